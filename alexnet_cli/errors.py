"""Every error a user can meet, with its exit code.

    AlexNetError            1  internal error
    ├── UsageError          2  an argument or option cannot be used
    │   └── RecipeError     2  a recipe value is unknown or out of range
    ├── DataError           3  data missing or invalid
    │   └── WeightsError    3  a model or checkpoint file is missing, corrupt or unsupported
    ├── MissingError        4  the environment lacks something: a GPU, an optional package
    │   └── LostError       4  another process of the same training does not respond
    ├── PartialError        5  some items failed
    ├── VerificationError   6  a result did not pass its own check
    ├── StorageError        7  the disk is full or read-only; the last good checkpoint is intact
    └── Stopped                stopped on purpose and resumable: 75 (time is up), 130 (Ctrl-C), 143 (SIGTERM)

A message is two lines: what and where, then what to do. The shell prints them; nothing else does.
"""

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

STORAGE_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EDQUOT}
# Of PyTorch on a GPU and on a CPU, cuDNN, cuBLAS and ONNX Runtime, which share no exception class.
OUT_OF_MEMORY_SIGNS = (
    "OutOfMemoryError",
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "Failed to allocate",
    "bad_alloc",
    "unable to find an engine",  # cuDNN: the workspace of every algorithm is too large
    "ALLOCATION_FAILED",
    "STATUS_NOT_INITIALIZED",  # cuDNN, cuBLAS: no memory for the library itself
)


class AlexNetError(Exception):
    """An error with a message for the user: `what` happened and where, and a `hint` what to do about it."""

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        if hint:
            self.add_note(hint)  # a Python traceback shows it below the message


class AlexNetWarning(UserWarning):
    """Something the user should know that stops nothing. The command line prints it as a line `warn`."""


class UsageError(AlexNetError):
    """An argument or option cannot be used."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe value is unknown or out of range."""


class DataError(AlexNetError):
    """Data is missing or invalid."""

    exit_code = 3


class WeightsError(DataError):
    """A model or checkpoint file is missing, corrupt or unsupported."""


class MissingError(AlexNetError):
    """The environment lacks something that was asked for."""

    exit_code = 4


class LostError(MissingError):
    """Another process of the same training does not respond. That process reports its own error."""


class PartialError(AlexNetError):
    """Some items failed; as a rule, the work on the others is finished."""

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
    """SIGTERM was received. It unwinds the stack as Ctrl-C does, so that everything is cleaned up."""

    exit_code = 143


@contextmanager
def storage_errors(path: Path, hint: str = "free some space, or choose another -o") -> Iterator[None]:
    """Raise StorageError instead of an OSError inside the `with` block, which writes to `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write to {path}: {error.strerror or error}", hint) from error


def suggest_name(typed: str, names: Iterable[str], meant: Sequence[str] = ()) -> str:
    """Return "did you mean NAME? " with the names `meant`, or the one nearest to `typed`. Empty if none is near."""
    near = meant or get_close_matches(typed, names, 1)
    return f"did you mean {' or '.join(near)}? " if near else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of any library means that memory ran out, on the CPU or a GPU."""
    return isinstance(error, MemoryError) or any(
        sign in f"{type(error).__name__} {error}" for sign in OUT_OF_MEMORY_SIGNS
    )


def format_error(error: BaseException) -> tuple[str, str, int]:
    """Return message, hint and exit code of any error."""
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
    if is_out_of_memory(error):
        detail = str(error).partition("\n")[0]
        hint = "use a smaller batch (-b); when training, --micro-batch and --cache none need less memory too"
        return f"out of memory{f': {detail}' if detail else ''}", hint, 4
    return f"internal error: {type(error).__name__}: {error}", "this is a bug; alexnet --debug COMMAND shows where", 1
