"""All that only a GPU can show, offline, in parts of at most nine minutes, the most valuable first.

    python tools/gpu_check.py                        # 45 minutes at most; goes on where an earlier call ended
    python tools/gpu_check.py --parts b16 losses     # only these, again
    python tools/gpu_check.py --device cpu --tiny    # the same on towers of a few numbers, to try it

Every part is a process of its own. It writes each result as it has it, to gpu_check/PART.jsonl, and what it prints to
gpu_check/PART.log; one that runs into its limit is ended, and what it has written counts. gpu_check/table.md has all
results. Packages that are absent are named and left out.

Parts:
  tests   the tests that are marked `gpu`
  methods every page of conf/methods on the quickstart, for some steps in bfloat16
  b16     ViT-B/16 at 224 px, 256 pairs, beside OpenCLIP's: eager and compiled, bfloat16 and float8; MFU
  l14     ViT-L/14, 128 pairs, likewise
  packed  B/16 on images of all sizes: packed, beside padded
  tasks   the four-task step at B/16's width beside the sum of its tasks alone
  fit     `indiclip fit` of the quickstart: rates while it runs, waiting for data
  losses  the contrastive losses beside OpenCLIP's, see tools/bench_losses.py
  profile what takes the time of the B/16 step, and its Chrome trace
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _clip_steps import (
    B16,
    CONTEXT,
    L14,
    SMALL,
    Ours,
    Shape,
    Step,
    Theirs,
    drawn,
    load_open_clip,
    longest_operators,
    on_device,
    our_batch,
    paired,
    pairs,
    ratio,
    training_step,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from indiclip import packing
from indiclip.float8 import convert_to_float8
from indiclip.planning.hardware import installed
from indiclip.sharding import compile_blocks
from indiclip.tokenizers import FastTokenizer

ROOT = Path(__file__).parent.parent
MINUTES = {"tests": 6, "methods": 5, "b16": 7, "l14": 8, "packed": 3, "tasks": 4, "fit": 4, "losses": 4, "profile": 3}
TINY = replace(SMALL, width=64, depth=2, pixels=64, heads=1, text_width=64, text_depth=1, text_heads=1, embed=64)
Row = dict[str, Any]


class Check:
    """What the parts share: the device, and whether all is tiny."""

    def __init__(self, device: str, tiny: bool, out: Path) -> None:
        self.device, self.tiny, self.out = device, tiny, out
        self.rounds = 2 if tiny else 10
        self.tokenizer = FastTokenizer(str(ROOT / "conf" / "tokenizers" / "mela.json"), CONTEXT)
        board = installed(torch.cuda.get_device_name()) if device == "cuda" else None
        self.peak = board.peak("bf16") if board else None

    def tests(self) -> Iterator[Row]:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
        ended = subprocess.run(command, capture_output=True, text=True)
        print(ended.stdout, ended.stderr)
        lines = [line for line in ended.stdout.splitlines() if line.strip()]
        yield {"what": "pytest -m gpu", "exit status": ended.returncode, "result": lines[-1] if lines else ""}

    def methods(self) -> Iterator[Row]:
        pages = sorted(file.stem for file in (ROOT / "conf" / "methods").glob("*.yaml"))
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
            running = [pool.submit(self._method, page) for page in (pages[:1] if self.tiny else pages)]
            yield from (ended.result() for ended in as_completed(running))

    def _method(self, page: str) -> Row:
        words = ["fit", "--config", "quickstart", "--config", f"methods/{page}", "--name", page]
        words += ["--runs", str(self.out / "methods"), "--trainer.max_steps", "4", "--data.steps_per_epoch", "2"]
        words += ["--config", "cluster/one_gpu"] if self.device == "cuda" else ["--trainer.accelerator", "cpu"]
        begin = time.perf_counter()
        ended = subprocess.run([sys.executable, "-m", "indiclip", *words], cwd=ROOT, capture_output=True, text=True)
        row = {"what": page, "exit status": ended.returncode, "s": time.perf_counter() - begin}
        if ended.returncode:
            print(ended.stdout, ended.stderr)
            row["said"] = (ended.stderr.strip().splitlines() or [""])[-1]
        return row

    def b16(self) -> Iterator[Row]:
        yield from self._beside_open_clip(TINY if self.tiny else B16, 8 if self.tiny else 256)

    def l14(self) -> Iterator[Row]:
        yield from self._beside_open_clip(TINY if self.tiny else L14, 8 if self.tiny else 128)

    def _ours(self, shape: Shape, compiled: bool = False, float8: str | None = None) -> Ours:
        torch.manual_seed(0)
        made = Ours(shape, self.tokenizer).to(self.device)
        towers: list[nn.Module] = [made.encoder.backbone, made.encoder.text]
        if float8:
            convert_to_float8(towers, float8, "bf16-mixed", torch.device(self.device))  # type: ignore[arg-type]
        if compiled:
            compile_blocks(towers)
        return made

    def _beside_open_clip(self, shape: Shape, batch_size: int) -> Iterator[Row]:
        batch, pixels, captions = pairs(shape, batch_size, self.tokenizer)
        batch, pixels = on_device(batch, self.device), pixels.to(self.device)
        steps: dict[str, Step] = {}
        kinds: dict[str, dict[str, Any]] = {"": {}, ", compiled": {"compiled": True}}
        if self.tiny:  # compiling takes minutes
            kinds = {"": {}, ", float8": {"float8": "rowwise"}}
        elif importlib.util.find_spec("torchao"):
            kinds |= {f", compiled, float8 {r}": {"compiled": True, "float8": r} for r in ("rowwise", "tensorwise")}
        else:
            yield {"what": "float8", "left out": "torchao is not installed"}
        for kind, options in kinds.items():
            ours = self._ours(shape, **options)
            steps[f"ours{kind}"] = self._step(ours, lambda ours=ours: ours.loss(batch))
        if importlib.util.find_spec("open_clip"):
            peer = load_open_clip()
            for kind in ("",) if self.tiny else ("", ", compiled"):
                theirs = Theirs(shape, self.tokenizer, peer).to(self.device)
                ids = theirs.ids(captions).to(self.device)
                loss = torch.compile(theirs.loss) if kind else theirs.loss
                steps[f"OpenCLIP{kind}"] = self._step(theirs, lambda loss=loss, ids=ids: loss(pixels, ids))
        else:
            yield {"what": "OpenCLIP", "left out": "open_clip_torch is not installed"}
        yield from self._measured(steps, batch_size)

    def _step(self, module: nn.Module, loss: Callable[[], Any]) -> Step:
        return training_step(module, loss, torch.bfloat16)

    def _measured(self, steps: dict[str, Step], batch_size: int) -> Iterator[Row]:
        """Rates, peak memory and MFU of steps that take turns."""
        flops, peaks, started = {}, {}, {}
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            started[name] = time.perf_counter() - begin
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step()
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None
        for name in steps:
            eager = name.partition(",")[0]  # the same sums, and a counter sees through no compiled code
            if eager not in flops:
                with FlopCounterMode(display=False) as counter:
                    steps[eager]()
                flops[eager] = counter.get_total_flops()
        seconds = paired(steps, self.rounds, self.device)
        for name, times in seconds.items():
            median, own = statistics.median(times), flops[name.partition(",")[0]]
            row: Row = {"what": name, "samples/s": batch_size / median, "ms": 1e3 * median, "GFLOP": own / 1e9}
            row["MFU of dense bf16"] = own / median / self.peak if self.peak else None
            row |= {"peak GiB": peaks[name], "first step, s": started[name]}
            for kind in ("OpenCLIP", "OpenCLIP, compiled", "ours, compiled", "padded"):
                if kind in seconds and kind != name:
                    row[f"x {kind}"] = ratio(seconds[kind], times)
            yield row

    def packed(self) -> Iterator[Row]:
        shape, number = (TINY, 8) if self.tiny else (B16, 256)
        scenes = drawn([shape.pixels // 2, shape.pixels], number)
        batch = on_device(our_batch(scenes, shape, self.tokenizer), self.device)
        lengths = batch["images"]["num_patches"]
        yield {
            "what": "images",
            "patches": f"{min(lengths)} to {max(lengths)}, {statistics.mean(lengths):.0f} on average",
        }
        ours = self._ours(shape)
        step = self._step(ours, lambda: ours.loss(batch))

        def padded() -> None:
            before, packing.WORTH_IT = packing.WORTH_IT, 1.0
            try:
                step()
            finally:
                packing.WORTH_IT = before

        yield from self._measured({"packed": step, "padded": padded}, number)

    def tasks(self) -> Iterator[Row]:
        from bench_step import operators, task_steps

        flags = [] if self.tiny else ["--model.encoder.backbone.init_args.width", "768"]
        flags += [] if self.tiny else ["--model.encoder.backbone.init_args.num_heads", "12"]
        flags += [] if self.tiny else ["--model.encoder.backbone.init_args.depth", "12"]
        steps = task_steps(self.device, flags, torch.bfloat16 if self.device == "cuda" else None)
        times = {name: statistics.median(of) for name, of in paired(steps, self.rounds, self.device).items()}
        alone = sum(seconds for name, seconds in times.items() if name != "together")
        for name, seconds in times.items():
            yield {"what": name, "ms": 1e3 * seconds}
        yield {"what": "together / sum of the tasks alone", "ratio": times["together"] / alone}
        operators(steps["together"], self.device)

    def fit(self) -> Iterator[Row]:
        runs = self.out / "runs"
        words = ["fit", "--config", str(ROOT / "conf" / "quickstart.yaml"), "--runs", str(runs), "--name", "quickstart"]
        words += ["--trainer.accelerator", "gpu" if self.device == "cuda" else "cpu", "--trainer.devices", "1"]
        if self.device == "cuda":
            words += ["--config", str(ROOT / "conf" / "cluster" / "one_gpu.yaml")]
        if self.tiny:
            words += ["--trainer.fast_dev_run", "1"]
        begin = time.perf_counter()
        ended = subprocess.run([sys.executable, "-m", "indiclip", *words], cwd=ROOT)
        row = {"what": "indiclip fit, quickstart", "exit status": ended.returncode, "s": time.perf_counter() - begin}
        file = runs / "quickstart" / "metrics.json"
        yield row | (_numbers(json.loads(file.read_text())) if file.exists() else {})

    def losses(self) -> Iterator[Row]:
        words = ["--pairs", "64"] if self.tiny else ["--pairs", "2048", "8192", "--length", "512"]
        command = [sys.executable, str(ROOT / "tools" / "bench_losses.py"), "--device", self.device, *words]
        ended = subprocess.run([*command, "--repeats", "3" if self.tiny else "9"], capture_output=True, text=True)
        print(ended.stdout, ended.stderr)
        yield {"what": "tools/bench_losses.py", "exit status": ended.returncode}
        heads: list[str] = []
        for line in ended.stdout.splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if line.startswith("|") and not heads:
                heads = cells
            elif line.startswith("|") and not set(line) <= set("|- "):
                row = dict(zip(heads, cells, strict=True))
                yield {"what": " ".join(row.pop(name) for name in ("loss", "pairs per rank"))} | row

    def profile(self) -> Iterator[Row]:
        shape, number = (TINY, 8) if self.tiny else (B16, 256)
        batch = on_device(pairs(shape, number, self.tokenizer)[0], self.device)
        for kind in (False, True):
            ours = self._ours(shape, compiled=kind)
            step = self._step(ours, lambda ours=ours: ours.loss(batch))
            for _ in range(3):
                step()
            with torch.profiler.profile() as profile:
                step()
            name = "compiled" if kind else "eager"
            profile.export_chrome_trace(str(self.out / f"{name}.trace.json"))
            for operator, seconds, share, calls in longest_operators(profile, self.device)[:12]:
                yield {"what": f"{name}: {operator[:60]}", "ms": 1e3 * seconds, "share": share, "calls": calls}


def _numbers(metrics: Any) -> Row:
    """The run's rates of its metrics.json."""
    found = {"step": metrics.get("step"), "seconds": metrics.get("seconds")}
    return found | {name: value for name, value in metrics.get("metrics", {}).items() if "throughput" in name}


def run_part(check: Check, part: str) -> int:
    """In a process of its own: write each row as it comes. Returns 1 where a command of the part failed."""
    failed = False
    with (check.out / f"{part}.jsonl").open("w") as file:
        for row in getattr(check, part)():
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(row, flush=True)
            failed |= bool(row.get("exit status"))
    return int(failed)


def start_part(arguments: argparse.Namespace, part: str) -> str:
    """How it ended."""
    words = [sys.executable, __file__, "--part", part, "--out", str(arguments.out), "--device", arguments.device]
    words += ["--tiny"] if arguments.tiny else []
    with (arguments.out / f"{part}.log").open("w") as log:
        child = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            status = child.wait(60 * MINUTES[part])
        except subprocess.TimeoutExpired:
            return f"ended at its limit of {MINUTES[part]} minutes"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # what it has started, too; also after Ctrl-C
            child.wait()
    return "done" if status == 0 else f"exit status {status}, see {part}.log"


def table(out: Path, about: str) -> str:
    """Markdown of all results."""
    lines = [about, ""]
    for part in MINUTES:
        file = out / f"{part}.jsonl"
        if not file.exists():
            continue
        ended = json.loads((out / f"{part}.done").read_text()) if (out / f"{part}.done").exists() else {}
        lines += [f"## {part}", "", f"{ended.get('ended', 'running')}, {ended.get('seconds', 0):.0f} s", ""]
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if part == "methods":  # which end in any order
            rows.sort(key=lambda row: str(row["what"]))
        heads = list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))
        if rows:
            lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
            lines += ["| " + " | ".join(_cell(row.get(name)) for name in heads) + " |" for row in rows] + [""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)


def main() -> int:
    """Run the parts that have not run; the exit status is 1 where one failed, in this call or an earlier one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=MINUTES, help="these, again; default: all that have not ended")
    parser.add_argument("--out", type=lambda folder: Path(folder).resolve(), default=Path("gpu_check").resolve())
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="towers of a few numbers: tries the tool, measures nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: found cuda, and there is no such device; expected cpu, with --tiny")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        return run_part(Check(arguments.device, arguments.tiny, arguments.out), arguments.part)
    board = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU"
    about = f"{board}, torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    for part in arguments.parts or MINUTES:
        done = arguments.out / f"{part}.done"
        if done.exists() and not arguments.parts:
            continue
        print(f"{part}: at most {MINUTES[part]} minutes", flush=True)
        begin = time.perf_counter()
        ended = start_part(arguments, part)
        done.write_text(json.dumps({"ended": ended, "seconds": time.perf_counter() - begin}))
        (arguments.out / "table.md").write_text(table(arguments.out, about))
        print(f"{part}: {ended}", flush=True)
    print(table(arguments.out, about))
    ends = [json.loads(done.read_text())["ended"] for done in arguments.out.glob("*.done")]
    return int(any(ended != "done" for ended in ends))


if __name__ == "__main__":
    sys.exit(main())
