"""The Python API: `import alexnet_cli as alexnet`. What the main commands do, as functions that return objects.

`alexnet_cli/__init__.py` loads this module when one of its names is first used, since it imports torch.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Literal

from alexnet_cli import recipe_io
from alexnet_cli.core.data import loader, plan, shards, sources
from alexnet_cli.core.data.augment import Augment
from alexnet_cli.core.data.prepare import pack
from alexnet_cli.core.data.shards import Dataset
from alexnet_cli.core.devices import count_cores
from alexnet_cli.core.evaluation import evaluate as evaluation
from alexnet_cli.core.evaluation.evaluate import Evaluation
from alexnet_cli.core.export import export as exporting
from alexnet_cli.core.export.quantize import CALIBRATION_IMAGES
from alexnet_cli.core.model.alexnet import AlexNet
from alexnet_cli.core.model.model_file import Model, read_model
from alexnet_cli.core.parallel.placement import choose_decode_threads, place
from alexnet_cli.core.runs.records import Record
from alexnet_cli.core.runs.resolve import find_training_data, find_weights
from alexnet_cli.core.runs.run import RUNNING, record_failure
from alexnet_cli.core.training import setup
from alexnet_cli.core.training.fine_tuning import load_source, match_layers
from alexnet_cli.core.training.loop import TrainingLoop
from alexnet_cli.core.training.trainer import Trainer
from alexnet_cli.errors import AlexNetError, DataError, Stopped, UsageError
from alexnet_cli.recipe import RECIPES, Recipe

__all__ = (
    "AlexNet", "AlexNetError", "Recipe", "evaluate", "export", "load", "open_dataset", "prepare", "recipes", "train",
)  # fmt: skip

BATCH = 128

recipes = dict(RECIPES)
"""The named recipes: paper, krizhevsky, caffe, fast, tiny. `dataclasses.replace` changes a value."""


def load(weights: str | Path | None = None) -> AlexNet:
    """Load a trained network, in evaluation mode on the CPU.

    Args:
        weights: a run or its name, a checkpoint folder, a .safetensors file, or a folder that `alexnet export --hub`
            wrote; runs/latest by default.

    Raises:
        WeightsError: there is no such network, or its file is damaged.
    """
    return AlexNet.from_model(_read_model(weights))


def open_dataset(data: str | Path | None = None) -> Dataset:
    """Open a prepared data set: a folder, or a name under prepared/; by default the only or newest one there.

    Raises:
        DataError: it is missing, unfinished or damaged.
    """
    return shards.open_dataset(shards.find_dataset(str(data) if data is not None else None))


def prepare(
    source: str | Path,
    output: str | Path | None = None,
    *,
    val_fraction: float | None = None,
    exif_rotate: bool = False,
    overwrite: bool = False,
) -> Dataset:
    """Pack a folder of images, or another layout that `alexnet prepare` knows, and open the result.

    What is already packed is kept: a second call returns at once.

    Args:
        source: the folder; never changed.
        output: prepared/NAME by default.
        val_fraction: share of each class to validate on, if the source has no validation split; 0.1 by default.
        exif_rotate: rotate images by their EXIF orientation.
        overwrite: replace `output`.

    Raises:
        DataError: there are no images, or not of a known layout.
        UsageError: `output` holds something else, or the same source with other settings.
    """
    found = sources.detect_source(Path(source), val_fraction)
    target = Path(output) if output else plan.default_output(Path(source))
    packing = plan.Plan(found, target, exif_rotate=exif_rotate)
    if packing.state(overwrite) != "finished":
        packing.check_space(packing.estimate_bytes())
        for _ in pack(packing, count_cores(), overwrite=overwrite):
            pass
    return shards.open_dataset(target)


def train(
    recipe: Recipe | str | None = None,
    data: Dataset | str | Path | None = None,
    *,
    name: str | None = None,
    init_from: str | Path | None = None,
    gpus: str | None = None,
    max_steps: int | None = None,
    jobs: int | None = None,
) -> Generator[Record]:
    """Train a network on one device as a new run, and yield each record of metrics.jsonl as it is written.

    `alexnet.load(name)` then loads the best epoch; without a name, `alexnet.load()`. If the loop over the records ends
    early, `alexnet train --resume NAME` continues from the last checkpoint.

    Args:
        recipe: a recipe, the name of one, or a TOML file; `paper` by default, or that of `init_from`.
        data: a prepared data set, as for `open_dataset`.
        name: of the run, runs/NAME; date, time and recipe by default.
        init_from: weights to start from, as for `load`; layers that do not fit start at random.
        gpus: id of a GPU, or "none" for the CPU; by default the first GPU if there is one.
        max_steps: stop after so many steps.
        jobs: threads that decode images; one per core by default.

    Raises:
        AlexNetError: see `alexnet_cli.errors`; the run is marked as failed.
    """
    initial = load_source(str(init_from), None) if init_from is not None else None
    if recipe is None and initial:
        recipe = recipe_io.apply_changes(initial.recipe, {"frozen": "none"})
    resolved = recipe if isinstance(recipe, Recipe) else recipe_io.load_recipe(recipe or "paper")
    dataset = _open(data)
    setup.check_data(dataset, None)
    placement = place(gpus, resolved.precision)
    transfer = match_layers(str(init_from), initial, resolved, dataset.classes) if initial else None
    run = setup.open_run(None, name, resolved, placement, dataset, transfer, {}, ["alexnet.train"])
    with run.locked():
        try:
            trainer = Trainer.for_dataset(resolved, dataset, placement)
            transfer = transfer.apply(trainer.network) if transfer else None
            loop = TrainingLoop(trainer, dataset, run, choose_decode_threads(jobs), transfer=transfer)
            run.update(RUNNING)
            reason = None
            for record in loop.fit(max_steps=max_steps):
                reason = record.reason
                yield record
            run.update({"status": "finished" if reason == "finished" else "interrupted", "reason": reason})
        except (GeneratorExit, KeyboardInterrupt):
            hint = f"alexnet train --resume {run.quoted}"
            stopped = Stopped("stopped: progress since the last checkpoint is lost", hint, 130)
            record_failure(run, stopped, "Ctrl-C", "interrupted")
            raise
        except BaseException as error:
            record_failure(run, error)
            raise


def evaluate(
    network: AlexNet | str | Path | None = None,
    data: Dataset | str | Path | None = None,
    *,
    split: str = "val",
    views: int = 1,
) -> Evaluation:
    """Classify every image of a split once: top-1 and top-5 error, the error of each class, the confusion matrix.

    Args:
        network: a network, on the device where it is; or weights, as for `load`.
        data: a prepared data set, as for `open_dataset`; by default the one the weights were trained on.
        split: "val" or "train".
        views: 1, the center; or 10, the paper's ten views.

    Raises:
        DataError: the network does not know the classes of the data set.
    """
    if isinstance(network, AlexNet):
        device = network.mean.device
        placement = place(str(device.index) if device.type == "cuda" else "none", "fp32")
        path = Path("network in memory")
    else:
        path, placement = find_weights(str(network) if network is not None else None), place(None, "fp32")
        data = data or find_training_data(path)
        network = load(path).to(placement.device)
    dataset = _open(data)
    images, output_of = dataset.split(split), evaluation.match_classes(network.classes, dataset.classes, path)
    if not len(images):
        raise DataError(f"{dataset.path}: split {split} has no images", "prepare it again with val_fraction=0.1")
    augment = Augment(network.recipe, network.mean.float().cpu().numpy(), None, None, placement.device)
    classify = evaluation.TorchClassifier(network, augment, placement, views)
    counts, size = Evaluation.empty(len(network.classes)), min(BATCH, len(images))
    with loader.Loader(images, size, choose_decode_threads(None)) as decoder:
        batches = decoder.batches(loader.all_batches(len(images), size))
        for _ in evaluation.evaluate(classify, batches, counts, output_of):
            counts.check_finite(path)
    return counts


def export(
    network: AlexNet | str | Path | None = None,
    path: str | Path = "alexnet.onnx",
    *,
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    data: Dataset | str | Path | None = None,
) -> Path:
    """Write an ONNX file, checked against PyTorch before it is kept, and its class names. Returns the path.

    Args:
        network: a network, or weights as for `load`.
        path: NAME.onnx; the class names go to NAME.names.txt.
        precision: fp16 halves the file; int8 quarters it and is fastest on a CPU.
        data: a prepared data set to check on, and to calibrate int8; by default the one the weights were trained on.

    Raises:
        UsageError: the path has another suffix.
        VerificationError: the file differs from PyTorch, or int8 loses more than a point of accuracy.
        DataError: int8 has no data set to calibrate on.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise UsageError(f"{path} does not end in .onnx", f"such as {path.stem or 'alexnet'}.onnx")
    model = network.to_model() if isinstance(network, AlexNet) else _read_model(network)
    data, side = data or find_training_data(model.path), model.recipe.input_size
    exporting.check_names(model, path)
    dataset = _open(data) if data or precision == "int8" else None
    crops = exporting.sample_crops(dataset, model) if dataset else exporting.synthetic_crops(side)
    if precision == "int8":
        assert dataset
        training, validation = dataset.split("train"), dataset.split("val")
        calibration = exporting.center_crops(training, training.spread_rows(CALIBRATION_IMAGES), side)
        output_of = evaluation.match_classes(model.classes, dataset.classes, model.path)
        labeled = exporting.labeled_crops(validation, side, output_of)
        exporting.export_int8(model, path, calibration, (crops, labeled))
    else:
        exporting.export(model, path, crops, precision)
    exporting.write_names(model, path)
    return path


def _read_model(weights: str | Path | None) -> Model:
    return read_model(find_weights(str(weights) if weights is not None else None))


def _open(data: Dataset | str | Path | None) -> Dataset:
    return data if isinstance(data, Dataset) else open_dataset(data)
