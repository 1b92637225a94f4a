"""CPU seconds until the image-text task is held out as well as OpenCLIP, ours beside OpenCLIP's.

    OMP_NUM_THREADS=1 python tools/bench_accuracy.py
    OMP_NUM_THREADS=1 python tools/bench_accuracy.py --open-clip open_clip/src    # and its main branch
    OMP_NUM_THREADS=1 python tools/bench_accuracy.py --arms ours "ours, label-aware" --seeds 0 1 2

All arms learn from the same drawn images and captions in the same order, 64 px, with the same towers (OpenCLIP's: mean
of the image's tokens, the text's last one), the same weights at the start, tokenizer, batch, optimizer, learning rates
and number of steps. Each side decays the weights that its own training decays. Held out are images of 17 kinds with
their names. Each arm's accuracy is measured now and then, which is not counted; what is counted are the seconds of its
training steps on the processor; workers tokenise and prepare images, on both sides. Arms take turns step by step.

The target is the mean accuracy that the installed OpenCLIP has in the last quarter of its steps; an arm reaches it at
the first measurement from which the mean of three is no lower. One seed says little: the same model from other initial
weights ends several hundredths apart. The last table is of the mean curves of all seeds.

Arms: `ours` and `ours, half of the patches` compare each image with the captions of others as OpenCLIP does; `ours,
label-aware` also knows the kinds, as our training does by default; `open_clip` pads to 77 tokens; `open_clip, half of
the patches` is its own patch dropout; `open_clip main` pads captions to the longest of the batch.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _clip_steps import CONTEXT, Ours, Shape, Theirs, load_open_clip, normalised
from torch import Tensor, nn

from indiclip.generated.mela import Mela
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.parameter_groups import parameter_groups
from indiclip.patches import unpatchify
from indiclip.planning.cpu import clock
from indiclip.preprocessing import Preprocessing
from indiclip.tokenizers import FastTokenizer, Tokenizer

SHAPE = Shape(128, 6, 2, 8, 64, 96, 3, 2, 128)
OURS = {"ours": 0.0, "ours, half of the patches": 0.5, "ours, label-aware": 0.0}  # shares of dropped patches
WARMUP = 0.125  # of the steps
Curve = list[tuple[float, float]]  # CPU seconds, accuracy


class Arm:
    """One side: a model, its optimizer, and its loss of a step's samples."""

    def __init__(self, module: Any, loss: Callable[[Any], Tensor], steps: int, lr: float) -> None:
        self.module, self.loss = module, loss
        groups = parameter_groups(module) if isinstance(module, Ours) else _their_groups(module)
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        warmup = max(1, int(WARMUP * steps))

        def rate(step: int) -> float:
            past = max(0, step - warmup) / (steps - warmup)
            return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * past)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.seconds = 0.0
        self.curve: Curve = []

    def step(self, samples: Any) -> None:
        """Train, on the clock."""
        self.module.train()
        start = clock()
        self.optimizer.zero_grad()
        self.loss(samples).backward()
        self.optimizer.step()
        self.seconds += clock() - start
        self.schedule.step()

    def measure(self, images: list[np.ndarray], labels: Tensor, names: list[str]) -> None:
        """Note the share of the images whose nearest name is theirs."""
        self.module.eval()
        nearest = torch.cat([self.module.class_scores(images[i : i + 64], names) for i in range(0, len(images), 64)])
        self.curve.append((self.seconds, float((nearest.argmax(1) == labels).float().mean())))


class Drawn:
    """Samples of each step, for ours and for OpenCLIP's.

    Args:
        images: Number of different ones.
        batch_size: Samples of a step.
        seed: Of their drawing and their order.
        tokenizer: Of both sides.
    """

    def __init__(self, images: int, batch_size: int, seed: int, tokenizer: Tokenizer) -> None:
        scenes = Mela(images, SHAPE.pixels, "single", languages=["en"], seed=seed)
        self.steps = {}
        for drop in (0.0, 0.5):
            tokens = (SHAPE.pixels // SHAPE.patch) ** 2
            source = Source("contrastive", scenes, batch_size, max_tokens=tokens, drop=drop)
            self.steps[drop] = Steps([source], seed, Preprocessing(SHAPE.patch), train=True, encode=tokenizer.encode)

    def ours(self, step: int, drop: float) -> Any:
        """As the loader's workers give it."""
        return self.steps[drop][step]["contrastive"]

    @staticmethod
    def theirs(batch: Any) -> tuple[Tensor, list[str]]:
        """Images (B, 3, H, W) and captions of one of our batches of whole images."""
        images = [unpatchify(batch["images"], index) for index in range(len(batch["keys"]))]
        return normalised(images), list(batch["targets"]["caption"])


def arms_of(arguments: argparse.Namespace, seed: int, tokenizer: Tokenizer) -> tuple[dict[str, Arm], dict[str, Any]]:
    """The arms, and what each of them is given: our share of dropped patches, or OpenCLIP's model."""
    released = partial(Theirs, SHAPE, tokenizer, load_open_clip())
    makers: dict[str, Callable[[], Any]] = {name: lambda: Ours(SHAPE, tokenizer, like=released()) for name in OURS}
    makers |= {"open_clip": released, "open_clip, half of the patches": partial(released, patch_dropout=0.5)}
    if arguments.open_clip:
        main = load_open_clip(arguments.open_clip)
        makers["open_clip main"] = partial(Theirs, SHAPE, tokenizer, main, variable_text=True)
    wanted = {"open_clip", *(arguments.arms or makers)}  # it sets the target
    if unknown := wanted - makers.keys():
        raise SystemExit(f"--arms: found {', '.join(sorted(unknown))}; expected some of {', '.join(makers)}")
    made, arms = {}, {}
    for name in filter(wanted.__contains__, makers):
        torch.manual_seed(seed)  # so that all start alike
        model = made[name] = makers[name]()
        if isinstance(model, Ours):
            loss: Callable[[Any], Tensor] = partial(model.loss, keys=name == "ours, label-aware")
        else:
            loss = partial(_their_loss, model)
        arms[name] = Arm(model, loss, arguments.steps, arguments.lr)
    return arms, made


def _their_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Which weights decay, by the rule of `open_clip_train.main`."""
    stay, decay = [], []
    for name, parameter in model.named_parameters():
        excluded = parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
        (stay if excluded else decay).append(parameter)
    return [{"params": stay, "weight_decay": 0.0}, {"params": decay}]


def _their_loss(model: Theirs, samples: tuple[Tensor, Tensor]) -> Tensor:
    return model.loss(*samples)


def race(arguments: argparse.Namespace, seed: int, tokenizer: Tokenizer) -> dict[str, Curve]:
    """The curve of each arm."""
    drawn = Drawn(arguments.images, arguments.batch, seed, tokenizer)
    scenes = Mela(arguments.held_out, SHAPE.pixels, "single", languages=["en"], seed=1000 + seed)
    held_out = [scenes[i] for i in range(len(scenes))]
    images, labels = [sample["image"] for sample in held_out], torch.tensor([sample["label"] for sample in held_out])
    arms, models = arms_of(arguments, seed, tokenizer)
    for step in range(arguments.steps):
        batches = {drop: drawn.ours(step, drop) for drop in {OURS.get(name, 0.0) for name in arms}}
        pixels, captions = drawn.theirs(batches[0.0])
        for name, arm in arms.items():
            if isinstance(models[name], Ours):
                arm.step(batches[OURS[name]])
            else:
                arm.step((pixels, models[name].ids(captions)))
        if (step + 1) % arguments.every == 0:
            for arm in arms.values():
                arm.measure(images, labels, scenes.classes)
    return {name: arm.curve for name, arm in arms.items()}


def seconds_to(curve: Curve, accuracy: float) -> float:
    """When the mean of three measurements has reached it."""
    for (seconds, _), *three in zip(curve, curve, curve[1:], curve[2:], strict=False):
        if statistics.mean(value for _, value in three) >= accuracy:
            return seconds
    return math.nan


def last(curve: Curve) -> float:
    """Mean accuracy of the last quarter."""
    return statistics.mean(accuracy for _, accuracy in curve[-len(curve) // 4 :])


def mean_curve(curves: list[Curve]) -> Curve:
    """Of all seeds."""
    return [
        (statistics.mean(seconds), statistics.mean(accuracies))
        for seconds, accuracies in (zip(*measured, strict=True) for measured in zip(*curves, strict=True))
    ]


def standard_error(values: list[float]) -> float:
    """Of their mean; unknown of a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def show(curves: dict[str, Curve], steps: int) -> None:
    """A line for each arm."""
    target = last(curves["open_clip"])
    wanted = seconds_to(curves["open_clip"], target)
    for name, curve in curves.items():
        seconds = seconds_to(curve, target)
        print(
            f"  {name:32} {1e3 * curve[-1][0] / steps:6.0f} ms a step   at the end {last(curve):.3f}   "
            f"target after {seconds:6.1f} s   {wanted / seconds:5.2f}x",
            flush=True,
        )


def show_differences(runs: list[dict[str, Curve]]) -> None:
    """Accuracies at the end less OpenCLIP's of the same seed."""
    for name in runs[0]:
        less = [last(curves[name]) - last(curves["open_clip"]) for curves in runs]
        print(f"  {name:32} at the end {statistics.mean(less):+.3f} +- {standard_error(less):.3f} beside open_clip")


def main() -> None:
    """Print a table for each seed, and one of their means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-clip", help="folder with the sources of another OpenCLIP")
    parser.add_argument("--arms", nargs="+", help="only these, and open_clip")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="steps between measurements")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--held-out", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)  # as `indiclip fit` does
    tokenizer = FastTokenizer(str(Path(__file__).parent.parent / "conf" / "tokenizers" / "mela.json"), CONTEXT)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.batch} pairs, {SHAPE}")
    runs = []
    for seed in arguments.seeds:
        runs.append(race(arguments, seed, tokenizer))
        print(f"seed {seed}")
        show(runs[-1], arguments.steps)
    print(f"mean curves of {len(runs)} seeds")
    show({name: mean_curve([curves[name] for curves in runs]) for name in runs[0]}, arguments.steps)
    show_differences(runs)


if __name__ == "__main__":
    main()
