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
from alexnet_cli.core.model.alexnet import AlexNet as AlexNet
from alexnet_cli.core.model.model_file import Model, read_model
from alexnet_cli.core.parallel.placement import Placement, choose_decode_threads, place
from alexnet_cli.core.runs.records import Record
from alexnet_cli.core.runs.resolve import find_training_data, find_weights
from alexnet_cli.core.runs.run import record_status
from alexnet_cli.core.training.fine_tuning import Transfer, load_source, match_layers
from alexnet_cli.core.training.loop import TrainingLoop, check_data, open_run
from alexnet_cli.core.training.trainer import Trainer
from alexnet_cli.errors import AlexNetError as AlexNetError
from alexnet_cli.errors import UsageError
from alexnet_cli.recipe import RECIPES
from alexnet_cli.recipe import Recipe as Recipe

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
    recipe: Recipe | str | Path | None = None,
    data: Dataset | str | Path | None = None,
    *,
    name: str | None = None,
    init_from: str | Path | None = None,
    gpus: str | None = None,
    max_steps: int | None = None,
    jobs: int | None = None,
) -> Generator[Record]:
    """Train a network on one device as a new run: an iterator that trains while it yields the records of metrics.jsonl.

    `alexnet.load(name)` then loads the best epoch; without a name, `alexnet.load()`. If the loop over the records ends
    early, `alexnet train --resume NAME` continues from the last checkpoint. Unlike the command, this writes no ONNX
    file and no report: `alexnet.export(name)` and `alexnet report -w NAME` do.

    Args:
        recipe: a recipe, the name of one, or a TOML file; `paper` by default, or that of `init_from`.
        data: a prepared data set, as for `open_dataset`.
        name: of the run, runs/NAME; date, time and recipe by default.
        init_from: weights to start from, as for `load`; layers that do not fit start at random.
        gpus: id of a GPU, or "none" for the CPU; by default the first GPU if there is one.
        max_steps: stop after so many steps.
        jobs: threads that decode images; one per core by default.

    Raises:
        AlexNetError: see `alexnet_cli.errors`; once the run exists, it is marked as failed.
    """
    if max_steps is not None and max_steps < 1:
        raise UsageError(f"max_steps is {max_steps}", "give at least 1")
    weights = _format_weights(init_from)
    initial = load_source(weights, None)
    if recipe is None and initial:
        recipe = recipe_io.apply_changes(initial.recipe, {"frozen": "none"})
    resolved = recipe if isinstance(recipe, Recipe) else recipe_io.load_recipe(str(recipe or "paper"))
    dataset = _open(data)
    check_data(dataset, None)
    placement = place(gpus if gpus is None else str(gpus), resolved.precision)
    transfer = match_layers(weights, initial, resolved, dataset.classes) if initial else None
    return _train(resolved, dataset, placement, transfer, name, max_steps, choose_decode_threads(jobs))


def _train(
    recipe: Recipe,
    dataset: Dataset,
    placement: Placement,
    transfer: Transfer | None,
    name: str | None,
    max_steps: int | None,
    threads: int,
) -> Generator[Record]:
    run = open_run(None, name, recipe, placement, dataset, transfer, {}, ["alexnet.train"])
    with record_status(run):
        trainer = Trainer.for_dataset(recipe, dataset, placement)
        transfer = transfer.apply(trainer.network) if transfer else None
        yield from TrainingLoop(trainer, dataset, run, threads, transfer=transfer).fit(max_steps=max_steps)


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
        data: a prepared data set, as for `open_dataset`. For weights, it is by default the one they were trained on.
        split: "val" or "train".
        views: 1, the center; or 10, the paper's ten views.

    Raises:
        DataError: the split has no images, or the network does not know the classes of the data set.
    """
    if isinstance(network, AlexNet):
        device, path = network.mean.device, Path("network in memory")
        placement = place(str(device.index) if device.type == "cuda" else "none", "fp32")
    else:
        path, placement = find_weights(_format_weights(network)), place(None, "fp32")
        data = data or find_training_data(path)
        network = load(path).to(placement.device)
    dataset = _open(data)
    images, output_of = dataset.nonempty_split(split), evaluation.match_classes(network.classes, dataset.classes, path)
    mean = network.mean.float().cpu().numpy()
    augment = Augment(network.recipe, mean, None, None, network.mean.device, network.mean.dtype)
    classify = evaluation.TorchClassifier(network, augment, placement, views)
    counts, size = Evaluation.empty(len(network.classes)), min(BATCH, len(images))
    with loader.Loader(images, size, choose_decode_threads(None), placement.device) as decoder:
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
        data: a prepared data set to check on, and to calibrate int8. For weights, it is by default the one they were
            trained on. Without one, float files are checked on synthetic images.

    Raises:
        UsageError: the path has another suffix, or see `AlexNet.to_model`.
        VerificationError: the file differs from PyTorch, or int8 loses more than a point of accuracy.
        DataError: int8 has no data set to calibrate on.
    """
    from alexnet_cli.core.export import export as exporting

    path = Path(path)
    if path.suffix != ".onnx":
        raise UsageError(f"{path} does not end in .onnx", f"such as {path.stem or 'alexnet'}.onnx")
    if precision not in ("fp32", "fp16", "int8"):
        raise UsageError(f"precision is {precision!r}", "use fp32, fp16 or int8")
    if isinstance(network, AlexNet):
        model = network.to_model()
    else:
        model = _read_model(network)
        data = data or find_training_data(model.path)
    exporting.check_names(model, path)
    if precision == "int8":
        dataset = _open(data)
        output_of = evaluation.match_classes(model.classes, dataset.classes, model.path)
        check = exporting.load_check_images(dataset, model, output_of)
        exporting.export_int8(model, path, exporting.load_calibration_crops(dataset, model), check)
    elif data:
        exporting.export(model, path, exporting.sample_crops(_open(data), model), precision)
    else:
        exporting.export(model, path, exporting.synthetic_crops(model.recipe.input_size), precision)
    exporting.write_names(model, path)
    return path


def _read_model(weights: str | Path | None) -> Model:
    return read_model(find_weights(_format_weights(weights)))


def _format_weights(weights: str | Path | None) -> str | None:
    if isinstance(weights, str | Path | None):
        return None if weights is None else str(weights)
    raise UsageError(
        f"{type(weights).__name__} is no run or file", "save a network first: net.save('mine.safetensors')"
    )


def _open(data: Dataset | str | Path | None) -> Dataset:
    return data if isinstance(data, Dataset) else open_dataset(data)
