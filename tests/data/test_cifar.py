"""CIFAR-10's batches, written here as its authors' Python 2 wrote them, and byte by byte as its page describes them."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alexnet_cli.cli import main
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.data.sources import SourceDataset, detect_source
from alexnet_cli.errors import DataError

NAMES = ["airplane", "automobile", "bird"]
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
PER_BATCH = 4
LABELS = np.random.default_rng(1).integers(0, len(NAMES), (len(BATCHES), PER_BATCH)).tolist()
NOISE = np.random.default_rng(2).integers(0, 256, (len(BATCHES), PER_BATCH, 3072), np.uint8)
PIXELS = NOISE // np.repeat(np.array([1, 2, 4], np.uint8), 1024)  # much red, little blue


def save_str(pickler: Any, value: str | bytes) -> None:
    """Write text and bytes as a str of Python 2."""
    data = value.encode("latin-1") if isinstance(value, str) else value
    is_short = len(data) < 256
    pickler.write(b"U" + bytes([len(data)]) if is_short else b"T" + struct.pack("<i", len(data)))
    pickler.write(data)
    pickler.memoize(value)


def save_reconstruct(pickler: Any, function: object) -> None:
    """Write numpy's function by its name of that time."""
    pickler.write(b"cnumpy.core.multiarray\n_reconstruct\n")
    pickler.memoize(function)


def dump(file: Path, value: object) -> None:
    """Pickle as Python 2 did with protocol 2."""
    reconstruct = np.empty(0).__reduce__()[0]
    changed = {str: save_str, bytes: save_str, type(reconstruct): save_reconstruct}
    with file.open("wb") as stream:
        pickler: Any = pickle._Pickler(stream, protocol=2)
        pickler.dispatch = pickler.dispatch | changed
        pickler.dump(value)


def python_batch(number: int, **changes: Any) -> dict[str, Any]:
    filenames = [f"picture_s_{row:06}.png" for row in range(PER_BATCH)]
    batch = {"batch_label": BATCHES[number], "labels": LABELS[number], "data": PIXELS[number], "filenames": filenames}
    return batch | changes


@pytest.fixture
def python_batches(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    dump(folder / "batches.meta", {"num_cases_per_batch": PER_BATCH, "label_names": NAMES, "num_vis": 3072})
    for number, name in enumerate(BATCHES):
        dump(folder / name, python_batch(number))
    return folder


@pytest.fixture
def binary_batches(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    for number, name in enumerate(BATCHES):
        rows = (bytes([LABELS[number][row]]) + PIXELS[number, row].tobytes() for row in range(PER_BATCH))
        (folder / f"{name}.bin").write_bytes(b"".join(rows))
    return folder


def pixels_of(source: SourceDataset, split: str) -> list[Any]:
    return [np.asarray(Image.open(io.BytesIO(image.read()))) for image in source.splits[split]]


def test_python_batches_are_what_the_recipe_of_their_page_reads(python_batches: Path) -> None:
    source = detect_source(python_batches)
    assert [name.name for name in source.classes] == NAMES
    read = {}
    for name in BATCHES:
        with (python_batches / name).open("rb") as stream:
            read[name] = pickle.load(stream, encoding="bytes")
    for split, batches in (("train", BATCHES[:5]), ("val", BATCHES[5:])):
        assert list(source.splits[split].labels) == [label for name in batches for label in read[name][b"labels"]]
        planes = np.concatenate([read[name][b"data"] for name in batches]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(pixels_of(source, split), planes.transpose(0, 2, 3, 1))
    assert source.splits["train"].name(5) == "data_batch_2/00001"


def test_an_array_by_columns_is_read_by_columns(python_batches: Path) -> None:
    dump(python_batches / BATCHES[0], python_batch(0, data=np.asfortranarray(PIXELS[0])))
    planes = PIXELS[0].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(pixels_of(detect_source(python_batches), "train")[:PER_BATCH], planes)


def test_a_binary_image_is_its_label_and_three_planes(binary_batches: Path) -> None:
    red, green, blue = bytes(range(256)) * 4, bytes([7]) * 1024, bytes([9]) * 1024
    (binary_batches / "data_batch_1.bin").write_bytes(b"\x02" + red + green + blue)
    source = detect_source(binary_batches)
    assert source.splits["train"].labels[0] == 2
    assert [c.name for c in source.classes] == NAMES
    image = pixels_of(source, "train")[0]
    assert image[0, 31].tolist() == [31, 7, 9]
    assert image[1, 0].tolist() == [32, 7, 9]


def test_both_kinds_of_batches_are_the_same_data(python_batches: Path, binary_batches: Path) -> None:
    from_python, from_binary = detect_source(python_batches), detect_source(binary_batches)
    assert from_python.fingerprint() == from_binary.fingerprint()
    for split, count in (("train", 5 * PER_BATCH), ("val", PER_BATCH)):
        assert len(from_python.splits[split]) == count
        np.testing.assert_array_equal(pixels_of(from_python, split), pixels_of(from_binary, split))


def test_a_pickle_that_names_a_function_is_refused(python_batches: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    hostile = b"\x80\x02cos\nmkdir\nX" + struct.pack("<i", len(str(made))) + str(made).encode() + b"\x85R."
    pickle.loads(hostile)
    made.rmdir()  # it was made: such a pickle does run
    (python_batches / "test_batch").write_bytes(hostile)
    with pytest.raises(DataError, match=r"test_batch cannot be used: it names os\.mkdir"):
        detect_source(python_batches)
    assert not made.exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing"),
        (cut, "pickle data was truncated"),
        (lambda file: dump(file, python_batch(2, labels=[0, 1, 3, 0])), "label 3, but there are 3 classes"),
        (lambda file: dump(file, python_batch(2, labels=[0, 1])), "with N labels"),
        (lambda file: dump(file, python_batch(2, data=PIXELS[2].reshape(-1, 1536))), "shape Nx3072"),
        (lambda file: dump(file, python_batch(2, data=PIXELS[2].astype(">i2"))), "must be uint8"),
        (lambda file: dump(file, {"data": PIXELS[2]}), "no dictionary with data and labels"),
    ],
)
def test_a_bad_python_batch_is_named(python_batches: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(python_batches / "data_batch_3")
    with pytest.raises(DataError, match=rf"data_batch_3 .*{message}") as error:
        detect_source(python_batches)
    assert error.value.hint == "unpack cifar-10-python.tar.gz again"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("data_batch_3.bin", Path.unlink, "is missing"),
        ("data_batch_3.bin", cut, "its 5,000 bytes are not a multiple of 3,073"),
        ("data_batch_3.bin", lambda file: file.write_bytes(bytes([3]) * 3073), "label 3, but there are 3 classes"),
        ("batches.meta.txt", lambda file: file.write_text("cat\ncat\n"), "does not name two or more classes"),
    ],
)
def test_a_bad_binary_file_is_named(
    binary_batches: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(binary_batches / name)
    with pytest.raises(DataError, match=rf"{name} .*{message}") as error:
        detect_source(binary_batches)
    assert error.value.hint == "unpack cifar-10-binary.tar.gz again"


def test_prepare_takes_the_folder_that_contains_them(
    python_batches: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    with pytest.raises(SystemExit) as end:
        main(["prepare", str(python_batches.parent), "-o", "out", "--json"])
    output = capsys.readouterr()
    assert end.value.code == 0, output.err
    assert json.loads(output.out)["images"] == {"train": 5 * PER_BATCH, "val": PER_BATCH}
    assert "CIFAR-10, python batches" in output.err
    dataset = open_dataset(Path("out"))
    mean = PIXELS[:5].reshape(-1, 3, 1024).mean(axis=(0, 2))
    np.testing.assert_allclose(dataset.mean_rgb, mean, atol=4)
