"""`swarm publish`: what its words ask for, what it refuses before it enters a network, how far an adapter has come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import swarm
from blocks.spans import Span
from peers.published.catalogue import Published
from swarm.adapters import commands
from swarm.adapters.publishing import check_new_name
from swarm.adapters.spreading import spread_of
from swarm.cli.main import main
from swarm.errors import BadConfig
from swarm.options import PublishOptions, Screen
from tests.fakes import fake_peer_id, peer_record
from tests.unit.errors_made.entering import SPEC, new_run

PIRATE = Published(name="pirate", content=b"p" * 32, num_bytes=1000)


def call(*words: str) -> Result:
    return CliRunner().invoke(main, ["publish", *words])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "adapter").mkdir()
    return new_run(tmp_path / "tales")


def test_words_become_options(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PublishOptions] = []

    def keep(options: PublishOptions, screen: Screen) -> None:
        asked.append(options)

    monkeypatch.setattr(commands, "run_publish", keep)
    adapter = run.parent / "adapter"
    for words in (
        (str(adapter), "--name", "pirate", "--wait", "7"),
        ("--withdraw", "pirate"),
        ("--list",),
    ):
        assert call(str(run), *words).exit_code == 0
    found = [(each.directory, each.name, each.withdraw, each.wait_seconds) for each in asked]
    assert found == [(adapter, "pirate", None, 7.0), (None, None, "pirate", 300.0), (None, None, None, 300.0)]


@pytest.mark.parametrize(
    "words", [(), ("--name", "x"), ("ADAPTER",), ("ADAPTER", "--name", "x", "--list"), ("--list", "--withdraw", "x")]
)
def test_words_that_do_not_go_together_are_refused(run: Path, words: tuple[str, ...]) -> None:
    done = call(str(run), *(str(run.parent / "adapter") if word == "ADAPTER" else word for word in words))
    assert done.exit_code == 2
    assert "Give ADAPTER and --name NAME, or --withdraw NAME, or --list." in done.output


def test_nothing_is_entered_for_what_cannot_be_published(run: Path) -> None:
    adapter = str(run.parent / "adapter")
    named = call(str(run), adapter, "--name", "Pirate")
    assert named.exit_code == 1
    assert "cannot name a published adapter" in named.output
    (run / "owner.key").unlink()
    for words in ((adapter, "--name", "pirate"), ("--withdraw", "pirate"), ("--list",)):
        refused = call(str(run), *words)
        assert refused.exit_code == 1
        assert "only the run's owner can publish" in refused.output


@pytest.mark.parametrize("name", ["tales", "smollm2-135m", "default", "-x", "x" * 49, "a/b", ""])
def test_names_of_the_run_and_its_model_and_what_is_no_name_are_refused(name: str) -> None:
    spec = replace(SPEC, model=replace(SPEC.model, name="HuggingFaceTB/SmolLM2-135M"))
    check_new_name("smollm2", spec)
    with pytest.raises(BadConfig):
        check_new_name(name, spec)


def test_from_python_arguments_are_refused_by_name(run: Path) -> None:
    with pytest.raises(BadConfig, match="name"):
        swarm.publish(run, run, name=5)  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match="wait_seconds"):
        swarm.publish(run, run, name="pirate", wait_seconds=float("nan"))
    with pytest.raises(BadConfig, match="config"):
        swarm.publish(run, run, name="pirate", config=3)  # type: ignore[arg-type]


def test_how_far_an_adapter_has_come_is_counted_over_live_hosts_and_blocks() -> None:
    front, back, late = (
        replace(peer_record(fake_peer_id(name), span), nickname=name)
        for name, span in (("front", Span(0, 3)), ("back", Span(3, 6)), ("late", Span(0, 6)))
    )
    publisher = replace(peer_record(fake_peer_id("owner"), Span(0, 6)), roles=(), adapters=(PIRATE.mark,))
    has = replace(front, adapters=(PIRATE.mark,))
    spread = spread_of([has, back, publisher], PIRATE, 6)
    assert (spread.fewest, spread.is_whole) == (0, False), "who publishes serves nobody"
    assert spread.words() == "1 of 2 hosts serve it, and some blocks have no host that does; not yet: back (3:6)"
    both = [has, replace(back, adapters=(PIRATE.mark,))]
    assert spread_of(both, PIRATE, 6).is_whole
    spread = spread_of([*both, late], PIRATE, 6)
    assert (spread.fewest, spread.is_whole) == (1, False)
    assert spread.words() == "2 of 3 hosts serve it; not yet: late (0:6)"
    assert spread_of([*both, late], PIRATE, 6, lambda peer: peer != late.peer).is_whole, "who is gone is not waited for"
    assert not spread_of([], PIRATE, 6).is_whole
