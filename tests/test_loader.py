"""The loader: whose turn it is, exactly once, independent of threads and ranks; damage has a name."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from alexnet_cli.core.loader import Loader, all_batches, epoch_order, steps_per_epoch, training_batches
from alexnet_cli.core.shards import ROW, Dataset, index_name, open_dataset
from alexnet_cli.core.sources import ClassName
from alexnet_cli.errors import DataError


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


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    assert [len(batch) for batch in training_batches(5, 128, 0, 1)] == [5]


def test_every_validation_row_once_also_when_it_does_not_divide() -> None:
    assert np.concatenate(all_batches(103, 16)).tolist() == list(range(103))


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_hold_the_pictures_of_their_rows(prepared: Path, threads: int) -> None:
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


def test_leaving_early_and_starting_again(prepared: Path) -> None:
    split = open_dataset(prepared).split("train")
    with Loader(split, 4, 2) as loader:
        for batches_taken, batch in enumerate(loader.batches(all_batches(len(split), 4))):
            first = batch.images.clone()
            if batches_taken == 0:
                break
        again = next(iter(loader.batches(all_batches(len(split), 4))))
        np.testing.assert_array_equal(first.numpy(), again.images.numpy())


def test_a_damaged_picture_is_named(prepared: Path, tmp_path: Path) -> None:
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


def test_a_picture_of_another_size_is_named(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_dataset(prepared).split("train")
    small = memoryview(simplejpeg.encode_jpeg(np.zeros((100, 256, 3), np.uint8)))
    monkeypatch.setattr(split, "jpeg", lambda row: small)
    with Loader(split, 8, 1) as loader, pytest.raises(DataError, match="256x100, not 256x256"):
        next(loader.batches(all_batches(8, 8)))


def test_an_early_leaver_s_threads_do_not_write_into_the_next_batches(prepared: Path) -> None:
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


def test_a_set_as_large_as_imagenet_opens_at_once(tmp_path: Path) -> None:
    rows, none = 1_281_167, np.zeros(0, np.float32)
    table = np.zeros(rows, ROW)
    table["label"] = np.arange(rows) % 1000
    np.save(tmp_path / index_name("train"), table)
    (tmp_path / "empty.tar").touch()
    record = {"splits": {"train": {"images": rows, "shards": [{"file": "empty.tar", "bytes": 0}]}}}
    dataset = Dataset(tmp_path, "", "", (ClassName("any"),) * 1000, none, none, none, record)
    assert dataset.split("train").labels[1_000_999] == 999
    assert shortest(lambda: dataset.split("train")) < 0.2
    assert shortest(lambda: training_batches(rows, 128, 0, 1)) < 0.1


@pytest.mark.parametrize(("field", "value"), [("shard", 99), ("label", 4_000_000_000)])
def test_an_index_that_leads_nowhere_is_named(prepared: Path, tmp_path: Path, field: str, value: int) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    file = tmp_path / "copy" / index_name("train")
    rows = np.load(file)
    rows[field][3] = value
    np.save(file, rows)
    with pytest.raises(DataError, match="a row names a shard or a class that does not exist"):
        open_dataset(tmp_path / "copy").split("train")


def shortest(work: Callable[[], object]) -> float:
    """Seconds of processor of the fastest of five, which a busy machine does not change much."""
    found = []
    for _ in range(5):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)
