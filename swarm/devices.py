"""Which device a peer computes on, and in which dtype."""

from __future__ import annotations

import torch

from swarm.errors import BadConfig

DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_device(name: str) -> torch.device:
    """The device that a person asked for; auto takes CUDA where there is some.

    Raises:
        BadConfig: CUDA was asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise BadConfig("--device cuda: torch finds no CUDA device; use --device cpu, or install a CUDA build of torch")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and has_cuda) else "cpu")


def pick_dtype(asked: str, run: str, device: torch.device) -> torch.dtype:
    """What a peer computes in: its own word, or else the run's, or else bf16 where the device has it in hardware.

    A CPU without bf16 instructions is many times slower in bf16 than in fp32.
    """
    name = asked if asked != "auto" else run
    if name == "auto":
        has_bf16 = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "bf16" if has_bf16 else "fp32"
    return DTYPES[name]
