"""`indiclip embed`: any dataset of ours to embeddings and their keys, in whole parts; a killed one goes on."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from indiclip import __version__
from indiclip.commands import embed_views
from indiclip.commands.embed_batches import Batch, Batches, embed
from indiclip.commands.embed_files import EmbeddingFolder, Part, make_folder
from indiclip.commands.embed_ranks import all_or_none, launch, ranks
from indiclip.commands.embed_sources import Sources, open_sources
from indiclip.commands.findings import json_line
from indiclip.commands.parallel import progress_bar
from indiclip.datasets.base import fingerprint
from indiclip.distributed import gathered, local_device, rank_and_world
from indiclip.evals.models import embedder
from indiclip.evals.models.digests import crc32_of_prepared, crc32_of_token_ids, crc32_of_weights
from indiclip.evals.models.embedder import Embedder, View
from indiclip.evals.models.stored import stored
from indiclip.loading.teacher_record import PIXEL_LIBRARIES, versions_of
from indiclip.loading.workers import StepLoader, Workers
from indiclip.names import check_range
from indiclip.training.run_folder import lock, unlock

_MOST_WORKERS = 8  # of a process that feeds a GPU, where nothing else is said
_LIBRARIES = (*PIXEL_LIBRARIES, "timm", "transformers", "open_clip_torch", "pyarrow")
_DECODE = "float32(row) / norm(float32(row))"


def run(**options: Any) -> int:
    """Returns the exit status."""
    words = argparse.Namespace(**options)
    if words.processes > 1 and "RANK" not in os.environ:
        return launch(run, options, words.processes)
    with warnings.catch_warnings(), ranks():
        warnings.showwarning = lambda message, *_: _say(str(message))
        try:
            if words.views:
                return embed_views.run(words, _num_workers(words), versions_of(_LIBRARIES))
            if len(words.model) > 1:
                raise ValueError("--model: found several; expected one, or --views for the teachers of a distillation")
            (words.model,), words.dtype = words.model, words.dtype or "fp32"
            return _run(words)
        finally:
            unlock()


class _Job(NamedTuple):
    """What there is to do."""

    words: argparse.Namespace
    sources: Sources
    model: Embedder
    view: View
    length: int
    folder: EmbeddingFolder

    @property
    def num_parts(self) -> int:
        return -(-len(self.sources) // int(self.words.part_size))

    def samples(self, number: int) -> range:
        """The samples of a part."""
        size = int(self.words.part_size)
        return range(number * size, min((number + 1) * size, len(self.sources)))


def _run(words: argparse.Namespace) -> int:
    job = all_or_none(lambda: _prepare(words))
    rank, world = rank_and_world()
    parts = range(0) if job.folder.is_done() else range(job.num_parts)
    missing = gathered([number for number in parts if not job.folder.is_whole(number)])[0]  # as the first one sees it
    started = time.monotonic()
    if rank == 0:
        _show_sources(job, len(missing))
    mine = missing[rank::world]
    samples = sum(len(job.samples(number)) for number in mine)
    batches = _batches(job, mine)  # starts its processes before the bar starts a thread
    what = "samples" if world == 1 else f"samples of process 1 of {world}"
    with progress_bar(samples, what) if rank == 0 else nullcontext(lambda _: None) as advance:
        for number, of_part in groupby(batches, key=lambda batch: batch.first // words.part_size):
            _write(job, number, of_part, advance)
    done = sum(gathered(samples))
    if rank == 0:
        record = job.folder.record()
        if not record["done"]:
            record = job.folder.finish(job.num_parts, _damaged(job.sources))
        _show(words, record, done, time.monotonic() - started)
    gathered(None)  # all end together, so that none is taken for lost
    return 0


def _prepare(words: argparse.Namespace) -> _Job:
    """Read the model and the sources; the first process makes the folder ready."""
    folder = EmbeddingFolder(Path(words.out))
    sources = open_sources(words)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)  # of a model without weights; it must be the same when the command goes on
    model = embedder.load_embedder(
        words.model,
        local_device(words.device),
        precision=words.precision,
        trust_code=words.trust_code,
        weights=words.weights,
    )
    (view,) = model.views([words.view])
    if words.what == "captions" and not model.embeds_text:
        raise ValueError(f"--what captions: {words.model} embeds no text")
    check_range({"--length": words.length}, 1, model.lengths[-1])
    length = words.length or model.lengths[-1]
    if rank_and_world()[0] == 0:
        if length not in model.lengths:
            known = ", ".join(map(str, model.lengths))
            _say(f"--length {length}: {words.model} was not trained to be cut to it; its lengths are {known}")
        make_folder(folder.path)
        lock(folder.path)
        folder.begin(_record(words, sources, model, view, length), words.overwrite)
        if model.weights and not words.as_json:
            print(f"weights: {model.weights}")
    return _Job(words, sources, model, view, length, folder)


def _record(words: argparse.Namespace, sources: Sources, model: Embedder, view: View, length: int) -> dict[str, Any]:
    """Everything that makes up the rows, of plain types."""
    known = {"name": words.model, "weights": model.weights, "crc32_of_weights": crc32_of_weights(model)}
    if words.what == "captions":
        known["crc32_of_token_ids"] = crc32_of_token_ids(model)
    return {
        "what": words.what,
        "model": known,
        "precision": words.precision,
        "preprocessing": {
            **view._asdict(),
            **model.preprocessing,
            "crc32_of_a_plain_picture": crc32_of_prepared(model, view),
        },
        "length": length,
        "full_length": model.lengths[-1],
        "dtype": words.dtype,
        "decode": _DECODE,
        "batch_size": words.batch_size,
        "part_size": words.part_size,
        "sources": [{"source": source.name, **fingerprint(source)} for source in sources.sources],
        "versions": {"indiclip": __version__, **versions_of(_LIBRARIES)},
    }


def _batches(job: _Job, parts: list[int]) -> Iterator[Batch]:
    """The batches of some parts, in order. No batch has samples of two parts."""
    words, num_workers = job.words, _num_workers(job.words)
    spans = [
        (first, min(first + words.batch_size, job.samples(number).stop))
        for number in parts
        for first in job.samples(number)[:: words.batch_size]
    ]
    loader: StepLoader[Any] = StepLoader(
        Batches(job.sources, job.model, job.view, words.what, spans),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=Workers("embed", num_workers) if num_workers else None,
    )
    return map(_or_raise, iter(loader) if spans else [])


def _or_raise(batch: Batch | Exception) -> Batch:
    if isinstance(batch, Exception):
        raise batch
    return batch


def _write(job: _Job, number: int, batches: Iterator[Batch], advance: Callable[[int], None]) -> None:
    """Embed and write a part."""
    vectors, rows = [np.zeros((0, job.length), np.float32)], list[dict[str, Any]]()
    quarantined, uncaptioned = list[dict[str, Any]](), list[dict[str, Any]]()
    for batch in batches:
        vectors.append(embed(job.model, batch, job.words.what, job.length))
        rows += batch.rows
        quarantined += batch.quarantined
        uncaptioned += batch.unreadable_captions
        advance(batch.last - batch.first)
    found, losses = stored(np.concatenate(vectors), job.words.dtype)
    lost = float(losses.sum()), float(losses.max(initial=0))
    part = Part(len(job.samples(number)), len(rows), quarantined, *lost, uncaptioned)
    job.folder.write(number, found, rows, job.words.what, part)


def _num_workers(words: argparse.Namespace) -> int:
    chosen: int | None = words.workers
    if chosen is not None:
        return chosen
    if not str(local_device(words.device)).startswith("cuda"):
        return 0  # loading and computing share the processors
    return min(_MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) // rank_and_world()[1]))


def _as_it_is(batch: Any) -> Any:
    return batch


def _damaged(sources: Sources) -> list[dict[str, Any]]:
    """What is lost of the files as a whole, for the quarantine."""
    lost = [one for source in sources.sources for one in source.damaged]
    return [{"key": one.key, "source": one.shard, "row": None, "reason": one.reason} for one in lost]


def _show_sources(job: _Job, missing: int) -> None:
    if job.words.as_json:
        return
    for source in job.sources.sources:
        print(f"{source.name}: {len(source):,} samples")
        for line in source.inventory.lines():
            if "left out" in line:
                print(f"  {line}".encode(errors="backslashreplace").decode())
    if 0 < missing < job.num_parts:
        print(f"going on: {job.num_parts - missing:,} of {job.num_parts:,} parts are there")


def _show(words: argparse.Namespace, record: dict[str, Any], done: int, seconds: float) -> None:
    """The summary at the end, of all starts but for the speed."""
    if words.as_json:
        print(json_line(record), end="")
        return
    summary, out = record["summary"], words.out
    parts = f"{len(record['parts']):,} part{'s' * (len(record['parts']) != 1)}"
    shown = f"{summary['rows']:,} embeddings of {record['length']} numbers, {record['dtype']}, in {parts}"
    print(f"{out}: {shown}" + ("" if done else "; it was complete already"))
    readable = summary["samples"] - summary["quarantined"]
    print(f"  {readable:,} of {summary['samples']:,} samples; quarantined: {summary['quarantined']:,}")
    if readable and not summary["rows"]:
        print("  not one of the samples has a caption")
    uncaptioned = summary.get("unreadable_captions", 0)  # older folders do not say
    if uncaptioned:
        print(f"  embedded, but with captions that cannot be read: {uncaptioned:,}")
    if summary["damaged"]:
        print(f"  lost to all samples: {summary['damaged']:,} damaged places of the files")
    if summary["quarantined"] or uncaptioned or summary["damaged"]:
        print(f"  every one of them: {Path(out) / 'quarantine.jsonl'}")
    if record["dtype"] != "fp32":
        loss = summary["cosine_loss"]
        print(
            f"  lost by {record['dtype']}: 1 - cosine is {loss['mean']:.1e} on average, {loss['largest']:.1e} at most"
        )
    if done:
        print(f"  {done:,} samples in {seconds:,.1f} s, {done / max(seconds, 1e-9):,.0f} a second")


def _say(message: str) -> None:
    print(f"indiclip embed: {message}", file=sys.stderr)
