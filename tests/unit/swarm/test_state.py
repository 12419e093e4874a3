"""Two peers never share a state directory, and a peer that comes back finds its own."""

from pathlib import Path

import pytest

from swarm.errors import BadConfig
from swarm.run import RunId
from swarm.state import claim_state, lock_state

RUN = RunId("ab" * 16)


def test_peers_started_together_get_directories_of_their_own(tmp_path: Path) -> None:
    with claim_state(tmp_path, RUN) as first, claim_state(tmp_path, RUN) as second:
        assert [first.path.name, second.path.name] == ["peer-0", "peer-1"]


def test_a_peer_that_comes_back_finds_its_state(tmp_path: Path) -> None:
    first = claim_state(tmp_path, RUN)
    with claim_state(tmp_path, RUN):
        (first.path / "kept").write_text("x")
        first.close()
        with claim_state(tmp_path, RUN) as again:
            assert again.path == first.path
            assert (again.path / "kept").exists()


def test_a_chosen_directory_in_use_is_refused(tmp_path: Path) -> None:
    with lock_state(tmp_path / "mine"), pytest.raises(BadConfig, match="in use"):
        lock_state(tmp_path / "mine")
    lock_state(tmp_path / "mine").close()


def test_a_place_that_cannot_hold_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="--state"):
        claim_state(tmp_path / "file", RUN)
