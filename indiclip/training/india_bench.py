"""`IndiaBench`: the benchmark inside of `fit`, on the weights of the moment.

trainer:
  callbacks:
    - class_path: indiclip.training.india_bench.IndiaBench
      init_args: {images: photos/india, every_n_steps: 1000}
    - class_path: indiclip.training.fault_tolerance.checkpoints.Checkpoints
      init_args: {monitor: eval/india/edibles/hi/acc1, mode: max, every_n_train_steps: 1000}
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.seed import isolate_rng

from indiclip.checkpoint import encoder_of
from indiclip.encoder import Encoder
from indiclip.evals.bench import logged_names, run_bench
from indiclip.evals.encode import Ranks
from indiclip.evals.find import check_languages, find_bench
from indiclip.evals.models.embedder import EncoderEmbedder
from indiclip.evals.protocols.protocol import Options
from indiclip.evals.result_files import load_pyarrow, save_result
from indiclip.evals.results import PROCEDURAL, Result
from indiclip.module import MultiTask
from indiclip.names import check_range, plain
from indiclip.pretrained.weights import Weights
from indiclip.sharding import is_sharded, whole
from indiclip.training.ema import scored_weights
from indiclip.training.fault_tolerance.ranks import Interrupted, callbacks_of, folder_of, together
from indiclip.training.fault_tolerance.step_sync import StepSync
from indiclip.training.fault_tolerance.watchdog import Watchdog
from indiclip.training.monitors import check_monitors
from indiclip.training.record import RunRecord
from indiclip.training.throughput import paused


class IndiaBench(Callback):
    """Scores the encoder on the benchmark while it trains, at the last of `max_steps`, and once in `validate` and
    `test`.

    Scored are the averaged weights where an `EMA` keeps some. Images and prompts are encoded once each, shared out
    over the ranks, and the numbers are those of one rank, in float32 whatever `trainer.precision` autocasts to. They
    are logged as `eval/india/<category>/<language>/<metric>`, so that any of them can be a `monitor`; the newest run's
    `metrics.json` and `predictions.parquet` are in `bench/` of
    the run's folder. Training is not changed by it. A signal ends it at once, and the run that goes on scores first. A
    `fast_dev_run` looks for the images and scores nothing.

    Args:
        images: Folder with a folder, table or shards for each card, by its id; None scores what is generated.
        cards: Ids of packaged cards, files, or names of suites; None takes the eleven categories of India.
        every_n_steps: Optimizer steps between two runs; None runs after validations.
        every_n_epochs: Validations between two runs, where `every_n_steps` is None; None is each of them.
        languages: Of prompts and captions; None takes all that a card has.
        views: Sizes and aspects, see `indiclip bench --help`.
        lengths: Of the embeddings; None takes the encoder's.
        procedural: Score the generated parts.
        probes: Score kNN and linear probes too.
        batch_size: Images in a batch, on each rank.
        num_workers: Loader processes of each rank: reading and drawing take longer than encoding on a GPU.
        skip_unknown: Leave out and count the images of classes that a card does not have; they are an error else.

    Raises:
        ValueError: A number that is below 1, or steps and epochs together.
    """

    def __init__(
        self,
        images: str | None = None,
        cards: list[str] | None = None,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        languages: list[str] | None = None,
        views: Sequence[str] = ("native",),
        lengths: list[int] | None = None,
        procedural: bool = True,
        probes: bool = True,
        batch_size: int = 64,
        num_workers: int = 0,
        skip_unknown: bool = False,
    ) -> None:
        numbers = {"every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs, "batch_size": batch_size}
        check_range({f"IndiaBench.{name}": number for name, number in numbers.items()}, 1)
        if every_n_steps and every_n_epochs:
            raise ValueError(
                f"IndiaBench: found every_n_steps {every_n_steps} and every_n_epochs {every_n_epochs}; expected one"
            )
        self.images, self.cards, self.procedural, self.skip_unknown = images, cards, procedural, skip_unknown
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs or 1
        self.options = Options(languages, list(views), probes)
        self.lengths = lengths
        self.batch_size, self.num_workers = batch_size, num_workers
        self._validations = 0
        self._scored = 0  # the step whose weights were scored last; none has any before the first
        self._goes_on_from = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            return
        assert isinstance(pl_module, MultiTask)
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                "trainer.strategy: IndiaBench needs all weights on each rank, which FSDPStrategy shares out; expected "
                "ddp or indiclip.training.sharding.ShardedStrategy"
            )
        load_pyarrow()
        self._folder = folder_of(trainer)
        with together(trainer, "IndiaBench") as exchange:
            try:
                self.bench = find_bench(self.images, self.cards, self.procedural, skip_unknown=self.skip_unknown)
            except ValueError as error:  # which names the command's flag
                raise ValueError(str(error).replace("--skip-unknown", "IndiaBench.skip_unknown: true")) from error
            check_languages(self.bench, self.options.languages)
            if any(data != self.bench.data for data in exchange(self.bench.data)):
                raise ValueError(f"IndiaBench.images: {self.images} does not hold the same on all ranks")
            embedder = self._embedder(pl_module)
            try:  # what the encoder cannot do shows before it trains
                embedder.views(self.options.views)
            except ValueError as error:
                raise ValueError(f"IndiaBench.views: {error}") from error
            if stage == "fit" and trainer.is_global_zero:
                if not self.every_n_steps and not trainer.enable_validation:
                    raise ValueError(
                        "IndiaBench.every_n_steps: null runs after validations, and this run has none; set it"
                    )
                names = logged_names(embedder.lengths, self.bench, self.options)
                check_monitors(trainer, self.every_n_steps, self.every_n_epochs, names)
        if trainer.is_global_zero:
            self._announce(stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # The run that this one goes on from was stopped in the middle of it.
        if self._goes_on_from == trainer.global_step != self._scored and self._is_due(trainer):
            self._score(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if stepped and self._is_due(trainer):  # not at a batch whose gradients are kept for the next one
            self._score(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        in_fit = trainer.state.fn == "fit"
        due = (self._validations + 1) % self.every_n_epochs == 0 or trainer.global_step == trainer.max_steps
        if not in_fit or (self.every_n_steps is None and due):
            self._score(trainer, pl_module)
        self._validations += in_fit  # last: one that is stopped here comes again

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._score(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations, "scored": self._scored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations, self._scored = state_dict["validations"], state_dict["scored"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._goes_on_from = checkpoint["global_step"]

    def _is_due(self, trainer: Trainer) -> bool:
        if self.every_n_steps is None:
            return False
        return trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps

    def _score(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, MultiTask)
        step = max(trainer.global_step, self._goes_on_from)  # the former is 0 where nothing trains
        votes = callbacks_of(trainer, StepSync)
        try:
            values = self._values(trainer, pl_module, step, votes)
        except Interrupted as stop:
            for vote in votes:
                vote.leave(stop.number)
            return
        self._scored = step
        # Not by `log_dict`, which would go through all of them again in every step, and give them to the loggers late.
        trainer.callback_metrics.update({name: torch.tensor(value).double() for name, value in values.items()})
        for logger in trainer.loggers:
            logger.log_metrics(values, step)

    def _values(self, trainer: Trainer, module: MultiTask, step: int, votes: list[StepSync]) -> dict[str, float]:
        def progress(images: int) -> None:
            for watchdog in callbacks_of(trainer, Watchdog):
                watchdog.alive("scoring the benchmark")
            for vote in votes:
                if vote.preemption.received:  # a scheduler waits a minute, this may take ten
                    raise Interrupted(vote.preemption.received)

        with (
            paused(trainer),
            together(trainer, f"the benchmark after step {step}") as exchange,
            scored_weights(trainer, module) as weights,
            torch.inference_mode(False),  # in which validations are: what a module keeps could not be trained with
            isolate_rng(include_cuda=False),
            _buffers_of_the_first(trainer, module),
        ):
            progress(0)
            ranks = Ranks(trainer.global_rank, trainer.world_size, exchange)
            embedder = self._embedder(module)
            result = run_bench(embedder, self.bench, self.options, ranks, self.batch_size, self.num_workers, progress)
            if result is not None:
                self._save(result, trainer, step, weights)
            values: dict[str, float] = exchange(result and result.logged())[0]  # all log what rank 0 found
        return values

    def _save(self, result: Result, trainer: Trainer, step: int, weights: str) -> None:
        result.about |= {"step": step, "weights": weights}
        save_result(result, self._folder / "bench")
        for record in callbacks_of(trainer, RunRecord):
            record.add(trainer, result.logged())
        numbers = [f"{card} {score.value:.3f}" for (card, _), score in result.main().items()]
        seconds = sum(result.about["seconds"].values())
        print(f"step {step}: benchmark of {weights} in {seconds:.0f} s: {', '.join(numbers)}", flush=True)

    def _embedder(self, module: MultiTask) -> EncoderEmbedder:
        encoder = _whole_encoder(module.encoder) if is_sharded(module) else module.encoder
        return EncoderEmbedder(encoder, self._folder.resolve().name, lengths=self.lengths)

    def _announce(self, stage: str) -> None:
        counts = [
            f"{items.card.id} ({len(items):,} {'generated ' * items.procedural}images)" for items in self.bench.items
        ]
        schedule = f"every {self.every_n_steps} steps" if self.every_n_steps else "after every validation"
        if self.every_n_epochs > 1:
            schedule = f"after every {self.every_n_epochs} validations"
        print(f"benchmark{f' {schedule}' * (stage == 'fit')}: {', '.join(counts)}")
        for card in self.bench.skipped:
            if self.images or card.part == PROCEDURAL:
                print(plain(f"  not scored: {card.card}, {card.part}: {'; '.join(card.notes)}"))
        for items in self.bench.items:
            for note in items.notes if not items.procedural else []:
                print(plain(f"  {items.card.id}: {note}"))


def _whole_encoder(encoder: Encoder) -> Encoder:
    """A copy with all weights, in float32: ranks do not encode equally many images. A collective."""
    tensors = {name: whole(tensor) for name, tensor in encoder.state_dict().items()}
    copied = Weights("the trained encoder", encoder.to_config(), tensors)
    return encoder_of(copied, trust_code=True).to(encoder.device)  # it is made of what runs already


@contextmanager
def _buffers_of_the_first(trainer: Trainer, module: MultiTask) -> Iterator[None]:
    """Batch norm's running statistics are each rank's own until the next step; a checkpoint has those of rank 0."""
    buffers = list(module.encoder.buffers()) if trainer.world_size > 1 else []
    own = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        torch.distributed.broadcast(buffer, 0)
    try:
        yield
    finally:
        for buffer, kept in zip(buffers, own, strict=True):
            buffer.copy_(kept)
