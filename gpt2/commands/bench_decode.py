"""gpt2 bench decode: generation beside other programs'."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from gpt2.commands.common import Json, Outcome, parse


@dataclass(frozen=True)
class BenchDecode:
    """Generation beside other programs': same weights, same token ids, greedy, in turn, each at its best setting.

    The other programs are those that are installed beside this one:

      llama.cpp     Q8_0                      pip install llama-cpp-python gguf
      openvino      int8                      pip install openvino openvino-genai openvino-tokenizers nncf transformers
      ctranslate2   int8                      pip install ctranslate2 transformers
      onnxruntime   int8                      pip install onnxruntime onnx
      transformers  bfloat16 where the processor or GPU multiplies it fast, else float32   pip install transformers
      compiled      plain torch, static cache, torch.compile with CUDA graphs, bfloat16 as above (part of this package)
    """

    model: tyro.conf.Positional[str]
    """Run, checkpoint, or Hugging Face GPT-2 directory or id, in float: each program quantises it in its own way."""
    batch: int = 1
    """Sequences at once, each with a prompt of its own."""
    prompt: int = 64
    """Tokens in a prompt."""
    tokens: int = 128
    """Tokens after it; 1: only the prompts' speed is measured."""
    against: tuple[str, ...] = ()
    """llama.cpp openvino ctranslate2 onnxruntime transformers compiled, or all."""
    threads: int = 0
    """Threads of each program; 0: one a core."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu) or a torch device."""
    rounds: int = 5
    """Turns of each program."""
    starts: int = 3
    """How often each program is started, which is timed to its first token."""
    minutes: float = 4.0
    """Budget: no round of turns starts that would not fit into it."""
    work: Path | None = None
    """Directory for the other programs' forms of the weights, used again the next time; without it a temporary one."""
    json: Json = False
    """Print one JSON object as the last line."""


def main(argv: Sequence[str]) -> Outcome:
    """gpt2 bench decode"""
    args = parse(BenchDecode, argv, "bench decode")
    from gpt2.bench import decoding

    result = decoding.bench_decoding(
        args.model,
        decoding.Case(args.batch, args.prompt, args.tokens, args.starts),
        args.against,
        args.threads,
        args.device,
        args.rounds,
        args.minutes,
        args.work,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    decoding.print_table(result)
    return Outcome(result, args.json)
