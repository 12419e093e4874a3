"""The form in which activations travel holds on every link of a chain, those between hosts as well."""

from __future__ import annotations

import torch

from blocks.source import ModelSource
from blocks.spans import Span
from peers.chains.decode_chain import DecodeSession
from peers.chains.decode_legs import SessionConfig
from peers.chains.history import StepInput
from peers.network import PeerId
from peers.streams.wire_format import WireFormat
from tests.unit.peers.chain_swarm import KnownRouter, chain_swarm

CHAIN = {"a": Span(0, 3), "b": Span(3, 6)}
TOKENS = 100
HIDDEN_BTD = torch.randn(1, TOKENS, 64, generator=torch.Generator().manual_seed(3))
BYTES_PER_TOKEN = {WireFormat.FP32: 256, WireFormat.BF16: 128, WireFormat.EIGHT_BIT: 68}


async def test_every_link_carries_the_form_that_the_client_chose(source: ModelSource) -> None:
    outputs: dict[WireFormat, torch.Tensor] = {}
    for wire, each in BYTES_PER_TOKEN.items():
        async with chain_swarm(source, CHAIN) as swarm:
            config = SessionConfig(batch=1, max_length=TOKENS, wire=wire, call_seconds=60.0)
            session = DecodeSession(swarm.client, KnownRouter(CHAIN), Span(0, 6), config)
            outputs[wire] = await session.step(StepInput(hidden_BTD=HIDDEN_BTD, position=0))
            await session.close()
            links = (
                swarm.sent_by_client("a", "step"),
                swarm.hosts["a"].traffic.by_peer[PeerId("b")]["step"].sent,
                swarm.traffic.by_peer[PeerId("b")]["collect"].received,
            )
        assert all(TOKENS * each < link < TOKENS * each + 500 for link in links), (wire, links)
    exact = outputs.pop(WireFormat.FP32)
    errors = {wire: float((output - exact).norm() / exact.norm()) for wire, output in outputs.items()}
    assert 0 < errors[WireFormat.BF16] < 0.01
    assert 0 < errors[WireFormat.EIGHT_BIT] < 0.03
