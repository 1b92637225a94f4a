"""`indiclip bench --model ...`: score an encoder, ours or anyone's."""

from __future__ import annotations

import argparse
import datetime
import itertools
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from indiclip.commands.words import Parser, count, whole

_EXAMPLES = """\
examples:
  indiclip bench --model runs/mela        what is generated; needs no photographs
  indiclip bench --model runs/india --images photos --views native 64 256-square
  indiclip bench --model open_clip:ViT-B-32:weights.safetensors --images photos
  indiclip bench --model siglip2-folder --cards my_card.yaml --images photos
"""
_OUT = Path("runs/bench")


def _parser() -> Parser:
    words = Parser(
        "bench",
        "Score an image-text encoder on the benchmark of India, or on any card.",
        _EXAMPLES,
    )
    add = words.add_argument
    add(
        "--model",
        required=True,
        metavar="MODEL",
        help="a run's folder or checkpoint; a folder of a transformers CLIP, SigLIP or SigLIP 2, or of an OpenCLIP or "
        "timm model; open_clip:NAME[:WEIGHTS], timm:NAME[:WEIGHTS] (timm: images only), with random weights where none "
        "are named; LIBRARY:hf-hub:NAME is downloaded",
    )
    add("--images", metavar="FOLDER", help="holds a folder, a table or shards for each card, by its id")
    add("--cards", nargs="+", metavar="CARD", help="ids (`indiclip bench cards`) or files (default: India's eleven)")
    add("--languages", nargs="+", metavar="X", help="such as hi hi-Latn, beside English (default: all that a card has)")
    add(
        "--views",
        nargs="+",
        default=["native"],
        metavar="X",
        help="sizes and aspects of the images: native, a number of patches such as 64, native-square, 64-square",
    )
    add(
        "--lengths",
        nargs="+",
        type=count,
        metavar="N",
        help="of the embeddings (default: those it was trained for)",
    )
    add("--no_procedural", "--no-procedural", action="store_true", help="leave out what is generated")
    add("--no_probes", "--no-probes", action="store_true", help="leave out kNN and the linear probe")
    add("--training", nargs="+", metavar="SHARDS", help="mark what is among these, and score without it too")
    add(
        "--out",
        metavar="FOLDER",
        help=f"for metrics.json, predictions.parquet, report.html (default: {_OUT}/MODEL, then MODEL-2, ...)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the encoder (default: fp32)")
    add("--batch_size", "--batch-size", type=count, default=64, metavar="N", help="images in a batch (default: 64)")
    add("--num_workers", "--num-workers", type=whole, default=0, metavar="N", help="loader processes (default: 0)")
    add("--seed", type=whole, default=0, metavar="N", help="of what is generated and of the intervals (default: 0)")
    add("--resamples", type=count, default=1000, metavar="N", help="of the 95%% intervals (default: 1000)")
    add("--trust_code", "--trust-code", action="store_true", help="import the classes that a checkpoint of ours names")
    add("--json", action="store_true", help="print metrics.json")
    return words


def run(argv: list[str]) -> int:
    """Returns the exit status."""
    if {"-h", "--help"} & {*argv}:  # also behind `--model`, which argparse would give it as a value
        _parser().print_help()
        return 0
    options = _parser().parse_args(argv)
    from indiclip.training.run_folder import unlock

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"indiclip bench: {message}", file=sys.stderr)
        try:
            return _run(options)
        finally:
            unlock()


def _run(options: argparse.Namespace) -> int:
    import torch

    from indiclip.commands.parallel import progress_bar
    from indiclip.evals.bench import check_languages, find_bench, run_bench
    from indiclip.evals.card_scorer import Options
    from indiclip.evals.models.embedder import load_embedder
    from indiclip.evals.overlap import flag
    from indiclip.evals.pages.bench_report import write_bench_report
    from indiclip.evals.pages.console import print_result
    from indiclip.evals.pages.pictures import Pictures
    from indiclip.evals.results import check_parquet
    from indiclip.training.run_folder import lock

    check_parquet()
    torch.set_flush_denormal(True)
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    views = list(dict.fromkeys(options.views))
    wanted = Options(options.languages, views, not options.no_probes, options.resamples, options.seed)
    bench = find_bench(options.images, options.cards, not options.no_procedural, options.seed)
    check_languages(bench, options.languages)
    embedder = load_embedder(
        options.model, device, precision=options.precision, lengths=options.lengths, trust_code=options.trust_code
    )
    embedder.views(views)  # what it cannot do shows before the shards are read
    folder = _folder(options)
    lock(folder)
    overlap = flag(bench, options.training, options.num_workers) if options.training else None
    with progress_bar(sum(map(len, bench.items)), "images") as advance:
        result = run_bench(embedder, bench, wanted, None, options.batch_size, options.num_workers, advance)
    assert result is not None
    if not result.scores:
        raise ValueError(f"nothing could be scored: {'; '.join(note for card in result.cards for note in card.notes)}")
    result.about |= _about(options, device)
    if overlap is not None:
        result.about["contamination"] = overlap
    result.save(folder)
    write_bench_report(folder, result, Pictures(bench.items))
    if options.json:
        print((folder / "metrics.json").read_text(encoding="utf-8"), end="")
    else:
        print_result(result, folder)
    return 0


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
    import torch

    from indiclip import __version__

    given = {name: value for name, value in vars(options).items() if name not in ("json", "out")}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "date": now,
        "indiclip": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "options": given,
    }
