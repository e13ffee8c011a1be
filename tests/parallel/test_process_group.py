"""Errors of gloo and NCCL become messages that say what happened to which rank; NCCL is simulated."""

from __future__ import annotations

import json
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from alexnet_cli.core.parallel import process_group
from alexnet_cli.core.parallel.process_group import ProcessMesh, RankInfo, join_process_group
from alexnet_cli.errors import LostError, MissingError
from rank_cases import check_peers_and_report, run_ranks, stop_together

NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, unhandled system error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.28.9\n{}: System call or external library call failed.\n"
    "Last error:\n{}\n"
)
SHARED_MEMORY = NCCL.format("ncclSystemError", "Error while creating shared memory segment /dev/shm/nccl-a (size 9)")
GONE = NCCL.format("ncclRemoteError", "socketPollConnect: Connect to 10.0.0.2 failed: Connection refused")


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> ProcessMesh:
    """Rank 1 of 4, where rank 2 has reported that it lost another rank."""
    monkeypatch.setattr(process_group, "REPORT_SECONDS", 0.1)
    store = HashStore()
    store.set("lost/2", "")
    return ProcessMesh(1, 4, store=store)


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (GONE, "lost its connection"),
        ("gloo: Connection closed by peer", "lost its connection"),
        ("gloo: Timed out waiting 5000ms for recv operation to complete", "timed out"),
    ],
)
def test_a_missing_rank_is_named(mesh: ProcessMesh, message: str, event: str) -> None:
    missing = pytest.raises(LostError, match=rf"(?m)^rank 1 {event} in step 7: ranks 0, 3 did not arrive$")
    with missing, mesh.name_errors("step 7"):
        raise RuntimeError(message)


def test_gpus_that_cannot_exchange_data_are_not_a_missing_rank(mesh: ProcessMesh) -> None:
    reason = r"^rank 1: NCCL.* failed in step 1: Error while creating shared memory"
    with pytest.raises(MissingError, match=reason) as caught, mesh.name_errors("step 1"):
        raise RuntimeError(SHARED_MEMORY)
    assert not isinstance(caught.value, LostError)
    assert "NCCL_DEBUG=INFO" in caught.value.hint


INTERFACES = {"first-machine": "ib0", process_group.ELSEWHERE: "eth0", "127.0.1.1": "lo"}


@pytest.mark.parametrize(
    ("own", "main", "already", "expected"),
    [
        ("10.0.0.7", "first-machine", None, None),  # gloo takes the address of the host's name
        ("127.0.1.1", "first-machine", None, "ib0"),
        ("127.0.1.1", "127.0.1.1", None, "eth0"),  # this is the first machine, and its name means itself
        ("127.0.1.1", "first-machine", "bond0", "bond0"),
        ("", "unknown", None, "eth0"),
    ],
)
def test_other_machines_can_reach_gloo(
    own: str, main: str, already: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_up(name: str) -> str:
        if not own:
            raise socket.gaierror
        return own

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    monkeypatch.setattr(process_group, "_find_interface", lambda address: INTERFACES.get(address, ""))
    monkeypatch.setenv("MASTER_ADDR", main)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", already or "")
    if not already:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    process_group._set_gloo_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell")
def test_the_interface_of_an_address() -> None:
    assert process_group._find_interface("127.0.0.1") == "lo"
    assert process_group._find_interface("no such host") == ""


def test_the_hint_of_ranks_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ALEXNET_TIMEOUT": "0.2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "1")  # restored at the end
    with pytest.raises(MissingError) as caught, join_process_group(RankInfo(1, 2, 0, 1), "gloo"):
        pass
    assert "MASTER_ADDR" in caught.value.hint
    assert "GLOO_SOCKET_IFNAME=eth0" in caught.value.hint


@pytest.mark.parametrize("silent", [False, True])
def test_data_that_arrives_corrupted_is_an_error(silent: bool, tmp_path: Path) -> None:
    run_ranks(4, check_peers_and_report, tmp_path, silent)
    reports = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(4)]
    assert reports[:2] == [[], []]
    assert reports[3] == []
    assert reports[2][:1] == ["data sent from GPU 3 to GPU 2 arrives corrupted"] * silent
    assert ("NCCL_P2P_DISABLE=1" in "".join(reports[2])) is silent


def test_ranks_stop_at_the_same_call_without_waiting_for_each_other(tmp_path: Path) -> None:
    """If rank 0 waited in its first call, rank 1 would never make its own."""
    run_ranks(2, stop_together, tmp_path)
    reasons = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert reasons[0] == reasons[1] == [None, None, None, "SIGTERM", "SIGTERM"]


def test_other_errors_stay_as_they_are(mesh: ProcessMesh) -> None:
    with pytest.raises(RuntimeError, match=r"^bug$"), mesh.name_errors("step 1"):
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

    process_group._lengthen_nccl_timeout(Group())  # type: ignore[arg-type]
    assert found == [waits] * (waits is not None)
