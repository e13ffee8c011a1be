"""Who may import whom (the tree in the README): an edge that is not in this table belongs here first."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SHELL = {
    "errors": "",
    "knob": "errors",
    "recipe": "errors knob",
    "entry_points": "errors",
    "console": "",
    "options": "",
    "usage": "recipe",
    "cli": "console errors entry_points usage",
}
CORE = {
    "devices": "",
    "heartbeat": "",
    "towers": "heartbeat",
    "transport": "",
    "ranks": "heartbeat towers transport",
    "launch": "devices ranks resume",
    "placement": "devices ranks triton_kernels",
    # section 2: the dataset
    "listing": "",
    "folders": "listing",
    "archives": "listing",
    "devkit": "",
    "imagenet": "archives devkit folders listing",
    "parquet": "listing",
    "ilsvrc": "",
    "unrecognised": "folders",
    "sources": "folders ilsvrc imagenet listing parquet unrecognised",
    "images": "",
    "fast_images": "images",
    "memory": "images",
    "statistics": "",
    "dataset_record": "",
    "shards": "dataset_record listing sources",
    "census": "",
    "shard_writer": "census shards statistics",
    "plan": "images shards sources",
    "assembly": "census plan shard_writer shards statistics",
    "chunk": "census fast_images images listing memory plan statistics",
    "packing": "assembly chunk listing memory plan shard_writer shards",
    "loader": "shards",
    "cache": "devices loader",
    # sections 3 and 4: the network
    "augment": "",
    "triton_kernels": "",
    "response_norm": "triton_kernels",
    "layers": "response_norm",
    "rows": "towers",
    "shapes": "",
    "weights": "shapes sources",
    "network": "layers rows shapes towers weights",
    # section 5: learning
    "update_gpu": "",
    "learning": "update_gpu",
    "atomic": "",
    "records": "listing",
    "runs": "atomic devices listing records",
    "checkpoint": "atomic learning listing network runs weights",
    "resume": "records runs",
    "origin": "records runs shards",
    "chance": "",
    "failure": "records runs",
    "evaluate": "augment loader network placement sources",
    "published": "ilsvrc sources",
    "lettering": "",
    "confusion_picture": "lettering",
    "results": "chance confusion_picture evaluate listing origin published shards sources",
    "backoff": "",
    "replicas": "network ranks",
    "compilation": "layers network",
    "gradient": "augment loader network placement",
    "fine_tuning": "network runs sources weights",
    "diagnosis": "augment gradient learning loader network weights",
    "training": "augment cache checkpoint compilation diagnosis evaluate fine_tuning gradient learning "
    "loader network placement records replicas runs shards weights",
    "tensorboard": "records runs",
    "advice": "chance records shards",
    "waiting": "",
    "train": "advice augment cache chance evaluate gradient loader qualitative records resume runs training waiting",
    # the paper's claims, switched off
    "switches": "",
    "ablation": "checkpoint failure placement records runs shards switches train training",
    "comparison": "runs switches",
    "plotting": "",
    "ablation_picture": "comparison",
    # section 6 and after: use
    "views": "",
    "onnx_metadata": "sources weights",
    "onnx_graph": "onnx_metadata weights",
    "quantize": "devices",
    "session": "devices onnx_graph onnx_metadata sources weights",
    "torch_session": "devices network session sources weights",
    "export": "atomic images onnx_graph onnx_metadata quantize session shards torch_session views weights",
    "inputs": "devices folders images listing memory runs",
    "predict": "images inputs session sources torch_session views",
    "responses": "images inputs session shards views",
    "stimuli": "responses",
    "receptive_field": "shapes",
    "contact_sheet": "lettering",
    "activations": "images predict responses session views weights",
    "activations_picture": "activations contact_sheet lettering predict",
    "outlines": "",
    "nearest": "devices outlines",
    "neighbours": "atomic nearest onnx_graph origin outlines responses runs session shards",
    "qualitative_sheets": "contact_sheet images receptive_field responses shards sources stimuli",
    "spectra": "",
    "qualitative": "spectra",
    "filter_picture": "lettering qualitative",
    # one page about a run
    "history": "",
    "patience": "",
    "neighbourhoods": "images nearest neighbours patience responses runs session shards weights",
    "evidence": "augment backoff evaluate images loader neighbourhoods network origin patience placement "
    "published responses results shards weights",
    "report": "evaluate evidence history patience placement qualitative runs shards sources weights",
    "report_charts": "history",
    "report_pictures": "",
    "anatomy": "layers network",
    "network_picture": "anatomy report_charts",
    "report_network": "anatomy network network_picture report report_pictures",
    "report_sections": "confusion_picture evaluate evidence filter_picture history published report report_charts "
    "report_pictures results",
    "report_page": "atomic chance history plotting records report report_charts report_network report_sections results "
    "runs shards",
    # weights of other programs
    "foreign": "shapes",
    "caffemodel": "foreign",
    "onnx_weights": "foreign",
    "state_dict": "foreign weights",
    "conversion": "atomic caffemodel devkit foreign ilsvrc listing onnx_weights runs shapes sources state_dict weights",
    "stopwatch": "",
}
TORCH = {
    "devices", "state_dict", "ranks", "launch", "rows", "replicas", "update_gpu", "placement", "fast_images", "chunk",
    "packing", "loader", "cache", "augment", "response_norm", "transport", "waiting",
    "triton_kernels", "layers", "towers", "network", "compilation", "learning", "checkpoint", "evaluate", "results",
    "fine_tuning", "gradient", "diagnosis", "training", "train", "ablation", "tensorboard",
    "torch_session", "evidence", "report", "report_sections", "report_page", "anatomy", "report_network",
}  # fmt: skip
LAZY_TORCH = {"devices", "state_dict"}  # import it in functions only
PLUGINS = {"errors", "knob", "recipe", "console", "options", "entry_points"}  # and anything in core
BESIDE = {
    "prepare": {"prepare_report"},
    "demo": {"demo_pictures"},
    "ablate": {"ablate_table"},
    "train": {"train_config", "train_display", "train_end", "train_report", "train_setup"},
    "train_end": {"train_report"},
    "train_setup": {"train_config"},
    "visualize_filters": {"visualize_patches", "visualize_picture", "visualize_terminal"},
    "benchmark": {
        "benchmark_pictures",
        "benchmark_prepare",
        "benchmark_load",
        "benchmark_train",
        "benchmark_infer",
        "benchmark_startup",
        "benchmark_parallel",
    },
    "benchmark_train": {"benchmark_step"},
    "benchmark_parallel": {"benchmark_rank"},
    "benchmark_infer": {"benchmark_step"},
    "benchmark_startup": {"benchmark_infer", "benchmark_pictures", "benchmark_step"},
}
RIVALS = {
    "benchmark_load",
    "benchmark_train",
    "benchmark_step",
    "benchmark_infer",
    "benchmark_startup",
    "benchmark_parallel",
    "benchmark_rank",
    "benchmark_costs",
}  # what others use is measured here


def imports(path: Path) -> set[str]:
    """Dotted names of every module a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(path: Path, package: str) -> set[str]:
    """The modules of a package that a file imports, by their own names."""
    folder = ROOT / package.replace(".", "/") if package.startswith("alexnet_cli") else ROOT / "plugins" / package
    names = {name.removeprefix(f"{package}.").split(".")[0] for name in imports(path) if name.startswith(f"{package}.")}
    return {name for name in names if (folder / f"{name}.py").is_file()}


def modules(folder: str) -> list[str]:
    return sorted(p.stem for p in (ROOT / folder).glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize(("folder", "table"), [("alexnet_cli", SHELL), ("alexnet_cli/core", CORE)])
def test_the_table_lists_what_is_there(folder: str, table: dict[str, str]) -> None:
    assert set(modules(folder)) == set(table), "add the module, with what it may import, to the table above"


@pytest.mark.parametrize("name", modules("alexnet_cli"))
def test_the_shell(name: str) -> None:
    path = ROOT / "alexnet_cli" / f"{name}.py"
    assert inside(path, "alexnet_cli") <= set(SHELL[name].split())
    assert not inside(path, "alexnet_cli.core"), "the shell reaches core through entry points alone"
    tops = {module.split(".")[0] for module in imports(path)}
    assert not tops & {"torch", "torchvision", "numpy", "PIL", "onnx", "onnxruntime", "click", "alexnet_plugins"}


@pytest.mark.parametrize("name", modules("alexnet_cli/core"))
def test_core(name: str) -> None:
    path = ROOT / "alexnet_cli" / "core" / f"{name}.py"
    extra = inside(path, "alexnet_cli.core") - set(CORE[name].split())
    assert not extra, f"core/{name}.py imports {extra}, which the table above does not allow"
    assert inside(path, "alexnet_cli") <= {"errors", "knob", "recipe"}, "core knows neither the shell nor the plugins"
    tops = {module.split(".")[0] for module in imports(path)}
    assert not tops & {"typer", "rich", "click", "alexnet_plugins"}
    if name not in TORCH:
        assert not tops & {"torch", "torchvision"}


@pytest.mark.parametrize("name", modules("plugins/alexnet_plugins"))
def test_plugins(name: str) -> None:
    path = ROOT / "plugins" / "alexnet_plugins" / f"{name}.py"
    assert inside(path, "alexnet_plugins") <= BESIDE.get(name, set()), "plugins never import one another"
    assert inside(path, "alexnet_cli") <= PLUGINS
    tops = {module.split(".")[0] for module in imports(path)}
    assert not tops & {"torch", "torchvision", "onnxruntime", "click"} or name in RIVALS


def test_the_arrows_have_no_cycle() -> None:
    left = {name: set(text.split()) for name, text in CORE.items()}
    while left:
        ends = {name for name, targets in left.items() if not targets}
        assert ends, f"a cycle among {sorted(left)}"
        left = {name: targets - ends for name, targets in left.items() if name not in ends}


def test_what_needs_no_torch_imports_none() -> None:
    names = [f"alexnet_cli.core.{name}" for name in CORE if name not in TORCH - LAZY_TORCH]
    code = f"import sys, {', '.join(names)}; assert 'torch' not in sys.modules; assert 'onnxruntime' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
