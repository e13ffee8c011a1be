"""ImageNet in miniature: the same pictures in each layout that it is distributed in."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from alexnet_cli.core.classes import ClassName

DEVKIT = "ILSVRC2012_devkit_t12"
# Sorted wnids, the words of each, and an ILSVRC2012_ID that follows another order.
CLASSES = {
    "n01440764": ("tench, Tinca tinca", 3),
    "n02012849": ("crane", 1),
    "n02123045": ("tabby, tabby cat", 4),
    "n03126707": ("crane, derrick", 2),
}
NAMES = (
    ClassName("tench", "n01440764"),
    ClassName("crane", "n02012849"),
    ClassName("tabby", "n02123045"),
    ClassName("crane, derrick", "n03126707"),
)
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40))
VAL = ("n03126707", "n01440764", "n02123045", "n02012849", "n03126707")  # classes of its pictures, in their order


def jpeg(label: int, number: int) -> bytes:
    """A picture that tells its class by its colour and its number by its shade."""
    buffer = io.BytesIO()
    colour = np.clip(np.array(COLOURS[label]) + number * 4, 0, 255).astype(np.uint8)
    Image.new("RGB", (300, 260), tuple(map(int, colour))).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def drawn() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Training pictures by WNID/FILE and validation pictures by file name, drawn."""
    wnids = sorted(CLASSES)
    train = {f"{w}/{w}_{i}.JPEG": jpeg(label, i) for label, w in enumerate(wnids) for i in range(3)}
    val = {val_name(i): jpeg(wnids.index(w), 5 + i) for i, w in enumerate(VAL, 1)}
    return train, val


def real(samples: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The same names, with real pictures of any class inside."""
    files = sorted(samples.rglob("*.JPEG"))
    train, val = drawn()
    data = iter(file.read_bytes() for file in files[:: len(files) // (len(train) + len(val))])
    return {name: next(data) for name in train}, {name: next(data) for name in val}


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def write(root: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def train_archive(path: Path, train: Mapping[str, bytes], order: int = -1) -> Path:
    """A tar of WNID.tar, the classes in an order that is not the sorted one."""
    inner = {}
    for file in class_archives(path.parent, train)[::order]:
        inner[file.name] = file.read_bytes()
        file.unlink()
    return tar(path, inner)


def class_archives(root: Path, train: Mapping[str, bytes]) -> list[Path]:
    """WNID.tar, sorted: what unpacking the training archive gives."""
    wnids = sorted({name.split("/")[0] for name in train})
    files = [{name.split("/")[1]: data for name, data in train.items() if name.startswith(w)} for w in wnids]
    return [tar(root / f"{wnid}.tar", inside) for wnid, inside in zip(wnids, files, strict=True)]


def devkit(root: Path, packed: bool = True, truth: tuple[str, ...] = VAL) -> Path:
    """meta.mat with a group of classes too, and the ground truth by ILSVRC2012_ID."""
    rows = [(float(identity), wnid, words, 0.0) for wnid, (words, identity) in CLASSES.items()]
    rows = [*sorted(rows), (1001.0, "n00001740", "entity", 4.0)]
    keys = ("ILSVRC2012_ID", "WNID", "words", "num_children")
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, [(key, object) for key in keys])[:, None]}, do_compression=True)
    files = {
        f"{DEVKIT}/readme.txt": b"Read me.",
        f"{DEVKIT}/data/meta.mat": meta.getvalue(),
        f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{CLASSES[w][1]}\n" for w in truth).encode(),
    }
    if packed:
        return tar(root / f"{DEVKIT}.tar.gz", files, "w:gz")
    write(root, files)
    return root / DEVKIT


def archives(root: Path, train: Mapping[str, bytes], val: Mapping[str, bytes]) -> None:
    train_archive(root / "ILSVRC2012_img_train.tar", train)
    tar(root / "ILSVRC2012_img_val.tar", dict(sorted(val.items(), reverse=True)))
    devkit(root)


def unpacked_once(root: Path, train: Mapping[str, bytes], val: Mapping[str, bytes]) -> None:
    class_archives(root / "train", train)
    write(root / "val", val)
    devkit(root)


def archive_and_folders(root: Path, train: Mapping[str, bytes], val: Mapping[str, bytes]) -> None:
    torchvision(root, {}, val)
    train_archive(root / "ILSVRC2012_img_train.tar", train)
    devkit(root)


def flat(root: Path, train: Mapping[str, bytes], val: Mapping[str, bytes]) -> None:
    write(root / "train", train)
    write(root / "val", val)
    devkit(root, packed=False)


def torchvision(root: Path, train: Mapping[str, bytes], val: Mapping[str, bytes]) -> None:
    write(root / "train", train)
    write(root / "val", {f"{w}/{name}": val[name] for w, name in zip(VAL, sorted(val), strict=True)})
    lines = [f"{wnid}\t{words}" for wnid, (words, _) in CLASSES.items()]
    (root / "words.txt").write_text("\n".join(lines))


def kaggle(root: Path, train: Mapping[str, bytes], val: Mapping[str, bytes]) -> None:
    tree = root / "ILSVRC" / "Data" / "CLS-LOC"
    write(tree / "train", train)
    write(tree / "val", val)
    write(tree / "test", {"ILSVRC2012_test_00000001.JPEG": next(iter(val.values()))})
    rows = [f"ILSVRC2012_val_{i:08d},{w} 85 1 499 272 {w} 3 4 5 6 " for i, w in enumerate(VAL, 1)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n")
    lines = [f"{wnid} {words}" for wnid, (words, _) in CLASSES.items()]
    (root / "LOC_synset_mapping.txt").write_text("\n".join(lines) + "\n")


def tiny(root: Path, train: Mapping[str, bytes], val: Mapping[str, bytes]) -> None:
    write(root / "train", {name.replace("/", "/images/"): data for name, data in train.items()})
    write(root / "val" / "images", val)
    lines = [f"{name}\t{w}\t0\t0\t62\t62" for w, name in zip(VAL, sorted(val), strict=True)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines))
    (root / "words.txt").write_text("\n".join(f"{wnid}\t{words}" for wnid, (words, _) in CLASSES.items()))


def fresh(root: Path) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    return root
