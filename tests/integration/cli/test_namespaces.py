"""Peers behind NAT for real: processes in network namespaces of their own, which nobody can dial."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.errors import BadCheckpoint
from swarm.join_string import parse_join
from swarm.units.checkpoint import DIRECTORY, checkpoint_files
from swarm.units.files import read_units
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
    for seed, name in enumerate(("ann", "bob")):
        rows = [" ".join(f"w{3 + (start * (seed + 1) + step) % 120}" for step in range(24)) for start in range(40)]
        (run / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    # Ann is a script over the API, which says a text at the end; bob is the command.
    end, words = run / "end", [join, str(run / "ann.jsonl"), str(run / "ann")]
    script = Path(__file__).with_name("trainer_behind_nat.py")
    ann = home.start(*words, str(end), inside=namespaces.inside("ann"), program=[str(script)])
    bob = home.start(
        *("train", join, "--data", str(run / "bob.jsonl"), "--blocks", "0:3", "--behind-nat"),
        *("--state", str(run / "bob"), "--threads", "1"),
        inside=namespaces.inside("bob"),
    )

    def common() -> set[tuple[str, int, bytes]]:
        for trainer in (ann, bob):
            assert trainer.popen.poll() is None, trainer.errors()
        return averaged(run / "ann") & averaged(run / "bob")

    # Nobody else holds these blocks, so that equal bits after a round can only come from a round of the two.
    until(lambda: len({unit for unit, _, _ in common()}) == 3, "a round in which both have the same bits", seconds=240)
    for name in ("ann", "bob"):
        assert not namespaces.listening(name), "a peer behind NAT listens nowhere"
    assert namespaces.listening("public")
    end.touch()
    assert ann.line().strip(), "through its own blocks, and those of the public host"
    assert ann.popen.wait(SECONDS) == 0, ann.errors()
    bob.send(signal.SIGTERM)
    for process in (public, ann, bob):
        assert "Traceback" not in process.errors()
