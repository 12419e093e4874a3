"""The door of the server, before anything reads a request: it is asked by its own name, bodies are bounded in bytes and
in time, answers counted.

Pure ASGI, so that streams stay streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swarm.gateway.answers import error_response
from swarm.gateway.failures import ApiFailure
from swarm.gateway.host_names import LOCAL_NAMES, ForeignName, check_names

# The page's scripts and styles are files of its own; nothing that a peer announces could run even as HTML.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DoorRules:
    """Bytes of a body at most, and seconds in which it has to come. `names` are those by which the gateway is asked, in
    lower case; see host_names.check_names.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    names: frozenset[str] = LOCAL_NAMES


class Door:
    """ASGI middleware. `answered` is told of each answer's endpoint and status."""

    def __init__(self, app: ASGIApp, rules: DoorRules, answered: Callable[[str, int], None]) -> None:
        self._app, self._rules, self._answered = app, rules, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._answered(_endpoint(scope), message["status"])
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        try:
            check_names(_hosts(scope), self._rules.names)
            async with asyncio.timeout(self._rules.body_seconds):
                body = await self._read(receive)
        except ForeignName as error:
            await error_response(ApiFailure(403, str(error), "host_not_allowed"))(scope, receive, send_on)
            return
        except TimeoutError:
            why = f"the body did not come within {self._rules.body_seconds:.0f} s; send it at once"
            await error_response(ApiFailure(408, why, "body_too_slow"))(scope, receive, send_on)
            return
        except ApiFailure as failure:
            await error_response(failure)(scope, receive, send_on)
            return
        if body is None:
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return first.pop() if first else await receive()

        try:
            await self._app(scope, receive_again, send_on)
        except Exception:
            self._answered(_endpoint(scope), 500)  # it is sent further out
            raise

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None if the asker is gone.

        Raises:
            ApiFailure: 413, it is too large.
        """
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._rules.body_bytes:
                most = self._rules.body_bytes
                raise ApiFailure(413, f"the body is larger than {most} bytes; send a shorter prompt", "body_too_large")
            if not message.get("more_body", False):
                return b"".join(parts)


def _hosts(scope: Scope) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]


def _endpoint(scope: Scope) -> str:
    """The route's pattern, so that there are as many names as routes."""
    return str(getattr(scope.get("route"), "path", "") or "other")
