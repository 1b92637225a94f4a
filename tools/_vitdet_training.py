"""detectron2's training loop for `finetune_detectron2.py`, in a run that may be stopped at any time and goes on.

Files are written whole, checkpoints come before evaluations, and an evaluation that was stopped is made up for.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.events import CommonMetricPrinter

from indiclip import json_lines
from indiclip.training.record import finite

NAMES = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_small", "APm": "ap_medium", "APl": "ap_large"}
logger = logging.getLogger("detectron2")  # which has its handlers


class Training:
    """From the newest checkpoint of the run, or from the start.

    Args:
        config: LazyConfig of detectron2.
        run: Folder of the run.
        detector: By which its metrics are called.

    Attributes:
        step: The last one that is done.
        checkpointer: Knows what has been saved.

    Raises:
        ValueError: The newest checkpoint is of another detector.
    """

    def __init__(self, config: Any, run: Path, detector: str) -> None:
        self.config, self.detector, self.history = config, detector, run / "history.jsonl"
        self.model = instantiate(config.model).to(config.train.device)
        config.optimizer.params.model = self.model
        kind = AMPTrainer if config.train.amp.enabled else SimpleTrainer
        self.trainer = kind(self.model, instantiate(config.dataloader.train), instantiate(config.optimizer))
        self.checkpointer = Checkpointer(self.model, str(run), trainer=self.trainer)
        saves = hooks.PeriodicCheckpointer(
            self.checkpointer, **config.train.checkpointer, max_iter=config.train.max_iter
        )
        self.trainer.register_hooks(
            [
                hooks.IterationTimer(),
                hooks.LRScheduler(scheduler=instantiate(config.lr_multiplier)),
                _Losses(self),
                saves,
                # Not after training: detectron2 would also do that after Ctrl-C in the last step.
                hooks.EvalHook(config.train.eval_period, self._evaluate_once, eval_after_train=False),
            ]
        )
        self.checkpointer.resume_or_load(config.train.init_checkpoint, resume=True)
        if self.checkpointer.step > 0:
            saves.recent_checkpoints = [self.checkpointer.get_checkpoint_file()]  # which go when there is a newer one

        self.step = self.checkpointer.step
        rows = [row for row in json_lines.read(self.history) if row["step"] <= self.step]
        json_lines.rewrite(self.history, rows)
        self._scored = {row["step"] for row in rows if f"val/{detector}/ap" in row}
        self._began = time.monotonic() - max((row["seconds"] for row in rows), default=0.0)

    def run(self) -> None:
        """Train to the last step; evaluate where a stopped process did not come to it, and in the end."""
        last = self.config.train.max_iter
        if self.step > 0:
            logger.info(f"Going on from {self.checkpointer.get_checkpoint_file()}, step {self.step}")
            self._evaluate_once()
        if self.step < last:
            self.trainer.train(self.step, last)
            self._evaluate_once()

    def _evaluate_once(self) -> None:
        if self.step in self._scored:
            return
        parts = self.config.dataloader
        found = inference_on_dataset(self.model, instantiate(parts.test), instantiate(parts.evaluator))
        values = scores(found)
        self.add({f"val/{self.detector}/{name}": value for name, value in values.items()})
        self._scored.add(self.step)
        said = ", ".join(f"{name} {value:.4f}" for name, value in values.items() if name.endswith(("ap", "ap50")))
        logger.info(f"Step {self.step}: {said}")

    def add(self, values: dict[str, float]) -> None:
        """A line of the history; detectron2 says NaN where there is no object of a kind."""
        row = {"step": self.step, "seconds": round(time.monotonic() - self._began, 1)}
        json_lines.append(self.history, [row | finite(values)])


class Checkpointer(DetectionCheckpointer):  # type: ignore[misc]
    """Its files are whole or not there. fvcore's own would be torn by a kill, which a run cannot go on from.

    Attributes:
        step: Of the newest checkpoint; 0 where there is none.
    """

    step = 0

    def save(self, name: str, **more: Any) -> None:
        data = {"model": self.model.state_dict()} | {
            key: each.state_dict() for key, each in self.checkpointables.items()
        }
        file = Path(self.save_dir) / f"{name}.pth"
        part = file.with_name(f".{file.name}.part")
        with _until_done():
            try:
                with part.open("wb") as opened:
                    torch.save(data | more, opened)
                    opened.flush()
                    os.fsync(opened.fileno())
                part.replace(file)
                self.tag_last_checkpoint(file.name)
            except RuntimeError as error:  # torch's own, which hides what the disk said
                raise OSError(f"{file}: cannot be written; is the disk full?") from error
            finally:
                part.unlink(missing_ok=True)
            self.step = more["iteration"] + 1

    def tag_last_checkpoint(self, name: str) -> None:
        json_lines.write_whole(Path(self.save_dir) / "last_checkpoint", name.encode())

    def load(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        rest: dict[str, Any] = super().load(*arguments, **options)
        if self.has_checkpoint():
            self.step = rest["iteration"] + 1
        return rest

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """An encoder lacks the heads, which are to be trained; a checkpoint of the run lacks nothing.

        Raises:
            ValueError: What the run goes on from is of another detector, which fvcore would read in part.
        """
        apart = [name for name, *_ in incompatible.incorrect_shapes] + list(incompatible.unexpected_keys)
        if self.has_checkpoint() and (apart := [*apart, *incompatible.missing_keys]):
            file = self.get_checkpoint_file()
            raise ValueError(f"{file}: is of another detector: {len(apart)} tensors differ, such as {apart[0]}")
        if apart:
            logger.warning(f"{len(apart)} tensors are not read, for they do not fit, such as {apart[0]}")


@contextmanager
def _until_done() -> Iterator[None]:
    """Ctrl-C waits until this is done."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


class _Losses(HookBase):  # type: ignore[misc]
    """Counts the steps; of some the losses are kept and printed."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.printer = CommonMetricPrinter(training.config.train.max_iter)

    def after_step(self) -> None:
        self.training.step = self.trainer.iter + 1
        if self.training.step % self.training.config.train.log_period == 0:
            latest = self.trainer.storage.latest()
            named = {name: value for name, (value, _) in latest.items() if "loss" in name}
            self.training.add({f"train/{self.training.detector}/{name}": value for name, value in named.items()})
            self.printer.write()  # PeriodicWriter also writes after Ctrl-C, and fails where nothing is new


def scores(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """detectron2's percentages by the names and in the units of IndiCLIP's detectors; those of masks begin with it."""
    return {
        f"{prefix}{ours}": found[task][theirs] / 100
        for task, prefix in {"bbox": "", "segm": "mask_"}.items()
        for theirs, ours in NAMES.items()
        if theirs in found.get(task, {})
    }
