"""The planner's prediction of a step on this processor beside the measured step.

    python tools/bench_plan.py                       # conf/quickstart.yaml
    python tools/bench_plan.py --config conf/mela.yaml --rounds 15
    python tools/bench_plan.py --count quickstart depth portable     # beside torch's counts

The machine's matrix rate, bandwidth and cost of an operator are measured in turn with the step, round by round, and
the medians are set side by side. With OMP_NUM_THREADS=1 the seconds are those of the processor.
"""

import argparse
import statistics

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from indiclip.commands.config_samples import build_run
from indiclip.parameter_groups import parameter_groups
from indiclip.planning import cpu
from indiclip.planning.counter import Count
from indiclip.planning.memory import weigh
from indiclip.planning.step_model import step_model


class Kept:
    """The bytes that a real step keeps for its backward pass beside the weights, each storage once."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.bytes = 0
        self._storages = {t.untyped_storage().data_ptr(): t for t in (*module.parameters(), *module.buffers())}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """A hook that packs what is saved: as it is."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._storages:
            self._storages[storage.data_ptr()] = storage  # kept, so that nothing else comes to lie there
            self.bytes += storage.nbytes()
        return tensor


def planned_and_counted(config: str) -> list[tuple[float, float]]:
    """FLOPs of a config's first step, and bytes that it keeps: as planned, and as torch counts them while it runs."""
    model, data, _ = build_run(["--config", config])
    counts = [part for task in step_model(model, data, 1, None).values() for part in task.counts(1).values()]
    model.log = model.log_dict = lambda *_, **__: None
    kept = Kept(model)
    with FlopCounterMode(display=False) as flops, saved_tensors_hooks(kept, lambda tensor: tensor):
        model.training_step(data.steps(data.train, train=True)[0], 0).backward()
    planned = sum(count.flops for count in counts), sum(count.saved for count in counts)
    return list(zip(planned, (flops.get_total_flops(), kept.bytes), strict=True))


def main() -> None:
    """Print measured and predicted seconds of a step, or its counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", nargs="+", metavar="CONFIG", help="print FLOPs and kept bytes of these instead")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)  # as `indiclip fit` does
    for config in arguments.count or ():
        (planned, flops), (planned_bytes, saved) = planned_and_counted(config)
        print(
            f"{config:12} GFLOP {planned / 1e9:8.2f} planned, {flops / 1e9:8.2f} counted, {planned / flops - 1:+.2%}   "
            f"MB kept {planned_bytes / 1e6:8.1f} planned, {saved / 1e6:8.1f} counted, {planned_bytes / saved - 1:+.2%}"
        )
    if arguments.count:
        return
    model, data, _ = build_run(["--config", arguments.config])
    model.log = model.log_dict = lambda *_, **__: None
    tasks, weights = step_model(model, data, 1, None), weigh(model)
    counts = [count for of in tasks.values() for count in of.counts(1).values()]
    total = Count.combine([(1, count) for count in [*counts, weights.update]])
    largest = max(tasks.values(), key=lambda of: of.tokens * of.batch_size)
    rows = largest.tokens * min(largest.batch_size, 64)
    optimizer = model.optimizer(parameter_groups(model))
    batches = data.steps(data.train, train=True)[0]

    def step() -> None:
        optimizer.zero_grad()
        model.training_step(batches, 0).backward()
        optimizer.step()

    step()
    measured, predicted, rates = [], [], []
    for _ in range(arguments.rounds):
        processor = cpu.measure(rows, largest.tokens, model.encoder.backbone.width)
        rates.append(processor.flops)
        predicted.append(processor.seconds(total))
        start = cpu.clock()
        step()
        measured.append(cpu.clock() - start)
    seconds, guess = statistics.median(measured), statistics.median(predicted)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.config}, {arguments.rounds} rounds"
    )
    print(f"  {total.flops / 1e9:.1f} GFLOP, {total.moved / 1e9:.2f} GB, {total.operators:,.0f} operators a step")
    print(f"  matrix rate  {statistics.median(rates) / 1e9:8.1f} GFLOPS")
    print(
        f"  attention    {processor.attention / 1e9:8.1f} GFLOPS, an exponential {1e9 * processor.exponential:.2f} ns"
    )
    print(f"  bandwidth    {processor.bandwidth / 1e9:8.1f} GB/s, an operator {1e6 * processor.operator:.1f} us")
    print(f"  measured     {seconds:8.3f} s (from {min(measured):.3f} to {max(measured):.3f})")
    print(
        f"  predicted    {guess:8.3f} s, {guess / seconds - 1:+.1%}; {total.flops / seconds / 1e9:.1f} GFLOPS reached"
    )
    ratios = sorted(guess / seconds for guess, seconds in zip(predicted, measured, strict=True))
    print(f"  predicted / measured, round by round: {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
