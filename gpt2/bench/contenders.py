"""The programs whose training step is measured: this project, and others from the user's own copies of them.

Each becomes a `Contender`: its own network, its own optimizer, its own attention and loss, compiled and under
autocast where that is its best. What surrounds them is the same for all: the batches, accumulation, clipping and
the learning rate's schedule.
"""

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2.config import Config, OptimConfig
from gpt2.distributed import Distributed
from gpt2.errors import RequestError
from gpt2.model import GPT
from gpt2.training.loop import accumulate_gradients, set_numerics, to_device
from gpt2.training.optim import build_optimizers
from gpt2.training.parallel import TrainingNetwork

OURS = "build-gpt2"
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """A program ready to train: what a training step needs of it."""

    model: nn.Module
    gradients: Callable[[np.ndarray, np.ndarray], Tensor]
    """(windows, T) int64 ids and targets -> the mean loss; adds its gradients to the parameters."""
    optimizers: list[torch.optim.Optimizer]
    setting: dict[str, Any]
    """What was chosen as its best, in words for the report."""


def build(name: str, path: str, config: Config, accumulation: int, device: torch.device) -> Contender:
    """The program of that name, with fresh weights on the device.

    path: the user's copy of it; empty where it is an installed package. Raises RequestError where it is not there.
    """
    torch.manual_seed(config.train.seed)
    if name == OURS:
        return _ours(config, accumulation, device)
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    if name not in PEERS:
        raise RequestError(f"there is no {name!r} to compare with: known are {', '.join(PEERS)}")
    if path and not Path(path).is_dir():
        raise RequestError(f"{name}: there is no directory {path}: give the folder of your own copy")
    if not path and name in NEEDS_PATH:
        raise RequestError(f"{name} is no package: give the folder of your own copy, --against {name}=PATH")
    try:
        return PEERS[name](path, config, accumulation, device)
    except ImportError as error:
        raise RequestError(f"{name} cannot be imported ({error}): pip install {name}, or give {name}=PATH") from error


def _ours(config: Config, accumulation: int, device: torch.device) -> Contender:
    """This project, by the functions that `gpt2 train` runs."""
    set_numerics(config, device)
    distributed = Distributed(rank=0, world_size=1, device=device)
    model = GPT(config.model).train()
    network = TrainingNetwork(model, config, distributed)
    optimizers = build_optimizers(model, config.optim)
    setting = {
        "precision": config.train.precision,
        "compile": config.train.compile,
        "fused_adamw": config.optim.fused,
        "attention": config.model.attention,
        "fused_loss": config.model.fused_loss,
        "padded_vocabulary": config.model.padded_vocab_size,
    }

    def gradients(x: np.ndarray, y: np.ndarray) -> Tensor:
        loss = accumulate_gradients(network, x, y, accumulation, distributed)
        assert loss is not None  # None where a signal stops the step, and none is given here
        return loss

    return Contender(model, gradients, optimizers, setting)


def _peer(
    model: nn.Module,
    loss_of: LossFunction,
    optimizer: torch.optim.Optimizer,
    config: Config,
    accumulation: int,
    device: torch.device,
    **setting: Any,
) -> Contender:
    """Another program's network and optimizer, under the config's precision, compiled as the config says."""
    model.train()
    function = torch.compile(loss_of, dynamic=False) if config.train.compile else loss_of
    bf16 = config.train.precision == "bf16"

    def gradients(x: np.ndarray, y: np.ndarray) -> Tensor:
        total = torch.zeros((), device=device)
        inputs, targets = torch.from_numpy(x).chunk(accumulation), torch.from_numpy(y).chunk(accumulation)
        for idx, target in zip(inputs, targets, strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = function(to_device(idx, device), to_device(target, device)) / accumulation
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    return Contender(
        model,
        gradients,
        [optimizer],
        {"precision": config.train.precision, "compile": config.train.compile, **setting},
    )


def _nanogpt(path: str, config: Config, accumulation: int, device: torch.device) -> Contender:
    """model.py of a nanoGPT checkout: its GPT and its configure_optimizers."""
    source = load_source(Path(path, "model.py"), "nanogpt_model")
    shape = config.model
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.n_ctx}
    padded = -(-shape.vocab_size // 64) * 64  # 50304 for GPT-2, its own default
    model = source.GPT(source.GPTConfig(vocab_size=padded, dropout=shape.dropout, bias=True, **sizes)).to(device)
    optim = config.optim
    optimizer = model.configure_optimizers(optim.weight_decay, optim.lr, (optim.beta1, optim.beta2), device.type)
    return _peer(
        model,
        lambda idx, targets: model(idx, targets)[1],
        optimizer,
        config,
        accumulation,
        device,
        fused_adamw=bool(optimizer.defaults.get("fused")),
        attention="scaled_dot_product_attention",
        padded_vocabulary=padded,
    )


def _build_nanogpt(path: str, config: Config, accumulation: int, device: torch.device) -> Contender:
    """The classes of a build-nanogpt checkout's train_gpt2.py; importing that file whole would start its training."""
    source = load_source(Path(path, "train_gpt2.py"), "build_nanogpt_train", classes_only=True)
    source.__dict__["master_process"] = False  # a global of its script, read by configure_optimizers
    shape = config.model
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.n_ctx}
    padded = -(-shape.vocab_size // 64) * 64
    model = source.GPT(source.GPTConfig(vocab_size=padded, **sizes)).to(device)
    optimizer = model.configure_optimizers(config.optim.weight_decay, config.optim.lr, device.type)
    return _peer(
        model,
        lambda idx, targets: model(idx, targets)[1],
        optimizer,
        config,
        accumulation,
        device,
        fused_adamw=bool(optimizer.defaults.get("fused")),
        attention="scaled_dot_product_attention",
        padded_vocabulary=padded,
    )


def _transformers(path: str, config: Config, accumulation: int, device: torch.device) -> Contender:
    """GPT2LMHeadModel of Hugging Face's transformers, with torch's fused AdamW, its trainer's default."""
    _prefer(path)
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = config.model
    hf_config = GPT2Config(
        vocab_size=-(-shape.vocab_size // 64) * 64,
        n_positions=shape.n_ctx,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        use_cache=False,
    )
    hf_config._attn_implementation = "sdpa"
    model = GPT2LMHeadModel(hf_config).to(device)  # type: ignore[arg-type]

    def loss_of(idx: Tensor, targets: Tensor) -> Tensor:
        # The targets are shifted already: its own loss would shift them once more.
        logits = model(idx).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return _peer(
        model,
        loss_of,
        build_optimizers(model, _fused(config))[0],
        config,
        accumulation,
        device,
        fused_adamw=True,
        attention="sdpa",
        padded_vocabulary=hf_config.vocab_size,
    )


def _litgpt(path: str, config: Config, accumulation: int, device: torch.device) -> Contender:
    """litgpt has no learned positions, so no GPT-2: its nearest of equal shapes, rotary over a quarter of a head."""
    _prefer(path)
    import litgpt

    shape = config.model
    model = litgpt.GPT(
        litgpt.Config(
            block_size=shape.n_ctx,
            vocab_size=shape.vocab_size,
            padding_multiple=128,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_embd=shape.n_embd,
            bias=True,
            attn_bias=True,
            parallel_residual=False,
            mlp_class_name="GptNeoxMLP",
            gelu_approximate="tanh",
        )
    ).to(device)
    model.lm_head.weight = model.transformer.wte.weight
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, 0.0, 0.02)

    def loss_of(idx: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(idx).flatten(0, 1).float(), targets.flatten())

    return _peer(
        model,
        loss_of,
        build_optimizers(model, _fused(config))[0],
        config,
        accumulation,
        device,
        fused_adamw=True,
        attention="scaled_dot_product_attention",
        padded_vocabulary=model.config.padded_vocab_size,
        network="rotary positions instead of learned ones, embeddings tied; all other shapes are GPT-2's",
    )


PEERS: dict[str, Callable[[str, Config, int, torch.device], Contender]] = {
    "nanogpt": _nanogpt,
    "build-nanogpt": _build_nanogpt,
    "transformers": _transformers,
    "litgpt": _litgpt,
}
NEEDS_PATH = ("nanogpt", "build-nanogpt")


def _fused(config: Config) -> OptimConfig:
    """The optimizer's options with torch's fused kernel, which build_optimizers then chooses for any module."""
    return replace(config.optim, optimizer="adamw", fused=True)


def _prefer(path: str) -> None:
    """A package's folder, if one was given, before the installed ones."""
    if path:
        sys.path.insert(0, path)


def load_source(file: Path, name: str, classes_only: bool = False) -> ModuleType:
    """A module of the user's own copy, run from its file.

    classes_only: nothing of it but classes and the imports of torch and the standard library, which suffices where the
    rest of the file is a script. Raises RequestError where the file is not there or is no Python.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{file} cannot be read as Python ({error}): give the folder of your own copy") from error
    if classes_only:
        tree.body = [node for node in tree.body if _is_class_or_known_import(node)]
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses and the compiler look a class's module up there
    try:
        exec(compile(tree, str(file), "exec"), module.__dict__)
    except ImportError:
        raise
    except Exception as error:
        raise RequestError(f"{file} cannot be run ({type(error).__name__}: {error})") from error
    missing = [wanted for wanted in ("GPT", "GPTConfig") if not hasattr(module, wanted)]
    if missing:
        raise RequestError(f"{file} has no {' and no '.join(missing)}: give the folder of your own copy")
    return module


def _is_class_or_known_import(node: ast.stmt) -> bool:
    """Imports of other packages are left out, name by name: the node is cut to what is known."""
    known = {"torch", *sys.stdlib_module_names}
    if isinstance(node, ast.Import):
        node.names = [alias for alias in node.names if alias.name.split(".")[0] in known]
        return bool(node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in known
    return isinstance(node, ast.ClassDef)
