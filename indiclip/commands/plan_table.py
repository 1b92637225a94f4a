"""A plan as tables for a terminal of 100 columns."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from indiclip.names import with_prefix
from indiclip.planning.hardware import Device

_WIDTH = 100  # columns, where the output is no terminal


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print what `indiclip.commands.plan_config.describe` says."""
    console = _console()
    console.print(
        f"{plan['nodes']} x {plan['gpus_per_node']} {plan['device']}, {plan['strategy']}, {plan['precision']}: "
        f"{plan['peak_tflops']:,.0f} TFLOPS ({plan['dtype']}, dense) each",
        style="bold",
        highlight=False,
    )
    console.print(_batches(plan), _flops(plan), _memory(plan))
    _say_fit(console, plan)
    if plan["gpus"] > 1:
        console.print(_communication(plan))
    console.print(_scaling(plan))
    if "phases" in plan:
        console.print(_phases(plan))
    for line in (*_cost(plan), *_assumed(plan)):
        console.print(line, highlight=False)


def show_cpu(plan: Mapping[str, float]) -> None:
    """Print a step on this machine."""
    console = _console()
    console.print(
        f"matrix products {plan['gflops']:.1f} GFLOPS, attention {plan['attention_gflops']:.1f} GFLOPS, "
        f"{plan['bandwidth_gbs']:.1f} GB/s, an exponential {plan['exponential_ns']:.2f} ns, "
        f"an operator {plan['operator_us']:.1f} us, with the threads that torch has here\n"
        f"{plan['flops'] / 1e9:,.1f} GFLOP, {plan['bytes'] / 1e9:,.2f} GB, {plan['operators']:,.0f} operators a step, "
        f"optimizer included\n{plan['seconds']:.3f} s a step, loading of data aside",
        highlight=False,
    )


def show_conversion(days: float, source: Device, target: Device, converted: Mapping[str, float], note: str) -> None:
    """Print how many days of one device are as many FLOPs as those of another."""
    console = _console()
    peak = source.tflops["bf16"]
    console.print(f"{days:g} days of {source.name} at {peak:,.0f} TFLOPS (bf16, dense) are", highlight=False)
    for kind, number in converted.items():
        rate = target.sparse[kind.split(",")[0]] if "sparse" in kind else target.tflops[kind]
        line = f"  {number:6.2f} days of {target.name} at {rate:,.0f} TFLOPS ({kind}{'' if ',' in kind else ', dense'})"
        console.print(line, highlight=False)
    console.print("at the same share of the peak", highlight=False)
    if note:
        console.print(note, highlight=False)


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def _table(title: str, first: str, *columns: str) -> Table:
    numbers = [Column(name, justify="right", no_wrap=True) for name in columns]
    head = Column(first, overflow="fold")
    return Table(head, *numbers, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _batches(plan: Mapping[str, Any]) -> Table:
    columns = ("samples", "per GPU", "image tokens", "text tokens", "different captions", "samples read")
    table = _table("A step; tokens are those of the longest", "task", *columns)
    for task, of in plan["batches"].items():
        names = ("samples", "per_gpu", "image_tokens", "text_tokens", "distinct_captions", "read")
        when = f", 1 of {of['every']} steps" if of["every"] > 1 else ""
        table.add_row(f"{task}{when}", *(f"{of[name]:,}" for name in names))
    return table


def _flops(plan: Mapping[str, Any]) -> Table:
    table = _table("FLOPs of a step, per GPU", "part", "forward", "backward", "share")
    everything = sum(sum(of.values()) for parts in plan["flops_per_gpu"].values() for of in parts.values()) or 1
    for task, parts in plan["flops_per_gpu"].items():
        for part, of in parts.items():
            if whole := sum(of.values()):
                share = f"{whole / everything:.1%}"
                table.add_row(f"{task}: {part}", with_prefix(of["forward"]), with_prefix(of["backward"]), share)
    table.add_row("all", *(with_prefix(_total(plan, name)) for name in ("forward", "backward")), "100.0%", style="bold")
    return table


def _total(plan: Mapping[str, Any], name: str) -> float:
    return float(sum(of[name] for parts in plan["flops_per_gpu"].values() for of in parts.values()))


def _memory(plan: Mapping[str, Any]) -> Table:
    strategies = [*plan["memory"]]
    table = _table("Memory of a GPU, GB", "part", *strategies)
    for part in plan["memory"][strategies[0]]:
        row = (f"{plan['memory'][name][part] / 1e9:.2f}" for name in strategies)
        table.add_row(part, *row, style="bold" if part == "total" else "")
    return table


def _phases(plan: Mapping[str, Any]) -> Table:
    table = _table("Phases of the run; the tables above are of the last", "heads", "steps", "samples x tokens")
    for name in ("FLOPs", "GB", "ms", "GPU-hours"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in plan["phases"]:
        batches = "\n".join(f"{task} {size:,} x {tokens:,}" for task, (size, tokens) in phase["batches"].items())
        table.add_row(
            ", ".join(phase["heads"]),
            f"{phase['first_step']:,} to {phase['first_step'] + phase['steps']:,}",
            batches,
            with_prefix(phase["flops_per_step"]),
            f"{phase['memory'] / 1e9:.1f}",
            f"{phase['step'] * 1e3:.1f}",
            f"{phase['gpu_hours']:,.2f}",
        )
    return table


def _say_fit(console: Console, plan: Mapping[str, Any]) -> None:
    total, hbm = plan["memory"][plan["strategy"]]["total"] / 1e9, plan["hbm"] / 1e9
    if plan["fits"]:
        console.print(f"fits: {total:.1f} of {hbm:.0f} GB with {plan['strategy']}\n", style="green", highlight=False)
        return
    console.print(f"does not fit: {total:.1f} of {hbm:.0f} GB with {plan['strategy']}", style="red", highlight=False)
    for line in plan["ways_to_fit"] or ["no single change makes it fit"]:
        console.print(f"  {line}", highlight=False)
    console.print()


def _communication(plan: Mapping[str, Any]) -> Table:
    columns = ("weights", "gradients", "embeddings", "sum", "waited for")
    table = _table(f"Communication of a step on {plan['gpus']} GPUs, ms", "strategy", *columns)
    for name, of in plan["communication"].items():
        parts = (of["weights"], of["gradients"], of["loss"], of["total"], of["exposed"])
        table.add_row(name, *(f"{1e3 * seconds:,.1f}" for seconds in parts))
    return table


def _scaling(plan: Mapping[str, Any]) -> Table:
    columns = ("samples", "compute", "loss", "waiting", "step", "samples/s", "efficiency")
    table = _table(f"Weak scaling, {plan['strategy']}, ms", "GPUs", *columns)
    for row in plan["scaling"]:
        seconds = (f"{1e3 * row[name]:,.1f}" for name in ("compute", "loss", "exposed", "step"))
        rest = (f"{row['samples/s']:,.0f}", f"{row['efficiency']:.1%}")
        table.add_row(f"{row['gpus']}", f"{row['batch']:,}", *seconds, *rest)
    return table


def _cost(plan: Mapping[str, Any]) -> list[str]:
    step, cost = plan["step"], plan["cost"]
    lines = [
        f"[bold]{1e3 * step['step']:,.1f} ms a step[/], {step['samples_per_second']:,.0f} samples/s, "
        f"{with_prefix(plan['flops_per_step'])}FLOP a step; {step['mfu']:.0%} of the peak with loss and waiting"
    ]
    if plan["bound_by_launches"]:
        us = plan["assumed"]["launch_us"]["value"]
        lines += [
            f"[yellow]launching its operators takes longer than computing them ({us:g} us each): a larger batch[/]"
        ]
    rates = {task: rate for task, rate in plan["storage"].items() if rate}
    lines += [f"storage: {with_prefix(rate)}B/s of images for {task}" for task, rate in rates.items()]
    if cost["days"] is None:
        return [*lines, "the config does not say how many steps: trainer.max_steps gives the days"]
    money = "" if cost["usd"] is None else f", {_rounded(cost['usd'])} USD at {cost['usd_per_gpu_hour']:g} a GPU-hour"
    hours = f"{_rounded(cost['gpu_hours'])} GPU-hours{money}"
    return [*lines, f"[bold]{cost['steps']:,} steps: {_duration(cost['days'])}, {hours}[/]"]


def _assumed(plan: Mapping[str, Any]) -> list[str]:
    of = plan["assumed"]
    return [
        "",
        f"Assumed: MFU {of['mfu']['value']:g} ({of['mfu']['source']}); {of['link_share']['value']:.0%} of the links' "
        f"bandwidth ({of['link_share']['source']}); gathering and reducing hide behind the pass that they belong to, "
        "but not the last bucket or block, nor the loss's embeddings; the loss in float32, by its FLOPs and bytes; "
        f"{of['reserved_gb']['value']:g} GB reserved ({of['reserved_gb']['source']}). Sources of the device's "
        "numbers: --json.",
        *(
            f"Left out, though it is faster with it: {key}; --mfu takes what you have measured."
            for key in plan["left_out"]
        ),
    ]


def _rounded(number: float) -> str:
    """Two digits of a small number, none behind the point of a large one."""
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"


def _duration(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{days * 1440:.1f} minutes"
