"""What `swarm status` says of what each peer has given, in its table and for programs."""

from __future__ import annotations

from dataclasses import replace

from blocks.spans import Span
from peers.network import PeerId
from peers.records import PeerRecord
from swarm.reports.status import Status
from tests.fakes import fake_peer_id, peer_record

ANN, BOB, CEM, DEE, EVE = (fake_peer_id(name) for name in ("ann", "bob", "cem", "dee", "eve"))


def peer(name: PeerId, **said: object) -> PeerRecord:
    return replace(peer_record(name, Span(0, 3)), **{"nickname": "", **said})  # type: ignore[arg-type]


def status() -> Status:
    return Status(
        run="r",
        name="tales",
        num_blocks=6,
        hosts=(
            peer(ANN, nickname="ann", served_tokens=1234567, trained_tokens=10),
            peer(BOB, served_tokens=5),
            peer(EVE),
        ),
        progress={},
        trainers=(),
        paused=(peer(CEM, nickname="cem", roles=(), away="hand", trained_tokens=4000),),
        members=(peer(DEE, nickname="dee", roles=("trainer",), trained_tokens=10),),
    )


def test_those_who_gave_are_listed_by_name_those_who_trained_most_first() -> None:
    assert status().given_rows() == [
        ("cem", "4,000", "0"),
        ("ann", "10", "1,234,567"),
        ("dee", "10", "0"),
        (BOB[-8:], "0", "5"),
    ]


def test_programs_get_every_peers_word() -> None:
    plain = status().to_plain()
    said = {
        each["peer"]: (each["nickname"], each["trained_tokens"], each["served_tokens"])
        for kind in ("hosts", "paused", "members")
        for each in plain[kind]  # type: ignore[attr-defined]
    }
    assert said == {
        ANN: ("ann", 10, 1234567),
        BOB: ("", 0, 5),
        CEM: ("cem", 4000, 0),
        DEE: ("dee", 10, 0),
        EVE: ("", 0, 0),
    }
