"""Join strings survive people, and refuse with a reason what they broke."""

import base64
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from swarm.config import ModelSettings, RunSpec
from swarm.errors import BadJoinString
from swarm.join_string import (
    Join,
    Known,
    RunDirectory,
    _checksum,
    check_address,
    format_join,
    known_of,
    own_state,
    parse_join,
    resolve_join,
    save_join,
    target_run_id,
)
from swarm.run import RunId, public_bytes, run_id_of, save_run, sign_run

ADDRESS = "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWEhjTZkKK4DN2rbq2zMkLKrxjYPGGfXhQJ8KmWPzXHtXb"
JOIN = Join(
    run_id=RunId("ab" * 16), run_name="tales", peers=(ADDRESS, ADDRESS.replace("ip4/127.0.0.1", "dns4/host.org"))
)


def packed(value: object) -> str:
    payload = msgpack.packb(value)
    return "swarm1:" + base64.urlsafe_b64encode(payload + _checksum(payload)).decode().rstrip("=")


def test_a_join_string_comes_back_equal() -> None:
    assert parse_join(format_join(JOIN)) == JOIN


def test_spaces_line_breaks_and_quotes_of_a_paste_do_not_matter() -> None:
    text = format_join(JOIN)
    folded = "\n  ".join(text[start : start + 40] for start in range(0, len(text), 40))
    assert parse_join(f"  '{folded}'\r\n") == JOIN
    assert resolve_join(f"\n{folded}\n") == JOIN


def test_every_truncated_copy_is_noticed() -> None:
    text = format_join(JOIN)
    for length in range(len(text)):
        with pytest.raises(BadJoinString):
            parse_join(text[:length])


@given(st.integers(min_value=7), st.sampled_from("abcXYZ019-_"))
def test_a_mistyped_character_is_noticed(position: int, character: str) -> None:
    text = format_join(JOIN)
    position = 7 + position % (len(text) - 8)  # the last character has bits that do not count
    if text[position] == character:
        return
    with pytest.raises(BadJoinString):
        parse_join(text[:position] + character + text[position + 1 :])


@given(st.text(max_size=200))
def test_noise_is_refused(noise: str) -> None:
    with pytest.raises(BadJoinString):
        parse_join(noise)
    with pytest.raises(BadJoinString):
        parse_join("swarm1:" + noise)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"run": 1},
        ["ab" * 16, "tales", []],
        ["ab" * 16, "tales", [ADDRESS] * 9],
        ["ab" * 16, "tales", [1]],
        ["ab" * 16, "../tales", [ADDRESS]],
        ["zz", "tales", [ADDRESS]],
        ["ab" * 16, "tales", ["not an address"]],
        ["ab" * 16, "tales", ["/ip4/127.0.0.1/tcp/31330"]],
    ],
)
def test_a_well_formed_string_with_impossible_fields_is_refused(value: object) -> None:
    with pytest.raises(BadJoinString) as caught:
        parse_join(packed(value))
    assert "\n" not in str(caught.value)


def test_another_version_is_named() -> None:
    with pytest.raises(BadJoinString, match="version 2"):
        parse_join("swarm2:AAAA")


def test_a_run_directory_stands_for_its_run(tmp_path: Path) -> None:
    (tmp_path / "swarm.toml").write_text("")
    assert resolve_join(str(tmp_path)) == RunDirectory(path=tmp_path, join=None)
    save_join(tmp_path, JOIN)
    assert resolve_join(f"{tmp_path}/") == RunDirectory(path=tmp_path, join=JOIN)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["join.txt", "swarm.toml"]


def test_peers_that_an_older_join_string_named_are_kept_behind_the_newest(tmp_path: Path) -> None:
    places = ((1, "A"), (2, "B"), (3, "A"))
    ann, bob, moved = (f"/ip4/127.0.0.1/tcp/{port}/p2p/12D3KooW{name * 40}" for port, name in places)
    save_join(tmp_path, replace(JOIN, peers=(ann,)))
    save_join(tmp_path, replace(JOIN, peers=(bob,)))
    both = resolve_join(str(save_join(tmp_path, replace(JOIN, peers=(moved,)))))
    assert both == replace(JOIN, peers=(moved, bob)), "an older address of the same peer is of no use"
    other = replace(JOIN, run_id=RunId("cd" * 16), peers=(ann,))
    assert resolve_join(str(save_join(tmp_path, other))) == other
    (tmp_path / "join.txt").write_text("nonsense")
    assert resolve_join(str(save_join(tmp_path, JOIN))) == JOIN


def test_a_state_directory_stands_for_its_run_and_is_its_peers_own(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
    model = ModelSettings(name="org/m", fingerprint="ab" * 32, num_blocks=4)
    spec = RunSpec(name="tales", nonce="0f" * 16, model=model)
    state, run = tmp_path / "state", tmp_path / "run"
    for directory in (state, run):
        directory.mkdir()
    save_run(state, sign_run(spec, key))
    target = resolve_join(str(state))
    assert target == RunDirectory(path=state, join=None)
    assert target_run_id(target) == run_id_of(public_bytes(key), spec)
    assert known_of(target) == Known(run=target_run_id(target), blob=sign_run(spec, key), peers=())
    save_join(state, JOIN)
    assert known_of(resolve_join(str(state))).peers == JOIN.peers
    assert own_state(target) == state
    (run / "swarm.toml").write_text("")
    assert own_state(RunDirectory(path=run, join=None)) == run / "peer"


def test_a_file_may_hold_the_join_string(tmp_path: Path) -> None:
    assert resolve_join(str(save_join(tmp_path, JOIN))) == JOIN
    broken = tmp_path / "broken.txt"
    broken.write_text(format_join(JOIN)[:-9])
    with pytest.raises(BadJoinString, match=r"broken\.txt"):
        resolve_join(str(broken))


def test_nothing_of_the_kind_says_what_it_may_be(tmp_path: Path) -> None:
    with pytest.raises(BadJoinString, match="swarm init"):
        resolve_join("tales")
    with pytest.raises(BadJoinString, match=r"swarm\.toml"):
        resolve_join(str(tmp_path))
    with pytest.raises(BadJoinString):
        resolve_join("x" * 5000)
    with pytest.raises(BadJoinString):
        resolve_join("a\0b")


def test_an_address_without_a_peer_id_is_refused() -> None:
    assert check_address(ADDRESS) == ADDRESS
    with pytest.raises(BadJoinString, match="address"):
        check_address("127.0.0.1:31330")
