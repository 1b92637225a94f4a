"""One training step of ours beside OpenCLIP's, in the same run, and beside this machine's own matrix products.

    OMP_NUM_THREADS=1 python tools/bench_step.py
    OMP_NUM_THREADS=1 python tools/bench_step.py --open-clip open_clip/src     # and its main branch
    python tools/bench_step.py --device cuda --batch 256

1. A contrastive step (forward, loss, backward, AdamW) beside OpenCLIP's with towers of the same shape, the same
   images, captions and tokenizer; once with a BPE tokenizer, once byte by byte. The installed OpenCLIP pads captions
   to 77 tokens; its main branch can pad to the longest of the batch ("variable text").
2. On a CPU, the share of the machine's own rate of matrix products that the step reaches: the FLOPS of the step,
   attention and convolutions included, beside those of its products when nothing else is run, shape by shape.
3. Our contrastive step on 196 patches beside 49 (a smaller image) and 98 (half of them dropped).
4. The quickstart's four-task step beside the sum of its tasks alone, and its operators above 3% of it.

Steps take turns, round by round; times are medians, of one CPU thread those that it ran. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _clip_steps import (
    CONTEXT,
    SMALL,
    Ours,
    Step,
    Theirs,
    load_open_clip,
    longest_operators,
    on_device,
    paired,
    pairs,
    ratio,
    training_step,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from indiclip.planning.cpu import clock
from indiclip.tokenizers import ByteTokenizer, FastTokenizer, Tokenizer

PRODUCTS = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.baddbmm.default"}


class Products(TorchDispatchMode):
    """Notes each matrix product's operator with its arguments' shapes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Any] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function) in PRODUCTS:
            layout = tuple((tuple(x.shape), x.stride()) if isinstance(x, Tensor) else x for x in args)
            self.found[function, layout] += 1
        return function(*args, **(kwargs or {}))


def share_of_rate(step: Step, seconds: float) -> float:
    """FLOPS of a step that takes so long, beside those of its matrix products alone."""
    with FlopCounterMode(display=False) as counter, Products() as products:
        step()
    total = 0.0
    for (function, layout), times in products.found.items():
        arguments = [_filled(x) for x in layout]
        rounds = []
        for _ in range(5):
            start = clock()
            function(*arguments)
            rounds.append(clock() - start)
        total += times * statistics.median(rounds)
    flops = {str(function): count for function, count in counter.get_flop_counts()["Global"].items()}
    of_products = sum(
        count for name, count in flops.items() if name in {str(of.overloadpacket) for of, _ in products.found}
    )
    return sum(flops.values()) / seconds / (of_products / total)


def _filled(argument: Any) -> Any:
    if not isinstance(argument, tuple):
        return argument
    size, stride = argument
    return torch.empty_strided(size, stride).uniform_()


def contrastive(batch_size: int, tokenizer: Tokenizer, rounds: int, device: str, other: str | None) -> None:
    """Print samples/s of all."""
    torch.manual_seed(0)
    batch, pixels, captions = pairs(SMALL, batch_size, tokenizer)
    batch = on_device(batch, device)
    installed, main = load_open_clip(), load_open_clip(other) if other else None
    ours = Ours(SMALL, tokenizer).to(device)
    peers = {f"open_clip {installed.__version__}": Theirs(SMALL, tokenizer, installed)}
    if main is not None:
        peers[f"open_clip {main.__version__}"] = Theirs(SMALL, tokenizer, main)
        peers[f"open_clip {main.__version__}, variable text"] = Theirs(SMALL, tokenizer, main, variable_text=True)
    steps = {
        "ours": training_step(ours, lambda: ours.loss(batch)),
        "ours, with keys": training_step(ours, lambda: ours.loss(batch, keys=True)),
    }
    for name, peer in peers.items():
        peer.to(device)
        ids, images = peer.ids(captions).to(device), pixels.to(device)
        steps[name] = training_step(peer, lambda peer=peer, ids=ids, images=images: peer.loss(images, ids))
    seconds = paired(steps, rounds, device)
    lengths = [len(row) for row in tokenizer.encode(captions)]
    print(
        f"contrastive step, {batch_size} pairs, {SMALL.pixels} px, {type(tokenizer).__name__}: {len(set(captions))} "
        f"distinct captions of {statistics.mean(lengths):.0f} tokens, the longest {max(lengths)}"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        share = f"   of the rate {share_of_rate(steps[name], median):4.0%}" if device == "cpu" else ""
        print(
            f"  {name:36} {batch_size / median:7.1f} samples/s   ours is {ratio(times, seconds['ours']):5.2f}x{share}",
            flush=True,
        )


def few_tokens(batch_size: int, tokenizer: Tokenizer, rounds: int, device: str) -> None:
    """Print our step on all patches of an image, on those of a smaller one, and on half of them."""
    shape = replace(SMALL, pixels=14 * SMALL.patch)
    budgets: dict[str, dict[str, Any]] = {"196": {"drop": 0.0}, "49": {"max_tokens": 49}, "half dropped": {"drop": 0.5}}
    steps = {}
    for name, budget in budgets.items():
        torch.manual_seed(0)
        batch, ours = on_device(pairs(shape, batch_size, tokenizer, **budget)[0], device), Ours(shape, tokenizer)
        steps[name] = training_step(ours.to(device), lambda ours=ours, batch=batch: ours.loss(batch))
    seconds = paired(steps, rounds, device)
    print(f"contrastive step, {batch_size} pairs, patches of an image:")
    for name, times in seconds.items():
        print(f"  {name:14} {1e3 * statistics.median(times):7.0f} ms   {ratio(seconds['196'], times):5.2f}x")


def task_steps(device: str, flags: Sequence[str] = (), autocast: torch.dtype | None = None) -> dict[str, Step]:
    """The quickstart's step with all tasks, `together`, and with each alone."""
    from indiclip.commands.config_samples import build_run

    module, data, _ = build_run(["--config", "quickstart", *flags])
    module = module.to(device)
    module.log = module.log_dict = lambda *_, **__: None
    batches = module.transfer_batch_to_device(data.steps(data.train, train=True)[0], torch.device(device), 0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    heads = dict(module.heads)

    def step_of(names: list[str]) -> Step:
        def step() -> None:
            module.heads = nn.ModuleDict({name: heads[name] for name in names})
            optimizer.zero_grad()
            with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
                loss = module.training_step(batches, 0)
            loss.backward()
            optimizer.step()

        return step

    return {"together": step_of(list(heads)), **{name: step_of([name]) for name in heads}}


def four_tasks(rounds: int, device: str, flags: Sequence[str] = ()) -> None:
    """Print the quickstart's step beside its tasks alone, and what takes its time."""
    steps = task_steps(device, flags)
    times = {name: statistics.median(of) for name, of in paired(steps, rounds, device).items()}
    alone = sum(seconds for name, seconds in times.items() if name != "together")
    print("quickstart's step, ms: " + ", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in times.items()))
    print(f"  together / sum of the tasks alone: {times['together'] / alone:.2f}")
    if device == "cpu":
        products = {name: share_of_rate(step, times[name]) for name, step in steps.items()}
        print("  of the rate: " + ", ".join(f"{name} {share:.0%}" for name, share in products.items()))
    operators(steps["together"], device)


def operators(step: Step, device: str) -> None:
    """Print the operators that take more than 3% of a step."""
    with torch.profiler.profile() as profile:
        step()
    print("  operators above 3%, share and calls:")
    for name, _, share, calls in longest_operators(profile, device):
        if share > 0.03:
            print(f"    {name:56} {share:6.1%} {calls:6}")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--open-clip", help="folder with the sources of another OpenCLIP")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)  # as `indiclip fit` does
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    bpe = FastTokenizer(str(Path(__file__).parent.parent / "conf" / "tokenizers" / "mela.json"), CONTEXT)
    for tokenizer in (bpe, ByteTokenizer(CONTEXT)):
        for batch_size in arguments.batch:
            contrastive(batch_size, tokenizer, arguments.rounds, arguments.device, arguments.open_clip)
    few_tokens(arguments.batch[0], bpe, arguments.rounds, arguments.device)
    four_tasks(arguments.rounds, arguments.device)


if __name__ == "__main__":
    main()
