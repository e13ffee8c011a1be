"""The command line: help, messages, exit codes, commands of other distributions."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from alexnet_cli import cli, entry_points
from alexnet_cli.core import devices
from alexnet_cli.core.model import triton_kernels
from alexnet_cli.errors import AlexNetError, DataError, Stopped, VerificationError
from commands import alexnet

HEAVY = ("torch", "torchvision", "numpy", "PIL", "onnxruntime", "onnx", "safetensors")
COMMANDS = (
    "prepare", "train", "evaluate", "predict", "explain", "neighbors", "visualize-filters", "report", "export",
    "import-weights", "ablate", "reproduce", "demo", "runs", "benchmark", "doctor", "plugins",
)  # fmt: skip


def started(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does; `path` is a folder of other modules."""
    paths = [str(path)] if path else []
    paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "alexnet_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[..., Path]:
    """Make a distribution without installing it: a module and its entry points in a folder for PYTHONPATH."""

    def make(command: str, body: str, distribution: str = "alexnet-extra", summary: str = "An extra.") -> Path:
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(body, encoding="utf-8")
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        about = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\nSummary: {summary}\n"
        (info / "METADATA").write_text(about, encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[alexnet.commands]\n{command} = {module}:run\n", encoding="utf-8")
        return tmp_path

    return make


HELLO = '''
import sys
from typing import Annotated
import typer

def run(name: str, loud: Annotated[bool, typer.Option("--loud")] = False) -> None:
    """Greet somebody."""
    sys.stdout.write(f"hello {name}{'!' if loud else ''}")
'''


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom alexnet_cli import cli\n"
        "try:\n cli.main(['--help'])\nexcept SystemExit as e:\n assert e.code == 0\n"
        f"heavy = [m for m in {HEAVY} if m in sys.modules]\nassert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    for command in COMMANDS:
        assert f"\n  {command} " in result.stdout


def test_help_cuts_no_description() -> None:
    shown = alexnet("--help", settings={"COLUMNS": "80"}).stdout
    assert "..." not in shown.partition("Commands:")[2]


@pytest.mark.parametrize(
    ("asked", "same"),
    [
        ("help", "--help"),
        ("help train", "train --help"),
        ("help help", "--help"),
        ("--debug help train", "train --help"),
    ],
)
def test_help_works_as_a_command(asked: str, same: str) -> None:
    result = alexnet(*asked.split())
    assert (result.returncode, result.stdout) == (0, alexnet(*same.split()).stdout)
    assert alexnet("help", "trian").returncode == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    for flag in ("-h", "--help"):
        result = alexnet(command, flag)
        assert result.returncode == 0, result.stderr
        assert "--json" in result.stdout
        assert "--quiet" in result.stdout
        own = "--weights" in result.stdout and "--data" in result.stdout
        assert ("the one the weights were trained on" in " ".join(result.stdout.split())) == own


def test_without_arguments_help_and_exit_2() -> None:
    result = alexnet()
    assert result.returncode == 2
    assert "Commands:" in result.stdout


def test_version_is_one_line() -> None:
    assert started("--version").stdout == alexnet("-V").stdout == "alexnet 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("trian",), "No such command 'trian'", "did you mean 'train'?"),
        (("classify", "x.jpg"), "No such command 'classify'", "did you mean predict?"),
        (("fit",), "No such command 'fit'", "alexnet --help"),
        (("evaluate", "mine"), "(mine)", "alexnet evaluate --help"),
        (("predict", "x", "--features", "fc7", "-o", "no/f.npz"), "the folder no does not exist", ""),
        (("train", "--epoch", "3"), "No such option: --epoch", "--epochs"),
        (("train", "--epochs", "x"), "'--epochs'", "alexnet train --help"),
        (("train", "--epochs"), "'--epochs' requires an argument", "alexnet train --help"),
        (("train", "--recpie", "tiny"), "No such option: --recpie", "--recipe"),
        (("predict", "x.jpg", "-k", "0"), "'-k' / '--top-k'", "alexnet predict --help"),
        (("train", "--parallel", "towers"), "'towers' is not one of 'auto', 'tower'", "alexnet train --help"),
        (("evaluate", "--views", "3"), "'--views'", "alexnet evaluate --help"),
        (("predict",), "", "alexnet predict --help"),
        (("train", "--recipe", "papr"), "no recipe and no file is called papr", "did you mean paper?"),
        (("train", "--max-time", "soon"), "--max-time soon", "8h"),
    ],
)
def test_mistakes_are_two_lines_and_exit_2(arguments: tuple[str, ...], error: str, hint: str) -> None:
    result = alexnet(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 2, result.stderr
    assert lines[0].startswith("error: ")
    assert error in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train --gpus 0 1", "--gpus 0,1"),
        ("train --gpus 0, 1 2 --epochs 1", "--gpus 0,1,2"),
        ("train --gpus 1 1", "--gpus 1,1"),
        ("ablate --only tanh sigmoid", "--only tanh,sigmoid"),
        ("train --set dropout 0.1", "--set dropout=0.1"),
        ("train data=prepared/x", "--data prepared/x"),
        ("train batch=8 lr0=0.1", "--batch-size 8"),
        ("train Device=cuda:0", "--gpus 0"),
        ("train momentum=0.8", "--set momentum=0.8"),
        ("prepare pets output=x", "--output x"),
        ("predict cat.jpg views=10", "--views 10"),
        ("train --device cpu", "--gpus none"),
        ("evaluate --device=cuda:1", "--gpus 1"),
        ("train --gpus cuda:0,cuda:1", "--gpus 0,1"),
        ("train --gpus CPU", "--gpus none"),
        ("train --num_workers 4", "--jobs 4"),
        ("train --weight-decay 0.1", "--set weight_decay=0.1"),
        ("train --learning-rate 0.1", "--lr 0.1"),
        ("train --lr 0,01", "--lr 0.01"),
        ("train mine/colors", "--data mine/colors"),
        ("train tiny", "--recipe tiny"),
        ("train one", "--resume one"),
        ("evaluate runs/one", "-w runs/one"),
        ("export --batch 3", ""),
        ("train --verbose", ""),
        ("train --gpus 0 x", ""),
        ("train =3", ""),
    ],
)
def test_a_word_of_another_tool_has_the_right_one_as_its_hint(typed: str, meant: str, tmp_path: Path) -> None:
    for file in ("mine/colors/dataset.json", "runs/one/run.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("{}", encoding="utf-8")
    result = alexnet(*typed.split(), folder=tmp_path)
    hint = result.stderr.splitlines()[-1]
    assert result.returncode == (3 if typed.startswith("predict") else 2)
    assert hint.partition("? ")[0].rstrip("?") == (f"hint: did you mean {meant}" if meant else hint)
    assert meant or "did you mean" not in hint


def test_options_of_a_command_follow_it() -> None:
    assert alexnet("-q", "doctor").stderr.splitlines()[1] == "hint: options follow the command: alexnet COMMAND -q"


@pytest.mark.parametrize("typed", ["--recipe papr", "--recipe tiny --set widht=1", "--set width", "--max-time soon"])
def test_mistyped_options_are_reported_before_torch_is_loaded(typed: str) -> None:
    code = (
        f"import sys\nsys.modules['torch'] = None\nfrom alexnet_cli import cli\ncli.main({['train', *typed.split()]})"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 2, result.stderr
    assert "error: " in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("no pictures in x", "look elsewhere"), 3),
        (VerificationError("differs", "again"), 6),
        (Stopped("time is up", "go on", 75), 75),
        (OSError(errno.ENOSPC, "No space left on device", "/full"), 7),
        (OSError(errno.EROFS, "Read-only file system", "/cd"), 7),
        (PermissionError(errno.EACCES, "Permission denied", "/secret"), 3),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("oops"), 1),
    ],
)
def test_errors_become_messages_and_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise error

    assert cli._run_guarded(run, debug=False) == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    if isinstance(error, AlexNetError):
        assert message == f"error: {error.what}\nhint: {error.hint}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_an_import_still_stops(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's import of numpy does so, and goes on with half of it."""

    def cut_short(_app: object) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(number)
        raise AttributeError("module 'numpy' has no attribute 'matrix'")

    monkeypatch.setattr(typer.main, "get_command", cut_short)
    before = signal.getsignal(number)
    result = alexnet("doctor")
    assert result.returncode == code
    assert result.stderr.startswith("error: stopped by ")
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert alexnet("evaluate", "-w", "").returncode == 3, "the next command has not been stopped"


@pytest.mark.parametrize(("words", "code"), [("['--version']", 0), ("['runs', 'nothing']", 2)], ids=["done", "failed"])
def test_sigterm_at_the_end_changes_nothing(words: str, code: int, tmp_path: Path) -> None:
    """torchrun sends it to workers that are ending by themselves: while they write an error, or after that."""
    lines = (
        "import atexit, os, signal, sys",
        "from alexnet_cli import cli",
        "stop = lambda: os.kill(os.getpid(), signal.SIGTERM)",
        "atexit.register(stop)",
        "format_error = cli._format_any_error",
        "cli._format_any_error = lambda error: (stop(), format_error(error))[1]",
        f"cli.main({words})",
    )
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == (code != 0)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise ZeroDivisionError("oops")

    assert cli._run_guarded(run, debug=True) == 1
    assert "ZeroDivisionError: oops" in capsys.readouterr().err
    assert "Traceback" in alexnet("--debug", "train", "--recipe", "papr").stderr
    assert "Traceback" not in alexnet("train", "--recipe", "papr").stderr


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m alexnet_cli --help | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600, check=False)
    assert "Traceback" not in result.stderr
    assert "error" not in result.stderr


def test_a_third_party_command_is_found_and_called(plugin: Callable[..., Path]) -> None:
    path = plugin("hello", HELLO, summary="Greets people.")
    assert "hello              Greets people." in alexnet("--help", plugins=path).stdout
    assert alexnet("hello", "world", "--loud", plugins=path).stdout == "hello world!"
    assert "Greet somebody" in alexnet("hello", "--help", plugins=path).stdout
    assert "did you mean 'hello'" in alexnet("helo", plugins=path).stderr


def test_an_error_in_a_third_party_command_names_it(plugin: Callable[..., Path]) -> None:
    path = plugin("half", 'def run(n: int) -> None:\n    """Halve."""\n    print(1 / n)\n')
    broken = alexnet("half", "0", plugins=path)
    assert broken.returncode == 1
    assert broken.stderr == (
        "error: the command half of alexnet-extra failed: ZeroDivisionError: division by zero\n"
        "hint: tell its authors; alexnet --debug half shows where\n"
    )
    assert "Traceback" in alexnet("--debug", "half", "0", plugins=path).stderr
    assert alexnet("half", "x", plugins=path).returncode == 2


def test_a_typer_app_is_a_command(plugin: Callable[..., Path]) -> None:
    body = (
        "import typer, sys\nrun = typer.Typer()\n"
        "@run.command()\ndef one() -> None:\n    '''First.'''\n    sys.stdout.write('1')\n"
        "@run.command()\ndef two() -> None:\n    '''Second.'''\n    sys.stdout.write('2')\n"
    )
    assert alexnet("pair", "two", plugins=plugin("pair", body)).stdout == "2"


def test_a_broken_plugin_is_listed_with_its_reason(plugin: Callable[..., Path]) -> None:
    path = plugin("grad", "import nonesuch_module\ndef run() -> None: ...\n")
    assert alexnet("--help", plugins=path).returncode == 0
    assert alexnet("plugins", plugins=path).returncode == 0
    for arguments in (("grad",), ("grad", "--layer", "5", "x.jpg"), ("grad", "--help")):
        result = alexnet(*arguments, plugins=path)
        assert result.returncode == 4
        assert "No module named 'nonesuch_module'" in result.stderr
        assert "Traceback" not in result.stderr
    rows = {row["name"]: row for row in json.loads(alexnet("plugins", "--json", plugins=path).stdout)["plugins"]}
    assert (rows["grad"]["status"], rows["grad"]["version"], rows["train"]["status"]) == ("broken", "1.2", "ok")
    assert "nonesuch_module" in rows["grad"]["reason"]
    assert any("grad" in key for key in json.loads(alexnet("doctor", "--json", plugins=path).stdout)["broken_commands"])


def test_help_does_not_import_plugins(plugin: Callable[..., Path]) -> None:
    path = plugin("slow", "import sys\nsys.stderr.write('IMPORTED')\n" + HELLO)
    assert "IMPORTED" not in alexnet("--help", plugins=path).stderr
    assert "IMPORTED" in alexnet("slow", "x", plugins=path).stderr


GREETING = "print('welcome to the greeting library')\n"


def test_what_a_plugin_prints_on_import_is_not_in_the_result(plugin: Callable[..., Path]) -> None:
    path = plugin("hello", GREETING + HELLO)
    listed = alexnet("plugins", "--json", plugins=path)
    assert "hello" in [row["name"] for row in json.loads(listed.stdout)["plugins"] if row["status"] == "ok"]
    assert "welcome" in listed.stderr
    result = alexnet("hello", "world", plugins=path)
    assert (result.stdout, result.stderr) == ("hello world", "welcome to the greeting library\n")


def test_what_a_plugin_prints_at_exit_is_not_in_the_result(plugin: Callable[..., Path]) -> None:
    path = plugin("hello", "import atexit\natexit.register(print, 'goodbye')\n" + HELLO)
    listed = started("plugins", "--json", path=path)
    assert json.loads(listed.stdout)["schema"] == "alexnet.plugins/1"
    assert "goodbye" in listed.stderr


def test_what_a_library_prints_is_not_in_the_json_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def greet() -> list[devices.Gpu]:
        print("welcome to the driver")  # noqa: T201
        return []

    monkeypatch.setattr(devices, "list_gpus", greet)
    result = alexnet("doctor", "--json")
    assert json.loads(result.stdout)["gpus"] == []
    assert "welcome to the driver" in result.stderr
    assert "Usage" in alexnet("doctor", "--json", "--help").stdout


def test_a_built_in_cannot_be_replaced(plugin: Callable[..., Path]) -> None:
    path = plugin("train", HELLO)
    assert "hello" not in alexnet("train", "--help", plugins=path).stdout
    found = json.loads(alexnet("plugins", "--json", plugins=path).stdout)["plugins"]
    assert {row["distribution"]: row["status"] for row in found if row["name"] == "train"} == {
        "alexnet-cli": "ok", "alexnet-extra": "shadowed",
    }  # fmt: skip


def test_a_name_conflict_names_both_distributions(plugin: Callable[..., Path]) -> None:
    plugin("hello", HELLO, "alexnet-one")
    path = plugin("hello", HELLO, "alexnet-two")
    result = alexnet("hello", "world", plugins=path)
    assert result.returncode == 4
    assert "alexnet-one and alexnet-two" in result.stderr
    assert alexnet("hello", "world", plugins=path, settings={"ALEXNET_PLUGINS": "alexnet-two"}).stdout == "hello world"


@pytest.mark.parametrize(
    ("allowed", "works"),
    [("", False), ("other", False), ("other, alexnet-extra", True), ("Alexnet_Extra", True)],
)
def test_plugins_can_be_switched_off(plugin: Callable[..., Path], allowed: str, works: bool) -> None:
    result = alexnet("hello", "world", plugins=plugin("hello", HELLO), settings={"ALEXNET_PLUGINS": allowed})
    assert (result.stdout == "hello world") is works
    assert result.returncode == (0 if works else 2)


def test_a_plugin_that_exits_on_import_is_broken(plugin: Callable[..., Path]) -> None:
    path = plugin("leaver", "import sys\nsys.exit('bye')\n")
    assert alexnet("leaver", "--x", plugins=path).returncode == 4
    result = alexnet("plugins", "--json", plugins=path)
    assert {row["name"]: row["status"] for row in json.loads(result.stdout)["plugins"]}["leaver"] == "broken"


def test_a_signature_that_typer_refuses_names_the_plugin(plugin: Callable[..., Path]) -> None:
    result = alexnet("odd", "3", plugins=plugin("odd", "def run(x: int | str) -> None: ...\n"))
    assert result.returncode == 4
    assert "alexnet-extra cannot be built" in result.stderr


def test_a_return_value_is_no_exit_code(plugin: Callable[..., Path]) -> None:
    assert alexnet("five", plugins=plugin("five", "def run() -> int:\n    return 5\n")).returncode == 0


def test_an_exit_code_is_kept(plugin: Callable[..., Path]) -> None:
    assert (
        alexnet(
            "five", plugins=plugin("five", "import typer\ndef run() -> None:\n    raise typer.Exit(5)\n")
        ).returncode
        == 5
    )


@pytest.mark.parametrize("records", [b"[alexnet.commands]\nzz\n", b"\xff\xfe", b"[alexnet.commands]\nhello = x:run\n"])
def test_corrupt_metadata_of_a_distribution_is_ignored(plugin: Callable[..., Path], records: bytes) -> None:
    path = plugin("hello", HELLO)
    damaged = path / "half_gone-1.0.dist-info"
    damaged.mkdir()
    (damaged / "entry_points.txt").write_bytes(records)
    assert alexnet("--version", plugins=path).returncode == 0
    assert alexnet("plugins", plugins=path).returncode == 0


def test_of_a_distribution_installed_twice_the_first_counts(plugin: Callable[..., Path], tmp_path: Path) -> None:
    path = plugin("hello", HELLO)
    shutil.copytree(path, tmp_path / "again", ignore=shutil.ignore_patterns("again"))
    twice = path / "alexnet_extra-1.2.dist-info" / "METADATA"
    twice.write_text(twice.read_text(encoding="utf-8").replace("1.2", "1.3"), encoding="utf-8")
    older = tmp_path / "again" / "alexnet_extra-1.2.dist-info" / "entry_points.txt"
    older.write_text(older.read_text(encoding="utf-8") + "gone = alexnet_extra:run\n", encoding="utf-8")
    paths = os.pathsep.join([str(path), str(tmp_path / "again")])
    rows = json.loads(started("plugins", "--json", path=Path(paths)).stdout)["plugins"]
    assert [(row["name"], row["version"]) for row in rows if row["distribution"] == "alexnet-extra"] == [
        ("hello", "1.3")
    ]


def test_the_parsers_errors_need_no_new_typer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(typer, "TyperException", raising=False)
    assert cli._format_any_error(typer.BadParameter("too big")) == ("Invalid value: too big", "alexnet --help", 2)
    assert cli._format_any_error(ZeroDivisionError("oops"))[2] == 1


def test_completion_offers_commands_and_options() -> None:
    def complete(words: str) -> str:
        settings = {"_ALEXNET_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return alexnet(settings=settings).stdout

    assert "visualize-filters" in complete("alexnet vis")
    assert "--recipe" in complete("alexnet train --rec")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("evaluate -w mi", ["mine"]),
        ("runs mi", ["mine"]),
        ("evaluate -w runs/m", [f"runs{os.sep}mine{os.sep}"]),
        ("train --data pe", ["pets"]),
        ("train --recipe ti", ["tiny"]),
        ("ablate --set drop", ["dropout=", "dropout_inverted=", "drop_epochs="]),
    ],
)
def test_completion_offers_values_without_torch(words: str, expected: list[str], tmp_path: Path) -> None:
    for file in ("runs/mine/run.json", "prepared/pets/dataset.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("{}", encoding="utf-8")
    code = "import sys\nsys.modules['torch'] = None\nfrom alexnet_cli import cli\ncli.main([])"
    typed = f"alexnet {words}"
    settings = {"_ALEXNET_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, timeout=600, check=False
    )
    assert (result.stdout.split(), result.stderr) == (expected, "")


@pytest.mark.parametrize("option", ["-w", "--data"])
def test_a_broken_folder_has_no_completions(option: str, tmp_path: Path) -> None:
    for folder in ("runs", "prepared"):
        (tmp_path / folder).symlink_to(folder)  # to itself: looking into it fails
    words = f"alexnet evaluate {option} x"
    settings = {"_ALEXNET_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"}
    result = alexnet(settings=settings, folder=tmp_path)
    assert (result.stdout.strip(), result.stderr) == ("", "")


def test_completion_survives_a_broken_plugin(plugin: Callable[..., Path]) -> None:
    settings = {"_ALEXNET_COMPLETE": "complete_bash", "COMP_WORDS": "alexnet grad --x", "COMP_CWORD": "2"}
    result = alexnet(plugins=plugin("grad", "import nonesuch_module\n"), settings=settings)
    assert "Traceback" not in result.stderr


def test_every_built_in_loads_and_has_its_name() -> None:
    builtins = [entry for entry in entry_points.find_entries({}) if entry.is_builtin]
    assert {entry.name for entry in builtins} == set(COMMANDS)
    for entry in builtins:
        assert entry.load().__name__.replace("_", "-") == entry.name


def test_doctor_lists_providers_that_work() -> None:
    found = json.loads(started("doctor", "--json").stdout)
    assert found["schema"] == "alexnet.doctor/1"
    assert found["onnxruntime_providers"]["CPUExecutionProvider"] == "ok"
    import torch

    assert bool(found["gpus"]) == torch.cuda.is_available()
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    if not torch.cuda.is_available() and "CUDAExecutionProvider" in found["onnxruntime_providers"]:
        assert found["onnxruntime_providers"]["CUDAExecutionProvider"] != "ok"
    for name in ("ALEXNET_DATA", "ALEXNET_RUNS_DIR", "ALEXNET_PLUGINS"):
        assert name in found["environment"]


def test_doctor_says_what_each_gpu_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [devices.Gpu(0, "H100", 80 << 30, "9.0"), devices.Gpu(1, "K80", 12 << 30, "3.7")]
    monkeypatch.setattr(devices, "list_gpus", lambda: gpus)
    monkeypatch.setattr(devices, "try_gpu", lambda index: ["", "no kernel image is available"][index])
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda index: "")
    monkeypatch.setattr(devices, "check_gpu_copies", lambda indices: pytest.fail("only one of them works"))
    said = alexnet("doctor").stdout
    assert "0: H100, 80 GiB, bf16: yes, kernels: ok" in said
    assert "1: K80, 12 GiB, bf16: no, cannot be used: no kernel image is available" in said
    assert [gpu.get("kernels") for gpu in json.loads(alexnet("doctor", "--json").stdout)["gpus"]] == ["ok", None]


@pytest.mark.parametrize(
    ("states", "line"),
    [
        ({"0 to 1": "ok", "1 to 0": "ok"}, "copies    between all GPUs: ok"),
        ({"0 to 1": "corrupted", "1 to 0": "ok"}, "copies    0 to 1: corrupted; train with NCCL_P2P_DISABLE=1"),
    ],
)
def test_doctor_compares_copies_between_gpus(
    states: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [devices.Gpu(i, "H100", 80 << 30, "9.0") for i in (0, 1)]
    monkeypatch.setattr(devices, "list_gpus", lambda: gpus)
    monkeypatch.setattr(devices, "try_gpu", lambda index: "")
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda index: "")
    monkeypatch.setattr(devices, "check_gpu_copies", lambda indices: states if indices == [0, 1] else {})
    assert line in alexnet("doctor").stdout.splitlines()
    assert json.loads(alexnet("doctor", "--json").stdout)["gpu_copies"] == states


@pytest.mark.parametrize(("package", "words"), [("torch", ["--json"]), ("onnxruntime", [])])
def test_doctor_reports_packages_that_do_not_import(tmp_path: Path, package: str, words: list[str]) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n", encoding="utf-8")
    result = started("doctor", *words, path=tmp_path)
    assert result.returncode == 0, result.stderr
    if words:
        assert json.loads(result.stdout)["problems"] == {package: "ImportError: libcudart.so.13: cannot open"}
    else:
        assert f"{package}: ImportError: libcudart.so.13: cannot open" in result.stdout


def test_disabled_plugins_are_not_broken(plugin: Callable[..., Path]) -> None:
    result = alexnet("doctor", "--json", plugins=plugin("hello", HELLO), settings={"ALEXNET_PLUGINS": ""})
    assert not any("hello" in key for key in json.loads(result.stdout)["broken_commands"])


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, cli.SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_sleep_soon_by_default(
    said: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert os.environ.get("GOMP_SPINCOUNT") == expected
