"""Times the contrastive losses, forward and backward, beside OpenCLIP's, and measures their peak memory.

    python tools/bench_losses.py                      # this machine, one process
    python tools/bench_losses.py --pairs 8192 --repeats 3
    python tools/bench_losses.py --ranks 2            # two gloo processes
    python tools/bench_losses.py --device cuda --pairs 4096 16384 --length 768
    python tools/bench_losses.py --launches           # operators of a step at 8, 64 and 512 ranks, in one process

All sides start from embeddings of any norm and end with the gradients of embeddings and temperature; at several
Matryoshka lengths OpenCLIP's loss is called once per prefix. They take turns, step by step: times are medians, and a
ratio is the median of ours / theirs over the turns. One process on a CPU is timed by the CPU seconds that it got, as
machines are shared, and all else by the clock. Peak is what torch's allocator holds during a step above its
inputs. `keys` are labels and caption ids, for which OpenCLIP has no counterpart. With several ranks the numbers are
those of the slowest and the largest. "chunked" is OpenCLIP's sigmoid loss with `--chunk-size`, from 4.2 on.
"""

import argparse
import inspect
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from indiclip.losses import ContrastiveLoss, SigmoidLoss, SoftmaxLoss

Step = Callable[[], Tensor]
CHUNKED = "chunk_size" in inspect.signature(SigLipLoss).parameters
HEADER = """
| loss | ranks | pairs per rank | lengths | keys | ms | OpenCLIP ms | ratio | chunked ms | ratio \
| peak MiB | OpenCLIP MiB | chunked MiB |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def peer_step(peer: torch.nn.Module, loss: torch.nn.Module, embeddings: list[Tensor], lengths: list[int]) -> Step:
    """Calls OpenCLIP's loss with our parameters."""

    def step() -> Tensor:
        total = torch.zeros(1, device=embeddings[0].device)
        for length in lengths:
            image_BE, text_BE = (F.normalize(x[:, :length], dim=-1) for x in embeddings)
            total = total + peer(image_BE, text_BE, loss.logit_scale.exp(), getattr(loss, "logit_bias", None))
        return total.squeeze() / len(lengths)

    return step


def peers(loss_class: type[ContrastiveLoss], rank: int, world: int, chunk_size: int) -> list[torch.nn.Module]:
    """OpenCLIP's loss, and in chunks if it has those; softmax gathers with gradients and keeps to local rows."""
    options: dict[str, Any] = {"rank": rank, "world_size": world}
    if loss_class is SoftmaxLoss:
        return [ClipLoss(local_loss=True, gather_with_grad=True, **options)]
    return [SigLipLoss(**options), *([SigLipLoss(chunk_size=chunk_size, **options)] if CHUNKED else [])]


def peak_mib(step: Step, device: str = "cpu") -> float:
    """Most memory that a step holds at one time above what was held before, by torch's allocator."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step().backward()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(profile_memory=True) as profiler:
        step().backward()
    events = profiler.profiler.kineto_results.events()  # profiler.events() lists the allocations outside operators only
    allocations = sorted((x.start_ns(), x.nbytes()) for x in events if x.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in allocations)) / 2**20


def measure(steps: list[Step], device: str, repeats: int) -> list[tuple[float, float, float]]:
    """Milliseconds, ratio of the first's to these, and peak MiB of forward and backward; the worst of the ranks."""
    seconds: list[list[float]] = [[] for _ in steps]
    clock = time.perf_counter if device == "cuda" or dist.is_initialized() else time.process_time
    for _ in range(repeats + 2):  # two to warm up
        for step, times in zip(steps, seconds, strict=True):
            if dist.is_initialized():
                dist.barrier()
            start = clock()
            step().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - start)
    results = []
    for step, times in zip(steps, seconds, strict=True):
        ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds[0][2:], times[2:], strict=True))
        worst = torch.tensor([statistics.median(times[2:]) * 1e3, ratio, peak_mib(step, device)])
        if dist.is_initialized():
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        results.append(tuple(worst.tolist()))
    return results


def bench(rank: int, arguments: argparse.Namespace, store: str) -> None:
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler would report every start and stop
    warnings.filterwarnings("ignore", category=FutureWarning, module="open_clip")
    torch.set_num_threads(arguments.threads)
    world, device, length = arguments.ranks, arguments.device, arguments.length
    if world > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    say = print if rank == 0 else lambda *_, **__: None
    say(HEADER)
    for num_pairs in arguments.pairs:
        embeddings = [torch.randn(num_pairs, length, device=device).requires_grad_() for _ in range(2)]
        keys = [torch.randint(1000, (num_pairs,), device=device) for _ in range(2)]
        for loss_class in (SoftmaxLoss, SigmoidLoss):
            for lengths, used in (
                ([length], []),
                ([length], keys),
                ([length // 8, length // 4, length // 2, length], []),
            ):
                loss = loss_class(lengths).to(device)
                steps: list[Step] = [partial(loss, *embeddings, *used)]
                theirs = peers(loss_class, rank, world, arguments.chunk_size)
                steps += [peer_step(peer, loss, embeddings, lengths) for peer in theirs]
                (ms, _, mib), *others = measure(steps, device, arguments.repeats)
                row = [loss_class.__name__, world, num_pairs, " ".join(map(str, lengths)), "yes" if used else "no"]
                columns = [[f"{a:.1f}", f"{b:.2f}", f"{c:.1f}"] for a, b, c in others] + [[""] * 3] * (2 - len(others))
                row += [f"{ms:.1f}", *columns[0][:2], *columns[1][:2], f"{mib:.1f}", columns[0][2], columns[1][2]]
                say("| " + " | ".join(map(str, row)) + " |", flush=True)
    if world > 1:
        dist.destroy_process_group()


class LaunchCounter(TorchDispatchMode):
    """Counts the operators that are not views, collectives too: about the kernels that a GPU would be given."""

    launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += not func.is_view
        return func(*args, **(kwargs or {}))


def launches(loss_class: type[ContrastiveLoss], world: int, num_pairs: int = 256, length: int = 256) -> int:
    """Operators of a step of rank 0 of `world`, with labels and captions. The other ranks are fake."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        embeddings = [torch.randn(num_pairs, length).requires_grad_() for _ in range(2)]
        keys = [torch.randint(1000, (num_pairs,)) for _ in range(2)]
        with LaunchCounter() as counter:
            loss_class([length])(*embeddings, *keys).backward()
    finally:
        dist.destroy_process_group()
    return counter.launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[256, 1024, 2048], help="pairs per rank")
    parser.add_argument("--length", type=int, default=256, help="embedding length")
    parser.add_argument("--ranks", type=int, default=1, help="gloo processes on this machine")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--chunk-size", type=int, default=512, help="images per chunk of OpenCLIP's")
    parser.add_argument("--launches", action="store_true", help="count operators instead")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and arguments.ranks > 1:
        parser.error("--ranks above 1 runs on gloo and the CPU")
    if arguments.launches:
        print(f"256 pairs per rank, E={arguments.length}\n\n| ranks | softmax | sigmoid |\n|---|---|---|")
        for world in (8, 64, 512):
            counts = [launches(loss_class, world, length=arguments.length) for loss_class in (SoftmaxLoss, SigmoidLoss)]
            print(f"| {world} | {counts[0]} | {counts[1]} |", flush=True)
        return
    processor = (
        torch.cuda.get_device_name() if arguments.device == "cuda" else f"{os.cpu_count()} x {platform.machine()}"
    )
    print(
        f"{processor}, torch {torch.__version__}, open_clip {open_clip.__version__}, E={arguments.length}\n", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        if arguments.ranks == 1:
            bench(0, arguments, store)
        else:
            torch.multiprocessing.spawn(bench, (arguments, store), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
