"""The int8 kernels: exact integers on every instruction path, clean under sanitizers, the same for any thread count."""

import gc
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2
from gpt2.config import GPTConfig
from gpt2.errors import WorkError
from gpt2.inference import native
from gpt2.inference.decoder import TorchDecoder
from gpt2.inference.native import NativeDecoder, integer_products
from gpt2.inference.quantize import quantize_model, write_quantized
from gpt2.model import GPT
from gpt2.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


def runs_here(path: str) -> bool:
    flags = Path("/proc/cpuinfo")
    known = flags.read_text(encoding="utf-8") if flags.exists() else ""
    wanted = {"avx512vnni": ("avx512_vnni", "avx512bw"), "avx2": ("avx2", "f16c", "fma")}.get(path, ())
    return all(f" {name} " in known.replace("\n", " ") for name in wanted)


PATHS = [
    pytest.param(path, marks=pytest.mark.skipif(not runs_here(path), reason=f"this processor has no {path}"))
    for path in native.PATHS
]


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 67), st.integers(1, 50), st.integers(1, 64), st.integers(0, 9), st.booleans())
def test_products_are_exact(path: str, n_in: int, n_out: int, rows: int, seed: int, extreme: bool) -> None:
    """Against int64, up to the limit that the kernels themselves state."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randint(-127, 128, (n_out, n_in), dtype=torch.int8, generator=random)
    if extreme:
        weights = weights.sign() * 127
    _, limit = integer_products(weights, torch.zeros(1, n_in, dtype=torch.int16), path)
    given_rows = torch.randint(-limit, limit + 1, (rows, n_in), dtype=torch.int16, generator=random)
    if extreme:
        given_rows = (given_rows.sign() * limit).to(torch.int16)
    sums, _ = integer_products(weights.contiguous(), given_rows, path)
    assert torch.equal(sums.long(), given_rows.long() @ weights.long().T)


@pytest.mark.parametrize("path", PATHS)
def test_the_largest_sum_fits(path: str) -> None:
    """As many inputs as GPT-2 XL's MLP has, all at their limits and of one sign."""
    weights = torch.full((3, 6400), 127, dtype=torch.int8)
    _, limit = integer_products(weights, torch.zeros(1, 6400, dtype=torch.int16), path)
    rows = torch.tensor([[limit] * 6400, [-limit] * 6400], dtype=torch.int16)
    sums, _ = integer_products(weights, rows, path)
    assert sums.tolist() == [[limit * 127 * 6400] * 3, [-limit * 127 * 6400] * 3]
    assert limit >= 2**11  # what is left of 16 bits for an activation, at the worst


def small(n_embd: int = 24, n_head: int = 2, tied: bool = True) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(61, n_ctx=40, n_layer=2, n_head=n_head, n_embd=n_embd, tie_embeddings=tied))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("n_embd", "n_head"), [(24, 2), (33, 3), (7, 1), (40, 1)])
def test_odd_sizes(path: str, n_embd: int, n_head: int) -> None:
    """Near the float network, to what int8 leaves; the paths differ by rounding alone."""
    model = small(n_embd, n_head, tied=n_embd % 2 == 0)
    ids = torch.randint(0, 61, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    steps = (ids, [0] * 30, range(30), range(30))
    logits = NativeDecoder(quantize_model(model), 1, 2, path).step(*steps)
    expected = TorchDecoder(model, 1).step(*steps)
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_any_number_of_threads_and_of_neighbours_gives_the_same_bits() -> None:
    weights = quantize_model(small())
    texts = torch.randint(0, 61, (16, 9), generator=torch.Generator().manual_seed(2)).tolist()
    alone = NativeDecoder(weights, 1, threads=1)
    expected = [alone.step(text, [0] * 9, range(9), [8])[0] for text in texts]
    for threads in range(1, 9):
        decoder = NativeDecoder(weights, 16, threads)
        for place in range(9):
            logits = decoder.step([text[place] for text in texts], range(16), [place] * 16, range(16))
        assert torch.equal(logits, torch.stack(expected)), threads


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident memory is read from /proc")
def test_memory_does_not_grow() -> None:
    """Over 100,000 tokens, with slots given back and taken again."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(17, n_ctx=100, n_layer=1, n_head=1, n_embd=8))
    decoder = NativeDecoder(quantize_model(model), 4, threads=1)

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096

    ids, slots = [3] * 100, [0] * 100
    sizes = []
    for i in range(1000):
        decoder.step(ids, slots, range(100), [99])
        if i % 10 == 0:
            decoder.copy_slot(0, 1 + i % 3)
            decoder.free_slot(1 + i % 3)
        if i % 100 == 99:
            sizes.append(resident())
    assert sizes[-1] - sizes[1] < 2**20


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    driver = Path(__file__).with_name("kernels_driver.cpp")
    command = ["g++", "-std=c++20", "-O1", "-g", "-march=native", "-pthread", f"-I{native.SOURCES}"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", str(driver), "-o", str(tmp_path / "run")]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find -lasan" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "run"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]


def test_a_library_is_built_once_and_whole(tmp_path: Path) -> None:
    first = native.build("native", tmp_path)
    stamp = first.stat().st_mtime_ns
    assert native.build("native", tmp_path) == first
    assert first.stat().st_mtime_ns == stamp
    assert [file.name for file in tmp_path.iterdir()] == [first.name]


def test_without_a_compiler_torch_does_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said once, in one line; nothing half-built is left."""
    tokenizer = Tokenizer.from_name("bytes")
    model = GPT(GPTConfig(257, n_ctx=16, n_layer=1, n_head=1, n_embd=8))
    write_quantized(quantize_model(model), tmp_path / "int8", tokenizer)
    kernels = gpt2.load(tmp_path / "int8")
    assert isinstance(kernels.decoder, NativeDecoder)
    native._library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for compiler, reason in (("/nonexistent/c++", "cannot be run"), ("false", "fails")):
        monkeypatch.setenv("CXX", compiler)
        with pytest.warns(UserWarning, match=f"kernels cannot be used, torch does the work.*{reason}") as seen:
            engine = gpt2.load(tmp_path / "int8")
        assert len(seen) == 1
        assert isinstance(engine.decoder, TorchDecoder)
    assert not list((tmp_path / "cache").rglob("*.so"))
    native._library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = engine.generate("ab", 8, temperature=0.0)
    assert text == kernels.generate("ab", 8, temperature=0.0)


def test_a_broken_source_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.cpp").write_text("int main( {", encoding="utf-8")
    monkeypatch.setattr(native, "SOURCES", tmp_path / "source")
    with pytest.raises(WorkError, match="the C\\+\\+ compiler fails") as error:
        native.build("portable", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").iterdir())
