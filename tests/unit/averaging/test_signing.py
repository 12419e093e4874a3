"""Contributions and votes on the wire: what is honest comes through, all else is refused."""

from __future__ import annotations

import asyncio
import hashlib
import math
from dataclasses import dataclass, replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from averaging import ballot as ballots
from averaging import signing
from averaging.ballot import Ballot, Word, parse_word, word_of
from averaging.errors import BadContribution
from averaging.exchange import Brought, Contribution, UnitClass, Version, Vote
from blocks.spans import UnitId, unit_of
from peers.identity import Identity, load_or_create
from peers.network import PeerId


@dataclass(frozen=True)
class FakeSigner:
    """A signature is a hash over the key and the data; 256 bytes long, like RSA's."""

    peer: PeerId
    public_key: bytes = b"k" * 294

    def sign(self, data: bytes) -> bytes:
        return hashlib.sha256(self.peer.encode() + data).digest() * 8


def verify(peer: PeerId, public_key: bytes, data: bytes, signature: bytes) -> bool:
    return signature == FakeSigner(peer).sign(data)


ANN = FakeSigner(PeerId("ann"))


def bring(weights, **changes) -> Contribution:
    units = {
        unit: Brought(samples=weight, tokens=9 * weight, steps=2, version=version_of(unit))
        for unit, weight in weights.items()
    }
    base = Contribution(peer=ANN.peer, number=3, layout="l" * 32, units=units, megabits_per_second=12.5)
    return replace(base, **changes)


def version_of(unit: UnitId) -> Version:
    return Version(number=2, weight=7.5, digest=hashlib.sha256(unit.encode()).digest()[:8])


def parse(data: bytes, peer: str = "ann", run: str = "run") -> Contribution:
    return signing.parse(data, peer=PeerId(peer), run=run, verify=verify)


@given(
    st.dictionaries(
        st.builds(unit_of, st.sampled_from(["default", "other-1"]), st.integers(0, 90)),
        st.sampled_from([1.0, 2.0, 0.5]),
        max_size=60,
    ),
    st.booleans(),
    st.frozensets(st.sampled_from([PeerId("bob"), PeerId("eve")])),
)
def test_a_contribution_comes_back_as_it_was(weights, client_mode, distrusts):
    mine = bring(weights, client_mode=client_mode, distrusts=distrusts)
    assert parse(signing.pack(mine, "run", ANN)) == mine


def test_a_span_of_equal_weights_is_short_and_one_of_different_weights_still_fits():
    equal = signing.pack(bring({unit_of("default", block): 8.0 for block in range(126)}), "run", ANN)
    assert len(equal) < 800 + 8 * 126
    different = signing.pack(bring({unit_of("default", block): block + 0.1 for block in range(60)}), "run", ANN)
    assert len(different) < signing.MAX_BYTES


def test_too_many_different_weights_are_refused_before_they_are_sent():
    weights = {unit_of("default", block): block + 0.1 for block in range(1000)}
    with pytest.raises(BadContribution, match="1000 units"):
        signing.pack(bring(weights), "run", ANN)


def test_strange_weights_come_through_so_that_the_rules_can_refuse_them_with_a_reason():
    mine = bring({unit_of("default", 0): math.inf, unit_of("default", 1): -1.0})
    assert parse(signing.pack(mine, "run", ANN)).units == mine.units


def test_another_peers_words_and_another_runs_words_are_refused():
    data = signing.pack(bring({unit_of("default", 0): 1.0}), "run", ANN)
    with pytest.raises(BadContribution, match="bob is refused: wrong signature"):
        parse(data, peer="bob")
    with pytest.raises(BadContribution, match="another run"):
        parse(data, run="run2")


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(position, change):
    data = bytearray(signing.pack(bring({unit_of("default", 0): 1.0}), "run", ANN))
    position %= len(data)
    if b"k" * 8 in bytes(data[max(0, position - 8) : position + 9]):
        return  # the fake's key says nothing; the real one is checked against the peer id
    data[position] ^= change
    with pytest.raises(BadContribution):
        parse(bytes(data))


@given(st.binary(max_size=300))
def test_rubbish_is_refused(data):
    with pytest.raises(BadContribution):
        parse(data)
    with pytest.raises(BadContribution):
        parse(sealed(data))


def sealed(body: bytes) -> bytes:
    return msgpack.packb([body, ANN.public_key, ANN.sign(signing._CONTEXT + body)])


def ranged(first: int, count: int) -> list[object]:
    return [first, count, 1.0, 1.0, 1, 0, 0.0, b"d" * 8 * min(count, 8)]


@pytest.mark.parametrize(
    "body",
    [
        [1, "run", 3, "l", 0.0, False, [], []],
        [2, "run", -1, "l", 0.0, False, [], []],
        [2, "run", 2**40, "l", 0.0, False, [], []],
        [2, "run", True, "l", 0.0, False, [], []],
        [2, "run", 3, "l" * 65, 0.0, False, [], []],
        [2, "run", 3, "l", 0.0, False, ["x"] * 17, []],
        [2, "run", 3, "l", 0.0, False, [7], []],
        [2, "run", 3, "l", 0.0, False, [], [["default", [ranged(0, 1), ranged(0, 1)]]]],
        [2, "run", 3, "l", 0.0, False, [], [["default", [ranged(0, 10**9)]]]],
        [2, "run", 3, "l", 0.0, False, [], [["default", [ranged(-1, 1)]]]],
        [2, "run", 3, "l", 0.0, False, [], [["default", [[0, 1, "1", 1.0, 1, 0, 0.0, b"d" * 8]]]]],
        [2, "run", 3, "l", 0.0, False, [], [["default", [[0, 1, 1.0, 1.0, -1, 0, 0.0, b"d" * 8]]]]],
        [2, "run", 3, "l", 0.0, False, [], [["default", [[0, 1, 1.0, 1.0, 1, -1, 0.0, b"d" * 8]]]]],
        [2, "run", 3, "l", 0.0, False, [], [["default", [[0, 1, 1.0, 1.0, 1, 0, math.nan, b"d" * 8]]]]],
        [2, "run", 3, "l", 0.0, False, [], [["default", [[0, 2, 1.0, 1.0, 1, 0, 0.0, b"d" * 8]]]]],
        [2, "run", 3, "l", 0.0, False, [], [["../etc", [ranged(0, 1)]]]],
        {"run": 3},
        [],
    ],
)
def test_a_signed_contribution_that_cannot_be_right_is_refused(body):
    with pytest.raises(BadContribution, match="ann"):
        parse(sealed(msgpack.packb(body)))


@pytest.fixture(scope="module")
def identity(tmp_path_factory) -> Identity:
    return load_or_create(tmp_path_factory.mktemp("ann") / "identity")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Identity:
    return load_or_create(tmp_path_factory.mktemp("bob") / "identity")


def test_votes_come_back_as_they_were_and_rubbish_is_refused(identity):
    votes = (
        Vote(
            class_id=b"c" * 32,
            complete=True,
            digest=b"d" * 32,
            dropped=frozenset({PeerId("eve")}),
            doubted=frozenset({PeerId("bob"), PeerId("cat")}),
            probes=b"p" * 8,
        ),
    )
    word = word_of(b"group", votes, identity)
    assert (word.peer, word.votes) == (identity.peer, votes)
    assert parse_word(word.data) == word
    for rubbish in (b"", b"\xc1", msgpack.packb([b"g", [[1, True, b""]]]), msgpack.packb(["g", []]), b"x" * 2**19):
        with pytest.raises(BadContribution):
            parse_word(rubbish)
    for entries in ([[b"c" * 33, True, b"", [], [], b""]], [[b"c", True, b"", [], []]], [7]):
        with pytest.raises(BadContribution, match="malformed"):
            parse_word(signed(identity, [b"g", entries]))
    for accused in (["x"] * 65, [7], ["x" * 129]):
        with pytest.raises(BadContribution, match="malformed"):
            parse_word(signed(identity, [b"g", [[b"c", True, b"", accused, [], b""]]]))
    with pytest.raises(BadContribution, match="malformed"):
        parse_word(signed(identity, [b"g" * 33, []]))


def test_a_vote_that_somebody_changed_on_its_way_is_refused(identity, other):
    word = word_of(b"group", [Vote(class_id=b"c", complete=True, digest=b"d")], identity)
    body, key, signature = msgpack.unpackb(word.data)
    with pytest.raises(BadContribution, match="wrong signature"):
        parse_word(msgpack.packb([body.replace(b"d", b"e"), key, signature]))
    with pytest.raises(BadContribution, match="wrong signature"):
        parse_word(msgpack.packb([body, other.public_key, signature]))
    with pytest.raises(BadContribution, match="malformed"):
        parse_word(msgpack.packb([body, key, "signed"]))


def signed(identity, body):
    packed = msgpack.packb(body)
    return msgpack.packb([packed, identity.public_key, identity.sign(b"swarmtune votes 1\0" + packed)])


def word(peer, *votes):
    return Word(peer=PeerId(peer), group_id=b"g", votes=votes, data=peer.encode())


async def test_only_holders_vote_and_only_their_first_word_counts():
    ann, bob, eve = PeerId("ann"), PeerId("bob"), PeerId("eve")
    unit_class = UnitClass(class_id=b"c", holders=(ann, bob), units=(unit_of("default", 0),))
    good, bad = (Vote(class_id=b"c", complete=complete, digest=b"d") for complete in (True, False))
    ballot = Ballot(b"g", [unit_class], [ann, bob, eve])
    for said in (word(ann, good), word(eve, bad), word("fay", bad), word(bob, good), word(bob, bad)):
        ballot.hear(said)
    async with asyncio.timeout(30):
        await ballot.settled()
    assert ballot.votes() == {b"c": {ann: good, bob: good}}


async def test_after_the_first_no_the_others_are_heard_but_not_waited_for_longer_than_a_moment(monkeypatch):
    ann, bob, cat = PeerId("ann"), PeerId("bob"), PeerId("cat")
    unit_class = UnitClass(class_id=b"c", holders=(ann, bob, cat), units=(unit_of("default", 0),))
    yes, no = (Vote(class_id=b"c", complete=complete, digest=b"d") for complete in (True, False))
    ballot = Ballot(b"g", [unit_class], [ann, bob, cat])
    ballot.hear(word(ann, yes))
    ballot.hear(word(cat, no))
    waiting = asyncio.create_task(ballot.settled())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    ballot.hear(word(bob, yes))
    async with asyncio.timeout(10):
        await waiting
    assert ballot.votes() == {b"c": {ann: yes, bob: yes, cat: no}}

    monkeypatch.setattr(ballots, "_JUDGE_SECONDS", 0.01)
    silent = Ballot(b"g", [unit_class], [ann, bob, cat])
    silent.hear(word(cat, no))
    async with asyncio.timeout(10):
        await silent.settled()


async def test_a_word_of_another_round_that_somebody_hands_on_does_not_stand_in_for_this_rounds():
    ann, bob = PeerId("ann"), PeerId("bob")
    unit_class = UnitClass(class_id=b"c", holders=(ann, bob), units=(unit_of("default", 0),))
    good = Vote(class_id=b"c", complete=True, digest=b"d")
    ballot = Ballot(b"g", [unit_class], [ann, bob], [bob])
    ballot.hear(Word(peer=ann, group_id=b"earlier", votes=(), data=b"replayed"))
    ballot.hear(word(ann, good))
    ballot.hear(word(bob, good))
    async with asyncio.timeout(30):
        await ballot.settled()
        assert await anext(ballot.words(bob, 60)) == b"ann"
    assert ballot.votes() == {b"c": {ann: good, bob: good}}


async def test_members_behind_nat_hear_what_others_said_and_go_on_to_say_once_each():
    ballot = Ballot(b"g", [], ["ann", "bob", "cat", "dan"], ["cat", "dan"])
    ballot.hear(word("ann"))
    heard = []
    async with asyncio.timeout(30):
        async for data in ballot.words(PeerId("cat"), 60):
            heard.append(data)
            if data == b"ann":
                for name in ("dan", "eve", "cat", "dan", "bob"):  # its own, a stranger's, and one twice
                    ballot.hear(word(name))
            if data == b"bob":
                break
        assert [data async for data in ballot.words(PeerId("dan"), 0.01)] == [b"ann", b"cat", b"bob"]
        assert [data async for data in ballot.words(PeerId("bob"), 60)] == []  # it is called by them itself
    assert heard == [b"ann", b"dan", b"bob"]
