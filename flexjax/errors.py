"""Errors that a caller may want to tell apart.

A caller's plain mistake is a `ValueError`; the classes here name the conditions that servers and
command lines map to their own replies. They derive from the builtin that fits, so code that knows
nothing of FlexJAX still catches them.
"""


class FlexJaxError(Exception):
    """Base of every error that FlexJAX raises on purpose, `ValueError` apart."""


class ModelNotFoundError(FlexJaxError, FileNotFoundError):
    """A model directory, or a file that it must hold, does not exist."""


class WeightFormatError(FlexJaxError, ValueError):
    """Weights do not fit the configuration; the message lists missing and unexpected keys."""


class UnsupportedModelError(FlexJaxError, ValueError):
    """The configuration asks for an architecture or a feature that FlexJAX does not have."""


class AdapterFormatError(FlexJaxError, ValueError):
    """A PEFT directory cannot be used with this base model; the message names the field."""


class AdapterNotFoundError(FlexJaxError, KeyError):
    """No adapter of that name is loaded."""

    def __str__(self) -> str:
        """Returns the message itself; `KeyError` would print its repr."""
        return str(self.args[0]) if self.args else ""


class DatasetError(FlexJaxError, ValueError):
    """A dataset row cannot be used; the message names the file and the line."""


class CapacityError(FlexJaxError, ValueError):
    """A request or job can never fit what the engine was started with."""


class JobStateError(FlexJaxError, RuntimeError):
    """The job's state does not allow this call, or the job failed."""


class CheckpointError(FlexJaxError, RuntimeError):
    """A checkpoint is missing, damaged or of another job."""


class EngineDeadError(FlexJaxError, RuntimeError):
    """The engine's loop stopped on an internal error; nothing further can run on it."""
