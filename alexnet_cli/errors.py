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

import errno

STORAGE_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EDQUOT}
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


def told(error: BaseException) -> tuple[str, str, int]:
    """What to say of an error, of ours or of anybody's, what to do about it, and the exit code."""
    if isinstance(error, AlexNetError):
        return error.what, error.hint, error.exit_code
    if isinstance(error, OSError):
        what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        if error.errno in STORAGE_ERRORS:
            return what, "free some space, or write to another disk", 7
        if error.errno == errno.ENAMETOOLONG:
            return what, "choose a shorter name", 2
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
            return what, "check the path and its permissions", 3
        return what, "check the path and its permissions", 1
    if memory_ended(error):
        what = f"the memory does not suffice: {str(error).partition(chr(10))[0] or 'it is all taken'}"
        return what, "a smaller batch (-b) takes less; so do --micro-batch and --cache none in training", 4
    return f"internal error: {type(error).__name__}: {error}", "a bug; alexnet --debug COMMAND shows where", 1
