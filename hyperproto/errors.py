"""Every error that the library raises on purpose, and the warning that it gives.

Each is a `HyperprotoError` and also the builtin that fits, so that both `except HyperprotoError` and
`except ValueError` catch it. A message says what was expected, what came and what to do.
"""


class HyperprotoError(Exception):
    """Base class of all errors of this library."""


class ArgumentError(HyperprotoError, ValueError):
    """An option has a value outside the ones it can take."""


class ShapeError(HyperprotoError, ValueError):
    """A tensor has a shape or a dtype that cannot be meant."""


class LabelError(HyperprotoError, ValueError):
    """Labels or soft targets do not fit the classes of the head."""


class BankError(HyperprotoError, ValueError):
    """A bank of prototypes cannot be built or does not fit its head."""


class AssignmentError(HyperprotoError, ValueError):
    """A label-to-prototype assignment is invalid or cannot be solved for."""


class CheckpointError(HyperprotoError, ValueError):
    """A checkpoint was written for something else than what it is loaded into."""


class RankError(HyperprotoError, RuntimeError):
    """The ranks of a process group have something else each, or another rank has raised an error."""


class HeadNotFoundError(HyperprotoError, ValueError):
    """A model has no classifier to replace, or no hyperspherical head."""


class AlreadyConvertedError(HyperprotoError, ValueError):
    """A model already has a hyperspherical head."""


class NotLinearError(HyperprotoError, AttributeError):
    """A hyperspherical head was asked for the weight and bias of a linear classifier."""


class HyperprotoWarning(UserWarning):
    """Something that runs, and is probably not what was meant."""
