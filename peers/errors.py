"""What can go wrong between peers. One root, so that the command line knows them all."""

NOT_ADMITTED = "not admitted: "  # how a refusal that will not change by itself begins
DIAL_BACKOFF = "dial backoff"  # libp2p dials no more for a while, and no longer says why


class PeerError(Exception):
    """Root of the errors of `peers`."""


class BadRecord(PeerError):
    """A record from the DHT is malformed, too large, expired, or its signature is wrong."""


class BadMessage(PeerError):
    """A message from the wire is malformed, too large, or carries values that cannot be right."""


class BadIdentity(PeerError):
    """The identity file cannot be used: unreadable, malformed, or in use by another process or peer."""


class BadMembership(PeerError):
    """A membership of a private run is malformed, not its owner's word, another peer's, expired or revoked."""


class BadNetworkConfig(PeerError, ValueError):
    """A setting of the network node or of routes cannot work; the message names it and what to use."""


class NetworkFailed(PeerError):
    """The node could not start: port taken, no bootstrap peer answered, or the daemon did not come up."""


class NotAdmitted(NetworkFailed):
    """In a private run: a peer without a valid membership, or whose role does not allow what it asks.

    `passing`: nothing is known against it, so that it may try again. hivemind tells the other side what `repr` says.
    """

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing

    def __repr__(self) -> str:
        return str(self) if self.passing else NOT_ADMITTED + str(self)


class StreamClosed(PeerError):
    """The other side closed the stream, or its process is gone."""


class Refused(PeerError):
    """The other peer answered with a refusal. `code` is one of messages.RefusalCode."""

    def __init__(self, reason: str, code: str = "refused") -> None:
        super().__init__(reason)
        self.code = code


class OverLimit(PeerError):
    """This peer's own send limit would let a message through too late."""


class PeerLost(PeerError):
    """A call to a peer failed: it is gone, too slow, or talks nonsense. Another peer can do the work."""


def reason_of(peer: str, reason: object) -> str:
    """Why a call to `peer` failed, in words that name it."""
    return str(reason) if peer in str(reason) else f"peer {peer}: {reason}"


class NoRoute(PeerError):
    """No chain of live hosts covers the blocks; the message names the blocks that are missing."""
