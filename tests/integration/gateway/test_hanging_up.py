"""Who hangs up ends the text, and the hosts' caches are free; who asks too much waits, or is told to."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from openai import APIStatusError, AuthenticationError, OpenAI, RateLimitError

from peers.network import PeerId
from peers.streams.answering import Handler
from peers.streams.calls import Answer, Question
from peers.streams.messages import Step, StreamKind
from swarm.gateway.desk import DeskLimits
from swarm.gateway.keys import AskerLimits
from swarm.gateway.serve import GatewayConfig
from swarm.peer import Peer
from tests.integration.gateway.conftest import Served
from tests.integration.gateway.small_gateway import QUICK, SmallGateway, gateway_over
from tests.integration.swarm.small_swarm import CACHE_BYTES, host_of, until

USER = [{"role": "user", "content": "hi"}]
LONG = 400
CONFIG = GatewayConfig(watch=QUICK, most_tokens=LONG, lookup=False)


def are_free(served: Served) -> bool:
    return all(host_of(host).caches.free_bytes == CACHE_BYTES for host in served.hosts)


def is_begun(served: Served) -> bool:
    """Whether the first host of `tales` serves a text."""
    return host_of(served.hosts[0]).caches.free_bytes < CACHE_BYTES


class Slow(Handler):
    """A host's handler that answers no step until it may go."""

    def __init__(self, real: Handler) -> None:
        self.real, self.go = real, threading.Event()

    async def answer(self, question: Question) -> Answer:
        if isinstance(question.message, Step):
            await asyncio.to_thread(self.go.wait)
        return await self.real.answer(question)

    async def stream_closed(self, peer: PeerId, stream: int) -> None:
        await self.real.stream_closed(peer, stream)


@contextmanager
def slow_steps(peer: Peer) -> Iterator[threading.Event]:
    """This host computes nothing until the event is set."""
    server = peer.node._servers[StreamKind.DECODE]
    slow = Slow(server.handler)
    server.handler = slow
    try:
        yield slow.go
    finally:
        slow.go.set()
        server.handler = slow.real


@contextmanager
def asked(gateway: SmallGateway, *, stream: bool) -> Iterator[socket.socket]:
    """A long text was asked for; the connection closes with the context."""
    place = urlsplit(gateway.url)
    body = json.dumps({"model": "tales", "messages": USER, "max_tokens": LONG, "stream": stream})
    head = ("POST /v1/chat/completions HTTP/1.1", "host: localhost", "content-type: application/json")
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        connection.sendall("\r\n".join([*head, f"content-length: {len(body)}", "", body]).encode())
        yield connection


def is_idle(gateway: SmallGateway) -> bool:
    desk = gateway.server.gateway.desk
    return (desk.writing, desk.waiting) == (0, 0)


def test_a_reader_that_hangs_up_ends_its_text_and_frees_the_hosts(served: Served) -> None:
    with gateway_over(served.clients[:1], CONFIG) as gateway:
        with asked(gateway, stream=True) as connection:
            left = 1500
            while left > 0:
                piece = connection.recv(left)
                assert piece, "the gateway ended the stream"
                left -= len(piece)
        until(lambda: is_idle(gateway) and are_free(served), "the text of a stream ends")
        metrics = gateway.server.gateway.metrics
        ended = metrics.registry.get_sample_value("swarm_gateway_texts_total", {"model": "tales", "end": "cancelled"})
        assert ended == 1, "it was written to its end"


@pytest.mark.parametrize("stream", [True, False])
def test_a_text_that_waits_for_a_host_ends_as_well(served: Served, stream: bool) -> None:
    with gateway_over(served.clients[:1], CONFIG) as gateway, slow_steps(served.hosts[1]) as go:
        with asked(gateway, stream=stream):
            until(lambda: is_begun(served) and gateway.server.gateway.desk.writing == 1, "the text is begun")
        until(lambda: is_idle(gateway), "the text ends")
        until(lambda: are_free(served), "the caches are free")
        assert not go.is_set(), "it ended because the host went on"


def test_more_texts_than_places_wait_and_still_more_are_refused(served: Served) -> None:
    config = replace(CONFIG, desk=DeskLimits(writing=1, waiting=2))
    with gateway_over(served.clients[:1], config) as gateway, slow_steps(served.hosts[1]) as go:
        client, desk = gateway.client(), gateway.server.gateway.desk
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(ask_shortly, client) for _ in range(3)]
            until(lambda: (desk.writing, desk.waiting) == (1, 2), "one is written and two wait")
            with pytest.raises(RateLimitError) as refused:
                ask_shortly(client)
            assert refused.value.code == "too_many_texts"
            assert int(refused.value.response.headers["retry-after"]) > 0
            go.set()
            assert {each.result(timeout=60) for each in waiting} == {"length"}
        assert ask_shortly(client) == "length"


def test_who_waits_too_long_is_told_so(served: Served) -> None:
    config = replace(CONFIG, desk=DeskLimits(writing=1, waiting=2, wait_seconds=0.2))
    with gateway_over(served.clients[:1], config) as gateway, slow_steps(served.hosts[1]) as go:
        client, desk = gateway.client(), gateway.server.gateway.desk
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(ask_shortly, client)
            until(lambda: desk.writing == 1, "one is written")
            with pytest.raises(RateLimitError, match="for 0 s; try again"):
                ask_shortly(client)
            assert (desk.writing, desk.waiting) == (1, 0)
            go.set()
            assert first.result(timeout=60) == "length"


def test_a_text_that_takes_too_long_ends(served: Served) -> None:
    config = replace(CONFIG, desk=DeskLimits(text_seconds=0.5))
    with gateway_over(served.clients[:1], config) as gateway, slow_steps(served.hosts[1]):
        with pytest.raises(APIStatusError) as late:
            ask_shortly(gateway.client())
        assert (late.value.status_code, late.value.code) == (504, "too_slow")
        until(lambda: is_idle(gateway) and are_free(served), "the caches are free")


def ask_shortly(client: OpenAI) -> str:
    answer = client.chat.completions.create(model="tales", messages=USER, max_tokens=2)  # type: ignore[arg-type]
    return answer.choices[0].finish_reason


def test_keys_are_needed_and_bound(served: Served, tmp_path: Path) -> None:
    ann, bob = "sk-ann-0123456789", "sk-bob-0123456789"
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[ann]\nkey = "{ann}"\nrequests_per_minute = 2\n[bob]\nkey = "{bob}"\nconcurrent = 1\n')
    config = replace(CONFIG, keys=keys, asker=AskerLimits(requests_per_minute=1000))
    with gateway_over(served.clients[:1], config) as gateway:
        for nobody in ("sk-nobody", "x" * 3000):
            client = gateway.client(nobody)
            for ask in (lambda client=client: ask_shortly(client), lambda client=client: client.models.list()):
                with pytest.raises(AuthenticationError) as refused:
                    ask()
                assert refused.value.code == "invalid_api_key"
        first = gateway.client(ann)
        assert [ask_shortly(first) for _ in range(2)] == ["length"] * 2
        with pytest.raises(RateLimitError) as limited:
            ask_shortly(first)
        assert limited.value.code == "rate_limit_exceeded"
        second = gateway.client(bob)
        with slow_steps(served.hosts[1]) as go, ThreadPoolExecutor(1) as pool:
            first = pool.submit(ask_shortly, second)
            until(lambda: gateway.server.gateway.desk.writing == 1, "bob's text is written")
            with pytest.raises(RateLimitError) as refused_too:
                ask_shortly(second)
            assert refused_too.value.code == "too_many_open_requests"
            go.set()
            assert first.result(timeout=60) == "length"
        stream = second.chat.completions.create(model="tales", messages=USER, max_tokens=2, stream=True)  # type: ignore[call-overload]
        assert len(list(stream)) > 1
        until(lambda: is_idle(gateway), "bob's stream is over")
        assert ask_shortly(second) == "length", "what a request holds is given back at its end"


def test_a_gateway_that_ends_ends_its_texts(served: Served) -> None:
    with slow_steps(served.hosts[1]), ThreadPoolExecutor(1) as pool:
        with gateway_over(served.clients[:1], CONFIG) as gateway:
            first = pool.submit(ask_shortly, gateway.client())
            until(lambda: is_begun(served), "a text is written")
        assert first.exception(timeout=60) is not None
        until(lambda: are_free(served), "the caches are free")
