"""A lean import leaves out what nobody uses here, and takes nothing away from who does. In a process of its own."""

import json
import subprocess
import sys

import pytest

from blocks import lean

SCRIPT = """
import json, sys
from peers.hivemind_lean import import_hivemind
from blocks.lean import import_models, register_meta_kernels

import_hivemind()
import_models()
import blocks.load, blocks.adapters
left_out = ["torch._dynamo", "torch._refs", "torch.distributed.tensor", "sympy", "scipy.optimize", "scipy.linalg"]
told = {"early": [name for name in left_out if name in sys.modules]}

import torch
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
with torch.device("meta"):
    LlamaForCausalLM(config)
torch.Generator().manual_seed(1)
told["after a model"] = [name for name in left_out if name in sys.modules]

from blocks.training.optimizer import OptimizerConfig, UnitOptimizer
steps = UnitOptimizer({"a": torch.nn.Parameter(torch.ones(2))}, OptimizerConfig())
steps.step({"a": torch.ones(2)}, samples=0)
told["after a step"] = [name for name in left_out if name in sys.modules]

import hivemind.averaging.load_balancing as load_balancing
told["shares"] = sum(load_balancing.load_balance_peers(100, [1.0, 1.0]))
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([weight])  # imports torch's compiler, which needs the kernels that were left out
weight.grad = torch.ones(2)
optimizer.step()
import transformers.models.llama
told["put back"] = [
    torch._dynamo.__file__ is not None,
    torch.compiler.disable.__module__ == "torch.compiler",
    torch.distributed.is_available(),
    not register_meta_kernels(),
    hasattr(transformers.models, "llama"),
    bool(torch.nn.Parameter(torch.ones(1, device="meta")).is_meta),
]
print(json.dumps(told))
"""


def test_what_is_left_out_is_there_for_who_asks() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["early"] == told["after a model"] == told["after a step"] == []
    assert told["shares"] == 100
    assert told["put back"] == [True] * 6


def test_other_versions_are_imported_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lean.TESTED, "torch", "0.0.")
    before = list(sys.meta_path)
    lean.import_models()
    assert sys.meta_path == before
    assert not lean.register_meta_kernels()
