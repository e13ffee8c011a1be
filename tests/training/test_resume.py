"""Resuming: which run, which recipe, and the list of changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training import resume
from alexnet_cli.errors import UsageError
from alexnet_cli.recipe import CAFFE, FAST, KRIZHEVSKY, PAPER, TINY, compare_recipes
from commands import alexnet


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_changes_of_the_result_are_refused() -> None:
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
        UsageError, match=r"(?m)^the recipe differs from that of run r: learning_rate = 0.5 instead of 0.03$"
    ) as caught:
        resume.check_recipe(run, replace(run.recipe, learning_rate=0.5), set())
    assert caught.value.hint == "remove it, or force it: --set learning_rate=0.5"
    with pytest.raises(UsageError, match=r"(?m)crops = False instead of True$") as caught:
        resume.check_recipe(run, replace(TINY, crops=False), set())
    assert caught.value.hint.endswith(": --set crops=false")
    assert resume.check_recipe(run, replace(TINY, learning_rate=0.5), {"learning_rate"}).learning_rate == 0.5
    with pytest.raises(UsageError, match="makes another network"):
        resume.check_recipe(run, replace(TINY, width=0.5), {"width"})
    with pytest.raises(
        UsageError, match=r'cross_talk = \["fc6"\] makes another network than .* \["conv3", "fc6", "fc7"\]'
    ):
        resume.check_recipe(run, replace(TINY, cross_talk=("fc6",)), {"cross_talk"})
    paper = Run.create("p", PAPER, {})
    with pytest.raises(UsageError, match=r"^width = 0.25 makes another network than that of run p"):
        resume.check_recipe(paper, TINY, set())  # not a word of a cycle that it does not have


def test_another_recipe_is_refused_with_the_hint_to_remove_it() -> None:
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
    with pytest.raises(UsageError, match=r"(?m)^the recipe differs from that of run paper"):
        resume.check_recipe(
            paper, replace(KRIZHEVSKY, epochs=20), set()
        )  # not a word of the epochs, which are the least


def test_the_hint_names_the_option_that_set_the_value() -> None:
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


def test_more_epochs_are_allowed_but_not_fewer_than_are_done() -> None:
    run = Run.create("r", PAPER, {})
    assert resume.check_recipe(run, replace(PAPER, epochs=99), set()).epochs == 99
    for epoch in (1, 2, 3):
        run.log({"event": "validation", "epoch": epoch, "step": 10 * epoch})
    assert resume.check_recipe(run, replace(PAPER, epochs=3), set()).epochs == 3
    with pytest.raises(UsageError, match="epochs = 2, but run r has begun epoch 3"):
        resume.check_recipe(run, replace(PAPER, epochs=2), {"epochs"})


def test_recipe_changes_are_recorded_with_their_steps() -> None:
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


def test_a_change_that_was_killed_at_once_leaves_no_value_behind() -> None:
    run = Run.create("r", replace(PAPER, momentum=0.8), {})
    applied = {"step": 30, "key": "momentum", "was": 0.9, "is": 0.8}
    run.update({"changed": [applied, {"step": 60, "key": "momentum", "was": 0.8, "is": 0.7}]})  # not in recipe.toml
    from_40 = {"step": 40, "key": "momentum", "was": 0.8, "is": 0.6}
    assert resume.list_changes(run, replace(PAPER, momentum=0.6), 40) == [applied, from_40]
    assert resume.list_changes(run, replace(PAPER, momentum=0.6), 20) == [{**from_40, "step": 20, "was": 0.9}]


@pytest.mark.parametrize(
    "told",
    [
        None, 5, [None, {"key": "momentum"}, {"step": 1, "key": "x", "was": 1, "is": 2}],
        [{"step": 30, "key": "momentum", "was": 0.9, "is": 0.8}],  # killed before recipe.toml had it
    ],
)  # fmt: skip
def test_invalid_or_unapplied_changes_are_dropped(told: Any) -> None:
    run = Run.create("r", PAPER, {})
    run.update({"changed": told})
    assert resume.list_changes(run, PAPER, 30) == []
    made = {"step": 30, "key": "momentum", "was": 0.9, "is": 0.8}
    assert resume.list_changes(run, replace(PAPER, momentum=0.8), 30) == [made]


def test_run_that_auto_resumes() -> None:
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
    ("spec", "hint"),
    [
        ("runs/mine/checkpoints/last", "did you mean --resume mine?"),
        ("mine/checkpoints/00000007/model.safetensors", "did you mean --resume mine?"),
        ("runs/latest/alexnet.onnx", "did you mean --resume mine?"),
        ("runs/study/tanh-seed0/checkpoints/best/", "did you mean --resume study/tanh-seed0?"),
        ("elsewhere/model.safetensors", "to start from these weights: --init-from elsewhere/model.safetensors"),
        ("last", "did you mean latest? existing runs: mine"),
        ("nope", "existing runs: mine"),
    ],
)
def test_a_checkpoint_in_place_of_a_run_names_its_run(spec: str, hint: str) -> None:
    Run.create("tanh-seed0", TINY, {}, Path("runs/study"))
    Run.create("mine", TINY, {})
    with pytest.raises(UsageError) as caught:
        resume.find_run_to_resume(spec, None)
    assert caught.value.hint == hint
