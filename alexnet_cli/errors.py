"""Every error a user can meet, with its exit code.

    AlexNetError            1  internal error
    ├── UsageError          2  an argument or option cannot be used
    │   └── RecipeError     2  a recipe value is unknown or out of range
    ├── DataError           3  data missing or invalid
    │   └── WeightsError    3  a model or checkpoint file is missing, damaged or foreign
    ├── MissingError        4  the environment lacks something: a GPU, an optional package
    │   └── LostError       4  another process of the same training does not answer
    ├── PartialError        5  finished, but some items failed
    ├── VerificationError   6  a result did not pass its own check
    ├── StorageError        7  the disk is full or read-only; the last good checkpoint is intact
    └── Stopped                stopped on purpose and resumable: 75 (time is up), 130 (Ctrl-C), 143 (SIGTERM)

A message is two lines: what and where, then what to do. The shell prints them; nothing else does.
"""

# PyTorch on a GPU and on a CPU, cuDNN, ONNX Runtime; none of them has an exception of its own that all share.
NO_MEMORY = (
    "OutOfMemoryError",
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "Failed to allocate",
    "bad_alloc",
)


class AlexNetError(Exception):
    """An error with a message for the user: `what` happened and where, and a `hint` what to do about it."""

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class UsageError(AlexNetError):
    """An argument or option cannot be used."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe value is unknown or out of range."""


class DataError(AlexNetError):
    """Data is missing or invalid."""

    exit_code = 3


class WeightsError(DataError):
    """A model or checkpoint file is missing, damaged or foreign."""


class MissingError(AlexNetError):
    """The environment lacks something that was asked for."""

    exit_code = 4


class LostError(MissingError):
    """Another process of the same training does not answer any more; what happened to it, it says itself."""


class PartialError(AlexNetError):
    """The work is finished, but some items failed."""

    exit_code = 5


class VerificationError(AlexNetError):
    """A result did not pass its own check."""

    exit_code = 6


class StorageError(AlexNetError):
    """The disk is full or cannot be written."""

    exit_code = 7


class Stopped(AlexNetError):
    """Stopped on purpose; the run can be resumed."""

    def __init__(self, what: str, hint: str, exit_code: int) -> None:
        super().__init__(what, hint)
        self.exit_code = exit_code


class Terminated(BaseException):
    """SIGTERM has come: as after Ctrl-C, everything is unwound, and nothing stays behind."""

    exit_code = 143


def memory_ended(error: BaseException) -> bool:
    """Whether an error of anybody's says that there was too little memory."""
    return isinstance(error, MemoryError) or any(sign in f"{type(error).__name__} {error}" for sign in NO_MEMORY)
