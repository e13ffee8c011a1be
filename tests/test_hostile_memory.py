"""ONNX files of about a megabyte that ask for gigabytes, and descriptions that unfold: refused before they get them.

Each runs in a process of its own, since only the kernel knows how much memory it really took.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from model_files import draw, random_model, save_model
from onnx import helper, numpy_helper

from alexnet_cli.core import onnx_graph, onnx_wire
from alexnet_cli.core.runs import Run
from alexnet_cli.core.session import Session
from alexnet_cli.core.shards import open_dataset
from alexnet_cli.core.state_dict import read_safetensors
from alexnet_cli.errors import DataError, RecipeError, WeightsError
from alexnet_cli.recipe import TINY
from alexnet_cli.recipe_io import load_recipe

MODEL = random_model(replace(TINY, width=1 / 64), 4)
LONG = 30_000  # its square times four is 3.6 GB


class Crafted:
    """A whole file of this toolkit, whose graph is put in another's place."""

    def __init__(self) -> None:
        self.proto = onnx_graph.build(MODEL)
        del self.proto.graph.node[:], self.proto.graph.initializer[:]

    def stored(self, name: str, *shape: int) -> str:
        values = numpy_helper.from_array(np.zeros(shape, np.float32), name)
        self.proto.graph.initializer.append(values)
        return name

    def whole(self, name: str, *values: int) -> str:
        self.proto.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.proto.graph.node.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def ended(self, x: str, channels: int, side: int = 1) -> onnx.ModelProto:
        """The largest of each map, and from these the logits."""
        pooled = self.node("MaxPool", [x], "pooled", kernel_shape=[side, side])
        flat = self.node("Flatten", [pooled], "flat", axis=1)
        self.node("Gemm", [flat, self.stored("last", channels, 4)], "logits")
        self.node("Softmax", ["logits"], "probabilities", axis=1)
        return self.proto


def outer_product(operator: str) -> onnx.ModelProto:
    """Two constants that broadcast into a huge one."""
    graph = Crafted()
    pair = [graph.stored("column", LONG, 1), graph.stored("row", 1, LONG)]
    graph.node("Slice", [graph.node(operator, pair, "huge"), *corner(graph)], "cut")
    return graph.ended(graph.node("Mul", ["input", "cut"], "x"), 3, 224)


def corner(graph: Crafted) -> list[str]:
    return [graph.whole(f"cut.{name}", *values) for name, values in CORNER.items()]


CORNER = {"starts": (0, 0), "ends": (1, 1), "axes": (0, 1)}


def spread_picture() -> onnx.ModelProto:
    """The picture, broadcast against a constant."""
    graph = Crafted()
    x = graph.node("Reshape", ["input", graph.whole("shape", -1, 1, 1, 150528)], "flat.input")
    return graph.ended(graph.node("Mul", [x, graph.stored("column", 1, 1, 30_000, 1)], "x"), 1)


def padded() -> onnx.ModelProto:
    graph = Crafted()
    x = graph.node("Conv", ["input", graph.stored("w", 1, 3, 1, 1)], "x", pads=[20_000] * 4)
    return graph.ended(x, 1, 40_224)


def many_maps() -> onnx.ModelProto:
    graph = Crafted()
    return graph.ended(graph.node("Conv", ["input", graph.stored("w", 80_000, 3, 1, 1)], "x"), 80_000, 224)


def unfolded() -> onnx.ModelProto:
    """A kernel as large as the picture, at each of its places."""
    graph = Crafted()
    x = graph.node("Conv", ["input", graph.stored("w", 1, 3, 224, 224)], "x", pads=[112] * 4)
    return graph.ended(x, 1, 225)


def all_kept() -> onnx.ModelProto:
    """A long chain, every part of which is needed again at the end."""
    graph = Crafted()
    names, x = ["input"], "input"
    for number in range(200):
        x = graph.node("Tanh", [x], f"x{number}")
        names.append(x)
    for number, name in enumerate(reversed(names)):
        x = graph.node("Mul", [x, name], f"y{number}")
    return graph.ended(x, 3, 224)


def filled_up() -> onnx.ModelProto:
    """Maps of one channel, for each of which ONNX Runtime takes the room of sixteen."""
    graph = Crafted()
    x, parts = "input", []
    for number in range(7):
        channels = 3 if x == "input" else 1
        x = graph.node("Conv", [x, graph.stored(f"w{number}", 1, channels, 1, 1)], f"x{number}", pads=[50] * 4)
        parts.append(x)
    return graph.ended(x, 1, 224 + 7 * 100)


def wide_rows() -> onnx.ModelProto:
    graph = Crafted()
    x = graph.node("Reshape", ["input", graph.whole("shape", -1, 4)], "rows")
    x = graph.node("Gemm", [x, graph.stored("w", 4, 60_000)], "x")
    return graph.ended(graph.node("Reshape", [x, graph.whole("maps", -1, 1, 1, 1)], "maps.x"), 1)


def batch_in_another_place() -> onnx.ModelProto:
    """For one picture the rest of a cut is nothing; for a hundred it is not."""
    graph = Crafted()
    x = graph.node("Reshape", ["input", graph.whole("shape", 1, -1)], "row")
    x = graph.node("Gemm", [x, graph.stored("w", 1, 4)], "logits")
    graph.node("Softmax", [x], "probabilities", axis=1)
    return graph.proto


def picture_of_any_size() -> onnx.ModelProto:
    graph = Crafted()
    for dimension in graph.proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_value = 200_000
    return graph.ended(graph.node("Relu", ["input"], "x"), 3, 200_000)


def window_outside() -> onnx.ModelProto:
    """Nothing is left for the second pooling: ONNX Runtime divided by zero, which ended the process."""
    graph = Crafted()
    x = graph.node("Transpose", ["input"], "x", perm=[0, 2, 3, 1])
    x = graph.node("MaxPool", [x], "few", kernel_shape=[1, 2], strides=[3, 3], ceil_mode=1)
    return graph.ended(graph.node("MaxPool", [x], "none", kernel_shape=[75, 2]), 224)


def declared() -> onnx.ModelProto:
    """Weights that are said to be huge, and are not there."""
    graph = Crafted()
    graph.proto.graph.initializer.append(
        onnx.TensorProto(name="last", data_type=1, dims=[2**40, 4], raw_data=bytes(48))
    )
    return graph.ended(graph.node("Relu", ["input"], "x"), 3, 224)


GRAPHS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "two constants": (lambda: outer_product("Mul"), r"Mul \(huge\)"),
    "two constants, another operator": (lambda: outer_product("Pow"), r"Pow \(huge\)"),
    "a picture and a constant": (spread_picture, r"Mul \(x\)"),
    "padding": (padded, r"Conv \(x\)"),
    "maps": (many_maps, r"Conv \(x\)"),
    "windows": (unfolded, r"Conv \(x\)"),
    "everything kept": (all_kept, "more numbers than a network of so few weights"),
    "channels filled up": (filled_up, "more numbers than a network of so few weights"),
    "rows": (wide_rows, r"Gemm \(x\)"),
    "the batch elsewhere": (batch_in_another_place, r"Reshape \(row\)"),
    "a huge picture": (picture_of_any_size, "an input of shape|more numbers"),
    "a window outside": (window_outside, r"MaxPool \(few\)"),
    "weights that are not there": (declared, "a tensor last of 48 bytes"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_that_ask_for_gigabytes(name: str, tmp_path: Path) -> None:
    make, words = GRAPHS[name]
    onnx_graph.save(make(), tmp_path / "x.onnx")
    with pytest.raises(WeightsError, match=words) as error:
        Session(tmp_path / "x.onnx")
    assert error.value.exit_code == 3


def ran(words: list[str], module: str = "alexnet_cli") -> tuple[int, str, int]:
    """Exit code, what was said, and the most bytes that a process of the command held."""
    command = [sys.executable, "-m", module, *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr
        said = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, said, usage.ru_maxrss * 1024


def largest_let_in(columns: int = 31_000, maps: int = 4) -> onnx.ModelProto:
    """As much as a file of that many columns, of 32 bytes each, may ask for, all of it needed until the end."""
    graph = Crafted()
    graph.stored("wide", 4, columns)
    graph.stored("narrow", columns, 4)
    x, names = "input", ["input"]
    for number in range(maps):
        x = graph.node("Sqrt", [x], f"x{number}")
        names.append(x)
    for number, name in enumerate(reversed(names)):
        x = graph.node("Sub", [x, name], f"y{number}")
    pooled = graph.node("MaxPool", [x], "pooled", kernel_shape=[224, 224])
    few = graph.node("Gemm", [graph.node("Flatten", [pooled], "flat"), graph.stored("first", 3, 4)], "few")
    graph.node("Gemm", [graph.node("Gemm", [few, "wide"], "many"), "narrow"], "logits")
    graph.node("Softmax", ["logits"], "probabilities", axis=1)
    return graph.proto


def test_the_most_that_is_let_in(tmp_path: Path) -> None:
    draw(tmp_path / "album" / "a.png", 0)
    for number in range(1, 40):
        os.link(tmp_path / "album" / "a.png", tmp_path / "album" / f"{number}.png")
    onnx_graph.save(largest_let_in(), tmp_path / "x.onnx")
    assert (tmp_path / "x.onnx").stat().st_size < 1_100_000
    code, said, most = ran(["predict", str(tmp_path / "album"), "-w", str(tmp_path / "x.onnx")])
    assert code == 0, said
    assert most < 2 << 30


def test_pictures_go_in_pieces_where_the_results_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 8 MB asked for 1.5 GB in the batches of 128 that `evaluate` has."""
    onnx_graph.save(largest_let_in(240_000, 8), tmp_path / "x.onnx")
    session, passed = Session(tmp_path / "x.onnx", provider="cpu"), []
    each = onnx_wire.check(tmp_path / "x.onnx")
    assert 128 * each * 4 > 1.5e9
    real = session._pass

    def counted(outputs: list[str], crops: Any, options: Any) -> Any:
        passed.append(len(crops))
        return real(outputs, crops, options) if len(crops) < 5 else [np.zeros((len(crops), 4), np.float32)]

    monkeypatch.setattr(session, "_pass", counted)
    assert session.logits(np.zeros((128, 3, 224, 224), np.uint8)).shape == (128, 4)
    assert sum(passed) == 128
    assert max(passed) * each * 4 <= 1.2e9 < (max(passed) + 1) * each * 4
    monkeypatch.setattr(session, "_most", 2)
    crops = np.random.default_rng(0).integers(0, 256, (3, 3, 224, 224)).astype(np.float32)
    apart = np.concatenate([real(["probabilities"], crops[i : i + 1], None)[0] for i in range(3)])
    assert session.probabilities(crops) == pytest.approx(apart, abs=1e-6)
    assert passed[-2:] == [2, 1]
    assert session.logits(crops[:0]).shape == (0, 4)


def test_a_description_that_unfolds(tmp_path: Path) -> None:
    """Three bytes of JSON can become eighty of memory: no header is read that could fill it."""
    path = save_model(MODEL, tmp_path / "x.safetensors")
    assert path.stat().st_size > 8
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", 90 << 20))
    os.truncate(path, 95 << 20)
    draw(tmp_path / "a.png", 0)
    for words in (["predict", str(tmp_path / "a.png"), "-w", str(path)], ["import-weights", str(path)]):
        code, said, most = ran(words)
        assert code == 3
        assert "its header is said to have 94,371,840 bytes" in said
        assert "Traceback" not in said
        assert most < 2 << 30


@pytest.mark.parametrize("text", ["a = " + "[" * 9000, ".".join("a" * 100_000) + " = 1", "seed = " + "9" * 5000, "\0"])
def test_recipes_that_unfold(text: str, tmp_path: Path) -> None:
    """A key of 100,000 parts took more than 20 GB."""
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError, match="is not TOML"):
        load_recipe(str(tmp_path / "r.toml"))


def test_a_record_that_unfolds(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("[" + "[]," * 6_000_000 + "[]]")
    with pytest.raises(DataError, match="more than 16,777,216 bytes"):
        open_dataset(tmp_path)


def test_metrics_of_junk_and_a_foreign_net_of_holes(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "[" * 100_000 + '\n{"step": 2')
    assert Run(tmp_path).records() == [{"step": 1}]
    header = b'{"a.weight":{"dtype":"F32","shape":[17179869184],"data_offsets":[0,68719476736]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + (1 << 36))
    with pytest.raises(WeightsError, match="larger than 2 GB"):
        read_safetensors(path, TINY, "rgb")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["models", "weights", "pictures"])
def test_all_other_cases_stay_within_two_gigabytes(family: str, tmp_path: Path) -> None:
    """Every generated case of a family in one process, PyTorch and the tests' own needs included."""
    cases = Path(__file__).with_name(f"test_hostile_{family}.py")
    words = [str(cases), "-q", "-m", "not slow", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "cases")]
    code, said, most = ran(words, "pytest")
    assert code == 0, said
    assert most < 2 << 30
