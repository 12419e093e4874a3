"""Peers behind NAT for real: processes in network namespaces of their own, which nobody can dial."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.checkpoint import DIRECTORY, checkpoint_files
from swarm.errors import BadCheckpoint
from swarm.join_string import parse_join
from swarm.unit_files import read_units
from tests.integration.cli.conftest import SECONDS, Home
from tests.integration.swarm.small_swarm import until
from tests.namespaces import PUBLIC, Namespaces, why_not


@pytest.fixture(scope="module")
def namespaces() -> Iterator[Namespaces]:
    if reason := why_not():
        pytest.skip(reason)
    with Namespaces("ann", "bob") as found:
        yield found


def averaged(state: Path) -> set[tuple[str, int, bytes]]:
    """Each unit as one peer has written it down after a round: name, round, digest."""
    found = set()
    for path in checkpoint_files(state / DIRECTORY):
        try:
            units = read_units(path).units.values()
        except (BadCheckpoint, OSError):  # it was replaced by a newer one while it was read
            continue
        found |= {(str(unit.unit), unit.round, unit.digest) for unit in units if unit.round > 0}
    return found


def test_trainers_that_nobody_can_dial_train_average_and_generate(namespaces: Namespaces, home: Home) -> None:
    run = home.init(
        f"nat-{len(home.started)}",  # another one where this is tried again
        **{"lora_rank": "4", "batch_size": "4", "sequence_length": "32", "compute_dtype": "fp32"},
        round_samples="64",
    )
    here = ("--host", PUBLIC, "--threads", "1")
    public = home.start("join", f"{run}/", "--blocks", "3:6", *here, inside=namespaces.inside("public"))
    join = public.line()
    assert parse_join(join).peers[0].startswith(f"/ip4/{PUBLIC}/")
    trainers = {}
    for seed, name in enumerate(("ann", "bob")):
        rows = [" ".join(f"w{3 + (start * (seed + 1) + step) % 120}" for step in range(24)) for start in range(40)]
        data = run / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        trainers[name] = home.start(
            *("train", join, "--data", str(data), "--blocks", "0:3", "--behind-nat"),
            *("--state", str(run / name), "--threads", "1"),
            inside=namespaces.inside(name),
        )

    def common() -> set[tuple[str, int, bytes]]:
        for trainer in trainers.values():
            assert trainer.popen.poll() is None, trainer.errors()
        return averaged(run / "ann") & averaged(run / "bob")

    # Nobody else holds these blocks, so that equal bits after a round can only come from a round of the two.
    until(lambda: len({unit for unit, _, _ in common()}) == 3, "a round in which both have the same bits", seconds=240)
    for name in trainers:
        assert not namespaces.listening(name), "a peer behind NAT listens nowhere"
    assert namespaces.listening("public")

    for trainer in trainers.values():
        trainer.send(signal.SIGTERM)
        assert "Traceback" not in trainer.errors()

    # A host that others can dial takes their blocks, with what they have learnt; then texts go through public hosts.
    second = home.start("join", join, "--blocks", "0:3", *here, inside=namespaces.inside("public"))
    second.line()
    text = home.start(
        *("generate", join, "w3 w4 w5", "--max-tokens", "4", "--threads", "1"), inside=namespaces.inside("bob")
    )
    assert text.popen.wait(3 * SECONDS) == 0, text.errors()
    assert text.line().strip()
