"""The contract of a task head. A head is one file in `heads/`: module, loss, decoding, metric and
picture. What of them is long, or shared, lies in `indiclip`.

A head borrows the encoder and reads precomputed features; it never runs the backbone. Nothing registers a head: the
YAML names its class.
"""

import inspect
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torchmetrics
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from indiclip.distributed import gathered
from indiclip.names import check_range
from indiclip.presentation import Frame, Line, Measure, Panel, Picture, plain
from indiclip.ratios import Ratio, Values
from indiclip.steps import check_starts
from indiclip.types import FIELDS, Batch, Features, Rows

if TYPE_CHECKING:
    from indiclip.datasets.base import SampleDataset
    from indiclip.encoder import Encoder

__all__ = [
    "Frame",
    "Head",
    "Line",
    "ListMetric",
    "Losses",
    "Measure",
    "Panel",
    "Picture",
    "Ratio",
    "WholeBatch",
    "all_captioned",
    "computed",
    "plain",
    "same_classes",
]

Datasets = Mapping[str, "SampleDataset"]  # YAML key of the source, such as `data.train[0]` -> its dataset
Prediction = dict[str, Any]  # what a head predicts for an image, or what is true of it, by name
Metrics = torchmetrics.Metric | torchmetrics.MetricCollection


class Losses(NamedTuple):
    """What a head makes of a batch in training.

    Attributes:
        terms: To be summed. A scalar is a mean over this batch's images, of which every rank has as many; what is
            normalised by anything else, such as a number of boxes, is a `Ratio`.
        logged: Detached numbers that are logged beside them, as `terms`. Their names may differ from step to step and
            between ranks; `<number>/<language>` is a curve in a plot of the number.
    """

    terms: Values
    logged: Values = MappingProxyType({})


class WholeBatch(NamedTuple):
    """Losses that compare the samples of a batch with each other, to be computed once all micro-batches are there.

    Attributes:
        function: Gives the losses of all rows. It may have parameters of its own.
        rows: Its arguments: tensors and lists with a row per sample, or with one for each micro-batch. Gradients go
            through those of floating point. Rows that are longer in another micro-batch are filled with zeros.
    """

    function: Callable[..., Losses]
    rows: tuple[Tensor | list[Any], ...]


def computed(output: Losses | WholeBatch) -> Losses:
    """What `Head.loss` gives, once all micro-batches are there."""
    return output.function(*output.rows) if isinstance(output, WholeBatch) else output


class Head(nn.Module, ABC):
    """A task on top of the shared features.

    Args:
        task: Which of the step's batches this head reads. Heads that name the same task share one batch and its
            features. None is the file's name in `heads/`, also of a head that is made from it in another file.
        weight: Factor of this head's losses in the step's total.
        name: Log prefix, `train/<name>/<loss>`; None is the file's name. Two heads of one class need it.
        start: Where the run begins to train the head: a share of its steps below 1, or the number of a step. Before,
            the head costs nothing and its weights stay as they are.
        block: Behind which block of the backbone the tokens are that the head reads, as its number from 0 on or, below
            0, from the end: -1 is the last. The blocks behind it get no gradient of the head, and do not run on a batch
            that no other head reads further. The tokens are normalised as the backbone's output is, by its last norm
            (as of DINOv2's `get_intermediate_layers`). None is the output. For heads with `needs_all_patches` or
            `reads_tokens`.

    Attributes:
        title: What people call the task; empty is the head's name, as is that of a head with a name of its own.
        metric: Its `compute()` gives a dict of numbers. Where a task has several held-out sources, each has a copy of
            it, which stands here while `update_metric` gets a batch of that source.
        required_fields: Fields of `Sample` that training and scoring need in every sample.
        loss_fields: Those that `loss` needs beside.
        required_views: Names of the views that `loss` reads, see `indiclip.loading.views.View`.
        predict_fields: Those that `predict` needs.
        needs_all_patches: Whether dropped patches would spoil what it learns, as they do where it needs a map.
        reads_tokens: Whether it reads tokens themselves, though not all of them are needed.
        reads_objects: Whether `loss` reads boxes, points, masks or maps, or what belongs to them. Where no head of a
            task does, its training samples come without: to augment them takes longer than the image does.
        no_flip: Why the head cannot learn from mirrored images; empty where it can.
        mixes: Whether `loss` learns from images that are mixed of two, see `mix_share` in `Sample`.
        embeds_images: Whether `loss` calls `encoder.embed_features`.
        pools_images: Whether it calls `encoder.pool_features`, if not that.
        embeds_text: Whether `loss` calls `encoder.embed_text`. What no head of a run uses is frozen: distributed
            training waits for a gradient of everything else.
        reads_text: Whether `loss` runs the text tower, if only for its tokens.
        idle_options: Given options that have no effect, and why, see `note_idle`.
        reads_embeddings: The argument for which it reads embeddings of images and texts that another head trains; empty
            where it reads none.

    Raises:
        ValueError: A name that cannot be part of a log's.
    """

    title = ""
    metric: Metrics
    required_fields: tuple[str, ...] = ()
    loss_fields: tuple[str, ...] = ()
    required_views: tuple[str, ...] = ()
    predict_fields: tuple[str, ...] = ()
    needs_all_patches = True
    reads_tokens = False
    reads_objects = True
    no_flip = ""
    mixes = False
    embeds_images = True
    pools_images = False
    embeds_text = True
    reads_text = False
    reads_embeddings = ""

    def __init__(
        self,
        task: str | None = None,
        weight: float = 1.0,
        name: str | None = None,
        start: float = 0.0,
        block: int | None = None,
    ) -> None:
        super().__init__()
        own, direct = type(self), next(kind for kind in type(self).__mro__ if Head in kind.__bases__)
        self.task = direct.__module__.rpartition(".")[2] if task is None else task
        self.weight, self.start, self.block = weight, start, block
        self.name = own.__module__.rpartition(".")[2] if name is None else name
        if name is not None or not self.title:
            self.title = f"{self.name[:1].upper()}{self.name[1:]}".replace("_", " ")
        if not re.fullmatch(r"[\w-]+", self.name) or hasattr(nn.ModuleDict(), self.name):
            expected = "letters, digits, _ and -, and no name of torch's ModuleDict"
            raise ValueError(f"heads.{type(self).__name__}.name: found {name!r}, expected {expected}")
        self.idle_options: dict[str, str] = {}
        self.check_range(weight=weight)
        check_starts({f"heads.{self.name}.start": start})

    def check_range(self, *limits: float, **arguments: float | None) -> None:
        """Raise ValueError for the first that does not lie within the limits, naming it; see `names.check_range`."""
        check_range({f"heads.{self.name}.{name}": value for name, value in arguments.items()}, *limits)

    def note_idle(self, reason: str, **options: Any) -> None:
        """Note options that have no effect with others, so that a run says so of those that differ from their defaults.

        Args:
            reason: Such as `with ibot_weight 0`.
            **options: As they were given to the constructor.
        """
        parameters = [inspect.signature(kind).parameters for kind in type(self).__mro__ if issubclass(kind, Head)]
        for name, value in options.items():
            if value != next(of[name] for of in parameters if name in of).default:
                self.idle_options[name] = reason

    @abstractmethod
    def bind(self, encoder: "Encoder") -> None:
        """Create the layers for this encoder's widths. Called once, before the optimizer sees the parameters."""

    def check(self, train: Datasets, held_out: Datasets) -> None:
        """Compare the head with the datasets it will be trained on and scored on; changes nothing.

        Raises:
            ValueError: What does not fit, naming the YAML key.
        """

    def check_samples(self, samples: Mapping[str, Mapping[str, Any]]) -> None:
        """Compare the head with the first sample of each training source: YAML key of the source -> the sample.

        Raises:
            ValueError: What does not fit, naming the YAML key.
        """

    def check_views(self, counts: Mapping[str, int]) -> None:
        """Compare the head with a training source's views: name -> number of them for each image.

        Raises:
            ValueError: What does not fit, naming the YAML key.
        """

    def fingerprint(self) -> dict[str, int]:
        """Checksums of what the head reads that is neither in checkpoints nor in batches, by name: a run goes on with
        the same. After `bind`.
        """
        return {}

    def tower_copies(self) -> list[nn.Module]:
        """Copies of the encoder's towers among the head's modules, which are compiled and sharded as those are."""
        return []

    def begin(self, encoder: "Encoder") -> None:
        """Called once, before the head's first step: `start`, or the run's first. What it changes must be in the
        head's state, as a resumed run does not call it again.
        """

    def after_step(self, encoder: "Encoder", progress: float, made: Tensor) -> None:
        """Called after each optimizer step that the head took part in, as for an average of weights.

        Args:
            progress: The share of the run's steps that are done, above 0 and at most 1.
            made: 1; or 0 after a step that changed no weight, as something in it was not finite: then nothing of the
                head may change either. A scalar on the device, for which the host is not to wait.
        """

    @abstractmethod
    def loss(self, features: Features, batch: Batch, encoder: "Encoder") -> Losses | WholeBatch:
        """Every parameter of the head gets a gradient, also for images without objects. Never waits for the device.

        What is random in it is a function of torch's generators and of the targets' `random_seed`: with
        `model.micro_batches` it is called twice for each part of the batch, first without gradients.
        """

    @abstractmethod
    def predict(self, features: Features, batch: Batch, encoder: "Encoder") -> list[Prediction]:
        """One dict per image, in the resized image's pixels."""

    @abstractmethod
    def update_metric(self, predictions: list[Prediction], features: Features, batch: Batch) -> None:
        """Add a batch to `metric`."""

    def measures(self, held_out: "SampleDataset") -> dict[str, Measure]:
        """How people read the numbers of `metric` on a held-out dataset, in the order in which they read them.

        A number that is not among them is called by its name.
        """
        return {}

    def visualize(self, image_HW3: np.ndarray, prediction: Prediction, target: Prediction) -> Picture | None:
        """A held-out image with the prediction on it, beside the truth, and what is said below, for the report; None,
        as of a head that does not say otherwise, where there is nothing to see.

        Args:
            image_HW3: uint8 RGB, the resized image.
            prediction: One item of `predict`, on the CPU.
            target: The targets of this image, see `targets_of`, and `class_names` of its source.
        """
        return None

    def to_json(self, prediction: Prediction, frame: Frame) -> dict[str, Any]:
        """What `indiclip predict` writes of an image: values that JSON has, in pixels of the original image.

        A list `detections`, of dicts with `class`, `score` and `bbox` (x, y, width, height), becomes a file of COCO's
        results too. Unless a head says otherwise it is the prediction, its tensors as lists; those that are called as
        boxes or points in `Sample` are moved into the original image.

        Args:
            prediction: One item of `predict`, on the CPU.
            frame: The original image.
        """
        move = {"boxes": frame.boxes, "points": frame.points}
        kinds = {name: FIELDS[name].kind for name in prediction.keys() & FIELDS.keys()}
        return {
            name: plain(move[kinds[name]](value) if kinds.get(name) in move else value)
            for name, value in prediction.items()
        }

    def target(self, batch: Batch, name: str, every: bool = True) -> Any:
        """A field of the batch.

        Args:
            name: In `Sample`.
            every: Each image must have it.

        Raises:
            ValueError: The samples lack it.
        """
        value = batch["targets"].get(name)
        known = value.known if isinstance(value, Rows) else [own is not None for own in value or ()]
        if value is None or (every and not all(known)):
            key = batch["keys"][known.index(False) if known else 0]
            raise ValueError(f"heads.{self.name}: sample {key!r} of its task {self.task!r} has no {name}")
        return value


class ListMetric(torchmetrics.Metric):
    """Keeps rows of any objects until it is computed, then over the rows of all ranks.

    torchmetrics itself puts only tensors together, and lists of them only where every rank has equally many.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        self.rows: list[tuple[Any, ...]] = []

    def reset(self) -> None:
        super().reset()
        self.rows = []

    def add(self, *row: Any) -> None:
        """Keep a row; tensors lie on the CPU, whatever nests them."""
        self.rows.append(apply_to_collection(row, Tensor, Tensor.cpu))

    def rows_of_all_ranks(self) -> list[tuple[Any, ...]]:
        """One rank's after the other's."""
        return [row for rows in gathered(self.rows) for row in rows]


def all_captioned(key: str, task: str, datasets: Datasets, otherwise: str = "") -> None:
    """Check that no source has images without a caption.

    Args:
        key: Of the head in the YAML, such as `heads.contrastive`.
        task: Whose sources they are.
        datasets: See `Head.check`.
        otherwise: What may be done instead of leaving such images out.

    Raises:
        ValueError: One has.
    """
    for source, dataset in datasets.items():
        if not dataset.captioned:
            raise ValueError(
                f"{key}.task: {source}: {type(dataset).__name__} for task {task!r} has images without a caption; "
                f"`captioned: true` leaves them out{otherwise}"
            )


def same_classes(task: str, datasets: Datasets) -> None:
    """Check that a class number means the same thing in all sources that have classes.

    Raises:
        ValueError: Two differ.
    """
    lists = {key: names for key, dataset in datasets.items() if (names := list(dataset.classes))}
    for (key, names), (other, others) in itertools.pairwise(lists.items()):
        if names != others:
            place = next((i for i, pair in enumerate(zip(names, others, strict=False)) if pair[0] != pair[1]), None)
            apart = f"class {place} is {names[place]!r} and {others[place]!r}" if place is not None else "one is longer"
            raise ValueError(
                f"{other}: the sources of task {task!r} must have the same classes in the same order; {key} has "
                f"{len(names)}, {other} has {len(others)}, {apart}"
            )
