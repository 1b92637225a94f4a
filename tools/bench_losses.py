"""Times the contrastive losses, forward and backward, beside OpenCLIP's, and measures their peak memory.

    python tools/bench_losses.py                      # this machine, one process
    python tools/bench_losses.py --ranks 2            # two gloo processes
    python tools/bench_losses.py --device cuda --pairs 4096 16384 --length 768

Both sides start from embeddings of any norm and end with the gradients of embeddings and temperature; at several
Matryoshka lengths OpenCLIP's loss is called once per prefix. Peak is what torch's allocator holds during a step above
its inputs. `keys` are labels and caption ids, for which OpenCLIP has no counterpart. With several ranks the numbers
are those of the slowest and the largest.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from indiclip.losses import SigmoidLoss, SoftmaxLoss

Step = Callable[[], Tensor]


def our_step(loss: torch.nn.Module, embeddings: list[Tensor], keys: list[Tensor]) -> Step:
    return lambda: loss(*embeddings, *keys)


def peer_step(loss: torch.nn.Module, embeddings: list[Tensor], lengths: list[int], rank: int, world: int) -> Step:
    """Calls OpenCLIP's loss with our parameters; softmax gathers with gradients and keeps to local rows."""
    softmax = isinstance(loss, SoftmaxLoss)
    options = {"rank": rank, "world_size": world}
    peer = ClipLoss(local_loss=True, gather_with_grad=True, **options) if softmax else SigLipLoss(**options)

    def step() -> Tensor:
        total = torch.zeros(1, device=embeddings[0].device)
        for length in lengths:
            image_BE, text_BE = (F.normalize(x[:, :length], dim=-1) for x in embeddings)
            total = total + peer(image_BE, text_BE, loss.logit_scale.exp(), getattr(loss, "logit_bias", None))
        return total.squeeze() / len(lengths)

    return step


def peak_mib(step: Step, device: str) -> float:
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


def measure(step: Step, device: str, repeats: int) -> tuple[float, float]:
    """Returns milliseconds (median) and peak MiB of forward and backward, the worst of the ranks."""
    seconds = []
    for _ in range(repeats + 2):  # two to warm up
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        step().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    worst = torch.tensor([statistics.median(seconds[2:]) * 1e3, peak_mib(step, device)])
    if dist.is_initialized():
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst[0].item(), worst[1].item()


def bench(rank: int, arguments: argparse.Namespace, store: str) -> None:
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler would report every start and stop
    warnings.filterwarnings("ignore", category=FutureWarning, module="open_clip")
    torch.set_num_threads(arguments.threads)
    world, device, length = arguments.ranks, arguments.device, arguments.length
    if world > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    say = print if rank == 0 else lambda *_, **__: None
    say("| loss | ranks | pairs per rank | lengths | keys | ms | OpenCLIP ms | peak MiB | OpenCLIP peak MiB |")
    say("|---|---|---|---|---|---|---|---|---|")
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
                ours = measure(our_step(loss, embeddings, used), device, arguments.repeats)
                peer = measure(peer_step(loss, embeddings, lengths, rank, world), device, arguments.repeats)
                row = [loss_class.__name__, world, num_pairs, " ".join(map(str, lengths)), "yes" if used else "no"]
                row += [f"{ours[0]:.1f}", f"{peer[0]:.1f}", f"{ours[1]:.1f}", f"{peer[1]:.1f}"]
                say("| " + " | ".join(map(str, row)) + " |", flush=True)
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[256, 1024, 2048], help="pairs per rank")
    parser.add_argument("--length", type=int, default=256, help="embedding length")
    parser.add_argument("--ranks", type=int, default=1, help="gloo processes on this machine")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and arguments.ranks > 1:
        parser.error("--ranks above 1 runs on gloo and the CPU")
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
