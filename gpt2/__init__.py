"""The complete reproduction of GPT-2: raw text, tokens, training, evaluation, generation.

>>> from gpt2 import GPT, GPTConfig
>>> import gpt2; engine = gpt2.load("out/run"); engine.generate("Fellow citizens")

Names are loaded on first use, so that `import gpt2` costs nothing and starts nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2.config import GPTConfig
    from gpt2.inference.engine import load
    from gpt2.model import GPT

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "__version__", "load"]

_HOME = {"GPT": "gpt2.model", "GPTConfig": "gpt2.config", "load": "gpt2.inference.engine"}


def __getattr__(name: str) -> Any:
    """Imports a public name's module when the name is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'gpt2' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
