"""What can go wrong in a round. A lost peer is an event, not an error: see rounds.py."""


class AveragingError(Exception):
    """Root of the errors of `averaging`."""


class RoundFailed(AveragingError):
    """A round did not happen; the message says why in one line."""


class BadContribution(AveragingError):
    """A peer's data for a round is malformed, wrongly signed, or cannot be right."""


class BadTensors(AveragingError):
    """This peer's own tensors cannot go into a round: missing, of the wrong dtype or device, or not finite."""
