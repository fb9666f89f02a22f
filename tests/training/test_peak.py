"""The denominator of MFU."""

import pytest
import torch

from gpt2.training.peak import card_peak, device_peak


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
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


def test_an_unknown_card_is_measured() -> None:
    assert card_peak("Voodoo 2", "bf16") is None
    assert device_peak(torch.device("cpu"), "fp32") > 1e9
