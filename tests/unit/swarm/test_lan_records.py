"""What a stranger says by mDNS is read or left out, and a name is one run or none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import SwarmError
from swarm.join_string import Join, format_join
from swarm.lan.records import (
    MOST_PEERS,
    BadLan,
    LanPeer,
    addresses_of,
    check_group,
    choose_join,
    fitting_addresses,
    format_answer,
    parse_answer,
    parse_peers_file,
    parse_texts,
)
from swarm.run import RunId

RUN, OTHER = RunId("0123456789abcdef" * 2), RunId("f" * 32)
ANN = "/ip4/10.0.0.5/tcp/31330/p2p/12D3KooWAnn11111"
BOB = "/ip4/10.0.0.6/tcp/31330/p2p/12D3KooWBob11111"
PEER = LanPeer(group="lab", run=RUN, run_name="tales", addresses=(ANN, BOB))


def texts(peer: LanPeer = PEER, **changed: str) -> dict[bytes, bytes | None]:
    plain = peer.to_texts() | changed
    return {key.encode(): value.encode() for key, value in plain.items()}


def test_what_a_peer_says_is_read_as_it_was_said() -> None:
    assert parse_texts(texts()) == PEER
    assert all(len(key) + len(value or b"") < 255 for key, value in texts().items())


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"v": "2"}, "version '2'"),
        ({"run": "xyz"}, "names no run"),
        ({"name": "a b"}, "not a run's name"),
        ({"name": "<script>"}, "not a run's name"),
        ({"a0": "http://evil"}, "not a peer's address"),
        ({"group": "../lab"}, "cannot name a group"),
        ({"group": "ö"}, "not plain text"),
        ({"more": "x" * 5000}, "far too long"),
    ],
)
def test_anything_else_is_refused_with_a_reason(changed: dict[str, str], word: str) -> None:
    with pytest.raises(BadLan, match=word):
        parse_texts(texts(**changed))


@given(st.dictionaries(st.binary(max_size=20), st.none() | st.binary(max_size=300), max_size=20))
def test_any_bytes_are_refused_and_nothing_else_happens(found: dict[bytes, bytes | None]) -> None:
    with pytest.raises(SwarmError):
        parse_texts(found)


def test_a_group_is_one_run_with_all_its_peers() -> None:
    more = LanPeer(group="lab", run=RUN, run_name="tales", addresses=(BOB,))
    strange = LanPeer(group="other", run=OTHER, run_name="x", addresses=(ANN,))
    assert choose_join("lab", [PEER, strange, more]) == Join(run_id=RUN, run_name="tales", peers=(ANN, BOB))
    assert addresses_of([PEER, strange, more], OTHER) == (ANN,)


def test_two_runs_of_one_name_are_not_mixed() -> None:
    with pytest.raises(BadLan, match=f"2 runs on this network.*{OTHER} at {BOB}"):
        choose_join("lab", [PEER, LanPeer(group="lab", run=OTHER, run_name="tales", addresses=(BOB,))])


def test_nobody_there_says_what_to_do() -> None:
    with pytest.raises(BadLan, match=r"nobody .* answers for 'lab'.*--lan lab.*--peers-file"):
        choose_join("lab", [])


def test_an_answer_by_stream_is_read_or_refused() -> None:
    assert parse_answer("lab", format_answer(RUN, "tales"), ANN) == LanPeer(
        group="lab", run=RUN, run_name="tales", addresses=(ANN,)
    )
    for answer in (b"", b"\xff\xfe", b"tales", RUN.encode(), f"{RUN} a b".encode()):
        with pytest.raises(BadLan, match=r"10\.0\.0\.5"):
            parse_answer("lab", answer, ANN)


def test_only_addresses_that_others_can_use_are_told() -> None:
    local = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWAnn11111"
    six = "/ip6/fd00::1/tcp/1/p2p/12D3KooWAnn11111"
    name = "/dns4/a.example/tcp/1/p2p/12D3KooWAnn11111"
    assert fitting_addresses([local, six, name, ANN], loopback=False) == (ANN,)
    assert fitting_addresses([local, six, name, ANN], loopback=True) == (local,)


def test_a_peers_file_has_addresses_join_strings_and_comments() -> None:
    join = format_join(Join(run_id=RUN, run_name="tales", peers=(BOB,)))
    assert parse_peers_file(f"# ours\n{ANN}  # ann\n\n{join}\n{ANN}\n", "f") == (ANN, BOB)
    with pytest.raises(BadLan, match="f, line 2: 'nonsense' is not a peer's address"):
        parse_peers_file(f"{ANN}\nnonsense", "f")
    with pytest.raises(BadLan, match=f"more than {MOST_PEERS}"):
        parse_peers_file(f"{ANN}\n" * (MOST_PEERS + 1), "f")


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "x" * 41])
def test_a_group_needs_a_plain_name(name: str) -> None:
    with pytest.raises(BadLan, match="cannot name a group"):
        check_group(name)
