"""`indiclip embed --views K`: teachers' embeddings of augmented images and of captions, for distillation."""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from indiclip.commands.embed_files import make_folder
from indiclip.commands.embed_ranks import all_or_none
from indiclip.commands.findings import json_line
from indiclip.commands.parallel import progress_bar
from indiclip.distributed import gathered, local_device, rank_and_world
from indiclip.evals.models.view_batches import load_teachers
from indiclip.evals.models.view_embedder import ViewEmbedder
from indiclip.loading.source import Source, keyed
from indiclip.names import did_you_mean
from indiclip.training.run_folder import lock

# What the other kind of `embed` has, and the value that leaves it out.
_OTHERS = {"what": "images", "images": None, "captions": None, "length": None, "view": "native"}


def run(words: argparse.Namespace, num_workers: int, versions: dict[str, str]) -> int:
    """Embed what is missing of the folder; the ranks share its parts. Returns the exit status.

    Args:
        words: Of the command.
        num_workers: Loader processes.
        versions: Of libraries, for the record.
    """
    job = all_or_none(lambda: _prepare(words, num_workers))
    rank, world = rank_and_world()
    numbers = range(rank, job.num_parts, world)
    wrong = {number: words for found in gathered(job.missing(numbers)) for number, words in found.items()}
    missing = sorted(wrong)
    mine, started = missing[rank::world], time.monotonic()
    samples = sum(len(job.samples(number)) for number in mine)
    if rank == 0 and missing:
        job.reopen(wrong)
        if len(missing) < job.num_parts and not words.as_json:
            print(f"going on: {job.num_parts - len(missing):,} of {job.num_parts:,} parts are there")
    what = "samples" if world == 1 else f"samples of process 1 of {world}"
    with progress_bar(samples, what) if rank == 0 else nullcontext(lambda _: None) as advance:
        job.write(mine, advance)
    done = sum(gathered(samples))
    if rank == 0:
        _show(words, job.finish(versions if missing else None), done, time.monotonic() - started)
    gathered(None)  # all end together, so that none is taken for lost
    return 0


def _prepare(words: argparse.Namespace, num_workers: int) -> ViewEmbedder:
    """Read the sources and the teachers; the first process makes the folder ready."""
    for name, default in _OTHERS.items():
        if getattr(words, name) != default:
            raise ValueError(
                f"--{name}: is not for --views, which embeds the images and captions of a config's sources"
            )
    if words.dtype not in (None, "fp16", "int8"):
        raise ValueError(f"--dtype: found {words.dtype}; expected fp16 or int8 with --views")
    dtype: Any = words.dtype or "fp16"
    torch.set_flush_denormal(True)
    sources = _sources(words)
    torch.manual_seed(0)  # of a model without weights; it must be the same when the command goes on
    options: dict[str, Any] = {"precision": words.precision, "trust_code": words.trust_code, "weights": words.weights}
    teachers = load_teachers(words.model, local_device(words.device), **options)
    job = ViewEmbedder(
        Path(words.out), sources, teachers, words.views, dtype, words.part_size, words.batch_size, num_workers
    )
    if rank_and_world()[0] == 0:
        make_folder(job.folder)
        lock(job.folder)
        job.begin(words.overwrite)
        for teacher in teachers if not words.as_json else ():
            weights = f", {teacher.about.weights}" if teacher.about.weights else ""
            print(f"teacher: {teacher.about.name}{weights}; scale {teacher.about.logit_scale:.4g}")
    return job


def _sources(words: argparse.Namespace) -> dict[str, Source]:
    """The training sources that the words name, by their keys; without a word the only one with captions."""
    from indiclip.commands.config_samples import build_config  # imports Lightning, which takes seconds

    if not words.config:
        raise ValueError("--config: found none; --views needs the config whose training augments the images")
    _, data = build_config([word for file in words.config for word in ("--config", file)])
    known = keyed("data.train", data.train)
    for word in words.sources:
        if word not in known:
            raise ValueError(f"{word}: no training source{did_you_mean(word, known)}; expected {', '.join(known)}")
    if not words.sources and len(known) > 1:
        raise ValueError(f"SOURCE: expected which of {', '.join(known)}")
    return {word: known[word] for word in words.sources or known}


def _show(words: argparse.Namespace, record: dict[str, Any], done: int, seconds: float) -> None:
    if words.as_json:
        print(json_line(record), end="")
        return
    summary, names = record["summary"], ", ".join(teacher["name"] for teacher in record["teachers"])
    print(f"{words.out}: {record['views']} views of {summary['samples']:,} images and their captions by {names}")
    of_images = summary["of_them_for_images"]
    print(
        f"  {record['dtype']}, {summary['bytes_per_sample']:,} bytes a sample: {of_images:,} for its images, the rest "
        "for captions, seeds and keys"
    )
    print(f"  lost by {record['dtype']}: 1 - cosine is {summary['largest_cosine_loss']:.1e} at most")
    print(f"  quarantined: {summary['quarantined']:,}; digest {record['digest']}")
    if done:
        print(f"  {done:,} samples in {seconds:,.1f} s, {done / max(seconds, 1e-9):,.0f} a second")
