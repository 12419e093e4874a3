"""A page that calls itself by a name that leads to the gateway cannot ask it."""

from __future__ import annotations

import json

import pytest
from starlette.types import Message, Receive, Scope, Send

from swarm.gateway.door import Door, DoorRules
from swarm.gateway.host_names import LOCAL_NAMES, ForeignName, check_names

OWN = LOCAL_NAMES | {"chat.example.org"}


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "[2001:db8::1]", "192.168.1.5",
     "chat.example.org", "Chat.Example.org.:443"],
)  # fmt: skip
def test_addresses_and_own_names_are_asked(host: str) -> None:
    check_names([host], OWN)


@pytest.mark.parametrize(
    "host",
    ["evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "evil.chat.example.org", "", ":8000",
     "localhost:8000@evil.example", "evil.example/localhost", "[evil.example]", "127.0.0.1:x", "localhost:8000:1",
     "[::1", "*"],
)  # fmt: skip
def test_other_names_are_not_asked(host: str) -> None:
    with pytest.raises(ForeignName, match="start it with --allow-host NAME"):
        check_names([host], OWN)
    check_names([host], frozenset({"*"}))


def test_each_of_several_headers_counts_and_no_header_is_no_browsers() -> None:
    with pytest.raises(ForeignName, match=r"^'evil\.example' is no name"):
        check_names(["localhost", "evil.example"], OWN)
    check_names([], OWN)


def test_what_is_shown_of_a_name_is_short_and_plain() -> None:
    with pytest.raises(ForeignName) as caught:
        check_names(["\x1b[2Jé" + "x" * 1000], OWN)
    assert str(caught.value).startswith("'?[2J?xxx")
    assert len(str(caught.value)) < 250


async def test_the_door_says_so_in_the_shape_of_openai_and_counts_it() -> None:
    passed: list[Scope] = []
    answered: list[tuple[str, int]] = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    door = Door(app, DoorRules(), lambda endpoint, status: answered.append((endpoint, status)))
    scope = {"type": "http", "headers": [(b"host", b"evil.example:8000")]}
    await door(scope, receive, send)
    assert not passed
    assert answered == [("other", 403)]
    assert sent[0]["status"] == 403
    error = json.loads(sent[1]["body"])["error"]
    assert (error["type"], error["code"]) == ("permission_error", "host_not_allowed")
    assert "'evil.example'" in error["message"]
    await door({"type": "http", "headers": [(b"host", b"localhost:8000")]}, receive, send)
    assert len(passed) == 1
