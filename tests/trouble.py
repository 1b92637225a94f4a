"""Things that go wrong in tests of survival, to be named in a YAML: a head with bad losses, signals, a diary."""

import json
import os
import resource
import signal
import time
import traceback
from pathlib import Path

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from heads.contrastive import Contrastive
from indiclip.datasets.base import SampleDataset
from indiclip.generated.mela import Mela
from indiclip.head import computed
from indiclip.images import UnreadableSample
from indiclip.training.fault_tolerance import checkpoints, manifest
from indiclip.training.throughput import Throughput


class BadLoss(Contrastive):
    """The image-text head, but at some calls its loss, or only its gradient, is not a number.

    Args:
        bad: Calls of `loss`, from 0 on.
        rank: The one that it happens on.
        what: `loss` or `gradient`.
    """

    def __init__(self, bad: list[int], rank: int = 0, what: str = "loss", **options) -> None:
        super().__init__(**options)
        self.bad, self.rank, self.what, self.calls = bad, rank, what, 0

    def loss(self, features, batch, encoder):
        found = computed(super().loss(features, batch, encoder))
        losses = found.terms
        mine = self.rank == (torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
        if self.calls in self.bad and mine:
            name = next(iter(losses))
            if self.what == "loss":
                losses[name] = losses[name] * float("nan")
            else:  # 0, with a gradient of 0 times infinity
                zero = features.tokens - features.tokens.detach()
                losses[name] = losses[name] + zero.abs().sqrt().sum()
        self.calls += 1
        return found


class Double(L.Callback):
    """The model in float64, which `trainer.precision` allows not everywhere; so that equal sums end equal."""

    def setup(self, trainer, pl_module, stage):
        pl_module.double()


class Signal(L.Callback):
    """Sends itself a signal at the end of a step, or in the middle of the first validation.

    Args:
        number: The signal's.
        step: After which step; 0 for the first validation batch, -1 for the time before the first step.
        rank: The process that gets it.
        times: How many of them.
    """

    def __init__(self, number: int, step: int, rank: int = 0, times: int = 1) -> None:
        self.number, self.step, self.rank, self.times = number, step, rank, times

    def _send(self, trainer):
        if trainer.global_rank == self.rank and self.times:
            self.times -= 1
            os.kill(os.getpid(), self.number)

    def on_train_start(self, trainer, module):
        if self.step == -1:
            self._send(trainer)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step + 1 == self.step:
            self._send(trainer)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if self.step == 0:
            self._send(trainer)


class Stuck(L.Callback):
    """A step that never ends, said on stderr.

    Args:
        step: Which one.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step + 1 == self.step:
            os.write(2, b"stuck\n")  # at once: two ranks say it
            while True:
                time.sleep(0.05)


def end_saves(trainer):
    """What is being saved ends first, on all ranks: the trouble is to meet the next save, however slow the disk."""
    if isinstance(trainer.strategy, checkpoints.SavesLater):
        trainer.strategy.finish_saving()


class FullDisk(L.Callback):
    """From a step on, no file of a rank may grow over a size: its checkpoints fail half-way.

    Args:
        step: The first step that it is so in, from 0 on.
        size: Bytes.
        rank: The process that it is so for.
    """

    def __init__(self, step: int, size: int = 50_000, rank: int = 0) -> None:
        self.step, self.size, self.rank = step, size, rank

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        end_saves(trainer)
        if trainer.global_rank == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


class Fails(L.Callback):
    """An error of the system after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise OSError("the sensor is gone")


class Kill(L.Callback):
    """SIGKILL for this process and its loader workers (the process group).

    Args:
        step: In which step, from 0 on.
        function: At its start, or the `write` of a checkpoint's part, or a `replace` of a file that follow it; for one
            that is a folder also that it is `put` in its place, or `remove`d.
        call: Which call of the function, from 1 on.
        rank: The process that it happens to.
    """

    def __init__(self, step: int, function: str | None = None, call: int = 1, rank: int = 0) -> None:
        self.step, self.function, self.call, self.rank = step, function, call, rank

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        end_saves(trainer)
        if trainer.global_rank != self.rank:
            return
        if self.function is None:
            os.killpg(0, signal.SIGKILL)
        owners = {"write": checkpoints.Hashing, "replace": Path, "put": manifest, "remove": manifest}
        owner = owners[self.function]
        function, calls = getattr(owner, self.function), []

        def counted(*args):
            calls.append(args)
            if len(calls) == self.call:
                os.killpg(0, signal.SIGKILL)
            return function(*args)

        setattr(owner, self.function, counted)


class BadDisk(L.Callback):
    """From a step on, what is read back from the disk is not what was written.

    Args:
        step: From 0 on.
        rank: Of the process that reads.
    """

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step != self.step:
            return
        end_saves(trainer)
        if trainer.global_rank == self.rank:
            manifest.sha256 = lambda file: "0" * 64


class Diary(L.Callback):
    """Writes the ids of each step's samples and, at the end, the weights, one file per rank, into a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.folder.mkdir(parents=True, exist_ok=True)
        row = {"step": trainer.global_step, "keys": {task: part["keys"] for task, part in batch.items()}}
        with (self.folder / f"keys-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_end(self, trainer, module):
        torch.save(module.state_dict(), self.folder / f"weights-{trainer.global_rank}.pt")


class Unreadable(SampleDataset):
    """Scenes of which some cannot be read.

    Args:
        num: How many there are.
        every: One in so many is torn.
    """

    def __init__(self, num: int, every: int) -> None:
        self.scenes, self.every = Mela(num, 32, "single"), every

    def __len__(self):
        return len(self.scenes)

    def key(self, index):
        return f"s/{index}"

    def __getitem__(self, index):
        if index % self.every == 0:
            raise UnreadableSample(self.key(index), "torn", "s.tar")
        return self.scenes[index] | {"key": self.key(index)}


class OwnLogger(L.pytorch.loggers.logger.DummyLogger):
    """A logger without a folder."""


class AllUnreadable(SampleDataset):
    """No sample can be read."""

    def __len__(self):
        return 12

    def key(self, index):
        return str(index)

    def __getitem__(self, index):
        raise UnreadableSample(f"{index}.png", "truncated")


class Barriers(L.Callback):
    """Notes after each step how often the ranks have met at a barrier."""

    def __init__(self, folder: str) -> None:
        self.folder, self.count = folder, 0

    def on_train_start(self, trainer, pl_module):
        barrier = torch.distributed.barrier

        def counted(*args, **options):
            self.count += 1
            return barrier(*args, **options)

        torch.distributed.barrier = counted

    def on_train_batch_end(self, trainer, *_):
        with (Path(self.folder) / f"barriers-{trainer.global_rank}").open("a") as file:
            file.write(f"{self.count}\n")


class OwnRates(L.Callback):
    """Writes what `Throughput`, which stands before it, has measured on this rank; its ranks are unequally fast.

    Args:
        folder: For the file `rates-<rank>.json`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        time.sleep(0.02 * trainer.global_rank)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        (own,) = [callback for callback in trainer.callbacks if isinstance(callback, Throughput)]
        if (rates := own.meter.rates()) is not None:
            (self.folder / f"rates-{trainer.global_rank}.json").write_text(json.dumps(rates))


class Scales(L.Callback):
    """Ends a run in which the scales of sharded float8 weights are not those of the weights that a step has left."""

    def on_train_batch_end(self, trainer, module, *_):
        layers = [layer for layer in module.modules() if type(layer).__name__ == "Float8Linear"]
        assert layers
        for layer in layers:
            shard = layer.weight._local_tensor
            largest = shard._tensor.abs().max()
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
            torch.testing.assert_close(shard._precomputed_scale, torch.finfo(torch.float8_e4m3fn).max / largest)

    def on_validation_batch_start(self, trainer, module, *_):
        """With averages in their place they have none, and are measured."""
        layers = [layer for layer in module.modules() if type(layer).__name__ == "Float8Linear"]
        if not trainer.sanity_checking:
            assert all(getattr(shard_of(layer), "_precomputed_scale", None) is None for layer in layers)


def shard_of(layer):
    """This rank's part of a layer's weight."""
    return getattr(layer.weight, "_local_tensor", layer.weight)


class SlowLoss(Contrastive):
    """Sleeps in its loss, and writes down when each began.

    Args:
        seconds: Of sleep.
        file: For a line with the clock's seconds.
    """

    def __init__(self, seconds: float, file: str, **options) -> None:
        super().__init__(**options)
        self.seconds, self.file = seconds, Path(file)

    def loss(self, features, batch, encoder):
        with self.file.open("a") as file:
            file.write(f"{time.perf_counter()}\n")
        time.sleep(self.seconds)
        return super().loss(features, batch, encoder)


class SlowMela(Mela):
    """Takes some time to read.

    Args:
        seconds: For a sample.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(12, 32, "single")
        self.seconds = seconds

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return super().__getitem__(index)


class Waits(L.Callback):
    """Notes for each step which operators have read a tensor's numbers on the host, and where.

    Args:
        folder: For the files `waits-<rank>.jsonl`, a line for each step.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.mode = Path(folder), None

    def on_train_start(self, trainer, module):
        self.mode = Reads()
        self.mode.__enter__()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._write(trainer)  # of the step before, with what Lightning does at its end

    def on_train_end(self, trainer, module):
        self._write(trainer)
        self.mode.__exit__(None, None, None)

    def _write(self, trainer):
        row, self.mode.found = {"step": trainer.global_step, "waits": self.mode.found}, []
        with (self.folder / f"waits-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


class Reads(TorchDispatchMode):
    """Lists operators for whose result the host would wait for a GPU."""

    names = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.names or by_mask:
            lines = [f for f in traceback.extract_stack() if "dispatch" not in f.name and "/torch/" not in f.filename]
            self.found.append(f"{name} in {lines[-1].name} ({Path(lines[-1].filename).name}:{lines[-1].lineno})")
        return func(*args, **(kwargs or {}))
