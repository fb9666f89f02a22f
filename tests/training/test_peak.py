"""The denominator of MFU."""

import pytest
import torch

from gpt2.training.peak import CARDS, card_peak, device_peak


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla T4", 65e12),
    ],
)
def test_known_cards(name: str, bf16: float) -> None:
    assert card_peak(name, "bf16") == bf16


def test_tf32_is_half_of_bf16_on_an_h100() -> None:
    assert card_peak("NVIDIA H100 80GB HBM3", "fp32") == 494e12


@pytest.mark.parametrize(
    ("name", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 494e12),
        ("NVIDIA A100-SXM4-80GB", 156e12),
        ("NVIDIA GeForce RTX 3090", 35.6e12),
        ("Tesla V100-SXM2-16GB", 15.7e12),
        ("Tesla T4", 8.1e12),
    ],
)
def test_float32_goes_by_tf32_where_the_card_has_it(name: str, fp32: float) -> None:
    assert card_peak(name, "fp32") == fp32


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000",  # no A100
        "NVIDIA T400 4GB",  # no T4
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a seventh of one
        "AMD Instinct MI300X",
        "",
    ],
)
def test_a_namesake_of_a_known_card_is_unknown(name: str) -> None:
    assert card_peak(name, "bf16") is None


def test_no_card_is_hidden_by_one_before_it() -> None:
    for card, (bf16, tf32) in CARDS.items():
        assert card_peak(f"NVIDIA {card}", "bf16") == bf16
        assert card_peak(f"NVIDIA {card} 80GB", "fp32") == tf32


def test_an_unknown_card_is_measured() -> None:
    assert card_peak("Voodoo 2", "bf16") is None
    assert device_peak(torch.device("cpu"), "fp32") > 1e9
