"""What goes wrong, in the shape that OpenAI's clients read: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blocks.errors import BlockError
from peers.errors import NoRoute, PeerError, Refused
from peers.streams.messages import RefusalCode
from swarm.errors import SwarmError
from swarm.interrupt import Interrupted

BUSY_SECONDS = 5  # told to those who find no room
NO_ROUTE_SECONDS = 15  # told to those who find a block without a holder: a host that restarts is back by then
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled",
}


@dataclass(eq=False)
class ApiFailure(Exception):
    """An answer that is an error. `retry_seconds` becomes the Retry-After header."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_seconds: int | None = None

    def body(self) -> dict[str, object]:
        """The answer's JSON."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Beside the usual ones."""
        headers = {} if self.retry_seconds is None else {"Retry-After": str(self.retry_seconds)}
        return headers | {"WWW-Authenticate": "Bearer"} if self.status == 401 else headers


def failure_of(error: BaseException) -> ApiFailure | None:
    """What the asker is told of an error that can be expected; None for a bug, of which nothing is told."""
    match error:
        case ApiFailure():
            return error
        case NoRoute() | Refused(code=RefusalCode.ADAPTER):
            return ApiFailure(503, _line(error), "no_route", retry_seconds=NO_ROUTE_SECONDS)
        case Refused(code=RefusalCode.FULL | RefusalCode.BUSY):
            return ApiFailure(503, _line(error), "swarm_is_full", retry_seconds=BUSY_SECONDS)
        case Interrupted():
            return ApiFailure(499, _line(error), "cancelled")
        case PeerError() | BlockError() | SwarmError():
            return ApiFailure(502, _line(error), "swarm_failed")
    return None


def bug() -> ApiFailure:
    """What the asker is told of a bug; the log has the rest."""
    return ApiFailure(500, "the gateway failed on this request; its log says why", "internal_error")


def bad_request(errors: Sequence[object]) -> ApiFailure:
    """From what pydantic found: the first error, and where. What was sent is not repeated."""
    first = _telling([error for error in errors if isinstance(error, Mapping)])
    if first is None:
        return ApiFailure(400, "the request cannot be read", "invalid_request")
    place, kind = first.get("loc", ()), str(first.get("type", ""))
    names = [str(part) for part in place if isinstance(part, (str, int))] if isinstance(place, (tuple, list)) else []
    if kind == "json_invalid":
        return ApiFailure(400, "the body is not valid JSON", "invalid_json")
    if names[:1] == ["body"]:
        names = names[1:]
    path = ".".join(name for name in names if not name.startswith(("function-", "constrained-", "list[")))
    shown = _safe(path)
    words = _safe(str(first.get("msg", "is wrong"))).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return ApiFailure(400, f"'{shown}' is not known or not done here", "unknown_parameter", param=shown)
    if not shown:
        return ApiFailure(400, words, "invalid_request")
    return ApiFailure(400, f"'{shown}': {words}", "invalid_value", param=shown)


def _telling(errors: Sequence[Mapping[str, object]]) -> Mapping[str, object] | None:
    """The first error; of a field that may be of several types, what is wrong with it as the type that it has."""
    if not errors:
        return None
    field = _field(errors[0])
    alike = [error for error in errors if _field(error) == field]
    return next((error for error in alike if not str(error.get("type")).endswith("_type")), alike[0])


def _field(error: Mapping[str, object]) -> object:
    place = error.get("loc", ())
    return tuple(place[:2]) if isinstance(place, (tuple, list)) else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _safe(text: str, most: int = 200) -> str:
    """What came from outside, in printable ASCII and short."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:most])
