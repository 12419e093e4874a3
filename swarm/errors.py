"""Errors that a person can meet, and the tuple of all roots that the command line prints in one line."""

from averaging.errors import AveragingError
from blocks.errors import BlockError
from peers.errors import PeerError


class SwarmError(Exception):
    """Root of the errors of `swarm`."""


class BadConfig(SwarmError):
    """swarm.toml or a setting in it is wrong; the message names the setting and what to use."""


class BadJoinString(SwarmError):
    """The join string is malformed, or belongs to another run."""


class NotInvited(SwarmError):
    """The run is private, and this machine has no invitation to it, or none that will do."""


class BadData(SwarmError):
    """A training or evaluation file is empty, unreadable, or a row lacks the expected fields."""


class BadCheckpoint(SwarmError):
    """A checkpoint is torn, or belongs to another run or model."""


EXPECTED_ERRORS = (BlockError, PeerError, AveragingError, SwarmError)
