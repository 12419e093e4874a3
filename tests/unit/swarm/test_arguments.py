"""What a script gives that cannot be meant is refused at once, with the name of the argument and what to use."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import swarm
from blocks.errors import BadSession, BadSpan
from peers.errors import BadNetworkConfig
from swarm.arguments import as_path, check_names
from swarm.errors import BadConfig, BadJoinString
from swarm.hosts.hours import parse_hours
from swarm.join_string import RunDirectory
from swarm.loop import LEFT, LoopThread
from swarm.model import RemoteBlocks, SwarmModel
from swarm.peer import Peer
from tests.errors_page import met
from tests.unit.errors_made.entering import LINE

HERE = Path("here")
ANY: Any = SGD([torch.zeros(1)])


def peer_config(**given: Any) -> swarm.PeerConfig:
    return swarm.PeerConfig(**{"state_root": HERE, "cache_dir": HERE, **given})


def hosting_config(**given: Any) -> swarm.HostingConfig:
    return swarm.HostingConfig(**{"cache_dir": HERE, **given})


def untouched_peer() -> Peer:
    """Refused before anything of it is used."""
    return object.__new__(Peer)


def of_each(make: Callable[..., object], **values: list[object]) -> list[tuple[Callable[..., object], str, object]]:
    return [(make, name, value) for name, listed in values.items() for value in listed]


CHECKED = [
    *of_each(
        swarm.Sampling,
        max_new_tokens=[0, -1, 1.5, "3", None, True],
        temperature=[-1, math.nan, math.inf, "x", None],
        top_p=[-0.1, 1.1, math.nan, "x"],
        seed=["x", 1.5, 2**65],
        num_beams=[0, -1, "x"],
    ),
    *of_each(swarm.Ending, last_round=[-1, "x", 1.5], seconds=[-1, math.nan, "x", None]),
    *of_each(
        peer_config,
        state_root=[None, "", 5],
        cache_dir=[None, "\0"],
        state=[5],
        network=[None, "x"],
        rules=[None, "x"],
        num_threads=[0, -1, "x"],
        model=[5],
        nickname=[5, None],
        route_seconds=[-1, math.nan, "x", None],
        call_seconds=[0, math.nan, "x"],
        wire=["fp8", 5, []],
        max_send=[0, -1, math.nan, None],
        lan=[5],
    ),
    *of_each(
        hosting_config,
        cache_dir=[None],
        span=["0:2", (0, 2)],
        device=["tpu", "", None],
        dtype=["fp8", 5],
        quantize=["int4", ""],
        cache_bytes=[0, math.nan, "4GB"],
        num_threads=[0, "x"],
        nickname=[5],
        model=[5],
        lora_rank=[-1, 1.5],
        max_blocks=[0, "x"],
        max_memory_bytes=[0, "4GB"],
        hours=[5],
        keep_bytes=[-1, "x"],
        resume=["directory", 5, (5,)],
    ),
    *of_each(lambda **given: swarm.init(**{"directory": "x", "base": "x", **given}), directory=[None, 5, ""]),
    *of_each(lambda **given: swarm.init(**{"directory": "x", "base": "x", **given}), base=[None, 5], model=["x"]),
    *of_each(lambda **given: swarm.join(LINE, **given), config=["x", {}]),
    *of_each(lambda **given: swarm.member(**{"optimizer": ANY, "run": LINE, **given}), model=[None, "x"]),
    *of_each(lambda **given: swarm.member(nn.Linear(1, 1), run=LINE, **given), optimizer=[None, "x"]),
    *of_each(lambda **given: swarm.attach(run=LINE, **given), trainer=[None, 5]),
    *of_each(lambda **given: untouched_peer().generate(**given), prompt=[None, 5, ["a"], b"x"]),
    *of_each(lambda **given: SwarmModel(ANY, ANY, ANY).generate(**given), prompt=[None, 5, [5], b"x", "\udcff"]),
    *of_each(
        lambda **given: SwarmModel(ANY, ANY, ANY).chat(**given),
        messages=[None, [], "x", [{}], [{"role": "user"}], [{"role": "user", "content": "\ud83d"}]],
    ),
    *of_each(lambda **given: untouched_peer().load([], **given), labels=[None, 5, [5], "spam"]),
    *of_each(lambda **given: untouched_peer().hold(config=None, **given), span=["0:2"]),
    *of_each(lambda **given: untouched_peer().hold(None, **given), config=[None, "x"]),
    *of_each(
        lambda **given: untouched_peer().wait_for_round(**{"number": 1, "seconds": 1.0, **given}), number=[-1, "x"]
    ),
    *of_each(lambda **given: untouched_peer().wait_for_round(1, **given), seconds=[-1, "x", math.nan]),
    *of_each(lambda **given: untouched_peer().watch(print, **given), seconds=[-1, "x"]),
    *of_each(lambda **given: Peer.enter(RunDirectory(path=HERE, join=None), **given), config=[None, "x"]),
]


@pytest.mark.parametrize(("make", "name", "value"), CHECKED)
def test_an_argument_that_cannot_be_meant_is_named(make: Callable[..., object], name: str, value: object) -> None:
    with pytest.raises(BadConfig, match=rf"^{name} is .*; use ") as caught:
        make(**{name: value})
    met("… is …; use …", caught.value)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        *of_each(swarm.RouteRules, allow=["Qm", 5], avoid=["Qm", None], pins=[5], keep_first=[-1, "x", 1.5]),
        *of_each(swarm.NetworkConfig, host=["localhost", None, 5, "999.1.1.1"], port=[-1, "80", 1.5, None]),
        *of_each(swarm.NetworkConfig, bootstrap=["/ip4/1.2.3.4/tcp/5", None, (5,)], announce=[(None,), "/ip4/1.2.3.4"]),
        *of_each(swarm.NetworkConfig, start_seconds=[0, "x", math.nan], dial_seconds=[-1], max_streams=[0, "x", 1.5]),
    ],
)
def test_so_is_one_of_the_network(make: Callable[..., object], name: str, value: object) -> None:
    with pytest.raises(BadNetworkConfig, match=rf"^(network|rules)\.{name} is .*; use "):
        make(**{name: value})


@pytest.mark.parametrize("ends", [("a", "b"), (0.5, 2), (None, 3), (2, 1), (-1, 1)])
def test_a_span_of_other_than_numbers_is_none(ends: Any) -> None:
    with pytest.raises(BadSpan) as caught:
        swarm.Span(*ends)
    met("is empty or out of range", caught.value)


@pytest.mark.parametrize("run", [None, 5, ["x"], b"x"])
def test_a_run_is_named_by_text_or_by_what_others_gave(run: Any) -> None:
    with pytest.raises(BadJoinString) as caught:
        swarm.join(run)
    met("names no run", caught.value)


@pytest.mark.parametrize("text", ["", " "])
def test_an_unset_name_of_a_run_is_not_this_directory(text: str) -> None:
    with pytest.raises(BadJoinString) as caught:
        swarm.join(text)
    met("is no join string, run directory or file", caught.value)


def test_text_is_taken_where_a_script_has_no_better_name_for_it() -> None:
    config = peer_config(state_root="a", state="~/b", wire="8bit")
    assert (config.state_root, config.state, config.wire) == (Path("a"), Path.home() / "b", "8bit")
    assert hosting_config(hours="22-07", resume=["a"]).hours == parse_hours("22-07")
    assert as_path("directory", "~nobody/x") == Path("~nobody/x")  # as a shell leaves it


def test_one_text_is_no_list_of_names() -> None:
    check_names("labels", ["spam", "ham"])
    with pytest.raises(BadConfig, match="labels is 'spam'; use a list of strings"):
        check_names("labels", "spam")


@pytest.mark.parametrize("given", [{"run": "bad"}, {"host": "localhost"}, {"config": "x"}, {"ending": 5}])
def test_a_callback_of_lightning_says_when_it_is_made_what_can_be_known_then(given: dict[str, Any]) -> None:
    pytest.importorskip("lightning")
    swarm.SwarmCallback(LINE, host="127.0.0.1")
    with pytest.raises((BadJoinString, BadConfig, BadNetworkConfig)):
        swarm.SwarmCallback(**{"run": LINE, **given})


def blocks_for(most: int, loop: LoopThread) -> RemoteBlocks:
    nothing: Any = SimpleNamespace()
    config: Any = SimpleNamespace(max_length=most)
    return RemoteBlocks(nothing, nothing, swarm.Span(0, 1), config, loop=loop.loop)  # type: ignore[arg-type]


def test_a_text_longer_than_the_model_takes_is_refused_before_a_host_is_asked() -> None:
    loop = LoopThread()
    with pytest.raises(BadSession) as caught:
        blocks_for(512, loop).prepare(length=500, max_new_tokens=13, adapter=True)
    met("this model takes … tokens", caught.value)
    loop.close()


def test_the_model_of_a_peer_that_has_left_says_so() -> None:
    loop = LoopThread()
    blocks = blocks_for(512, loop)
    loop.close()
    with pytest.raises(BadConfig, match=LEFT) as caught:
        blocks.prepare(length=1, max_new_tokens=1, adapter=True)
    met("has left its run; enter it again", caught.value)
    blocks.close()


def test_steps_of_a_loop_are_counts() -> None:
    member = object.__new__(swarm.Member)
    member._counter = SimpleNamespace(take=lambda: (1, 1))  # type: ignore[assignment]
    for given in ({"samples": -1}, {"tokens": "x"}):
        with pytest.raises(BadConfig, match=r"(samples|tokens) is .*; use a whole number of 0 or more"):
            member.step(**given)  # type: ignore[arg-type]
