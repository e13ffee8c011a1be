"""What the tests with hostile files share: generated junk, and what may become of it."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from alexnet_cli.errors import AlexNetError

T = TypeVar("T")
SECONDS = 300  # a hang, on however busy a machine

MUTATION = st.tuples(
    st.sampled_from(["cut", "set", "insert", "drop", "repeat"]), st.integers(0, 10**9), st.binary(max_size=9)
)
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=4)

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.sampled_from([2**63, -(2**70), 10**30, float("nan"), 1e300]),
    st.text(max_size=5), st.sampled_from(["..", "/etc/passwd", "../../x", "\0", "\ud800", "val-000000.tar"]),
)  # fmt: skip
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "wnid", "file", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def generated(examples: int) -> settings:
    """So many cases, the same in every run."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def mutated(data: bytes, mutations: list[tuple[str, int, bytes]], within: int | None = None) -> bytes:
    """The bytes after some damage, in their first `within` bytes if that is given."""
    for kind, number, extra in mutations:
        place = number % (min(len(data), within or len(data)) + 1)
        if kind == "cut":
            data = data[:place]
        elif kind == "set":
            data = data[:place] + extra + data[place + len(extra) :]
        elif kind == "insert":
            data = data[:place] + extra + data[place:]
        elif kind == "drop":
            data = data[:place] + data[place + 1 + len(extra) :]
        else:
            data = data[:place] + data[max(0, place - 40) : place] + data[place:]
    return data


def told(call: Callable[[], T]) -> T | str:
    """What the call returns, or the message of its AlexNetError; any other exception is the test's failure."""
    try:
        return call()
    except AlexNetError as error:
        found = error
    assert found.what
    assert found.exit_code in {2, 3, 4, 5, 6}
    return found.what


def replaced(value: Any, steps: list[int], new: Any) -> Any:
    """A JSON value in which one part, found by going down a step at a time, is another."""
    if not steps or not isinstance(value, dict | list) or not value:
        return new
    if isinstance(value, dict):
        key = sorted(value)[steps[0] % len(value)]
        return value | {key: replaced(value[key], steps[1:], new)}
    place = steps[0] % len(value)
    return [*value[:place], replaced(value[place], steps[1:], new), *value[place + 1 :]]


@contextmanager
def bounded(memory: int = 2 << 30) -> Iterator[None]:
    """While inside: an alarm ends a hang, and the process may not come to hold that many bytes more than before."""

    def late(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < memory
