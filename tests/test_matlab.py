"""The reader of MAT files, on files that scipy wrote and on damaged ones."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from mat_files import mat_file

from alexnet_cli.core.matlab import read_mat
from alexnet_cli.errors import DataError


def test_a_file_made_byte_by_byte() -> None:
    entries: list[dict[str, str | float]] = [{"id": 1, "word": "tench"}, {"id": 300, "word": "crème brûlée"}]
    for compressed in (False, True):
        ((name, found),) = read_mat(mat_file("synsets", entries, compressed)).items()
        assert name == "synsets"
        assert [(int(entry["id"][0]), entry["word"]) for entry in found] == [(1, "tench"), (300, "crème brûlée")]


@pytest.mark.parametrize("compressed", [False, True])
def test_what_scipy_writes(compressed: bool) -> None:
    io_ = pytest.importorskip("scipy.io")
    kinds = [("id", object), ("word", object), ("children", object)]
    synsets = np.zeros((3, 1), kinds)
    for i, (word, children) in enumerate([("tench, Tinca tinca", [1.0, 7.0]), ("é", []), ("", [2.5])]):
        synsets[i, 0] = (float(i + 1), word, np.array([children]))
    buffer = io.BytesIO()
    values = {"synsets": synsets, "many": np.arange(70000, dtype=np.int32), "cells": np.array(["a", 3.0], object)}
    io_.savemat(buffer, values, do_compression=compressed)
    found = read_mat(buffer.getvalue())
    assert [entry["word"] for entry in found["synsets"]] == ["tench, Tinca tinca", "é", ""]
    assert [float(entry["id"][0]) for entry in found["synsets"]] == [1, 2, 3]
    assert [list(entry["children"]) for entry in found["synsets"]] == [[1, 7], [], [2.5]]
    np.testing.assert_array_equal(found["many"], values["many"])
    assert found["cells"][0] == "a"


def test_damage_is_an_error_and_nothing_else() -> None:
    for compressed in (False, True):
        whole = mat_file("synsets", [{"id": 1, "word": "tench"}, {"id": 2, "word": "goldfish"}], compressed)
        for size in range(0, len(whole) - 1, 3):
            found: Any = None
            try:
                found = read_mat(whole[:size])
            except DataError:
                continue
            assert found == {}, f"{size} of {len(whole)} bytes passed for a whole file"
        generator = np.random.default_rng(1)
        for _ in range(300):
            damaged = bytearray(whole)
            damaged[generator.integers(128, len(whole))] = generator.integers(256)
            with contextlib.suppress(DataError):  # and no other exception
                read_mat(bytes(damaged))
