"""The plan of a config: it is built as `indiclip fit` builds it, and its step is counted."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import torch

from indiclip.commands.config_samples import build_run
from indiclip.commands.findings import json_line
from indiclip.commands.plan_table import show_cpu, show_plan
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import keyed
from indiclip.names import check_choice
from indiclip.planning import cpu
from indiclip.planning.communication import Cluster
from indiclip.planning.counter import Count
from indiclip.planning.estimate import Estimate, ways_to_fit
from indiclip.planning.hardware import STRATEGIES, Strategy, default, device
from indiclip.planning.memory import weigh
from indiclip.planning.run_phases import RunPhases
from indiclip.planning.step_model import step_model
from indiclip.training.checks import check, check_length

# `trainer.precision` -> data type of the matrix products, and of autocast
_PRECISIONS = {
    "32-true": ("fp32", None),
    "bf16-mixed": ("bf16", torch.bfloat16),
    "16-mixed": ("bf16", torch.float16),  # of the same peak on every device of the table
}


def plan_on_gpus(
    words: list[str],
    gpu: str,
    nodes: int | None,
    gpus_per_node: int | None,
    strategy: str | None,
    mfu: float | None,
    price: float | None,
    as_json: bool,
) -> int:
    """Print the plan of a config on a cluster; the words are those of `fit`. Returns 1 where it does not fit."""
    model, data, trainer = build_run(words)
    precision = str(trainer.get("precision") or "32-true")
    precision = {"32": "32-true"}.get(precision, precision)
    check_choice("trainer.precision", precision, _PRECISIONS)
    if (most := trainer.get("max_steps") or 0) > 0:
        check_length(model, data, most)
    check(model, data, "fit")
    dtype, autocast = _PRECISIONS[precision]
    nodes = nodes or _number(trainer.get("num_nodes"), 1)
    gpus_per_node = gpus_per_node or _number(trainer.get("devices"), 8)
    cluster = Cluster(device(gpu), nodes, gpus_per_node, default("link_share")[0])
    steps = _num_steps(trainer, data)
    phases = RunPhases(model, data, cluster.world, autocast)
    estimate = Estimate(
        cluster,
        step_model(model, data, cluster.world, autocast),
        weigh(model),
        cast(Strategy, strategy or strategy_of(trainer.get("strategy"))),
        dtype,
        mfu or default("mfu")[0],
        int(getattr(model, "micro_batches", None) or 1),
        bool(getattr(model, "activation_checkpointing", False)),
    )
    plan = describe(estimate, data, steps, price) | {"precision": precision}
    if steps is not None and len(borders := phases.borders(steps)) > 1:
        plan |= _by_phase(estimate, phases, borders, steps, price)
    left_out = {"model.float8": getattr(model, "float8", None), "model.compile": getattr(model, "compiles", False)}
    plan["left_out"] = [key for key, value in left_out.items() if value]
    if as_json:
        print(json_line(plan), end="")
    else:
        show_plan(plan)
    return 0 if plan["fits"] else 1


def _by_phase(
    estimate: Estimate, phases: RunPhases, borders: list[int], num_steps: int, price: float | None
) -> dict[str, Any]:
    """What of a plan is another where a run has several phases: its cost, and whether the largest of them fits."""
    rows, estimates, costs = [], [], []
    for first, end in pairwise([*borders, num_steps]):
        of = replace(estimate, tasks=phases.tasks(first, num_steps))
        estimates.append(of)
        costs.append(of.cost(end - first, price))
        rows.append(
            {
                "first_step": first,
                "steps": end - first,
                "heads": phases.heads(first, num_steps),
                "batches": {name: [task.batch_size * of.cluster.world, task.tokens] for name, task in of.tasks.items()},
                "flops_per_step": of.model_flops * of.cluster.world,
                "memory": of.memory()["total"],
                "step": of.step()["step"],
                "gpu_hours": costs[-1]["gpu_hours"],
            }
        )
    total = {
        name: None if any(cost[name] is None for cost in costs) else sum(cost[name] or 0 for cost in costs)
        for name in costs[0]
    }
    return {"phases": rows, "cost": total | {"usd_per_gpu_hour": price}, "fits": all(of.fits for of in estimates)}


def describe(estimate: Estimate, data: MultiTaskData, steps: int | None, price: float | None) -> dict[str, Any]:
    """All that is planned, as plain values: FLOPs, bytes, seconds.

    Args:
        estimate: Of the run.
        data: Its sources.
        steps: Of the run; None where the config does not say.
        price: Of a GPU-hour, in USD.
    """
    cluster, seconds = estimate.cluster, estimate.step()
    with_strategy = {name: replace(estimate, strategy=name) for name in STRATEGIES}
    flops = {task: {part: _flops(count) for part, count in of.items()} for task, of in estimate.parts.items()}
    utilisation = estimate.model_flops / seconds["step"] / cluster.device.peak(estimate.dtype)
    return {
        "device": cluster.device.name,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "gpus": cluster.world,
        "strategy": estimate.strategy,
        "dtype": estimate.dtype,
        "peak_tflops": cluster.device.tflops[estimate.dtype],
        "batches": {
            task: {
                "samples": of.batch_size * cluster.world,
                "every": of.every,
                "per_gpu": of.batch_size,
                "read": of.read,
                "image_tokens": of.tokens,
                "text_tokens": of.text_tokens,
                "distinct_captions": round(of.distinct) if of.captions else 0,
            }
            for task, of in estimate.tasks.items()
        },
        "flops_per_gpu": flops,
        "flops_per_step": estimate.model_flops * cluster.world,
        "memory": {name: of.memory() for name, of in with_strategy.items()},
        "hbm": cluster.device.hbm_gb * 1e9,
        "fits": estimate.fits,
        "ways_to_fit": [] if estimate.fits else ways_to_fit(estimate, _batch_keys(data)),
        "communication": {name: _traffic(of) for name, of in with_strategy.items()},
        "step": seconds | {"samples_per_second": estimate.samples_per_second(), "mfu": utilisation},
        "bound_by_launches": estimate.launch_seconds() > estimate.busy_seconds(),
        "storage": estimate.storage(),
        "scaling": estimate.scaling(),
        "cost": estimate.cost(steps, price) | {"usd_per_gpu_hour": price},
        "assumed": {
            "mfu": {"value": estimate.mfu, "source": _mfu_source(estimate.mfu)},
            **{name: _assumed(name) for name in ("link_share", "reserved_gb", "launch_us")},
            "device": cluster.device.sources,
        },
    }


def strategy_of(value: Any) -> Strategy:
    """How a `trainer.strategy` shares the weights of a model."""
    name = str(value if isinstance(value, str) else getattr(value, "class_path", value)).lower()
    if "fsdp" in name:
        return "fsdp"
    if "sharded" not in name and "modelparallel" not in name:
        return "ddp"
    replicas = getattr(value, "init_args", {}).get("data_parallel_size", "auto")  # `auto` is one per node
    return "fsdp" if replicas == 1 else "hsdp"


def _flops(count: Count) -> dict[str, float]:
    return {"forward": count.forward, "backward": count.backward}


def _traffic(estimate: Estimate) -> dict[str, float]:
    traffic = estimate.traffic()
    parts = {"weights": 2 * traffic.weights, "gradients": traffic.gradients, "loss": traffic.loss}
    return parts | {"total": traffic.total, "exposed": estimate.step()["exposed"]}


def _batch_keys(data: MultiTaskData) -> Mapping[str, str]:
    """Task -> the key of its first source's batch size; all sources of a task have the same."""
    keys: dict[str, str] = {}
    for key, source in keyed("data.train", data.train).items():
        keys.setdefault(source.task, f"{key}.{'batch_size' if source.batch_size else 'batch_tokens'}")
    return keys


def _assumed(name: str) -> dict[str, Any]:
    value, source = default(name)
    return {"value": value, "source": source}


def _mfu_source(mfu: float) -> str:
    value, source = default("mfu")
    return source if mfu == value else "--mfu"


def _number(value: Any, otherwise: int) -> int:
    """Nodes or devices of a Trainer; `auto` is not known here."""
    if isinstance(value, list):
        return len(value)
    return int(value) if str(value).isdecimal() and int(value) else otherwise


def _num_steps(trainer: Any, data: MultiTaskData) -> int | None:
    """Steps of the run; None where only time ends it."""
    if (steps := trainer.get("max_steps")) is not None and steps > 0:
        return int(steps)
    if (epochs := trainer.get("max_epochs")) is None or epochs < 0:
        return None
    return int(epochs * (data.steps_per_epoch or len(data.steps(data.train, train=True))))


def plan_on_cpu(words: list[str], rate: float | None, as_json: bool) -> int:
    """Print how long a config's step takes on this machine's processor, whose GFLOPS may be known. Returns 0."""
    model, data, _ = build_run(words)
    check(model, data, "fit")
    tasks, weights = step_model(model, data, 1, None), weigh(model)
    counts = [(1 / of.every, count) for of in tasks.values() for count in of.counts(1).values()]
    largest = max(tasks.values(), key=lambda of: of.tokens * of.batch_size)
    rows = largest.tokens * min(largest.batch_size, 64)
    processor = cpu.measure(rows, largest.tokens, model.encoder.backbone.width, rate and rate * 1e9)
    total = Count.combine([*counts, (1, weights.update)])
    plan = {
        "gflops": processor.flops / 1e9,
        "bandwidth_gbs": processor.bandwidth / 1e9,
        "attention_gflops": processor.attention / 1e9,
        "exponential_ns": processor.exponential * 1e9,
        "operator_us": processor.operator * 1e6,
        "flops": total.flops,
        "attention_flops": total.attention,
        "bytes": total.moved,
        "exponentials": total.exponentials,
        "operators": total.operators,
        "seconds": processor.seconds(total),
    }
    if as_json:
        print(json_line(plan), end="")
    else:
        show_cpu(plan)
    return 0
