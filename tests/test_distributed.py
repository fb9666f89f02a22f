"""The one object that knows processes and devices: what is here is taken, what is not is one line."""

import dataclasses

import pytest
import torch

from gpt2.distributed import Distributed, find_device, multiplies_bf16_fast
from gpt2.errors import RequestError


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("world_size", [None, "1"])
def test_one_process_is_the_main_one(monkeypatch: pytest.MonkeyPatch, world_size: str | None) -> None:
    if world_size is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    alone = Distributed.from_environment("cpu")
    assert (alone.rank, alone.world_size, alone.device) == (0, 1, torch.device("cpu"))
    assert alone.is_main
    assert not dataclasses.replace(alone, rank=1).is_main


@pytest.mark.parametrize("world_size", ["many", "", "2.5"])
def test_an_environment_that_makes_no_sense_is_one_line(monkeypatch: pytest.MonkeyPatch, world_size: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(RequestError, match="must be whole numbers: start with torchrun"):
        Distributed.from_environment("cpu")


def test_several_processes_need_to_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RequestError, match="nothing says where the others are: use torchrun"):
        Distributed.from_environment("cpu")


def test_alone_every_collective_is_the_identity() -> None:
    alone = Distributed(rank=0, world_size=1, device=torch.device("cpu"))
    assert alone.sum([1.5, 2]) == alone.max([1.5, 2]) == [1.5, 2.0]
    tensor = torch.randn(3)
    assert torch.equal(alone.mean(tensor), tensor)
    assert alone.on_main(lambda: {"a": [1]}) == {"a": [1]}
    assert dict(alone.tensors_from_main({"a": tensor})) == {"a": tensor}


@pytest.mark.usefixtures("cpu_only")
def test_auto_is_the_best_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device() == torch.device("cuda")


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "xla", "meta", "gpu", "", "cuda:", "cuda:x", "cpu\n", "ü"])
def test_a_device_that_is_not_here_is_one_line_with_what_is(name: str) -> None:
    with pytest.raises(RequestError, match="is not here: use one of cpu, or auto") as error:
        find_device(name)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("cpu_only")
def test_there_is_one_cpu() -> None:
    assert find_device("cpu:0").type == "cpu"
    for name in ("cpu:1", "cpu:999"):
        with pytest.raises(RequestError, match=f"{name}' is not here"):
            find_device(name)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_is_counted() -> None:
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(RequestError, match="'cuda:2' is not here: this machine has 2 of type cuda"):
        find_device("cuda:2")


def test_bf16_is_fast_only_with_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for has in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert multiplies_bf16_fast(torch.device("cpu")) is has
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not multiplies_bf16_fast(torch.device("cuda"))  # emulation does not count
    assert not multiplies_bf16_fast(torch.device("mps"))
