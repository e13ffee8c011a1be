"""The cache changes no bit of any batch or of any weight, and after the first epoch nothing is decoded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import new_loop

from alexnet_cli.core import cache, devices
from alexnet_cli.core.cache import Cache, Where, remembering
from alexnet_cli.core.loader import Loader, training_batches
from alexnet_cli.core.placement import Placement
from alexnet_cli.core.runs import Run
from alexnet_cli.core.shards import open_dataset
from alexnet_cli.errors import MissingError
from alexnet_cli.recipe import TINY


def counted(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are decoded from now on."""
    seen: list[int] = []
    original = loader.split.jpeg

    def jpeg(row: int) -> memoryview:
        seen.append(row)
        return original(row)

    monkeypatch.setattr(loader.split, "jpeg", jpeg)
    return seen


def test_the_same_batches_and_each_picture_is_decoded_once(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_dataset(prepared).split("train")
    with Loader(split, 7, 2) as plain, Loader(open_dataset(prepared).split("train"), 7, 2) as under:
        decoded, kept = counted(under, monkeypatch), Cache(under)
        for epoch in (1, 2, 3):  # six of seven, six rows left over each time: the second epoch lacks some
            plan = training_batches(len(split), 7, 0, epoch)
            for a, b, rows in zip(plain.batches(plan), kept.batches(plan), plan, strict=True):
                np.testing.assert_array_equal(a.images.numpy(), b.images.numpy())
                np.testing.assert_array_equal(a.labels.numpy(), b.labels.numpy())
                np.testing.assert_array_equal(b.rows, rows)
    assert len(decoded) == len(set(decoded))


def test_left_early_it_holds_what_it_gave_out(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_dataset(prepared).split("train")
    plan = training_batches(len(split), 8, 0, 1)
    with Loader(split, 8, 2) as loader:
        kept = Cache(loader)
        steps = kept.batches(plan)
        first = next(steps).images.clone()
        steps.close()
        assert kept.held.sum() == 8
        decoded = counted(loader, monkeypatch)
        np.testing.assert_array_equal(next(kept.batches(plan[:1])).images.numpy(), first.numpy())
        assert decoded == []


def test_training_ends_with_the_same_weights(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path))
    recipe = replace(TINY, width=1 / 16, batch_size=14, epochs=2, precision="fp32")
    place, weights = Placement(torch.device("cpu"), "CPU", "fp32"), []
    modes: tuple[Where, ...] = ("none", "device")
    for where in modes:
        training = new_loop(recipe, open_dataset(prepared), Run.create(where, recipe, {}), place, 1, where)
        list(training.fit())
        weights.append([p.detach().clone() for p in training.trainer.network.parameters()])
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


def test_where_it_is_used(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Loader(open_dataset(prepared).split("train"), 8, 1) as loader:
        assert remembering(loader, "none") is loader
        assert isinstance(remembering(loader, "auto"), Cache)
        assert isinstance(remembering(loader, "device"), Cache)
        assert remembering(loader, "auto", 10**6) is loader  # as many processes as that take more
        monkeypatch.setattr(cache, "_free", lambda device: 4 * 48 * cache.BYTES - 1)
        assert remembering(loader, "auto") is loader  # a quarter is for it at most
        assert isinstance(remembering(loader, "device"), Cache)
        monkeypatch.setattr(cache, "_free", lambda device: 48 * cache.BYTES - 1)
        with pytest.raises(MissingError, match="--cache device: 48 decoded pictures"):
            remembering(loader, "device")
        monkeypatch.setattr(cache, "_free", lambda device: None)
        assert remembering(loader, "auto") is loader
        assert isinstance(remembering(loader, "device"), Cache)


def test_what_torch_keeps_of_a_gpu_for_itself_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {True: 5_000, False: 9_000}  # while torch keeps what an earlier training has left, and afterwards
    kept = [True]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[bool(kept)], 10_000))
    assert cache._free(torch.device("cuda", 0)) == 9_000


def test_a_container_may_have_less_memory_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(devices, "CONTAINER_MEMORY", ((str(limit), str(used)),))
    whole = devices.free_memory()
    if whole is None:
        pytest.skip("this system does not say how much memory is free")
    assert whole > 1 << 27
    used.write_text("1000\n")
    limit.write_text("max\n")
    assert (devices.free_memory() or 0) > 1 << 27  # "max" is no number
    limit.write_text(f"{1 << 26}\n")
    assert devices.free_memory() == (1 << 26) - 1000
