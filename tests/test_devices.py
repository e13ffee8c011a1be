"""Facts about CPU and GPU."""

from __future__ import annotations

import pytest
import torch

from alexnet_cli.core import devices


@pytest.mark.parametrize(("present", "typed"), [(True, "alexnet train"), (False, "alexnet train --recipe tiny")])
def test_train_command_suits_the_machine(present: bool, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_gpu", lambda: present)
    assert devices.suggest_train_command() == typed


class Traveller(torch.Tensor):
    """Bytes that become zeros on the way from GPU 2 to GPU 0, and that GPU 1 refuses."""

    place = ""

    def to(self, device: str) -> Traveller:  # type: ignore[override]
        if device == "cuda:1":
            raise RuntimeError("CUDA error: peer access is not supported\nmore")
        arrived = self.clone().as_subclass(Traveller)
        if (self.place, device) == ("cuda:2", "cuda:0"):
            arrived.zero_()
        arrived.place = device
        return arrived


def test_copies_between_gpus_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *size, **kind: randint(*size, **kind).as_subclass(Traveller))
    states, refused = devices.check_gpu_copies([0, 1, 2]), "CUDA error: peer access is not supported"
    assert states.pop("0 to 2") == "ok"
    assert states.pop("2 to 0") == "corrupted"
    assert states == dict.fromkeys(("0 to 1", "1 to 0", "1 to 2", "2 to 1"), refused)
