"""The caches of teachers that a run's sources name: made where they may be, opened and compared before training."""

import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from indiclip.distributed import local_device
from indiclip.encoder import Encoder
from indiclip.evals.models.view_batches import INITIAL, load_teachers
from indiclip.evals.models.view_embedder import ViewEmbedder
from indiclip.head import Head
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source, keyed
from indiclip.loading.teacher_options import MakeTeachers, TeacherCache
from indiclip.loading.teacher_record import RECORD, read_record
from indiclip.training.run_folder import is_first_process


def place_caches(data: MultiTaskData, folder: Path, begun: Path | None) -> None:
    """Caches without a folder are in that of the run, where this process knows it: `teachers`, `teachers-2` and so on.

    Args:
        data: Of the run, changed in place.
        folder: Of the run. Of a new one that has several processes only the first knows it.
        begun: The folder of the run whose checkpoint this one goes on from, which may have another name. It has the
            cache that it was begun with, and its initial encoder is not kept.

    Raises:
        ValueError: A cache of that encoder is gone.
    """
    caches = _caches(source.teachers for source in data.train)
    without = [cache for cache in caches if cache.folder is None]
    for number, cache in enumerate(without if begun or is_first_process() else [], 1):
        name = "teachers" if number == 1 else f"teachers-{number}"
        cache.folder = str(folder / name)
        if begun is not None and (_is_done(begun / name) or _reads_initial(cache)):
            cache.folder = str(begun / name)
    for cache in caches if begun else []:
        if _is_done(cache.path):
            cache.make = None
        elif _reads_initial(cache):
            raise ValueError(
                f"{cache.path.resolve()}: holds no whole cache of teachers, and {INITIAL} in teachers.make, the "
                "encoder that the run began with, is not kept; expected the folder as it was, or a copy of it as "
                "teachers.folder"
            )
    for cache in without if begun and is_first_process() else []:
        _link(folder / cache.path.name, cache.path)


def _reads_initial(cache: TeacherCache) -> bool:
    return cache.make is not None and INITIAL in cache.make.models


def _link(own: Path, cache: Path) -> None:
    """From a branch's folder to its cache, so that it finds that again when it is itself stopped and goes on."""
    is_of_run = (own.resolve().parent / "config.yaml").is_file()
    if own.is_symlink() and not _is_done(own) and (is_of_run or not own.exists()):
        own.unlink()  # to another run's cache that is gone, not to where a user wants this one; it is made here
    if own == cache or os.path.lexists(own):
        return
    try:
        own.symlink_to(os.path.relpath(cache.resolve(), own.parent.resolve()))
    except OSError as error:  # a file system without links, for one
        warnings.warn(f"{own}: no link to {cache}, which this run needs to go on: {error.strerror}", stacklevel=2)


def prepare_teachers(encoder: Encoder, data: MultiTaskData, heads: Iterable[Head]) -> None:
    """Make the caches that are missing and may be made, and compare all of them with their sources.

    Args:
        encoder: Of the run, as it begins.
        data: Of the run.
        heads: Of the run.

    Raises:
        FileNotFoundError: No cache, and nothing to make it of.
        ValueError: One that does not fit its source, or sources of a task with different teachers, or without any where
            a head reads them.
    """
    for head in heads:
        _check_head(head, data)
    sources = {key: source for key, source in keyed("data.train", data.train).items() if source.teachers is not None}
    for key, source in sources.items():  # before one is made, which may take long
        assert source.teachers is not None
        source.teachers.check_folder(key)
    for cache in _caches(source.teachers for source in sources.values()):
        _make(cache, {key: source for key, source in sources.items() if source.teachers is cache}, encoder)
    taught: dict[str, tuple[str, list[Any]]] = {}
    for key, source in sources.items():
        cached = source.open_teachers(key)
        own = [(teacher.crc32_of_weights, teacher.crc32_of_token_ids) for teacher in cached.teachers]
        first, others = taught.setdefault(source.task, (key, own))
        if own != others:
            raise ValueError(f"{key}.teachers: are others than those of {first}, with which it shares batches")


def said_of(data: MultiTaskData) -> list[str]:
    """What is said of each cache before training."""
    found = []
    for key, source in keyed("data.train", data.train).items():
        if source.teachers is not None:
            record = source.open_teachers(key).record
            names, summary = ", ".join(one["name"] for one in record["teachers"]), record["summary"]
            lost = f"; {summary['quarantined']:,} samples without" if summary["quarantined"] else ""
            found.append(
                f"{key}: teachers {names}: {record['views']} views of {len(source.dataset):,} samples, "
                f"{record['dtype']}, {summary['bytes_per_sample']:,} bytes each{lost}"
            )
    return found


def _check_head(head: Head, data: MultiTaskData) -> None:
    """Refuse a source without teachers whose head reads what they say."""
    for key, source in keyed("data.train", data.train).items():
        if source.task == head.task and source.teachers is None and "teacher_image" in head.loss_fields:
            raise ValueError(
                f"{key}.teachers: found none, and heads.{head.name} reads them; expected a cache, by data.overrides "
                f"with `task: {head.task}` and `teachers`, or a teacher that runs beside, heads.{head.name}.teacher"
            )


def _caches(of_sources: Iterable[TeacherCache | None]) -> list[TeacherCache]:
    """Each once, though an override gives several sources the same one."""
    return [*{id(cache): cache for cache in of_sources if cache is not None}.values()]


def _make(cache: TeacherCache, sources: dict[str, Source], encoder: Encoder) -> None:
    """Make a cache that is not whole: for all times in the first process of the run, in any other one for itself alone.

    The processes have not met yet, so that none knows which files of another it sees.
    """
    if cache.make is None or (not is_first_process() and cache.folder is not None and _is_done(cache.path)):
        return
    if cache.folder is None or not is_first_process():  # also of a plan or a check, which have no run
        cache.folder = tempfile.mkdtemp(prefix="indiclip-teachers-")
        atexit.register(shutil.rmtree, cache.folder, ignore_errors=True)
    _embed(cache.make, cache.path, sources, encoder)


def _embed(make: MakeTeachers, folder: Path, sources: dict[str, Source], encoder: Encoder) -> None:
    state = torch.get_rng_state()
    try:
        teachers = load_teachers(make.models, local_device(make.device), encoder)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{next(iter(sources))}.teachers.make.models: {error}") from error
    job = ViewEmbedder(folder, sources, teachers, make.views, make.dtype)
    job.begin()
    if (missing := job.missing()) or not job.is_done():
        if is_first_process():
            print(f"teachers: {', '.join(make.models)} embed {make.views} views of {len(job):,} samples into {folder}")
        job.reopen(missing)
        job.write(missing)
        job.finish({})
    torch.set_rng_state(state)  # random numbers are those of a run whose cache was there


def _is_done(folder: Path) -> bool:
    return (folder / RECORD).is_file() and bool(read_record(folder)["done"])
