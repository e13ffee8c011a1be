"""Each layout is written here, file by file, and must be detected with the right labels."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.sources import SourceDataset, detect_source
from alexnet_cli.errors import DataError, UsageError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode(errors="surrogateescape"))
    return root


def listed(source: SourceDataset, split: str) -> list[tuple[str, int]]:
    return [(item.name, item.label) for item in source.splits[split]]


def test_train_and_val_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/b/2.jpg", "train/b/1.JPEG", "train/a/deep/er/x.png", "val/b/9.jpg", "train/b/notes.txt")
    source = detect_source(tmp_path)
    assert source.classes == (ClassName("a"), ClassName("b"))
    assert listed(source, "train") == [("train/a/deep/er/x.png", 0), ("train/b/1.JPEG", 1), ("train/b/2.jpg", 1)]
    # Class a has no validation image; b keeps its label.
    assert listed(source, "val") == [("val/b/9.jpg", 1)]
    assert source.splits["val"][0].read() == b"val/b/9.jpg"
    assert source.layout == "train/CLASS and val/CLASS"
    assert source.notes == ("left out in train/ (no image suffix): .txt 1",)


def test_wordnet_names(tmp_path: Path) -> None:
    wnids = ("n02123045", "n02012849", "n03126707", "n00000001")
    touch(tmp_path, *(f"train/{w}/1.jpg" for w in wnids), *(f"val/{w}/1.jpg" for w in wnids))
    (tmp_path / "words.txt").write_text("n02012849\tcrane\nn02123045\ttabby, tabby cat\nn03126707\tcrane, derrick\n")
    assert detect_source(tmp_path).classes == (
        ClassName("n00000001", "n00000001"),
        ClassName("crane", "n02012849"),
        ClassName("tabby", "n02123045"),
        ClassName("crane, derrick", "n03126707"),
    )


def test_wnids_among_plain_names_are_named_too(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in ("cats", "n01440764", "n01443537") for i in (1, 2)))
    source = detect_source(tmp_path)
    assert [c.name for c in source.classes] == ["cats", "tench", "goldfish"]
    assert [c.wnid for c in source.classes] == [None, "n01440764", "n01443537"]
    assert source.notes[0] == "2 of 3 classes are named as in torchvision's list of ILSVRC 2012"
    touch(tmp_path, "goldfish/1.jpg")  # that name is taken
    source = detect_source(tmp_path)
    assert [c.name for c in source.classes] == ["cats", "goldfish", "tench", "n01443537"]
    assert source.notes[0] == "1 of 4 classes are named as in torchvision's list of ILSVRC 2012"
    assert source.notes[1].startswith("1 of 4 classes have only a wnid; name them in words.txt")


def test_one_folder_per_class_is_split_by_name(tmp_path: Path) -> None:
    sizes = {"few": 1, "two": 2, "many": 40}
    touch(tmp_path, *(f"{name}/{i}.jpg" for name, size in sizes.items() for i in range(size)))
    source = detect_source(tmp_path)
    assert Counter(label for _, label in listed(source, "val")) == {1: 4, 2: 1}
    everything = sorted(listed(source, "train") + listed(source, "val"))
    assert everything == sorted((f"{n}/{i}.jpg", sorted(sizes).index(n)) for n, s in sizes.items() for i in range(s))
    assert listed(detect_source(tmp_path), "val") == listed(source, "val")
    half = {name for name, _ in listed(detect_source(tmp_path, 0.5), "val")}
    assert {name for name, _ in listed(source, "val")} < half
    assert not listed(detect_source(tmp_path, 0.0), "val")


def test_tiny_imagenet_takes_labels_from_the_annotations(tmp_path: Path) -> None:
    touch(tmp_path, "train/n2/images/n2_0.JPEG", "train/n1/images/n1_0.JPEG", "train/n1/n1_boxes.txt")
    touch(tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG")
    annotations = tmp_path / "val/val_annotations.txt"
    annotations.write_text("val_1.JPEG\tn1\t0\t32\t44\t62\nval_0.JPEG\tn2\t0\t0\t63\t63\n")
    source = detect_source(tmp_path)
    assert listed(source, "train") == [("train/n1/images/n1_0.JPEG", 0), ("train/n2/images/n2_0.JPEG", 1)]
    assert listed(source, "val") == [("val/images/val_0.JPEG", 1), ("val/images/val_1.JPEG", 0)]
    assert source.layout.startswith("Tiny ImageNet")
    annotations.write_text("val_1.JPEG\tn1\t0\t32\t44\t62\n")
    with pytest.raises(DataError, match="no line for val/images/val_0"):
        detect_source(tmp_path)
    annotations.write_text("val_1.JPEG\tn3\n")
    with pytest.raises(DataError, match="line 1: class 'n3' has no images"):
        detect_source(tmp_path)


def test_odd_names_and_links(tmp_path: Path) -> None:
    odd = ["a b.jpg", "new\nline.jpg", "dots.in.name.jpg", "\udcff\udcfe.jpg", "ÄÖ.jpg"]
    touch(tmp_path, *(f"odd/{name}" for name in odd), "other/1.jpg", "other/.hidden.jpg")
    (tmp_path / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "round").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "nowhere.jpg").symlink_to(tmp_path / "missing.jpg")
    source = detect_source(tmp_path, 0.0)
    assert [c.name for c in source.classes] == ["linked", "odd", "other"]
    names = [name for name, _ in listed(source, "train")]
    assert [n for n in names if n.startswith("odd/")] == sorted(f"odd/{name}" for name in odd)
    assert [n for n in names if not n.startswith("odd/")] == [
        "linked/1.jpg", "linked/nowhere.jpg", "other/1.jpg", "other/nowhere.jpg",
    ]  # fmt: skip
    readable = [item for item in source.splits["train"] if item.name.startswith("odd/")]
    assert [item.read() for item in readable] == [item.name.encode(errors="surrogateescape") for item in readable]
    with pytest.raises(FileNotFoundError):
        source.splits["train"][len(names) - 1].read()
    assert len(source.fingerprint()) == 64


def test_the_fingerprint_sees_every_change(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    prints = {detect_source(tmp_path).fingerprint()}
    touch(tmp_path, "b/2.jpg")
    prints |= {detect_source(tmp_path, 0.0).fingerprint(), detect_source(tmp_path, 0.5).fingerprint()}
    (tmp_path / "a").rename(tmp_path / "c")
    prints.add(detect_source(tmp_path, 0.0).fingerprint())
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("files", "fraction", "error", "message"),
    [
        ((), None, DataError, "is empty$"),
        (("only/1.jpg", "none/1.txt"), None, DataError, "has only one class: only$"),
        (("up/only/1.jpg",), None, DataError, "has only one class: up/only$"),
        (("train/a/1.jpg", "test/1.txt"), None, DataError, "train has only one class: a$"),
        (("1.jpg", "2.jpg"), None, DataError, "has 2 images, but no class folders$"),
        (("a/1.NEF", "b/2.NEF", "b/1.txt"), None, DataError, r"only images that cannot be read: \.NEF 2$"),
        (("a/1.NEF", "b/2.jpg"), None, DataError, r"only one class: b, and images that cannot be read: \.NEF 1$"),
        (
            ("a/1.txt", "b/2.md"),
            None,
            DataError,
            r"no files with an image suffix \(\.md 1, \.txt 1\)\. Known layouts: ILSVRC2012",
        ),
        (("train/a/1.jpg", "val/a/1.jpg"), None, DataError, "train has only one class: a$"),
        (("train/a/1.jpg", "train/b/1.jpg", "val/1.jpg"), None, DataError, "no class folders"),
        (
            ("train/a/1.jpg", "train/b/1.jpg", "val/c/1.jpg"),
            None,
            DataError,
            "the class c, but the training split has no images of it",
        ),
        (("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"), 0.1, UsageError, "of its own"),
        (("a/1.jpg", "b/1.jpg"), 1.0, UsageError, "below 1"),
    ],
)
def test_folders_without_a_usable_layout(
    tmp_path: Path, files: tuple[str, ...], fraction: float | None, error: type[DataError], message: str
) -> None:
    touch(tmp_path, *files)
    with pytest.raises(error, match="(?m)" + message) as caught:
        detect_source(tmp_path, fraction)
    assert caught.value.hint


@pytest.mark.parametrize("inside", ["pics", "a/pics", "pics/train"])
def test_one_folder_too_high(tmp_path: Path, inside: str) -> None:
    touch(tmp_path, f"{inside}/cat/1.jpg", f"{inside}/dog/1.jpg", "notes.txt")
    right = tmp_path / inside.removesuffix("/train")
    with pytest.raises(DataError, match="has no class folders, but") as caught:
        detect_source(tmp_path)
    assert caught.value.hint == f"did you mean {right}?"
    assert len(detect_source(right).classes) == 2


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.jpg", "train/2.jpg", "tram/1.jpg")
    assert [c.name for c in detect_source(tmp_path).classes] == ["train", "tram"]


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        detect_source(tmp_path / "nope")
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    (tmp_path / "train" / "empty").mkdir()
    source = detect_source(tmp_path)
    assert len(source.classes) == 2
    assert "train/empty" in source.notes[0]


def test_real_folders(tiny10: Path, samples: Path) -> None:
    source = detect_source(tiny10)
    assert {name: len(items) for name, items in source.splits.items()} == {"train": 5000, "val": 500}
    assert ClassName("tabby", "n02123045") in source.classes
    assert len(detect_source(samples).classes) == 500


def test_links_between_classes_are_entered_once_each(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(9)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.jpg").write_bytes(b".")
    for name in names:
        for other in names:
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other, target_is_directory=True)
        (tmp_path / name / "up").symlink_to(tmp_path, target_is_directory=True)
    source = detect_source(tmp_path, 0.0)
    assert len(source.splits["train"]) == 81  # each class: its own image and those of the classes it links to, once
    (deep := tmp_path.joinpath("c0", *["d"] * 300)).mkdir(parents=True)
    (deep / "deep.jpg").write_bytes(b".")
    assert len(detect_source(tmp_path, 0.0).splits["train"]) == 90


def test_a_file_that_would_fill_the_memory(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "huge.jpg").open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(DataError, match="it has 1,099,511,627,776 bytes"):
        detect_source(tmp_path, 0.0).splits["train"][0].read()


def test_a_test_folder_gives_a_note(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{split}/{name}/{i}.jpg" for split in ("train", "test") for name in "ab" for i in range(3)))
    source = detect_source(tmp_path)
    assert source.notes[0] == "test/ (6 images) is not used; rename it to val/ to validate on it"
    touch(tmp_path, "val/a/1.jpg")
    assert detect_source(tmp_path).notes == ("test/ (6 images) is not used; validation uses val/",)


def test_other_files_are_counted_by_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "b/1.jpg", "b/notes.txt", "b/list", "phone/1.nef")
    touch(tmp_path, *(f"{name}/{i}.NEF" for name in "ab" for i in range(3)))
    assert detect_source(tmp_path).notes[:3] == (
        "left out (no images inside): phone",
        "left out (no image suffix): .NEF 6, .nef 1, .txt 1, others 1",
        "these image formats cannot be read: .NEF 6, .nef 1; convert them to JPEG",
    )


def test_images_outside_of_class_folders_give_a_note(tmp_path: Path) -> None:
    for folder in ("train/a", "train/b", "train", "val/a", "val", "test"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            (tmp_path / folder / f"{number}.jpg").write_bytes(b".")
    assert detect_source(tmp_path).notes == (
        f"left out (in no class folder): 3 images directly in {tmp_path}/train",
        f"left out (in no class folder): 3 images directly in {tmp_path}/val",
        "left out (not sorted into the classes of the training split): test/",
    )


def touch_classes(root: Path, *folders: str, classes: str = "cat dog", images: int = 3) -> Path:
    return touch(
        root, *(f"{folder}/{name}/{i}.jpg" for folder in folders for name in classes.split() for i in range(images))
    )


@pytest.mark.parametrize(
    ("folders", "layout", "counts", "note"),
    [
        (["TRAIN", "VALID"], "TRAIN/CLASS and VALID/CLASS", (6, 6), None),
        (["Train_Images", "Validation_Images"], "Train_Images/CLASS and Validation_Images/CLASS", (6, 6), None),
        (["trainset", "dev"], "trainset/CLASS and dev/CLASS", (6, 6), None),
        (
            ["train", "val", "dev"],
            "train/CLASS and val/CLASS",
            (6, 6),
            "dev/ (6 images) is not used; validation uses val/",
        ),
        (["train2017", "val2017"], "train2017/CLASS and val2017/CLASS", (6, 6), None),
        (["train_1", "train_2", "val"], "train_1/CLASS, train_2/CLASS and val/CLASS", (12, 6), None),
        (["pets_train", "pets_val"], "pets_train/CLASS and pets_val/CLASS", (6, 6), None),
        (
            ["seg_train/seg_train", "seg_dev/seg_dev"],
            "seg_train/seg_train/CLASS and seg_dev/seg_dev/CLASS",
            (6, 6),
            None,
        ),
        (
            ["training_set/training_set", "test_set/test_set"],
            "training_set/training_set/CLASS",
            (4, 2),
            "test_set/test_set/ (6 images) is not used; rename it to val/ to validate on it",
        ),
        (["train", "val", "later"], "train/CLASS and val/CLASS", (6, 6), "left out (not named like a split): later/"),
        (["train", "val/test_set"], "train/CLASS and val/test_set/CLASS", (6, 6), None),  # renamed as the note says
        (
            ["Final_Training/Images", "Final_Validate/Images"],
            "Final_Training/Images/CLASS and Final_Validate/Images/CLASS",
            (6, 6),
            None,
        ),
        (["train", "train_more 2", "val"], "train/CLASS and val/CLASS", (6, 6), None),
    ],
)
def test_splits_of_other_names(
    folders: list[str], layout: str, counts: tuple[int, int], note: str | None, tmp_path: Path
) -> None:
    source = detect_source(touch_classes(tmp_path, *folders))
    assert [name.name for name in source.classes] == ["cat", "dog"]
    assert source.layout == layout
    assert (len(source.splits["train"]), len(source.splits["val"])) == counts
    for split in source.splits.values():
        assert all(item.name.split("/")[-2] == ["cat", "dog"][item.label] for item in split)
    assert note is None or note in source.notes
    assert not source.warnings


def test_parts_of_a_split_may_have_different_classes(tmp_path: Path) -> None:
    touch_classes(tmp_path, "train.part1", classes="bird cat")
    touch_classes(tmp_path, "train.part2", classes="ant cat")
    touch_classes(tmp_path, "val.part1", classes="cat")
    source = detect_source(tmp_path)
    assert [name.name for name in source.classes] == ["ant", "bird", "cat"]
    labels = [item.label for item in source.splits["train"]]
    assert [labels.count(label) for label in range(3)] == [3, 3, 6]
    assert {item.label for item in source.splits["val"]} == {2}


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (["train/1.jpg", "test1/2.jpg"], "train has no class folders with images$", "folder of its own"),
        (
            ["Train/ok/1.jpg", "Test/ok/1.jpg", "Test/bad/1.jpg", "mask/bad/1.png"],
            "Train has only one class: ok$",
            "two",
        ),
        (
            ["data/train/a/1.jpg", "data/test/a/1.jpg", "docs/1.jpg"],
            r"data has splits inside: test/, train/$",
            "mean .*/data",
        ),
        (
            ["train_data/train/a/1.jpg", "train_data/val/a/1.jpg", "test/1.jpg"],
            "splits inside: train/, val/$",
            "train_data",
        ),
        (
            ["Set(1)/Set(1)/train/a/1.jpg", "Set(1)/Set(1)/val/a/1.jpg", "test/test/1.jpg"],
            "splits inside",
            r"Set\(1\)\?",
        ),
        (["cat/train/1.jpg", "cat/val/1.jpg", "dog/train/1.jpg", "dog/val/1.jpg"], "splits inside", "train/CLASS"),
    ],
)
def test_splits_that_do_not_fit_are_refused(files: list[str], message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="(?m)" + message) as caught:
        detect_source(touch(tmp_path, *files))
    assert re.search(hint, caught.value.hint)


@pytest.mark.parametrize(
    "classes",
    [
        ["car", "plane", "train"],
        ["freight train", "tram", "test tube"],
        ["$1", "$5", "#1"],
        ["dev", "ops"],
        ["#cats", "@me", "__other__"],
    ],
)
def test_names_that_only_look_like_splits_are_classes(classes: list[str], tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in classes for i in range(3)))
    source = detect_source(tmp_path)
    assert [name.name for name in source.classes] == sorted(classes)
    assert not source.warnings
    touch(tmp_path / "split", *(f"{split}/{name}/1.jpg" for split in ("Train", "Val") for name in classes))
    assert [name.name for name in detect_source(tmp_path / "split").classes] == sorted(classes)


def test_classes_with_the_same_folders_inside_give_a_warning(tmp_path: Path) -> None:
    touch_classes(tmp_path, "lernen", "pruefen")
    assert detect_source(tmp_path).warnings == ("lernen/, pruefen/ hold the same folders: cat/, dog/",)
    touch_classes(tmp_path / "domains", "amazon/images", "dslr/images")
    assert "amazon/images/, dslr/images/ hold" in detect_source(tmp_path / "domains").warnings[0]
    touch_classes(tmp_path / "twice", ".", "twice")
    assert detect_source(tmp_path / "twice").warnings == ("./, twice/ hold the same folders: cat/, dog/",)
    touch_classes(tmp_path / "other", "cat", "dog", classes="images")  # one folder of a common name is usual
    assert not detect_source(tmp_path / "other").warnings


@pytest.mark.parametrize("inside", ["", "images/"])
def test_tiny_imagenet_sorted_by_hand(inside: str, tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/n{label}/images/n{label}_{i}.JPEG" for label in (1, 2) for i in range(3)))
    touch(tmp_path, f"val/n2/{inside}val_0.JPEG", f"val/n1/{inside}val_1.JPEG")
    (tmp_path / "val/val_annotations.txt").write_text("val_0.JPEG\tn2\t0\nval_1.JPEG\tn1\t0\n")
    (tmp_path / "val/images").mkdir()
    source = detect_source(tmp_path)
    assert listed(source, "val") == [(f"val/n1/{inside}val_1.JPEG", 0), (f"val/n2/{inside}val_0.JPEG", 1)]
    assert len(source.splits["train"]) == 6
    touch(tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG")  # sorted copies
    assert listed(detect_source(tmp_path), "val") == [("val/images/val_0.JPEG", 1), ("val/images/val_1.JPEG", 0)]


def test_tiny_imagenet_sorted_inside_images(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/n{label}/images/n{label}_{i}.JPEG" for label in (1, 2) for i in range(3)))
    touch(tmp_path, "val/images/n2/val_0.JPEG", "val/images/n1/val_1.JPEG")
    (tmp_path / "val/val_annotations.txt").write_text("val_0.JPEG\tn2\t0\nval_1.JPEG\tn1\t0\n")
    source = detect_source(tmp_path)
    assert listed(source, "val") == [("val/images/n1/val_1.JPEG", 0), ("val/images/n2/val_0.JPEG", 1)]


def test_folders_of_a_system_are_left_out_and_counted(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "dog/2.jpg", "dog/@home.jpg")
    touch(
        tmp_path, "cat/.thumbnails/1.jpg", "dog/@eaDir/2.jpg/THUMB.jpg", "@eaDir/a.jpg/THUMB.jpg", "#recycle/bird/9.jpg"
    )
    touch(tmp_path, "$RECYCLE.BIN/x.jpg", "@Recycle/y.jpg", "__MACOSX/cat/._1.jpg", "lost+found/3.jpg", ".git/readme")
    source = detect_source(tmp_path, 0.0)
    assert listed(source, "train") == [("cat/1.jpg", 0), ("dog/2.jpg", 1), ("dog/@home.jpg", 1)]
    assert len(source.notes) == 1
    what, _, found = source.notes[0].partition(": ")
    assert what == "left out (folders of a NAS or system)"
    assert set(found.split(", ")) == {
        ".thumbnails (1 image)", "@eaDir (2 images)", "#recycle (1 image)", "$RECYCLE.BIN (1 image)",
        "@Recycle (1 image)", "__MACOSX (1 image)", "lost+found (1 image)",
    }  # fmt: skip


@pytest.mark.parametrize("line", ["{} {}", "{},{}", '"{}";"{}"', "'{}'\t'{}'", "{}: {}"])
def test_columns_of_words(line: str, tmp_path: Path) -> None:
    names = {"n00000001": "red fox, Vulpes", "n00000002": 'a "bear'}
    touch(tmp_path, *(f"{wnid}/{i}.jpg" for wnid in names for i in range(2)))
    (tmp_path / "words.txt").write_text("".join(line.format(*pair) + "\n" for pair in names.items()))
    assert [name.name for name in detect_source(tmp_path).classes] == ["red fox", 'a "bear']


def test_words_of_other_classes_are_no_names(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{wnid}/{i}.jpg" for wnid in ("n01440764", "n01443537") for i in range(2)))
    (tmp_path / "words.txt").write_text("n00000001\tbear\n")
    assert [name.name for name in detect_source(tmp_path).classes] == ["tench", "goldfish"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_words_and_annotations_written_on_windows(encoding: str, tmp_path: Path) -> None:
    touch(tmp_path, "train/n00000001/images/1.JPEG", "train/n00000002/images/2.JPEG", "val/images/val_0.JPEG")
    (tmp_path / "val/val_annotations.txt").write_bytes("val_0.JPEG\tn00000002\t0\r\n".encode(encoding))
    (tmp_path / "words.txt").write_bytes("n00000001\tFüchse\r\nn00000002\tBären\r\n".encode(encoding))
    source = detect_source(tmp_path)
    assert [name.name for name in source.classes] == ["Füchse", "Bären"]
    assert listed(source, "val") == [("val/images/val_0.JPEG", 1)]
    (tmp_path / "words.txt").write_bytes("n00000001\tFüchse\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"words\.txt is not UTF-8 text"):
        detect_source(tmp_path)
