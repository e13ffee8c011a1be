"""What transports complain of, and who waits longest; NCCL's part is played."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from alexnet_cli.core import transport
from alexnet_cli.core.ranks import Ranks
from alexnet_cli.errors import LostError, MissingError

NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, unhandled system error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.28.9\n{}: System call or external library call failed.\n"
    "Last error:\n{}\n"
)
SHARED_MEMORY = NCCL.format("ncclSystemError", "Error while creating shared memory segment /dev/shm/nccl-a (size 9)")
GONE = NCCL.format("ncclRemoteError", "socketPollConnect: Connect to 10.0.0.2 failed: Connection refused")


def test_gpus_that_cannot_talk_are_told_apart_from_ranks_that_are_gone() -> None:
    why = r"^rank 1: NCCL.* fails at: step 1; Error while creating shared memory"
    with pytest.raises(MissingError, match=why) as told, Ranks(1, 2).together("step 1"):
        raise RuntimeError(SHARED_MEMORY)
    assert not isinstance(told.value, LostError)
    assert "NCCL_DEBUG=INFO" in told.value.hint
    for message in (GONE, "gloo: Connection closed by peer", "Timed out after 600 s"):
        with pytest.raises(LostError, match="waited for the others in vain"), Ranks(1, 2).together("step 1"):
            raise RuntimeError(message)
    with pytest.raises(RuntimeError, match=r"^bug$"), Ranks(1, 2).together("step 1"):
        raise RuntimeError("bug")


@pytest.mark.parametrize(("name", "waits"), [("nccl", timedelta(seconds=80)), ("gloo", None), (None, None)])
def test_nccl_waits_longer(name: str | None, waits: timedelta | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALEXNET_TIMEOUT", "40")
    found: list[timedelta] = []

    class Backend:
        _set_default_timeout = found.append

        def name(self) -> str:
            return str(name)

    class Group:
        def _get_backend(self, device: Any) -> Backend:
            if name is None:
                raise RuntimeError("No backend type associated with device type cuda")
            return Backend()

    transport.outlast(Group())  # type: ignore[arg-type]
    assert found == [waits] * (waits is not None)
