"""gpt2 export: a model in another program's format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from gpt2.commands.common import Json, Outcome, parse, say
from gpt2.errors import RequestError


@dataclass(frozen=True)
class Export:
    """A model in another program's format. (For transformers, vLLM and CTranslate2 a checkpoint is ready as it is.)"""

    model: tyro.conf.Positional[str]
    """Run, checkpoint, or Hugging Face GPT-2 directory or id."""
    out: Path
    """File to make."""
    format: Literal["gguf"] = "gguf"
    """gguf: one file for llama.cpp and what is built on it."""
    quant: Literal["f16", "q8_0"] = "f16"
    """Type of the matrices: f16, or q8_0 (8 bits and a scale for each 32 numbers)."""
    json: Json = False
    """Print one JSON object as the last line."""


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 export"""
    args = parse(Export, argv, "export")
    from gpt2.checkpoint.gguf import write_gguf
    from gpt2.inference.engine import load_network
    from gpt2.inference.quantize import is_quantized

    if is_quantized(Path(args.model)):
        raise RequestError(f"{args.model} is int8: export the float model it was made from (--quant q8_0 for 8 bits)")
    model, tokenizer = load_network(args.model, "cpu")
    name = Path(args.model).resolve().name if Path(args.model).exists() else args.model
    size = write_gguf(args.out, model.config, model.state_dict(), tokenizer, name, args.quant)
    say(f"{args.out}: {size:,} bytes, {args.quant}\nnext: llama-cli -m {args.out} -p TEXT -no-cnv")
    result = {"format": args.format, "quant": args.quant, "file": str(args.out), "bytes": size}
    return Outcome(result, args.json)
