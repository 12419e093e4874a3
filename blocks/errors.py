"""What can go wrong with a model on this machine. One root, so that the command line knows them all."""


class BlockError(Exception):
    """Root of the errors of `blocks`."""


class BadSpan(BlockError):
    """A span is malformed, empty, or outside the model."""


class UnknownModel(BlockError):
    """No model was found under that name, path or hub id."""


class UnsupportedModel(BlockError):
    """The architecture cannot be cut into spans; the message names the reason."""


class MissingTensors(BlockError):
    """The checkpoint lacks tensors that the span needs."""


class BadAdapter(BlockError):
    """Adapter settings or adapter tensors do not fit the model."""


class CacheFull(BlockError):
    """The byte budget for KV caches has no room for this session."""


class BadSession(BlockError):
    """A decode request does not fit its session: unknown id, wrong position, too many tokens."""


class BadSpeculation(BlockError):
    """Tokens cannot be guessed ahead for this text, or not by that draft model."""


class Busy(BlockError):
    """This host holds as much unfinished work as it may; try another, or later."""


class BadGradient(BlockError):
    """A gradient is not finite."""


class WrongGradient(BlockError):
    """Backward on this device does not give the gradient of forward; the message names the block and the numbers."""
