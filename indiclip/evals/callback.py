"""`IndiaBench`: the benchmark inside of `fit`, on the weights of the moment.

trainer:
  callbacks:
    - class_path: indiclip.evals.callback.IndiaBench
      init_args: {images: photos/india, every_n_steps: 1000}
    - class_path: indiclip.survival.checkpoints.Checkpoints
      init_args: {monitor: eval/india/edibles/hi/acc1, mode: max, every_n_train_steps: 1000}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

from indiclip.evals.bench import check_languages, find_bench, run_bench
from indiclip.evals.console import print_notes
from indiclip.evals.encode import Ranks
from indiclip.evals.models import EncoderEmbedder
from indiclip.evals.results import check_parquet
from indiclip.evals.sheet import Options
from indiclip.module import Batches, MultiTask
from indiclip.record import append_history, finite
from indiclip.survival.ranks import gathered
from indiclip.survival.watchdog import Watchdog


class IndiaBench(L.Callback):
    """Scores the encoder on the benchmark while it trains.

    Images and prompts are encoded once each, shared out over the ranks, and the numbers are those of one rank. They are
    logged as `eval/india/<category>/<language>/<metric>`, so that any of them can be a `monitor`; the newest run's
    `metrics.json` and `predictions.parquet` are in `bench/` of the run's folder.

    Args:
        images: Folder with a folder, table or shards for each card, by its id; None scores what is generated.
        cards: Ids of packaged cards, or files; None takes the eleven categories of India.
        every_n_steps: Optimizer steps between two runs; None runs after validations.
        every_n_epochs: With `every_n_steps: null`: validations between two runs.
        languages: Of prompts and captions; None takes all that a card has.
        views: Sizes and aspects, see `indiclip bench --help`.
        lengths: Of the embeddings; None takes the encoder's.
        procedural: Score the generated parts.
        probes: Score kNN and linear probes too.
        batch_size: Images in a batch, on each rank.
        num_workers: Loader processes.

    Raises:
        ValueError: A number that is below 1.
    """

    def __init__(
        self,
        images: str | None = None,
        cards: list[str] | None = None,
        every_n_steps: int | None = None,
        every_n_epochs: int = 1,
        languages: list[str] | None = None,
        views: Sequence[str] = ("native",),
        lengths: list[int] | None = None,
        procedural: bool = True,
        probes: bool = True,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        numbers = {"every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs, "batch_size": batch_size}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"IndiaBench.{name}: found {number}; expected 1 or more")
        self.images, self.cards, self.procedural = images, cards, procedural
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.options = Options(languages, list(views), probes)
        self.lengths = lengths
        self.batch_size, self.num_workers = batch_size, num_workers
        self._validations = 0
        self._last = -1  # the step whose weights were scored last

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "predict":
            return
        assert isinstance(pl_module, MultiTask)
        check_parquet()
        self._check_monitors(trainer)
        self.bench = find_bench(self.images, self.cards, self.procedural)
        check_languages(self.bench, self.options.languages)
        self._folder = Path(trainer.log_dir or ".")  # all ranks ask: rank 0 tells the others
        self._embedder(pl_module).views(self.options.views)  # what the encoder cannot do shows before it trains
        if trainer.is_global_zero:
            print_notes(Console(), [*self.bench.skipped, *self.bench.expected()])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batches, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self._last:
            values = self._score(trainer, pl_module)
            for logger in trainer.loggers:  # at once: what is given to `log_dict` waits for `log_every_n_steps`
                logger.log_metrics(values, step)
            pl_module.log_dict(values, on_step=True, on_epoch=False, logger=False, batch_size=1)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_steps or trainer.sanity_checking:
            return
        self._validations += 1
        if trainer.state.fn != "fit" or self._validations % self.every_n_epochs == 0:
            pl_module.log_dict(self._score(trainer, pl_module), batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def _score(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        assert isinstance(pl_module, MultiTask)
        watchdogs = [callback for callback in trainer.callbacks if isinstance(callback, Watchdog)]  # type: ignore[attr-defined]

        def progress(images: int) -> None:
            for watchdog in watchdogs:
                watchdog.alive("scoring the benchmark")

        progress(0)
        ranks = Ranks(trainer.global_rank, trainer.world_size, lambda value: gathered(trainer, value))
        embedder = self._embedder(pl_module)
        result = run_bench(embedder, self.bench, self.options, ranks, self.batch_size, self.num_workers, progress)
        self._last = trainer.global_step
        values: dict[str, float] = gathered(trainer, result and result.logged())[0]  # all log what rank 0 found
        if result is not None:
            result.about |= {"step": trainer.global_step}
            result.save(self._folder / "bench")
            if trainer.state.fn == "fit":
                append_history(self._folder, {"step": trainer.global_step, **finite(values)})
        return values

    def _embedder(self, module: MultiTask) -> EncoderEmbedder:
        return EncoderEmbedder(module.encoder, self._folder.name, lengths=self.lengths)

    def _check_monitors(self, trainer: L.Trainer) -> None:
        """A best checkpoint is of the weights that were scored: both come at the same steps."""
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or not str(callback.monitor).startswith("eval/"):
                continue
            steps = callback._every_n_train_steps
            if self.every_n_steps and steps % self.every_n_steps == 0 and steps > 0:
                continue
            if not self.every_n_steps and self.every_n_epochs == 1 and not steps:
                continue
            advice = f"set its every_n_train_steps to {self.every_n_steps or 'null'}"
            if not self.every_n_steps and self.every_n_epochs != 1:
                advice += ", and every_n_epochs of IndiaBench to 1"
            raise ValueError(
                f"trainer.callbacks: {type(callback).__name__} keeps the best by {callback.monitor} and saves with "
                f"every_n_train_steps {steps or 'null'}, but IndiaBench scores with every_n_steps "
                f"{self.every_n_steps or 'null'}, every_n_epochs {self.every_n_epochs}: a checkpoint would get the "
                f"score of other weights; {advice}"
            )
