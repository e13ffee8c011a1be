"""Run directories and what -w means."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alexnet_cli.core import devices, signals
from alexnet_cli.core.files import replace_link
from alexnet_cli.core.runs.resolve import find_run_folder, find_weights
from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training import resume
from alexnet_cli.errors import DataError, StorageError, UsageError, WeightsError
from alexnet_cli.recipe import CAFFE, FAST, KRIZHEVSKY, PAPER, TINY, compare_recipes
from commands import alexnet


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checkpoint(run: Run, step: int, *pointers: str) -> Path:
    folder = run.checkpoints / f"{step:08d}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    for name in pointers:
        replace_link(run.checkpoints / name, folder)
    return folder


def test_a_new_run_has_its_recipe_and_is_the_latest() -> None:
    run = Run.create(None, TINY, {"seed": 0})
    assert run.recipe == TINY
    assert run.about == {"schema": "alexnet.run/1", "status": "running", "seed": 0}
    assert run.path.name.endswith("_tiny")
    second = Run.create(None, TINY, {})
    assert second.path != run.path
    assert Run.open("latest").path.name == second.path.name
    assert Run.open(run.path.name).path.name == Run.open(str(run.path)).path.name == run.path.name


@pytest.mark.parametrize("name", ["", "..", "a/b", "latest", "two\nlines", "\udcff", "x" * 201])
def test_names_that_would_lead_elsewhere_or_cannot_be_read(name: str) -> None:
    with pytest.raises(UsageError, match="is not a plain folder name"):
        Run.create(name, PAPER, {})


def test_a_name_that_is_taken_is_not_overwritten() -> None:
    Run.create("mine", PAPER, {})
    with pytest.raises(UsageError, match="already exists") as caught:
        Run.create("mine", TINY, {})
    assert "--resume mine" in caught.value.hint
    assert Run.open("mine").recipe == PAPER


def test_hints_name_a_run_as_a_shell_takes_it() -> None:
    run = Run.create("my $(run)", PAPER, {})
    with pytest.raises(UsageError) as caught:
        Run.create("my $(run)", TINY, {})
    assert caught.value.hint == "continue it with --resume 'my $(run)', choose another --name, or delete the folder"
    assert run.storage_hint().endswith("alexnet train --resume 'my $(run)'")


def test_what_a_run_left_that_was_killed_while_it_was_made_is_taken_up() -> None:
    """Or a requeued job, which has no run to go on with, could not start one either."""
    for left in (
        (),
        ("checkpoints",),
        ("checkpoints", ".recipe.toml.7.tmp"),
        ("checkpoints", "recipe.toml", ".lock", ".run.json.7.tmp.json"),
    ):
        folder = Path("runs") / f"r{len(left)}"
        folder.mkdir(parents=True)
        for name in left:
            (folder / name).mkdir() if name == "checkpoints" else (folder / name).write_text("cut sho")
        assert resume.find_run_to_resume("auto", folder.name) is None
        assert Run.create(folder.name, TINY, {}).recipe == TINY
    for name in ("notes.txt", "checkpoints/00000003"):
        folder = Path("runs") / f"mine-{len(name)}"
        (folder / name).mkdir(parents=True)
        with pytest.raises(UsageError, match="already exists"):
            Run.create(folder.name, TINY, {})


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "file" / "runs"))
    with pytest.raises(StorageError, match="cannot write"):
        Run.create("x", PAPER, {})


def test_a_record_cut_short_by_a_crash_is_left_out() -> None:
    run = Run.create("r", PAPER, {})
    for step in (1, 2, 3):
        run.log({"event": "step", "step": step})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"event":"st')
    assert [r["step"] for r in run.records()] == [1, 2, 3]
    (run.path / "alexnet.onnx").write_bytes(b"stale")
    run.begin(PAPER, 2, 1)
    assert not (run.path / "alexnet.onnx").exists()
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_what_w_means() -> None:
    run = Run.create("r", PAPER, {})
    with pytest.raises(WeightsError, match="no checkpoint yet"):
        find_weights("r")
    first = checkpoint(run, 10, "last")
    assert find_weights("r").resolve() == (first / "model.safetensors").resolve()
    second = checkpoint(run, 20, "last")
    replace_link(run.checkpoints / "best", first)
    for spec in (None, "r", "runs/r", str(run.path.resolve())):
        assert find_weights(spec).resolve() == (first / "model.safetensors").resolve(), spec
    for spec in ("runs/r/checkpoints/last", str(second), str(second / "model.safetensors")):
        assert find_weights(spec).resolve() == (second / "model.safetensors").resolve(), spec
    Path("r").mkdir()  # a folder of that name does not hide the run
    assert find_weights("r").resolve() == (first / "model.safetensors").resolve()
    both = (".onnx", ".safetensors")
    assert find_weights("r", both).name == "model.safetensors"
    (run.path / "alexnet.onnx").write_bytes(b"x")
    assert find_weights("r", both) == run.path / "alexnet.onnx"
    assert find_run_folder(find_weights("r")) == run.path
    assert find_run_folder(Path("elsewhere/model.onnx")) is None


@pytest.mark.parametrize(
    ("about", "what", "hint"),
    [
        ({}, "runs/r has no checkpoint yet", "wait until the first one is saved"),
        ({"status": "interrupted"}, "runs/r has no checkpoint yet", "the run was stopped; alexnet train --resume r"),
        (
            {"status": "failed", "reason": "error", "error": "the loss became nan", "hint": "train again"},
            "runs/r has no checkpoint because the run failed: the loss became nan",
            "train again",
        ),
        (
            {"status": "failed", "error": [1]},
            "runs/r has no checkpoint yet",
            "the run failed; start it again: alexnet train --resume",
        ),
    ],
)
def test_a_run_without_a_checkpoint_says_why(about: dict[str, Any], what: str, hint: str) -> None:
    Run.create("r", PAPER, about)
    with pytest.raises(WeightsError) as caught:
        find_weights("r")
    assert caught.value.what == what
    assert caught.value.hint.startswith(hint)


def test_what_w_cannot_be() -> None:
    with pytest.raises(WeightsError, match=f"there is no run in {Path.cwd()}/runs") as caught:
        find_weights(None)
    assert caught.value.hint == f"train one first: {devices.suggest_train_command()}"
    Run.create("r", PAPER, {})
    (Path("runs") / "latest").unlink()
    with pytest.raises(WeightsError, match="there is no latest run in") as caught:
        find_weights(None)
    assert caught.value.hint == "existing runs: r"
    with pytest.raises(WeightsError, match="there is no run, folder or file named nothing") as caught:
        find_weights("nothing")
    assert "existing runs: r" in caught.value.hint
    Path("a.pth").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"not a .safetensors file") as caught:
        find_weights("a.pth")
    assert caught.value.hint.endswith("to convert weights of another program: alexnet import-weights")
    for onnx, way in ((Path("runs/r/alexnet.onnx"), ".safetensors file: -w r"), (Path("b.onnx"), ".safetensors file")):
        onnx.write_bytes(b"x")
        with pytest.raises(WeightsError, match=r"not a .safetensors file") as caught:
            find_weights(str(onnx))
        assert caught.value.hint.endswith(way)


def test_going_on_refuses_what_would_change_the_result() -> None:
    run = Run.create("r", TINY, {})
    with pytest.raises(
        UsageError, match="one-cycle schedule of run r is planned for 15 epochs, not 99"
    ):  # every rate of the cycle would be another
        resume.check_recipe(run, replace(TINY, epochs=99), set())
    assert resume.check_recipe(run, replace(TINY, epochs=99), {"epochs"}).epochs == 99
    with pytest.raises(UsageError, match="counts its steps in batches of 64"):
        resume.check_recipe(run, replace(TINY, batch_size=32), {"batch_size"})
    assert run.recipe == TINY, "nothing is written before the run has really gone on"
    with pytest.raises(
        UsageError, match=r"^the recipe differs from that of run r: learning_rate = 0.5 instead of 0.03$"
    ) as caught:
        resume.check_recipe(run, replace(run.recipe, learning_rate=0.5), set())
    assert caught.value.hint == "remove it, or force it: --set learning_rate=0.5"
    with pytest.raises(UsageError, match=r"crops = False instead of True$") as caught:
        resume.check_recipe(run, replace(TINY, crops=False), set())
    assert caught.value.hint.endswith(": --set crops=false")
    assert resume.check_recipe(run, replace(TINY, learning_rate=0.5), {"learning_rate"}).learning_rate == 0.5
    with pytest.raises(UsageError, match="makes another network"):
        resume.check_recipe(run, replace(TINY, width=0.5), {"width"})
    paper = Run.create("p", PAPER, {})
    with pytest.raises(UsageError, match=r"^width = 0.25 makes another network than that of run p \(width = 1.0\)$"):
        resume.check_recipe(paper, TINY, set())  # not a word of a cycle that it does not have


def test_going_on_by_another_recipe_is_met_with_leaving_it_out() -> None:
    for base in (TINY, PAPER):
        Run.create(base.name, base, {})
    tiny, paper = (Run.open(name) for name in ("tiny", "paper"))
    for run, recipe, what, hint in (
        (tiny, FAST, "width = 1.0 makes another network than that of run tiny", ", or start a new run"),
        (paper, CAFFE, "batch_size = 256, but run paper counts", ", or start a new run: --init-from paper"),
        (
            paper,
            KRIZHEVSKY,
            "the recipe differs from that of run paper: name = krizhevsky instead of ",
            "; to change a value from here on: --set KEY=VALUE",
        ),
    ):
        with pytest.raises(UsageError, match=f"^{what}") as caught:
            resume.check_recipe(run, recipe, set(), vars(recipe))
        assert caught.value.hint.startswith(f"remove --recipe ({run.name} has its own){hint}")
    rest = len(compare_recipes(KRIZHEVSKY, PAPER)) - 1 - 4  # epochs are free, and four are shown
    assert caught.value.what.endswith(f", and {rest} more")
    for epoch in range(1, 41):
        paper.log({"event": "validation", "epoch": epoch, "step": epoch})
    with pytest.raises(UsageError, match=r"^the recipe differs from that of run paper"):
        resume.check_recipe(
            paper, replace(KRIZHEVSKY, epochs=20), set()
        )  # not a word of the epochs, which are the least


def test_a_value_of_a_recipe_is_met_with_leaving_it_out_also_by_one_name() -> None:
    Run.create("older", replace(TINY, momentum=0.8), {})
    for words, what, hint in (
        ((), "momentum = 0.9 instead of 0.8", "remove --recipe (older has its own), or force it"),
        (("--set", "momentum=0.8", "--epochs", "9"), "planned for 15 epochs, not 9", "remove it, or force it"),
        (("--set", "momentum=0.8", "--lr", "0.5"), "learning_rate = 0.5 instead of 0.03", "remove it, or force it"),
        (
            ("--set", "momentum=0.8", "--set", "width=0.5"),
            "width = 0.5 makes another network",
            "remove it, or start a new run",
        ),
    ):
        refused = alexnet("train", "--resume", "older", "--recipe", "tiny", *words)
        assert refused.returncode == 2
        assert what in refused.stderr
        assert f"hint: {hint}" in refused.stderr


def test_changes_on_the_way_are_remembered_with_their_steps() -> None:
    run = Run.create("r", PAPER, {})
    assert resume.list_changes(run, replace(PAPER, momentum=0.8), 0) == [], "nothing was trained before it"
    first = resume.list_changes(run, replace(PAPER, momentum=0.8), 30)
    assert first == [{"step": 30, "key": "momentum", "was": 0.9, "is": 0.8}]
    run.update({"changed": first})
    run.begin(replace(PAPER, momentum=0.8), 30, 2)
    again = replace(run.recipe, bias_rate=2.0)
    assert resume.list_changes(run, run.recipe, 60) == first
    assert resume.list_changes(run, again, 60) == [*first, {"step": 60, "key": "bias_rate", "was": 1.0, "is": 2.0}]
    from_20 = {**first[0], "step": 20}
    assert resume.list_changes(run, run.recipe, 20) == [from_20], "what came later is lost; the recipe is not"
    assert resume.list_changes(run, PAPER, 30) == [], "it held for no step"
    assert resume.list_changes(run, run.recipe, 0) == []


@pytest.mark.parametrize(
    "told",
    [
        None, 5, [None, {"key": "momentum"}, {"step": 1, "key": "x", "was": 1, "is": 2}],
        [{"step": 30, "key": "momentum", "was": 0.9, "is": 0.8}],  # killed before recipe.toml had it
    ],
)  # fmt: skip
def test_changes_that_never_were_are_not_told(told: Any) -> None:
    run = Run.create("r", PAPER, {})
    run.update({"changed": told})
    assert resume.list_changes(run, PAPER, 40) == []
    made = {"step": 40, "key": "momentum", "was": 0.9, "is": 0.8}
    assert resume.list_changes(run, replace(PAPER, momentum=0.8), 40) == [made]


def test_what_is_left_of_a_deleted_folder_is_no_run() -> None:
    run = Run.create("r", PAPER, {})
    (run.path / "run.json").unlink()
    with pytest.raises(StorageError, match=r"run\.json is missing"):
        run.update({"status": "finished"})
    assert not (run.path / "run.json").exists()


def test_a_record_begins_a_line_of_its_own() -> None:
    run = Run.create("r", PAPER, {})
    run.log({"event": "step", "step": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"event":"st')  # as a full disk leaves it
    run.log({"event": "end", "step": 2})
    run.log({"event": "end", "step": 3})
    assert [record["step"] for record in run.records()] == [1, 2, 3]


def test_more_epochs_may_follow_but_not_fewer_than_are_done() -> None:
    run = Run.create("r", PAPER, {})
    assert resume.check_recipe(run, replace(PAPER, epochs=99), set()).epochs == 99
    for epoch in (1, 2, 3):
        run.log({"event": "validation", "epoch": epoch, "step": 10 * epoch})
    assert resume.check_recipe(run, replace(PAPER, epochs=3), set()).epochs == 3
    with pytest.raises(UsageError, match="epochs = 2, but run r has done 3"):
        resume.check_recipe(run, replace(PAPER, epochs=2), {"epochs"})


def test_odd_lines_and_files_of_a_run_are_messages() -> None:
    run = Run.create("r", PAPER, {})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n"text"\n\xff\xfe\n{"event":"step","step":3}\n')
    assert run.records() == [{"event": "step", "step": 3}]
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"event":"step","step":null}\n{"event":"validation","step":"x"}\n{"step":9}\n')
    assert resume.check_recipe(run, PAPER, set()) == PAPER
    run.begin(PAPER, 4, 2)
    assert [r.get("step") for r in run.records()] == [3, None, "x"]
    (run.path / "run.json").write_text("[]")
    assert run.about == {}
    (run.path / "run.json").write_text("[1]")
    with pytest.raises(DataError, match="cannot be read"):
        _ = run.about


def test_which_run_auto_goes_on_with() -> None:
    assert resume.find_run_to_resume(None, None) is None
    assert resume.find_run_to_resume("auto", None) is None
    assert resume.find_run_to_resume("auto", "slurm") is None
    run = Run.create("slurm", TINY, {})
    for name in (None, "slurm"):
        found = resume.find_run_to_resume("auto", name)
        assert found is not None
        assert found.path.name == "slurm"
    run.update({"status": "finished"})
    assert resume.find_run_to_resume("auto", None) is None
    assert resume.find_run_to_resume("slurm", "slurm") is not None
    with pytest.raises(UsageError, match="--resume slurm and --name mine are different runs"):
        resume.find_run_to_resume("slurm", "mine")
    with pytest.raises(UsageError, match="there is no run other in"):
        resume.find_run_to_resume("other", None)


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28800), ("30m", 1800), ("1h30m", 5400), ("90s", 90), (None, None)]
)
def test_lengths_of_time(text: str | None, seconds: float | None) -> None:
    assert signals.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "soon", "-5", "1.5h", "5m1h", "h"])
def test_no_lengths_of_time(text: str) -> None:
    with pytest.raises(UsageError, match="not a duration"):
        signals.parse_duration(text)


def test_two_commands_cannot_train_one_run() -> None:
    run = Run.create("r", PAPER, {})
    with run.locked(), pytest.raises(DataError, match="another command is training"), run.locked():
        pass
    with run.locked():
        pass


def test_the_newest_run_is_taken_by_its_own_name() -> None:
    """So that results land in it even if another run becomes the newest meanwhile."""
    run = Run.create("r", PAPER, {})
    checkpoint(run, 1, "last")
    assert find_run_folder(find_weights(None)) == run.path
    for spec in ("", "."):
        with pytest.raises(WeightsError):
            find_weights(spec)


def test_a_run_inside_a_folder_of_runs_is_called_by_both_names() -> None:
    run = Run.create("cell", PAPER, {}, Path("runs/several"))
    assert (run.name, Run.open("several/cell").path) == ("several/cell", run.path)
    assert Run(Path("elsewhere/cell")).name == "cell"
    assert "alexnet train --resume several/cell" in run.storage_hint()
    assert not Path("runs/latest").exists()


@pytest.mark.parametrize(("present", "typed"), [(True, "alexnet train"), (False, "alexnet train --recipe tiny")])
def test_the_recipe_to_begin_with_is_one_that_the_machine_can_train(
    present: bool, typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "has_gpu", lambda: present)
    assert devices.suggest_train_command() == typed


def test_a_run_that_was_likely_meant_is_named() -> None:
    for name in ("2026-01-02_030405_paper", "2026-01-03_030405_paper", "mine"):
        Run.create(name, PAPER, {})
    for typed, meant in (("mien", "mine"), ("paper", "2026-01-03_030405_paper")):
        for look in (find_weights, Run.open):
            with pytest.raises((WeightsError, UsageError)) as caught:
                look(typed)
            assert caught.value.hint.startswith(f"did you mean {meant}? existing runs: ")
    with pytest.raises(WeightsError) as caught:
        find_weights("another")
    assert caught.value.hint.startswith("existing runs: ")
