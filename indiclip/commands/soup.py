"""`indiclip soup`: the average of several runs' weights as a run of its own.

Wortsman et al., "Model soups", ICML 2022, arXiv:2203.05482. Weights that training has led apart from one beginning
(fine-tuned with other seeds, rates or data, or checkpoints of one run) lie in one valley; their average is often better
than any of them, at the cost of one.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning import Trainer
from torch import Tensor

from indiclip.commands.config_samples import build_run
from indiclip.export.new_folder import check_new, new_folder
from indiclip.names import did_you_mean, differences
from indiclip.pretrained.runs import AVERAGES, Chosen, read_checkpoint
from indiclip.pretrained.weights import check_tensors
from indiclip.training.checks import check
from indiclip.training.fault_tolerance.checkpoints import DurableCheckpointIO

Tensors = dict[str, Tensor]
_NAME = "soup.ckpt"
# Entries of a checkpoint that belong to one run's training, none of which is that of an average.
_OF_TRAINING = ("optimizer_states", "lr_schedulers", "loops", "callbacks", AVERAGES)


def run(
    sources: list[str],
    out: Path,
    weights: str,
    greedy: bool,
    monitor: str,
    mode: str,
    config: list[str] | None,
) -> int:
    """Average the weights of runs or checkpoints into a new run. Returns the exit status."""
    check_new(out)
    if greedy != bool(monitor):
        raise ValueError("--greedy and --monitor METRIC go together: the former adds what makes the latter better")
    first = read_checkpoint(sources[0], weights)
    ingredients = Ingredients(sources, first, weights)
    rows: list[dict[str, Any]] = [{"name": source} for source in sources]
    if greedy:
        taken, average = _greedy(ingredients, rows, _scorer(first, config, monitor), -1 if mode == "min" else 1)
    else:
        taken, average = sources, Average()
        for source in sources:
            average.add(ingredients[source])
    for row in rows:
        row |= {"weights": ingredients.said[row["name"]], "taken": row["name"] in taken}
        print(f"{'took' if row['taken'] else 'left out'} {row['weights']}")
    _write(out, first, average.tensors(), {"monitor": monitor, "sources": rows})
    print(f"{out}: the average of {len(taken)} of {len(sources)}, a run that indiclip.load, validate and export read")
    return 0


class Ingredients:
    """The weights of each source, read when they are asked for: no more models lie in memory than are in use.

    Attributes:
        said: Of each source that was read, its file, step and which weights.
    """

    def __init__(self, sources: list[str], first: Chosen, weights: str) -> None:
        repeated = [source for number, source in enumerate(sources) if source in sources[:number]]
        if repeated:
            raise ValueError(f"{repeated[0]}: stands there more than once")
        if len(sources) > 1 and first.checkpoint["encoder"].get("lora"):
            raise ValueError(
                f"{first.file}: has LoRA's adapters (model.encoder.lora), which are products of two matrices: those of "
                "their averages are no averages; expected runs that trained the weights themselves"
            )
        self.said: dict[str, str] = {}
        self._first, self._weights = first, weights
        self._sources: dict[Path, str] = {}

    def __getitem__(self, source: str) -> Tensors:
        """Of a source.

        Raises:
            ValueError: They are of another architecture, not finite, or those of another source.
        """
        found = read_checkpoint(source, self._weights)
        file = found.file.resolve()
        if (other := self._sources.setdefault(file, source)) != source:
            raise ValueError(f"{source}: is {file}, as {other} is; expected each checkpoint once")
        check_same(self._first, found)
        tensors: Tensors = found.checkpoint["state_dict"]
        check_tensors(tensors, str(found.file))
        self.said[source] = found.said
        return tensors


class Average:
    """Of tensors by name, in float64 so that neither order nor number shows; of whole numbers the first's."""

    def __init__(self) -> None:
        self.number = 0
        self._sums: Tensors = {}
        self._first: Tensors = {}

    def add(self, tensors: Tensors) -> "Average":
        """Take one more in."""
        self._first = self._first or tensors
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self._sums[name] = self._sums[name] + tensor if self.number else tensor.double()
        self.number += 1
        return self

    def with_another(self, tensors: Tensors) -> "Average":
        """A new one, with this one's and one more."""
        made = Average()
        made.number, made._sums, made._first = self.number, {**self._sums}, self._first
        return made.add(tensors)

    def tensors(self) -> Tensors:
        """In the types of the first, for which the sum of one is that one."""
        return {
            name: (self._sums[name] / self.number).to(tensor.dtype) if name in self._sums else tensor
            for name, tensor in self._first.items()
        }


def _greedy(
    ingredients: Ingredients, rows: list[dict[str, Any]], score: Callable[[Tensors], float], sign: int
) -> tuple[list[str], Average]:
    """Algorithm 1 of the paper: from the best on, each is taken in where the average does not get worse by it.

    Args:
        ingredients: All.
        rows: Of each, to which the scores are added.
        score: Of weights, on held-out data.
        sign: 1 where more of it is better, else -1.
    """
    for row in rows:
        row["alone"] = score(ingredients[row["name"]])
    order = sorted(rows, key=lambda row: sign * float(row["alone"]), reverse=True)
    taken, best = [order[0]["name"]], order[0]["alone"]
    average = Average().add(ingredients[taken[0]])
    for row in order[1:]:
        with_it = average.with_another(ingredients[row["name"]])
        row["with"] = score(with_it.tensors())
        if sign * row["with"] >= sign * best:
            best, average = row["with"], with_it
            taken.append(row["name"])
    return taken, average


def check_same(first: Chosen, other: Chosen) -> None:
    """Raise ValueError that names the first tensor, or the argument of the encoder, in which two models differ."""
    expected, found = ({name: tuple(w.shape) for name, w in c.checkpoint["state_dict"].items()} for c in (first, other))
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{other.file}: {name}: found {_shape(found.get(name))}; expected {_shape(expected.get(name))} as in "
                f"{first.file}"
            )
    apart = differences(first.checkpoint["encoder"], other.checkpoint["encoder"], "encoder")
    for _, line in apart:
        raise ValueError(f"{other.file}: another model than {first.file}: {line}")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else f"shape {shape}"


def _scorer(first: Chosen, config: list[str] | None, monitor: str) -> Callable[[Tensors], float]:
    """What scores weights on the held-out data of a config, by default of the first source's run."""
    files = config or [str(first.file.resolve().parent.parent / "config.yaml")]
    words = [word for file in files for word in ("--config", file)]
    model, data, options = build_run(words, first.file)
    check(model, data, "validate")

    def score(tensors: Tensors) -> float:
        model.load_state_dict(tensors)
        trainer = Trainer(
            accelerator=options.get("accelerator") or "auto",
            devices=1,
            precision=options.get("precision") or "32-true",
            limit_val_batches=options.get("limit_val_batches"),
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
        )
        trainer.validate(model, datamodule=data, verbose=False)
        return _metric(trainer.callback_metrics, monitor)

    return score


def _metric(metrics: Mapping[str, Tensor], monitor: str) -> float:
    if monitor not in metrics:
        hint = did_you_mean(monitor, metrics)
        raise ValueError(f"--monitor: no metric {monitor!r}{hint}; there are {', '.join(sorted(metrics)) or 'none'}")
    return float(metrics[monitor])


def _write(out: Path, first: Chosen, tensors: Tensors, record: dict[str, Any]) -> None:
    """A run's folder, whole or not at all: the checkpoint, and the config and files of the first source's run."""
    checkpoint = {name: value for name, value in first.checkpoint.items() if name not in _OF_TRAINING}
    checkpoint |= {"state_dict": tensors, "callbacks": {}}
    of_run = first.file.resolve().parent.parent
    with new_folder(out) as folder:
        DurableCheckpointIO().save_checkpoint(checkpoint, folder / "checkpoints" / _NAME)
        (folder / "checkpoints" / "last.ckpt").symlink_to(_NAME)
        (folder / "soup.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if (of_run / "config.yaml").is_file():
            shutil.copy(of_run / "config.yaml", folder)
            if (of_run / "files").is_dir():
                shutil.copytree(of_run / "files", folder / "files")
