"""Who is to blame when a class cannot be completed."""

from __future__ import annotations

from collections.abc import Sequence

from hivemind.averaging.partition import AllreduceException
from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID

NETWORK_ERRORS = (P2PDaemonError, P2PHandlerError, OSError, EOFError, AllreduceException)


class LostPeer(AllreduceException):  # type: ignore[misc]
    """A class cannot be completed because of `peer`."""

    def __init__(self, peer: PeerID, reason: str) -> None:
        super().__init__(f"{peer.to_base58()} {reason}")
        self.peer = peer


class StreamEnded(AllreduceException):  # type: ignore[misc]
    """A stream ended too early, which alone does not say who broke the class."""


def blame(errors: Sequence[BaseException]) -> tuple[str, set[PeerID]]:
    """Why a class failed, and by whom: each lost peer with the first that was said of it."""
    reasons: dict[PeerID, str] = {}
    for error in errors:
        if isinstance(error, LostPeer):
            reasons.setdefault(error.peer, str(error))
    return "; ".join(reasons.values()) or str(errors[0]), set(reasons)


def nothing_from(silent: set[PeerID]) -> str:
    """Words for those of whom nothing was heard; none for nobody."""
    names = ", ".join(sorted(peer.to_base58() for peer in silent))
    return f"; nothing came from {names}" if names else ""


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The errors that are no groups themselves."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
