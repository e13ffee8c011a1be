"""The loader: every row once, whatever the threads and ranks; errors name the image.

The cache changes no bit of any batch or of any weight, and after the first epoch nothing is decoded.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from alexnet_cli.core import devices
from alexnet_cli.core.data import loader as loader_module
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.loader import (
    CachedLoader,
    CacheMode,
    Loader,
    all_batches,
    cache_decoded,
    epoch_order,
    steps_per_epoch,
    training_batches,
)
from alexnet_cli.core.data.shards import ROW, Dataset, index_name, open_dataset
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import DataError, MissingError
from alexnet_cli.recipe import TINY
from trainings import new_loop


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    first, second, other_seed = epoch_order(1000, 0, 1), epoch_order(1000, 0, 2), epoch_order(1000, 1, 1)
    assert sorted(first.tolist()) == list(range(1000))
    np.testing.assert_array_equal(first, epoch_order(1000, 0, 1))
    assert (first != second).mean() > 0.9
    assert (first != other_seed).mean() > 0.9


def test_ranks_share_each_batch_without_overlap() -> None:
    whole = training_batches(50, 8, seed=0, epoch=3)
    parts = [training_batches(50, 8, seed=0, epoch=3, rank=rank, ranks=3) for rank in range(3)]
    assert len(whole) == steps_per_epoch(50, 8) == 6
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), batch)


def test_position_within_an_epoch_is_exact() -> None:
    whole, rest = training_batches(50, 8, 0, 2), training_batches(50, 8, 0, 2, first_step=4)
    for a, b in zip(whole[4:], rest, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_data_set_smaller_than_a_batch_is_one_batch() -> None:
    assert [len(batch) for batch in training_batches(5, 128, 0, 1)] == [5]


def test_all_batches_visit_every_row_once() -> None:
    assert np.concatenate(all_batches(103, 16)).tolist() == list(range(103))


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_hold_the_images_of_their_rows(prepared: Path, threads: int) -> None:
    split = open_dataset(prepared).split("train")
    plan = training_batches(len(split), 7, 0, 1)
    with Loader(split, 7, threads) as loader:
        seen = 0
        for batch, rows in zip(loader.batches(plan), plan, strict=True):
            np.testing.assert_array_equal(batch.rows, rows)
            np.testing.assert_array_equal(batch.labels.numpy(), split.labels[rows])
            for image, row in zip(batch.images.numpy(), rows, strict=True):
                np.testing.assert_array_equal(image, simplejpeg.decode_jpeg(bytes(split.jpeg(int(row))), "RGB"))
            seen += len(rows)
    assert seen == 6 * 7


def test_batches_can_be_abandoned_and_started_again(prepared: Path) -> None:
    split = open_dataset(prepared).split("train")
    with Loader(split, 4, 2) as loader:
        for batches_taken, batch in enumerate(loader.batches(all_batches(len(split), 4))):
            first = batch.images.clone()
            if batches_taken == 0:
                break
        again = next(iter(loader.batches(all_batches(len(split), 4))))
        np.testing.assert_array_equal(first.numpy(), again.images.numpy())


def test_the_message_names_a_damaged_image(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    dataset = open_dataset(copy)
    split = dataset.split("train")
    where = bytes(split.jpeg(5))
    shard = copy / "train-000000.tar"
    content = shard.read_bytes()
    place = content.index(where)
    shard.write_bytes(content[: place + 200] + bytes(100) + content[place + 300 :])
    damaged = open_dataset(copy).split("train")
    with Loader(damaged, 8, 2) as loader, pytest.raises(DataError) as caught:
        for _ in loader.batches(all_batches(len(damaged), 8)):
            pass
    assert damaged.key(5) in caught.value.what


def test_after_damage_the_loader_still_works(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_dataset(prepared).split("train")
    original = split.jpeg
    plan = all_batches(len(split), 8)
    with Loader(split, 8, 3) as loader:
        monkeypatch.setattr(split, "jpeg", lambda row: original(row)[:900] if row == 11 else original(row))
        with pytest.raises(DataError, match="row 11"):
            list(loader.batches(plan))
        monkeypatch.setattr(split, "jpeg", original)
        for batch in loader.batches(plan):
            for image, row in zip(batch.images.numpy(), batch.rows, strict=True):
                np.testing.assert_array_equal(image, simplejpeg.decode_jpeg(bytes(original(int(row))), "RGB"))


def test_an_image_of_another_size_is_refused(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_dataset(prepared).split("train")
    small = memoryview(simplejpeg.encode_jpeg(np.zeros((100, 256, 3), np.uint8)))
    monkeypatch.setattr(split, "jpeg", lambda row: small)
    with Loader(split, 8, 1) as loader, pytest.raises(DataError, match="256x100, not 256x256"):
        next(loader.batches(all_batches(8, 8)))


def test_abandoned_batches_do_not_write_into_the_next_ones(prepared: Path) -> None:
    split = open_dataset(prepared).split("train")
    truth = [simplejpeg.decode_jpeg(bytes(split.jpeg(row)), "RGB") for row in range(len(split))]
    with Loader(split, 8, 3) as loader:
        for round_ in range(10):
            left = loader.batches(training_batches(len(split), 8, 0, round_ + 1))
            next(left)
            left.close()
            for batch in loader.batches(all_batches(len(split), 8)):
                for image, row in zip(batch.images.numpy(), batch.rows, strict=True):
                    np.testing.assert_array_equal(image, truth[row])


def test_a_data_set_as_large_as_imagenet_opens_fast(tmp_path: Path) -> None:
    rows, none = 1_281_167, np.zeros(0, np.float32)
    table = np.zeros(rows, ROW)
    table["label"] = np.arange(rows) % 1000
    np.save(tmp_path / index_name("train"), table)
    (tmp_path / "empty.tar").touch()
    record = {"splits": {"train": {"images": rows, "shards": [{"file": "empty.tar", "bytes": 0}]}}}
    dataset = Dataset(tmp_path, "", "", (ClassName("any"),) * 1000, none, none, none, record)
    assert dataset.split("train").labels[1_000_999] == 999
    assert shortest_time(lambda: dataset.split("train")) < 0.2
    assert shortest_time(lambda: training_batches(rows, 128, 0, 1)) < 0.1


@pytest.mark.parametrize(("field", "value"), [("shard", 99), ("label", 4_000_000_000)])
def test_an_index_with_wrong_rows_is_refused(prepared: Path, tmp_path: Path, field: str, value: int) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    file = tmp_path / "copy" / index_name("train")
    rows = np.load(file)
    rows[field][3] = value
    np.save(file, rows)
    with pytest.raises(DataError, match="a row names a shard or a class that does not exist"):
        open_dataset(tmp_path / "copy").split("train")


def shortest_time(work: Callable[[], object]) -> float:
    """Least CPU time of five runs, in seconds."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def record_decoded_rows(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that collects the rows decoded from now on."""
    seen: list[int] = []
    original = loader.split.jpeg

    def jpeg(row: int) -> memoryview:
        seen.append(row)
        return original(row)

    monkeypatch.setattr(loader.split, "jpeg", jpeg)
    return seen


def test_cached_batches_are_equal_and_each_image_is_decoded_once(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = open_dataset(prepared).split("train")
    with Loader(split, 7, 2) as plain, Loader(open_dataset(prepared).split("train"), 7, 2) as under:
        decoded, kept = record_decoded_rows(under, monkeypatch), CachedLoader(under)
        for epoch in (1, 2, 3):  # six of seven, six rows left over each time: the second epoch lacks some
            plan = training_batches(len(split), 7, 0, epoch)
            for a, b, rows in zip(plain.batches(plan), kept.batches(plan), plan, strict=True):
                np.testing.assert_array_equal(a.images.numpy(), b.images.numpy())
                np.testing.assert_array_equal(a.labels.numpy(), b.labels.numpy())
                np.testing.assert_array_equal(b.rows, rows)
    assert len(decoded) == len(set(decoded))


def test_abandoned_batches_stay_cached(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_dataset(prepared).split("train")
    plan = training_batches(len(split), 8, 0, 1)
    with Loader(split, 8, 2) as loader:
        kept = CachedLoader(loader)
        steps = kept.batches(plan)
        first = next(steps).images.clone()
        steps.close()
        assert kept.is_cached.sum() == 8
        decoded = record_decoded_rows(loader, monkeypatch)
        np.testing.assert_array_equal(next(kept.batches(plan[:1])).images.numpy(), first.numpy())
        assert decoded == []


def test_training_with_a_cache_gives_the_same_weights(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path))
    recipe = replace(TINY, width=1 / 16, batch_size=14, epochs=2, precision="fp32")
    place, weights = Placement(torch.device("cpu"), "CPU", "fp32"), []
    modes: tuple[CacheMode, ...] = ("none", "device")
    for where in modes:
        loop = new_loop(recipe, open_dataset(prepared), Run.create(where, recipe, {}), place, 1, where)
        list(loop.fit())
        weights.append([p.detach().clone() for p in loop.trainer.network.parameters()])
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)


def test_when_the_cache_is_used(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Loader(open_dataset(prepared).split("train"), 8, 1) as loader:
        assert cache_decoded(loader, "none") is loader
        assert isinstance(cache_decoded(loader, "auto"), CachedLoader)
        assert isinstance(cache_decoded(loader, "device"), CachedLoader)
        assert cache_decoded(loader, "auto", 10**6) is loader  # as many processes as that take more
        monkeypatch.setattr(loader_module, "_free_bytes", lambda device: 4 * 48 * loader_module.IMAGE_BYTES - 1)
        assert cache_decoded(loader, "auto") is loader  # a quarter is for it at most
        assert isinstance(cache_decoded(loader, "device"), CachedLoader)
        monkeypatch.setattr(loader_module, "_free_bytes", lambda device: 48 * loader_module.IMAGE_BYTES - 1)
        with pytest.raises(MissingError, match="--cache device: 48 decoded images"):
            cache_decoded(loader, "device")
        monkeypatch.setattr(loader_module, "_free_bytes", lambda device: None)
        assert cache_decoded(loader, "auto") is loader
        assert isinstance(cache_decoded(loader, "device"), CachedLoader)


class LateStream:
    """A CUDA stream whose work runs as late as allowed: when somebody waits for an event after it."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.work: list[Callable[[], object]] = []

    def run(self, count: int | None = None) -> None:
        """Run the first `count` pieces of work; those that ran before do nothing."""
        count = len(self.work) if count is None else count
        for i in range(count):
            self.work[i]()
            self.work[i] = lambda: None

    def record_event(self) -> LateEvent:
        return LateEvent(self, len(self.work))

    def wait_event(self, event: LateEvent) -> None:
        self.work.append(event.synchronize)


@dataclass
class LateEvent:
    stream: LateStream
    count: int

    def synchronize(self) -> None:
        self.stream.run(self.count)


class PinnedTensor(torch.Tensor):
    """A pinned buffer: a copy to the device is work of the current stream."""

    current: LateStream
    in_use: list[Any]
    """The stream that each copy is used on."""

    def to(self, *_: object, **__: object) -> torch.Tensor:
        copy = torch.zeros(self.shape, dtype=self.dtype)
        PinnedTensor.current.work.append(lambda: copy.copy_(self.as_subclass(torch.Tensor)))
        copy.record_stream = PinnedTensor.in_use.append  # type: ignore[assignment, method-assign]
        return copy


def test_batches_on_a_gpu_wait_for_their_copies(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is pretended: its copies and its computing run as late as allowed, so that a missing wait shows."""
    compute, empty = LateStream(), torch.empty
    PinnedTensor.current, PinnedTensor.in_use = compute, []

    @contextmanager
    def use_stream(stream: LateStream) -> Iterator[None]:
        PinnedTensor.current = stream
        yield
        PinnedTensor.current = compute

    def pinned_empty(shape: tuple[int, ...], *, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(shape, **options).as_subclass(PinnedTensor) if pin_memory else empty(shape, **options)

    split = open_dataset(prepared).split("train")
    plan, seen = all_batches(len(split), 7) * 2, list[torch.Tensor]()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", pinned_empty)
        patch.setattr(torch.cuda, "Stream", LateStream)
        patch.setattr(torch.cuda, "stream", use_stream)
        patch.setattr(torch.cuda, "current_stream", lambda device: compute)
        with Loader(split, 7, 2, torch.device("cuda", 0)) as loader:
            for batch in loader.batches(plan):
                compute.work.append(lambda images=batch.images: seen.append(images.clone()))  # type: ignore[misc]
    assert not seen
    compute.run()
    with Loader(split, 7, 2) as plain:
        for batch, images in zip(plain.batches(plan), seen, strict=True):
            assert torch.equal(batch.images, images)
    assert PinnedTensor.in_use == [compute] * len(plan)


def test_memory_cached_by_torch_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {True: 5_000, False: 9_000}  # while torch keeps what an earlier training has left, and afterwards
    kept = [True]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[bool(kept)], 10_000))
    assert loader_module._free_bytes(torch.device("cuda", 0)) == 9_000


def test_available_memory_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(devices, "CONTAINER_MEMORY", ((str(limit), str(used)),))
    whole = devices.available_memory()
    if whole is None:
        pytest.skip("this system does not say how much memory is free")
    assert whole > 1 << 27
    used.write_text("1000\n")
    limit.write_text("max\n")
    assert (devices.available_memory() or 0) > 1 << 27  # "max" is no number
    limit.write_text(f"{1 << 26}\n")
    assert devices.available_memory() == (1 << 26) - 1000
