"""The device and the dtype of a peer, as a person, the run and the hardware decide."""

from __future__ import annotations

import pytest
import torch

from swarm.devices import pick_device, pick_dtype
from swarm.errors import BadConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize(
    ("asked", "run", "device", "expected"),
    [
        ("fp32", "bf16", CUDA, torch.float32),
        ("bf16", "fp32", CPU, torch.bfloat16),
        ("auto", "fp32", CUDA, torch.float32),
        ("auto", "bf16", CPU, torch.bfloat16),
        ("auto", "auto", CUDA, torch.bfloat16),
        ("auto", "auto", CPU, None),
    ],
)
def test_a_peers_own_word_goes_before_the_runs_and_the_runs_before_the_hardware(
    asked: str,
    run: str,
    device: torch.device,
    expected: torch.dtype | None,
    has_bf16: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    by_hardware = torch.bfloat16 if has_bf16 else torch.float32
    assert pick_dtype(asked, run, device) == (expected or by_hardware)


@pytest.mark.parametrize(
    ("name", "has_cuda", "expected"), [("auto", True, CUDA), ("auto", False, CPU), ("cpu", True, CPU)]
)
def test_auto_takes_cuda_where_there_is_some(
    name: str, has_cuda: bool, expected: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert pick_device(name) == expected


def test_cuda_that_is_not_there_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadConfig, match="use --device cpu"):
        pick_device("cuda")
