"""The programs whose decoding is measured: this project, and others from the user's own environment.

Each opens its own form of the same weights and becomes a `Contender`: token ids in, greedily chosen token ids out,
the same number for every prompt, whatever the tokens are (end-of-text ends nothing). Nothing here imports torch by
itself: what a process holds and how soon it answers are a program's own.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from gpt2.errors import RequestError

OURS = "build-gpt2"
Ids = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Shape:
    """What a contender is opened for."""

    batch: int
    """Sequences at once."""
    context: int
    """Tokens of a sequence at most, prompt and completion together."""
    vocabulary: int
    threads: int
    device: str = "cpu"


class Contender(Protocol):
    """A program with its weights loaded."""

    setting: dict[str, Any]
    """What was chosen as its best, for the report."""

    def generate(self, prompts: Ids, tokens: int) -> list[list[int]]:
        """That many tokens after each prompt (all of one length), from nothing: no cache of an earlier call is used."""
        ...


@dataclass(frozen=True)
class Program:
    """How a program is had, fed and opened."""

    packages: dict[str, str]
    """Import name -> what pip calls it."""
    convert: Callable[[Path, Path], None] | None
    """(Hugging Face directory, an empty directory): writes its own form of the weights; None: it opens the former."""
    open: Callable[[Path, Path, Shape], Contender]
    """(that directory, the Hugging Face directory, what for) -> ready to generate."""
    devices: tuple[str, ...] = ("cpu",)

    @property
    def install(self) -> str:
        """The pip command for all of it."""
        return f"pip install {' '.join(dict.fromkeys(self.packages.values()))}"

    def missing(self) -> str:
        """Which of its packages are not installed, with the pip command; empty where none is missing."""
        gone = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed ({', '.join(gone)} cannot be imported): {self.install}" if gone else ""

    def versions(self) -> dict[str, str]:
        """Of those packages that are installed."""
        found = {}
        for name in dict.fromkeys(self.packages.values()):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found


def program(name: str) -> Program:
    """Raises RequestError for a name that is not known."""
    if name not in PROGRAMS:
        peers = [known for known in PROGRAMS if known != OURS]
        raise RequestError(f"there is no {name!r} to compare with: known are {', '.join(peers)}")
    return PROGRAMS[name]


def _quantize(model: Path, out: Path) -> None:
    """Our own form: int8."""
    from gpt2.inference.engine import load_network
    from gpt2.inference.quantize import is_quantized, quantize_model, write_quantized

    if not is_quantized(model):
        network, tokenizer = load_network(model, "cpu")
        write_quantized(quantize_model(network), out / "int8", tokenizer)


class _Ours:
    """This project's engine."""

    def __init__(self, converted: Path, model: Path, shape: Shape) -> None:
        import torch

        from gpt2.inference.engine import load

        torch.set_num_threads(shape.threads)
        quantised = converted / "int8"
        on_gpu = shape.device.startswith("cuda")
        weights = quantised if quantised.is_dir() else model
        self.engine = load(weights, shape.device, slots=shape.batch, compile=on_gpu)
        self.setting: dict[str, Any] = {"weights": "int8", "decoder": type(self.engine.decoder).__name__}
        if threads := getattr(self.engine.decoder, "threads", None):
            self.setting["threads"] = threads

    def generate(self, prompts: Ids, tokens: int) -> list[list[int]]:
        completions = [self.engine.submit(list(ids), tokens, temperature=0.0, until_eot=False) for ids in prompts]
        while self.engine.step():
            pass
        return [completion.tokens for completion in completions]


def _write_gguf(model: Path, out: Path) -> None:
    from gpt2.checkpoint.gguf import write_gguf
    from gpt2.inference.engine import load_network

    network, tokenizer = load_network(model, "cpu")
    write_gguf(out / "model.gguf", network.config, network.state_dict(), tokenizer, "gpt2", "q8_0")


class _LlamaCpp:
    """llama.cpp by its C interface, which takes several sequences in one call."""

    def __init__(self, converted: Path, model: Path, shape: Shape) -> None:
        import llama_cpp
        import numpy as np

        self.lib, self.np, self.vocabulary = llama_cpp, np, shape.vocabulary
        llama_cpp.llama_backend_init()
        file = str(converted / "model.gguf").encode()
        self.model = llama_cpp.llama_model_load_from_file(file, llama_cpp.llama_model_default_params())
        if self.model is None:
            raise RequestError(f"llama.cpp cannot open {converted / 'model.gguf'}")
        options = llama_cpp.llama_context_default_params()
        room = -(-shape.context // 256) * 256
        options.n_ctx = shape.batch * room
        options.n_batch = shape.batch * shape.context
        options.n_seq_max = shape.batch
        options.n_threads = options.n_threads_batch = shape.threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if self.context is None:
            raise RequestError("llama.cpp has no room for so many tokens: a smaller --batch fits")
        self.batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)
        self.setting = {"weights": "Q8_0", "cache": "float16"}

    def generate(self, prompts: Ids, tokens: int) -> list[list[int]]:
        lib = self.lib
        lib.llama_memory_clear(lib.llama_get_memory(self.context), False)
        given = [list(prompt) for prompt in prompts]
        chosen: list[list[int]] = [[] for _ in prompts]
        position = 0
        for _ in range(tokens):
            last = self._step(given, position)
            position += len(given[0])
            for ids, token in zip(chosen, last, strict=True):
                ids.append(token)
            given = [[token] for token in last]
        return chosen

    def _step(self, given: list[list[int]], position: int) -> list[int]:
        """New tokens of each sequence from that position on; gives the likeliest next of each."""
        batch, at = self.batch, 0
        ends = []
        for sequence, ids in enumerate(given):
            for i, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, position + i
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = i == len(ids) - 1
                at += 1
            ends.append(at - 1)
        batch.n_tokens = at
        code = self.lib.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")
        rows = (self.lib.llama_get_logits_ith(self.context, end) for end in ends)
        return [int(self.np.ctypeslib.as_array(row, (self.vocabulary,)).argmax()) for row in rows]


def _write_openvino(model: Path, out: Path) -> None:
    from gpt2.bench.graphs import write_openvino

    write_openvino(model, out)


class _OpenVino:
    """OpenVINO GenAI: the pipeline with paged attention, which serves one sequence faster than the plain one too."""

    def __init__(self, converted: Path, model: Path, shape: Shape) -> None:
        import numpy as np
        import openvino
        import openvino_genai as genai

        self.np, self.openvino = np, openvino
        schedule = genai.SchedulerConfig()
        schedule.max_num_seqs = shape.batch
        schedule.max_num_batched_tokens = max(256, shape.batch * shape.context)
        schedule.num_kv_blocks = shape.batch * (shape.context // 32 + 2)  # 32 tokens a block on a CPU
        schedule.enable_prefix_caching = False
        tokenizer = genai.Tokenizer(str(converted))
        self.pipeline = genai.ContinuousBatchingPipeline(
            str(converted), tokenizer, schedule, "CPU", INFERENCE_NUM_THREADS=shape.threads
        )
        self.options = genai.GenerationConfig()
        self.options.do_sample = False
        self.options.ignore_eos = True
        self.setting = {"weights": "int8, a scale a channel", "pipeline": "ContinuousBatchingPipeline"}

    def generate(self, prompts: Ids, tokens: int) -> list[list[int]]:
        self.options.max_new_tokens = tokens
        inputs = [self.openvino.Tensor(self.np.array([list(prompt)], dtype=self.np.int64)) for prompt in prompts]
        results = self.pipeline.generate(inputs, [self.options] * len(inputs))
        return [[int(token) for token in result.m_generation_ids[0]] for result in results]


def _write_ctranslate2(model: Path, out: Path) -> None:
    import ctranslate2

    converter = ctranslate2.converters.TransformersConverter(str(model))
    converter.convert(str(out), quantization="int8", force=True)  # into a directory that is there


class _CTranslate2:
    """CTranslate2's generator."""

    def __init__(self, converted: Path, model: Path, shape: Shape) -> None:
        import ctranslate2

        from gpt2.tokenizer import Tokenizer

        self.generator = ctranslate2.Generator(
            str(converted), device="cpu", compute_type="int8", inter_threads=1, intra_threads=shape.threads
        )
        tokenizer = Tokenizer.load(model)
        self.spelled, self.end = tokenizer.spelled, tokenizer.eot
        self.setting = {"weights": "int8", "compute_type": self.generator.compute_type}

    def generate(self, prompts: Ids, tokens: int) -> list[list[int]]:
        results = self.generator.generate_batch(
            [[self.spelled[token] for token in prompt] for prompt in prompts],
            max_length=tokens,
            min_length=tokens,  # until then end-of-text is not chosen
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[self.end],
        )
        return [list(result.sequences_ids[0]) for result in results]


def _write_onnx(model: Path, out: Path) -> None:
    from gpt2.bench.graphs import write_onnx

    write_onnx(model, out)


class _OnnxRuntime:
    """onnxruntime with its own attention operator over buffers that are written in place."""

    def __init__(self, converted: Path, model: Path, shape: Shape) -> None:
        import numpy as np
        import onnxruntime

        self.np = np
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = shape.threads
        options.inter_op_num_threads = 1
        file = str(converted / "model.onnx")
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        pasts = [given for given in self.session.get_inputs() if given.name.startswith("past_key_values")]
        self.cache = {}
        for given in pasts:
            buffer = np.zeros((shape.batch, given.shape[1], shape.context, given.shape[3]), dtype=np.float32)
            self.cache[given.name] = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
        self.setting = {"weights": "int8, dynamic quantisation a channel", "attention": "GroupQueryAttention"}

    def generate(self, prompts: Ids, tokens: int) -> list[list[int]]:
        np = self.np
        ids = np.array([list(prompt) for prompt in prompts], dtype=np.int64)  # (B, T)
        start, chosen = 0, []
        for _ in range(tokens):
            logits = self._step(ids, start)  # (B, 1, V)
            start += ids.shape[1]
            ids = logits.argmax(-1)
            chosen.append(ids)
        result: list[list[int]] = np.concatenate(chosen, axis=1).tolist()
        return result

    def _step(self, ids: Any, start: int) -> Any:
        from gpt2.bench.names import present_name

        np, stop = self.np, start + ids.shape[1]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("position_ids", np.arange(start, stop, dtype=np.int64)[None])
        binding.bind_cpu_input("seqlens_k", np.full(ids.shape[0], stop - 1, dtype=np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array([stop], dtype=np.int32))
        binding.bind_output("logits")
        for name, buffer in self.cache.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(present_name(name), buffer)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()


class _Transformers:
    """Hugging Face's own network and its generate()."""

    def __init__(self, converted: Path, model: Path, shape: Shape) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from gpt2.distributed import multiplies_bf16_fast

        torch.set_num_threads(shape.threads)
        device = torch.device(shape.device)
        kind = torch.bfloat16 if multiplies_bf16_fast(device) else torch.float32
        network: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=kind)
        self.network = network.eval().to(device)
        self.network.generation_config.eos_token_id = None
        self.setting = {"weights": str(kind).removeprefix("torch."), "attention": "sdpa"}

    def generate(self, prompts: Ids, tokens: int) -> list[list[int]]:
        import torch

        idx = torch.tensor([list(prompt) for prompt in prompts], device=self.network.device)  # (B, T)
        with torch.inference_mode():
            whole = self.network.generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        ids: list[list[int]] = whole[:, idx.size(1) :].tolist()
        return ids


def _open_compiled(converted: Path, model: Path, shape: Shape) -> Contender:
    from gpt2.bench.compiled import Compiled

    return Compiled(model, shape)


PROGRAMS: dict[str, Program] = {
    OURS: Program({"torch": "torch"}, _quantize, _Ours, ("cpu", "cuda")),
    "llama.cpp": Program({"llama_cpp": "llama-cpp-python", "gguf": "gguf"}, _write_gguf, _LlamaCpp),
    "openvino": Program(
        {
            "openvino": "openvino",
            "openvino_genai": "openvino-genai",
            "openvino_tokenizers": "openvino-tokenizers",
            "nncf": "nncf",
            "transformers": "transformers",
        },
        _write_openvino,
        _OpenVino,
    ),
    "ctranslate2": Program(
        {"ctranslate2": "ctranslate2", "transformers": "transformers"}, _write_ctranslate2, _CTranslate2
    ),
    "onnxruntime": Program({"onnxruntime": "onnxruntime", "onnx": "onnx"}, _write_onnx, _OnnxRuntime),
    "transformers": Program({"transformers": "transformers"}, None, _Transformers, ("cpu", "cuda")),
    "compiled": Program({"torch": "torch"}, None, _open_compiled, ("cpu", "cuda")),
}
