"""Whom a host leaves out of its company after a round, and what it says of that."""

from __future__ import annotations

import logging
from typing import cast

import pytest

from averaging.averager import RoundOutcome
from blocks.spans import Span
from peers.directory import Directory
from peers.network import PeerId
from peers.records import ProgressRecord
from peers.routes.health import Health
from peers.routes.router import LiveRouter
from peers.streams.pool import Pool
from swarm.units import company as company_module
from swarm.units.company import Company, Surroundings
from tests.logged import logged_by

ME, BOB, CAT = PeerId("me"), PeerId("bob"), PeerId("cat")


class FakePool:
    me = ME


class FakeRouter:
    def __init__(self) -> None:
        self.health = Health(lambda: 0.0)


@pytest.fixture
def company() -> Company:
    around = Surroundings(
        directory=cast(Directory, None),
        pool=cast(Pool, FakePool()),
        dht_time=lambda: 1000.0,
        router=cast(LiveRouter, FakeRouter()),
    )
    return Company(around, "run", Span(0, 2))


def records() -> list[ProgressRecord]:
    return [
        ProgressRecord(run="run", peer=peer, span=Span(0, 2), round=1, samples=0, total_samples=0, expires_at=2000.0)
        for peer in (BOB, CAT)
    ]


def left(company: Company) -> list[PeerId]:
    return [record.peer for record in company.usable(records())]


def outcome(number: int, **changes: frozenset[PeerId]) -> RoundOutcome:
    return RoundOutcome(number=number, peers=(ME, BOB, CAT), **changes)  # type: ignore[arg-type]


def test_whom_most_holders_accuse_is_out_at_once(company: Company, caplog: pytest.LogCaptureFixture) -> None:
    company.judge(outcome(1, offenders=frozenset({BOB, ME})))
    assert left(company) == [CAT]
    assert company.banned() == {BOB}, "no host bans itself"
    assert "round 1: peer bob is banned for 60 s: most holders had values" in caplog.text


def test_who_fails_three_rounds_in_a_row_is_out_so_that_the_others_go_on(
    company: Company, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            company.judge(outcome(number, missing=frozenset({BOB})))
        assert left(company) == [BOB, CAT]
        assert not logged_by(company_module, caplog)
        company.judge(outcome(3, missing=frozenset({BOB})))
    assert left(company) == [CAT]
    assert "round 3: peer bob is banned for 60 s: several rounds in a row failed because of it" in caplog.text


def test_who_alone_says_no_three_rounds_in_a_row_is_out_and_not_for_one_bad_round(company: Company) -> None:
    for number in (1, 2):
        company.judge(outcome(number, spoilers=frozenset({BOB})))
    company.judge(outcome(3))
    for number in (4, 5):
        company.judge(outcome(number, spoilers=frozenset({BOB})))
    assert left(company) == [BOB, CAT]
    company.judge(outcome(6, missing=frozenset({BOB})))
    assert left(company) == [CAT], "by turns it is the same"


def test_nobody_is_out_for_what_it_sees_of_itself(company: Company) -> None:
    for number in range(1, 7):
        company.judge(outcome(number, spoilers=frozenset({ME})))
    assert company.banned() == set()
