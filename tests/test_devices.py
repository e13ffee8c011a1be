"""Facts about CPU and GPU."""

from __future__ import annotations

import pytest

from alexnet_cli.core import devices


@pytest.mark.parametrize(("present", "typed"), [(True, "alexnet train"), (False, "alexnet train --recipe tiny")])
def test_train_command_suits_the_machine(present: bool, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_gpu", lambda: present)
    assert devices.suggest_train_command() == typed
