"""`indiclip bench --model ...`: score an encoder, ours or anyone's."""

import argparse
import datetime
import itertools
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from indiclip import __version__
from indiclip.commands.bench_training import TrainingData
from indiclip.commands.parallel import progress_bar
from indiclip.evals.bench import run_bench
from indiclip.evals.encode import ALONE
from indiclip.evals.find import Bench, check_languages, find_bench
from indiclip.evals.models import embedder
from indiclip.evals.overlap import flag
from indiclip.evals.protocols.protocol import Options
from indiclip.evals.reports.bench_report import write_bench_report
from indiclip.evals.reports.console import print_result
from indiclip.evals.reports.pictures import Pictures
from indiclip.evals.result_files import check_out, load_pyarrow, save_result
from indiclip.images import storable
from indiclip.masking import mask
from indiclip.names import plain, reason_of
from indiclip.training.run_folder import lock, unlock

_OUT = Path("runs/bench")


def run(**options: Any) -> int:
    """Returns the exit status."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(plain(mask(f"indiclip bench: {message}")), file=sys.stderr)
        try:
            return _run(argparse.Namespace(**options))
        finally:
            unlock()


def _run(options: argparse.Namespace) -> int:
    load_pyarrow()
    if options.out:
        check_out(Path(options.out))
    torch.set_flush_denormal(True)
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    views = list(dict.fromkeys(options.views))
    wanted = Options(
        options.languages,
        views,
        probes=not options.no_probes,
        resamples=options.resamples,
        seed=options.seed,
        all_names=options.all_names,
    )
    bench = find_bench(
        options.images,
        options.cards,
        not options.no_procedural,
        options.seed,
        options.skip_unknown,
        options.protocols,
    )
    check_languages(bench, options.languages, "--languages")
    model = embedder.load_embedder(
        options.model,
        device,
        precision=options.precision,
        lengths=options.lengths,
        trust_code=options.trust_code,
        weights=options.weights,
    )
    if model.weights:
        print(f"weights: {model.weights}", file=sys.stderr)
    model.views(views)  # what it cannot do shows before the shards are read
    folder = _folder(options)
    lock(folder)
    overlap = _overlap(bench, options) if options.training else None
    num_images = sum(items.num_images for items in bench.items)
    generated = sum(items.num_images for items in bench.items if items.procedural)
    if 0 < generated < num_images:
        left_out = "(--no_procedural leaves these out)"
        print(f"{num_images - generated:,} photographs, {generated:,} generated images {left_out}", file=sys.stderr)
    with progress_bar(num_images, "images") as advance:
        result = run_bench(model, bench, wanted, ALONE, options.batch_size, options.num_workers, advance)
    assert result is not None
    if not result.scores:
        raise ValueError(f"nothing could be scored: {'; '.join(note for card in result.cards for note in card.notes)}")
    result.about |= _about(options, device) | {"weights": model.weights}
    if overlap is not None:
        result.about["contamination"] = overlap
    save_result(result, folder)
    try:
        write_bench_report(folder, result, Pictures(bench.items))
    except Exception as error:  # whatever a page stumbles over; the scores are there, and took the time
        reason = f"{type(error).__name__}: {reason_of(error)}"
        saved = f"the scores are in {folder / 'metrics.json'} and predictions.parquet beside it"
        raise RuntimeError(f"{folder / 'report.html'} could not be written ({reason}); {saved}") from error
    if options.json:
        print((folder / "metrics.json").read_text(encoding="utf-8"), end="")
    else:
        print_result(result, folder)
    return 0


def _overlap(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """What of the images and captions is among those of --training, see `flag`."""
    try:
        training = TrainingData(options.training)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"--training: {error}") from error
    if training.generated:
        left_out = f"{', '.join(training.generated)} is generated, so no photograph can be among it"
        print(f"indiclip bench: --training: not looked at: {left_out}", file=sys.stderr)
    with progress_bar(len(training), "training data") as advance:
        return flag(bench, training, options.num_workers, advance)


def _folder(options: argparse.Namespace) -> Path:
    """Where the results go, made before anything is scored: --out, or one that holds no finished run."""
    name = re.sub(r"[^\w.-]+", "-", options.model).strip("-.")
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    free = (_OUT / name for name in names if not (_OUT / name / "metrics.json").exists())
    folder = Path(options.out) if options.out else next(free)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--out {folder}: a file is in the way; expected a folder") from error
    return folder


def _about(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """What a reader needs to do it again."""
    paths = {"images": options.images and storable(options.images)}
    given = {name: value for name, value in vars(options).items() if name not in ("json", "out")} | paths
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "date": now,
        "indiclip": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "options": given,
    }
