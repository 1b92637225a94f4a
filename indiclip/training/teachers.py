"""The caches of teachers that a run's sources name: made where they may be, opened and compared before training."""

import atexit
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from indiclip.datasets.tables import load_json
from indiclip.encoder import Encoder
from indiclip.evals.models.view_batches import load_teachers
from indiclip.evals.models.view_embedder import ViewEmbedder
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source, keyed
from indiclip.loading.teacher_cache import MakeTeachers, TeacherCache
from indiclip.loading.teacher_parts import RECORD
from indiclip.training.run_folder import is_first_process

_SECONDS_TO_SAY = 60.0  # after which a process says that it waits for the first one


def place_caches(data: MultiTaskData, folder: Path, goes_on: bool) -> None:
    """Caches without a folder are in that of the run.

    Args:
        data: Of the run, changed in place.
        folder: Of the run.
        goes_on: From a checkpoint. It has the cache that it was begun with, and its initial encoder is no more.
    """
    for cache in (source.teachers for source in data.train):
        if cache is not None and cache.folder is None:
            cache.folder = str(folder / "teachers")
        if cache is not None and goes_on and _is_done(Path(str(cache.folder))):
            cache.make = None


def prepare_teachers(encoder: Encoder, data: MultiTaskData) -> None:
    """Make the caches that are missing and may be made, and compare all of them with their sources.

    Args:
        encoder: Of the run, as it begins.
        data: Of the run.

    Raises:
        FileNotFoundError: No cache, and nothing to make it of.
        ValueError: One that does not fit its source, or sources of a task with different teachers.
    """
    sources = {key: source for key, source in keyed("data.train", data.train).items() if source.teachers is not None}
    for cache in {id(source.teachers): source.teachers for source in sources.values()}.values():
        assert cache is not None
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


def _make(cache: TeacherCache, sources: dict[str, Source], encoder: Encoder) -> None:
    """Make a cache that is not whole, in the first process of the run; the others wait for it."""
    if cache.make is None:
        return
    if cache.folder is None:  # of a plan or a check, which have no run
        cache.folder = tempfile.mkdtemp(prefix="indiclip-teachers-")
        atexit.register(shutil.rmtree, cache.folder, ignore_errors=True)
    if is_first_process():
        _embed(cache.make, Path(cache.folder), sources, encoder)
    else:
        _wait_for(Path(cache.folder))


def _embed(make: MakeTeachers, folder: Path, sources: dict[str, Source], encoder: Encoder) -> None:
    device = make.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    state = torch.get_rng_state()
    try:
        teachers = load_teachers(make.models, device, encoder)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{next(iter(sources))}.teachers.make.models: {error}") from error
    job = ViewEmbedder(folder, sources, teachers, make.views, make.dtype)
    job.begin()
    if missing := job.missing():
        print(f"teachers: {', '.join(make.models)} embed {make.views} views of {len(job):,} samples into {folder}")
        job.write(missing)
        job.finish({})
    torch.set_rng_state(state)  # random numbers are those of a run whose cache was there


def _wait_for(folder: Path) -> None:
    """Until the first process has made the cache; whatever ends that one ends this one too."""
    said = time.monotonic()
    while not _is_done(folder):
        time.sleep(0.2)
        if time.monotonic() - said > _SECONDS_TO_SAY:
            said = time.monotonic()
            print(f"teachers: waiting for the first process, which makes {folder}", flush=True)


def _is_done(folder: Path) -> bool:
    return (folder / RECORD).is_file() and bool(load_json(folder / RECORD)["done"])
