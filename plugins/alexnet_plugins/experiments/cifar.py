"""CIFAR-10 (sections 3.1 and 3.3): the networks of the authors' released files, and a training that can be continued.

The files are cuda-convnet's `example-layers`: `19pct` and `18pct` (three convolutions and a fully connected layer),
`conv-local-13pct` and `conv-local-11pct` (two convolutions, two locally connected layers, a fully connected one). The
second of each pair has response normalization. Inputs are 0..255 minus the mean image.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from alexnet_cli.core.data.images import decode
from alexnet_cli.core.data.sources import detect_source
from alexnet_cli.core.devices import count_cores
from alexnet_cli.core.files import read_text, replace_file, write_text
from alexnet_cli.core.model.layers import within_map
from alexnet_cli.core.model.response_norm import normalize_fast
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.errors import DataError
from alexnet_plugins.experiments.experiment import Job, describe_machine

SIDE, CROP = 32, 24  # pixels of an image, and of the crops of the conv-local networks
CLASSES = 10
BATCH_SIZE = 128
MOMENTUM = 0.9
BIAS_RATE = 2.0  # learning rate of biases, as a multiple of the weights'
RECORDS_PER_EPOCH = 5  # like cuda-convnet's, which reads CIFAR-10 in files of 10,000 images
TEST_IMAGES = 500  # computed at once
SECONDS_BETWEEN_LOOKS = 0.5
TRAININGS = "trainings"  # folder of their files inside the experiment's
FILES_LOCK = Lock()  # Windows cannot replace a file that another thread reads
COUNTS = (CLASSES, 50_000, 10_000)  # classes, training and test images
DATA_HINT = (
    "give cifar-10-batches-py, cifar-10-batches-bin, or a folder with train/CLASS/ and val/CLASS/ (the test images)"
)


@dataclass(frozen=True)
class CifarData:
    """CIFAR-10 in memory: images, uint8 N x 3 x 32 x 32, labels 0..9, and the mean training image, float32."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    mean: Tensor


def read_cifar(folder: Path, device: torch.device) -> CifarData:
    """Read CIFAR-10 from its python or binary batches, class folders or parquet files. The test set is its `val` split.

    Raises:
        DataError: the folder holds something else.
    """
    source, arrays = detect_source(folder), dict[str, Tensor]()
    counts = len(source.classes), *(len(source.splits[split]) for split in ("train", "val"))
    if counts != COUNTS:
        found, expected = (
            "{} classes, {:,} training and {:,} test images".format(*numbers) for numbers in (counts, COUNTS)
        )
        raise DataError(f"{folder} is not CIFAR-10: it has {found}, not {expected}", DATA_HINT)
    for split, images in source.splits.items():
        with ThreadPoolExecutor(count_cores()) as pool:
            decoded = list(pool.map(lambda image: decode(image.read()), images))
        shapes = {image.shape for image in decoded}
        if shapes != {(SIDE, SIDE, 3)}:
            raise DataError(f"{folder} is not CIFAR-10: its images are not all of {SIDE} x {SIDE} pixels", DATA_HINT)
        arrays[split] = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(device)
    labels = {split: torch.tensor(list(images.labels), device=device) for split, images in source.splits.items()}
    mean = arrays["train"].float().mean(0)
    return CifarData(arrays["train"], labels["train"], arrays["val"], labels["val"], mean)


class LocallyConnected(nn.Linear):
    """A 3x3 convolution whose filters are not shared: each pixel has its own. N x C x S x S -> N x maps x S x S.

    Computed as a fully connected layer whose weights outside the windows are zero. On maps this small that is four
    times the arithmetic, and still as fast as cutting out the windows.
    """

    def __init__(self, channels: int, maps: int, side: int) -> None:
        super().__init__(channels * side * side, maps * side * side)
        self.sides = maps, side, side
        place = torch.arange(side)
        near = (place[:, None] - place).abs() <= 1
        window = torch.kron(near, near)  # output pixel x input pixel
        self.window: Tensor
        self.register_buffer("window", window.repeat(maps, channels).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weights of each pixel's window; there is nothing beyond the edge."""
        weight = self.weight * self.window
        maps: Tensor = functional.linear(x.flatten(1), weight, self.bias).unflatten(1, self.sides)
        return maps


class AcrossMapsNorm(nn.Module):
    """`cmrnorm` of conv-local-11pct (cuda-convnet's copy): 5 maps, scale 0.001 divided by them, power 0.75, k 1."""

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> the same shape."""
        return normalize_fast(x, 5, 1.0, 0.001 / 5, 0.75, 1)


class WithinMapNorm(nn.Module):
    """`rnorm` of 18pct: a window of 3x3 pixels, scale 5e-5 divided by them, power 0.75, k 1."""

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> the same shape."""
        return within_map(x, 3, 1.0, 5e-5 / 9, 0.75)


@dataclass(frozen=True)
class NetworkFile:
    """One of the released networks: initial standard deviations and weight decay of its layers with weights, in order.

    `crop` is the side of its input. Smaller than 32: random crops and reflections in training, nine crops in testing.
    """

    crop: int
    stds: tuple[float, ...]
    decays: tuple[float, ...]


NETWORKS = {
    "19pct": NetworkFile(SIDE, (0.0001, 0.01, 0.01, 0.01), (0.004, 0.004, 0.004, 3.0)),
    "18pct": NetworkFile(SIDE, (0.0001, 0.01, 0.01, 0.01), (0.004, 0.004, 0.004, 1.0)),
    "conv-local-13pct": NetworkFile(CROP, (0.0001, 0.01, 0.04, 0.04, 0.01), (0.0, 0.0, 0.004, 0.004, 0.004)),
    "conv-local-11pct": NetworkFile(CROP, (0.0001, 0.01, 0.04, 0.04, 0.01), (0.0, 0.0, 0.004, 0.004, 0.004)),
}


def build_network(name: str, activation: str = "relu") -> nn.Sequential:
    """Return an untrained network: N x 3 x S x S -> N x 10 logits. `activation` is relu, tanh or sigmoid."""
    act = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}[activation]

    def pool(kind: type[nn.MaxPool2d | nn.AvgPool2d]) -> nn.Module:
        return kind(3, stride=2, ceil_mode=True)

    norm = {"18pct": WithinMapNorm, "conv-local-11pct": AcrossMapsNorm}.get(name, nn.Identity)
    if name in ("19pct", "18pct"):
        return nn.Sequential(
            nn.Conv2d(3, 32, 5, padding=2), pool(nn.MaxPool2d), act(), norm(),
            nn.Conv2d(32, 32, 5, padding=2), act(), pool(nn.AvgPool2d), norm(),
            nn.Conv2d(32, 64, 5, padding=2), act(), pool(nn.AvgPool2d),
            nn.Flatten(), nn.Linear(64 * 4 * 4, CLASSES),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, 64, 5, padding=2), act(), norm(), pool(nn.MaxPool2d),
        nn.Conv2d(64, 64, 5, padding=2), act(), norm(), pool(nn.MaxPool2d),
        LocallyConnected(64, 32, 6), act(), LocallyConnected(32, 32, 6), act(),
        nn.Flatten(), nn.Linear(32 * 6 * 6, CLASSES),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training of one network. The learning rate is divided by ten after each of `drops` (epochs)."""

    network: str
    activation: str = "relu"
    rate: float
    seed: int
    decay: bool = True
    drops: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.network}-{self.activation}-{self.rate:g}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What has come of a training so far, with the machine that trained it last.

    `errors` holds the training error, as a share, of each fifth of an epoch, measured while training on it; it ends
    with NaN if the loss became NaN or infinite. `test_error` is None until it was measured.
    """

    training: Training
    epochs: int = 0
    errors: tuple[float, ...] = ()
    test_error: float | None = None
    machine: str = ""

    @property
    def diverged(self) -> bool:
        """Whether the loss became NaN or infinite; the training has ended."""
        return bool(self.errors) and math.isnan(self.errors[-1])


class CifarTrainer:
    """Trains one network. The same seed gives the same initial weights, data order and crops in every network."""

    def __init__(self, training: Training, data: CifarData, placement: Placement) -> None:
        self.training, self.data, self.placement = training, data, placement
        self.file = NETWORKS[training.network]
        self.network = build_network(training.network, training.activation)
        layers = [m for m in self.network if isinstance(m, nn.Conv2d | nn.Linear)]
        random = torch.Generator().manual_seed(training.seed)
        groups: list[dict[str, Any]] = []
        for layer, std, decay in zip(layers, self.file.stds, self.file.decays, strict=True):
            nn.init.normal_(layer.weight, std=std, generator=random)
            nn.init.zeros_(layer.get_parameter("bias"))
            groups += [
                {"params": [layer.weight], "scale": 1.0, "weight_decay": decay if training.decay else 0.0},
                {"params": [layer.bias], "scale": BIAS_RATE, "weight_decay": 0.0},
            ]
        self.network.to(placement.device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(groups, lr=training.rate, momentum=MOMENTUM)
        self.steps_per_epoch = max(1, len(data.train) // BATCH_SIZE)  # the last images, fewer than a batch, sit out
        self.record = TrainingRecord(training=training, machine=describe_machine(placement))

    def train_epoch(self, should_stop: Callable[[int], bool]) -> bool:
        """Train for an epoch, or until it diverges. Returns False if `should_stop` ended it early.

        `should_stop` is asked after each fifth of the epoch, with the number of images trained on since it was asked.
        """
        epoch, seed = self.record.epochs, self.training.seed
        drops = sum(epoch >= drop for drop in self.training.drops)
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self.training.rate / 10**drops
        random = np.random.default_rng([seed, epoch])
        order = torch.from_numpy(random.permutation(len(self.data.train))).to(self.data.train.device)
        ends = {round(self.steps_per_epoch * (i + 1) / RECORDS_PER_EPOCH) for i in range(RECORDS_PER_EPOCH)}
        wrong, images = torch.zeros((), device=self.data.train.device), 0
        for step in range(1, self.steps_per_epoch + 1):
            rows = order[(step - 1) * BATCH_SIZE : step * BATCH_SIZE]
            wrong += self._step(rows, random)
            images += len(rows)
            if step in ends:
                self.record = replace(self.record, errors=(*self.record.errors, float(wrong) / images))
                if should_stop(images):
                    return False
                if self.record.diverged:
                    break
                wrong, images = torch.zeros_like(wrong), 0
        self.record = replace(self.record, epochs=epoch + 1)
        return True

    def _step(self, rows: Tensor, random: np.random.Generator) -> Tensor:
        """Train on a batch. Returns the number of wrong predictions; NaN if the loss is not finite."""
        labels = self.data.train_labels[rows]
        logits = self._forward(self._crop_randomly(self.data.train[rows], random))
        loss = functional.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return torch.where(loss.isfinite(), (logits.argmax(1) != labels).sum(), math.nan)

    def _forward(self, images: Tensor) -> Tensor:
        """Uint8 crops -> logits in float32. The mean image's center is subtracted from every crop."""
        margin = (SIDE - images.shape[-1]) // 2
        mean = self.data.mean[:, margin : SIDE - margin, margin : SIDE - margin]
        with self.placement.precision_context():
            x = (images.float() - mean).contiguous(memory_format=torch.channels_last)
            logits: Tensor = self.network(x)
        return logits.float()

    def _crop_randomly(self, images: Tensor, random: np.random.Generator) -> Tensor:
        """Crops of the network's size at random places, half of them reflected; whole images if they are 32 x 32."""
        side = self.file.crop
        if side == SIDE:
            return images
        top, left = random.integers(0, SIDE - side + 1, (2, len(images)))
        flips = random.random(len(images)) < 0.5
        crops = [images[i, :, y : y + side, x : x + side] for i, (y, x) in enumerate(zip(top, left, strict=True))]
        return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips, strict=True)])

    @torch.no_grad()
    def measure_test_error(self) -> None:
        """Record the error on the test images; that of the mean probability of nine crops if it learned crops."""
        margin = SIDE - self.file.crop
        places = list(itertools.product((0, margin // 2, margin), repeat=2)) if margin else [(0, 0)]
        wrong = 0
        for images, labels in zip(
            self.data.test.split(TEST_IMAGES), self.data.test_labels.split(TEST_IMAGES), strict=True
        ):
            crops = [images[:, :, y : y + self.file.crop, x : x + self.file.crop] for y, x in places]
            probabilities = torch.stack([self._forward(crop).softmax(1) for crop in crops]).mean(0)
            wrong += int((probabilities.argmax(1) != labels).sum())
        self.record = replace(self.record, test_error=wrong / len(self.data.test))

    def save(self, folder: Path) -> None:
        """Write the record as NAME.json, and all that `restore` needs to continue as NAME.pt."""
        path = folder / f"{self.training.name}.pt"
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        with replace_file(path) as temporary:
            torch.save({"record": asdict(self.record)} | state, temporary)
        write_record(self.record, folder)

    def restore(self, path: Path) -> None:
        """Continue, exactly, from a file that `save` wrote.

        Raises:
            DataError: the file is damaged, or of a training with other settings.
        """
        with _explain_damage(path):
            state = torch.load(path, weights_only=True, map_location=self.placement.device)
            record = _make_record(state["record"])
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
        _check_same_training(record, self.training, path)
        self.record = replace(record, machine=self.record.machine)


def write_record(record: TrainingRecord, folder: Path) -> None:
    """Write a record as NAME.json; a diverged error becomes null."""
    errors = [None if math.isnan(error) else round(error, 6) for error in record.errors]
    text = json.dumps(asdict(record) | {"errors": errors}, allow_nan=False) + "\n"
    with FILES_LOCK:
        write_text(folder / f"{record.training.name}.json", text)


def read_record(path: Path) -> TrainingRecord:
    """Read a file of `write_record`.

    Raises:
        DataError: the file is damaged.
    """
    with _explain_damage(path):
        with FILES_LOCK:
            text = read_text(path)
        return _make_record(json.loads(text))


def read_records(folder: Path) -> list[TrainingRecord]:
    """Read what the trainings of an experiment have recorded so far, in the order of their names.

    Raises:
        DataError: a file is damaged.
    """
    return [read_record(path) for path in sorted((folder / TRAININGS).glob("[!.]*.json"))]


def list_machines(records: Sequence[TrainingRecord]) -> list[str]:
    """Return the machines of these trainings, each once."""
    return sorted({record.machine for record in records})


def _make_record(values: dict[str, Any]) -> TrainingRecord:
    errors = tuple(math.nan if error is None else float(error) for error in values["errors"])
    training = values["training"]
    training = Training(**training | {"drops": tuple(training["drops"])})
    return TrainingRecord(**values | {"training": training, "errors": errors})


@contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, DataError):
        raise
    except Exception as error:  # a damaged file may raise any
        hint = "delete it; the same command then trains it again"
        raise DataError(f"{path} is not a training of this experiment: {error}", hint) from error


def _check_same_training(record: TrainingRecord, training: Training, path: Path) -> None:
    if record.training != training:
        hint = f"rename {path.parent}"
        raise DataError(f"{path} is of another training: {record.training}, not {training}", hint)


Condition = Callable[[TrainingRecord], bool]


def continue_training(
    training: Training, data: CifarData, job: Job, is_done: Condition, measure_test_error: bool = False
) -> TrainingRecord:
    """Train, from the files of an earlier call if there are any, until `is_done` after an epoch; saves each epoch.

    A record that is done needs no NAME.pt: published records can be continued with more seeds.
    """
    torch.set_num_threads(1)  # of this thread: trainings run side by side
    folder = job.folder / TRAININGS
    path = folder / f"{training.name}.json"
    if path.is_file():
        record = read_record(path)
        _check_same_training(record, training, path)
        if record.diverged or (is_done(record) and (record.test_error is not None or not measure_test_error)):
            return record
    trainer, state = CifarTrainer(training, data, job.placement), path.with_suffix(".pt")
    if state.is_file():
        trainer.restore(state)

    def should_stop(images: int) -> bool:
        done = trainer.record
        job.advance(images, f"{training.name}  epoch {done.epochs + 1}  training error {done.errors[-1]:.1%}")
        return job.stop() is not None

    folder.mkdir(exist_ok=True)
    while not (trainer.record.diverged or is_done(trainer.record)):
        if job.stop() is not None or not trainer.train_epoch(should_stop):
            return trainer.record
        trainer.save(folder)
    if measure_test_error and not trainer.record.diverged:
        trainer.measure_test_error()
    trainer.save(folder)
    return trainer.record


def continue_trainings(
    trainings: Sequence[Training], data: CifarData, job: Job, is_done: Condition, measure_test_error: bool = False
) -> None:
    """Call `continue_training` in threads, as many at a time as there are cores; on a GPU one after the other.

    If one raises an error, the others stop, and it is raised here.
    """
    workers = 1 if job.placement.device.type == "cuda" else count_cores()
    errors: list[BaseException] = []
    stoppable = replace(job, stop=lambda: "error" if errors else job.stop())

    def train(training: Training) -> None:
        try:
            continue_training(training, data, stoppable, is_done, measure_test_error)
        except BaseException as error:
            errors.append(error)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(train, training) for training in trainings]
        while wait(futures, SECONDS_BETWEEN_LOOKS).not_done:  # without end, this thread would not notice a signal
            pass
    if errors:
        raise errors[0]
