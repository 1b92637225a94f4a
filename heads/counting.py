"""Counting: how many things of a class, named in words, are in the image.

The prompt's text embedding modulates every token (FiLM, Perez et al., arXiv:1709.07871), neighbours are compared, so
that a thing of several tokens is one, and a small network makes of it the expected number of things per cell. The
count is the sum.

Shape letters: see `indiclip.types`; C channels, Q queries, S cells of a token, P points of a batch, I images of an
evaluation. H and W are rows and columns of tokens, or of cells where the name says so.
"""

import math
from dataclasses import dataclass, replace
from itertools import compress
from random import Random
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor, nn

from indiclip.head import (
    Datasets,
    Frame,
    Head,
    ListMetric,
    Losses,
    Measure,
    Panel,
    Picture,
    Prediction,
    Ratio,
    plain,
    same_classes,
)
from indiclip.types import Batch, Features, class_names, in_float32, on_device, random_seeds

if TYPE_CHECKING:
    from indiclip.datasets.base import SampleDataset
    from indiclip.encoder import Encoder

_FIRST_DENSITY = 0.02  # things per cell before training: about the share of cells that hold one
_SMALLEST = 1e-8  # keeps the logarithm of a density finite
_DRAWN_SIDE = 320  # pixels that a picture's shorter side has at least
_ASK_BOXES = "ask_boxes: needs the names of the classes of the source's boxes"


@dataclass
class CountQueries:
    """How many of what there are in which image: Q questions, which P points answer.

    Attributes:
        images: Number in the batch; on the host, as the next two.
        names: Of the classes.
        known: False where there is no answer.
        xy_P2: Places of the things in the image.
        query_P: The question that each belongs to.
    """

    images: list[int]
    names: list[str]
    known: list[bool]
    xy_P2: Tensor
    query_P: Tensor


class Counting(Head):
    """The count of the class that a text names, as the sum of a density.

    Args:
        channels: Width of its layers.
        num_layers: Layers between the compared tokens and the density.
        upsample: Cells along each side of a token: 2 where several things may fall into one patch.
        prompt: What is asked; `{}` stands for the class name.
        ask_boxes: In training, where an image has boxes with classes, ask for each of them too (their centres are the
            points), and for as many drawn from the source's classes: several questions for one pass of the backbone.
        **common: Of every `Head`.

    Raises:
        ValueError: `prompt` without `{}`, or `upsample` below 1.
    """

    title = "Counting"
    metric: "CountMetric"
    required_fields = ("count_class", "points_xy")
    predict_fields = ("count_class",)
    embeds_images = False

    def __init__(
        self,
        channels: int = 128,
        num_layers: int = 1,
        upsample: int = 1,
        prompt: str = "{}",
        ask_boxes: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if "{}" not in prompt:
            raise ValueError(f"heads.{self.name}.prompt: {prompt!r} must contain {{}} for the class name")
        self.check_range(1, channels=channels, upsample=upsample)
        self.channels, self.num_layers, self.upsample, self.prompt = channels, num_layers, upsample, prompt
        self.ask_boxes = ask_boxes

    def bind(self, encoder: "Encoder") -> None:
        self.tokens = nn.Linear(encoder.backbone.width, self.channels)
        self.norm = nn.LayerNorm(self.channels, elementwise_affine=False)  # the text gives the scale and the shift
        self.film = nn.Linear(encoder.embed_dim, 2 * self.channels)
        self.compare = nn.Conv2d(self.channels, self.channels, 3, padding=1)
        layers: list[nn.Module] = []
        for _ in range(self.num_layers):
            layers += [nn.Conv2d(self.channels, self.channels, 1), nn.GELU()]
        self.layers = nn.Sequential(nn.GELU(), *layers)
        self.density = nn.Conv2d(self.channels, self.upsample**2, 1)
        nn.init.constant_(cast(Tensor, self.density.bias), math.log(math.expm1(_FIRST_DENSITY)))
        self.metric = CountMetric()

    def check(self, train: Datasets, held_out: Datasets) -> None:
        if self.ask_boxes and train:  # scoring asks for the source's own class
            same_classes(self.task, train)
            if not any(dataset.classes for dataset in train.values()):
                raise ValueError(f"heads.{self.name}.{_ASK_BOXES}, but {', '.join(train)} has none")

    def forward(self, features: Features, text_QE: Tensor, image_Q: Tensor | None = None) -> Tensor:
        """Expected things (Q, H, W) in every cell, float32; 0 where an image has no patch.

        Args:
            features: Of the images.
            text_QE: What is asked.
            image_Q: Which image each query is about; None asks one of every image.
        """
        # A unit vector's numbers are small; at variance 1 the text steers the density from the first steps on.
        text_QE = text_QE.to(self.film.weight.dtype) * text_QE.shape[-1] ** 0.5
        scale_QC11, shift_QC11 = self.film(text_QE)[..., None, None].chunk(2, 1)
        x_QCHW, mask_QHW = replace(features, tokens=self.norm(self.tokens(features.tokens))).map()
        if image_Q is not None:
            x_QCHW, mask_QHW = x_QCHW[image_Q], mask_QHW[image_Q]
        mask_Q1HW = mask_QHW[:, None]
        x_QCHW = x_QCHW * (1 + scale_QC11) + shift_QC11
        x_QCHW = x_QCHW + self.compare(F.gelu(x_QCHW) * mask_Q1HW)
        density_QSHW = F.softplus(in_float32(self.density(self.layers(x_QCHW)))) * mask_Q1HW
        return F.pixel_shuffle(density_QSHW, self.upsample)[:, 0]

    def loss(self, features: Features, batch: Batch, encoder: "Encoder") -> Losses:
        queries = self._queries(batch)
        device = features.tokens.device
        image_Q = on_device(queries.images, device)
        prompts = [self.prompt.replace("{}", name) for name in queries.names]
        text_QE = encoder.embed_text(prompts, batch_statistics=False)
        density_QHW = self(features, text_QE, image_Q)
        counts_QHW = self._counts(features, batch, queries, image_Q)
        return Losses(count_losses(density_QHW, counts_QHW, on_device(queries.known, device)))

    def predict(self, features: Features, batch: Batch, encoder: "Encoder") -> list[Prediction]:
        """`count` (a number), `density` (rows, columns), whose sum it is, of cells that are `cell` resized pixels wide
        and high, `class_name` and `prompt`.
        """
        names = self.target(batch, "count_class")
        prompts = [self.prompt.replace("{}", name) for name in names]
        density_BHW = self(features, encoder.embed_text(prompts))
        s, stride = self.upsample, features.stride
        return [
            {
                "count": count,
                "density": density_HW[: -(-height // stride) * s, : -(-width // stride) * s],
                "cell": stride / s,
                "class_name": name,
                "prompt": prompt,
            }
            for count, density_HW, (height, width), name, prompt in zip(
                density_BHW.sum((1, 2)).tolist(), density_BHW, batch["images"]["sizes_hw"], names, prompts, strict=True
            )
        ]

    def to_json(self, prediction: Prediction, frame: Frame) -> dict[str, Any]:
        """`class`, `count`, `points` (x, y) and `density`. The points are as many peaks of the density as the count
        says, the highest first, or all where there are fewer.
        """
        points_P2 = frame.points(peaks(prediction["density"].float(), round(prediction["count"])) * prediction["cell"])
        return {
            "class": prediction["class_name"],
            "count": plain(prediction["count"]),
            "points": plain(points_P2),
            "density": plain(prediction["density"]),
        }

    def update_metric(self, predictions: list[Prediction], features: Features, batch: Batch) -> None:
        points, names = self.target(batch, "points_xy", every=False), self.target(batch, "count_class")
        for prediction, known, truth, name in zip(predictions, points.known, points.counts, names, strict=True):
            if known:
                self.metric.update(prediction["count"], truth, name)

    def measures(self, held_out: "SampleDataset") -> dict[str, Measure]:
        constants = {"": "the mean", "_median": "the median", "_class_median": "each class's median"}
        ratios = {
            f"mae_ratio{name}": Measure(
                f"mean error of the count, relative to always answering {constant}",
                "lower",
                trivial=1.0,
                answer=f"always {constant}",
                main=not name,
            )
            for name, constant in constants.items()
        }
        return ratios | {
            "mae": Measure("mean error of the count", "lower", "things"),
            "mae_of_mean": Measure("mean error of always answering the mean", "", "things"),
            "rmse": Measure("root mean square error of the count", "lower", "things"),
            "rmse_of_mean": Measure("root mean square error of always answering the mean", "", "things"),
        }

    def visualize(self, image_HW3: np.ndarray, prediction: Prediction, target: Prediction) -> Picture:
        """Where the model sees the things, beside the true points."""
        zoom = max(1, -(-_DRAWN_SIDE // min(image_HW3.shape[:2])))
        large_HW3 = image_HW3.repeat(zoom, 0).repeat(zoom, 1)
        panels = [Panel(heat_map(large_HW3, prediction["density"].float()), f"model: {prediction['count']:.1f}")]
        if "points_xy" in target:
            points_P2 = target["points_xy"] * zoom
            panels.append(Panel(_with_points(large_HW3, points_P2), f"truth: {len(points_P2)}"))
        return panels, f"how many {prediction['prompt']}?"

    def _queries(self, batch: Batch) -> CountQueries:
        """The source's own, one of each image, and those that the boxes answer."""
        names, points = self.target(batch, "count_class"), self.target(batch, "points_xy", every=False)
        queries = CountQueries([*range(len(names))], [*names], [*points.known], points.values, points.image_R)
        if self.ask_boxes:
            self._ask_boxes(batch, queries)
        return queries

    def _ask_boxes(self, batch: Batch, queries: CountQueries) -> None:
        """Add a query for each class of an image's boxes, and for as many others, most of which it will not show."""
        boxes, classes = (self.target(batch, name, every=False) for name in ("boxes_xyxy", "classes"))
        labels, names = classes.on_host.tolist(), class_names(batch)
        if labels and max(labels) >= len(names):
            found = f"found {len(names)} of them and a box of class {max(labels)}"
            raise ValueError(f"heads.{self.name}.{_ASK_BOXES}; {found}")
        images = [i for i, count in enumerate(classes.counts) for _ in range(count)]
        pairs = list(zip(images, labels, strict=True))  # image and class of each box
        in_crowd = batch["targets"]["crowd"].on_host.tolist() if "crowd" in batch["targets"] else []
        uncountable = set(compress(pairs, in_crowd))

        others = {
            (i, label)
            for i, seed in enumerate(random_seeds(batch))
            for label in Random(seed).choices(range(len(names)), k=max(1, len({own for j, own in pairs if j == i})))
        }
        asked = sorted(pair for pair in {*pairs, *others} - uncountable if boxes.known[pair[0]])
        query_of = {pair: number for number, pair in enumerate(asked, len(queries.images))}
        queries.images += [i for i, _ in asked]
        queries.names += [names[label] for _, label in asked]
        queries.known += [True] * len(asked)

        rows = [row for row, pair in enumerate(pairs) if pair in query_of]
        device = boxes.values.device
        boxes_P4 = boxes.values[on_device(rows, device).long()]
        query_P = on_device([query_of[pairs[row]] for row in rows], device).long()
        queries.xy_P2 = torch.cat([queries.xy_P2, (boxes_P4[:, :2] + boxes_P4[:, 2:]) / 2])
        queries.query_P = torch.cat([queries.query_P, query_P])

    def _counts(self, features: Features, batch: Batch, queries: CountQueries, image_Q: Tensor) -> Tensor:
        """How many points (Q, H, W) lie in each cell."""
        s, device = self.upsample, features.tokens.device
        H, W = (side * s for side in features.grid_hw)
        # A point on the lower or right edge belongs to the last cell.
        last_B2 = on_device([[width - 1e-3, height - 1e-3] for height, width in batch["images"]["sizes_hw"]], device)
        last_P2 = last_B2[image_Q[queries.query_P]]
        x_P, y_P = (torch.minimum(queries.xy_P2.clamp(min=0), last_P2) * s / features.stride).long().unbind(1)
        counts_L = torch.zeros(len(queries.images) * H * W, device=device)
        counts_L.index_add_(0, (queries.query_P * H + y_P) * W + x_P, torch.ones_like(last_P2[:, 0]))
        return counts_L.reshape(-1, H, W)


def count_losses(density_QHW: Tensor, counts_QHW: Tensor, known_Q: Tensor) -> dict[str, Ratio]:
    """Where the things are, and how many.

    `density`: the points are taken as a Poisson process with the predicted intensity, whose negative log-likelihood is
    the sum of the intensity less the sum of its logarithm at the points (Daley and Vere-Jones, An Introduction to the
    Theory of Point Processes, 2003, eq. 2.1.9), here without what the prediction does not change, so that 0 is
    perfect: sum of d - c - c log(d / c) over the cells. `count`: the absolute difference of the counts. Both
    are sums over the batch, to be divided by the number of its queries and points.

    Args:
        density_QHW: Predicted, positive; 0 on padding.
        counts_QHW: True number of points in each cell.
        known_Q: False for queries without an answer, which do not count.
    """
    log_ratio_QHW = density_QHW.clamp(min=_SMALLEST).log() - counts_QHW.clamp(min=1).log()
    deviance_Q = (density_QHW - counts_QHW - counts_QHW * log_ratio_QHW).sum((1, 2))
    counts_Q = counts_QHW.sum((1, 2))
    error_Q = (density_QHW.sum((1, 2)) - counts_Q).abs()
    number = known_Q.sum() + (counts_Q * known_Q).sum()
    return {"density": Ratio((deviance_Q * known_Q).sum(), number), "count": Ratio((error_Q * known_Q).sum(), number)}


class CountMetric(ListMetric):
    """Errors of the counts, and beside them those of constant answers, taken from the held-out counts themselves.

    What the training set would suggest, which one would answer in earnest, has larger errors. The mean knows nothing
    of the images. Each class's median knows the class, which may say most: where cells are many and cars few, a head
    that tells the two apart is far below the mean without having counted anything.
    """

    def update(self, count: float, truth: int, class_name: str) -> None:
        """Add an image."""
        self.add(float(count), float(truth), class_name)

    def compute(self) -> dict[str, Tensor]:
        """`mae`, `rmse`, and `mae_of_mean`, `rmse_of_mean` of always answering the mean.

        `mae_ratio` is ours to that of the mean, `mae_ratio_median` to that of the median, `mae_ratio_class_median` to
        that of each class's median. A ratio is left out where the constant answer has no error.
        """
        counts, truths, classes = zip(*self.rows_of_all_ranks(), strict=True)
        truths_I, classes_I = torch.tensor(truths), np.array(classes)
        error_I, mean = torch.tensor(counts) - truths_I, truths_I.mean()
        class_medians_I = torch.empty_like(truths_I)
        for name in set(classes):
            class_medians_I[classes_I == name] = truths_I[classes_I == name].median()
        numbers = {
            "mae": error_I.abs().mean(),
            "rmse": error_I.square().mean().sqrt(),
            "mae_of_mean": (truths_I - mean).abs().mean(),
            "rmse_of_mean": (truths_I - mean).square().mean().sqrt(),
        }
        constants = {"": mean, "_median": truths_I.median(), "_class_median": class_medians_I}
        for name, constant in constants.items():
            if (mae_of_constant := (truths_I - constant).abs().mean()) > 0:
                numbers[f"mae_ratio{name}"] = numbers["mae"] / mae_of_constant
        return numbers


def peaks(density_HW: Tensor, most: int) -> Tensor:
    """The middles (P, 2) of the cells with more than any of their eight neighbours, in cells as (x, y), highest first.

    Args:
        density_HW: Not negative.
        most: So many at most.
    """
    highest_HW = F.max_pool2d(density_HW[None, None], 3, stride=1, padding=1)[0, 0]
    is_peak_HW = (density_HW == highest_HW) & (density_HW > 0)
    order_P = density_HW[is_peak_HW].argsort(descending=True, stable=True)[:most]
    return is_peak_HW.nonzero()[order_P].flip(1) + 0.5


def heat_map(image_HW3: np.ndarray, density_HW: Tensor) -> np.ndarray:
    """The grey image with the density laid over it, from clear through red to yellow at its largest."""
    strength_HW = density_HW / density_HW.max().clamp(min=0.05)  # an empty map stays clear
    heat_11HW = F.interpolate(strength_HW[None, None], image_HW3.shape[:2], mode="bilinear")
    heat_HW = heat_11HW[0, 0].numpy()
    opacity_HW1 = np.sqrt(heat_HW)[..., None] * 0.85
    colour_HW3 = 255 * colormaps["autumn"](heat_HW)[..., :3]
    blend_HW3: np.ndarray = image_HW3.mean(-1, keepdims=True) * (1 - opacity_HW1) + colour_HW3 * opacity_HW1
    return blend_HW3.astype(np.uint8)


def _with_points(image_HW3: np.ndarray, points_P2: Tensor) -> np.ndarray:
    """A copy with a dark-rimmed yellow square at each point."""
    marked_HW3 = image_HW3.copy()
    for x, y in points_P2.long().tolist():
        for reach, colour in ((6, (20, 20, 20)), (4, (255, 225, 0))):
            marked_HW3[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = colour
    return marked_HW3
