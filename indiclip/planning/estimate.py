"""A run's plan from the counts of its step: seconds, memory, storage, scaling, money."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from indiclip.planning.communication import Cluster, Traffic, traffic
from indiclip.planning.counter import Count, Counts
from indiclip.planning.hardware import STRATEGIES, Strategy, default
from indiclip.planning.memory import Weights, per_gpu
from indiclip.planning.parts import IMAGE_TOWER, TEXT_TOWER
from indiclip.planning.step_model import TaskModel

SCALES = (1, 2, 4, 8, 16, 32, 64, 128)  # GPUs


@dataclass(frozen=True)
class Estimate:
    """What a run takes on a cluster.

    Attributes:
        cluster: Where it runs.
        tasks: Task -> its part of a rank's step.
        weights: Of the model.
        strategy: How ranks share the weights.
        dtype: In which matrices are multiplied: a key of `Device.tflops`.
        mfu: Share of the peak that towers and heads reach, all waiting inside of a GPU included.
        micro_batches: Parts of a batch with gradient caching: towers run forward a second time.
        checkpointing: Towers' blocks run forward a second time.
    """

    cluster: Cluster
    tasks: Mapping[str, TaskModel]
    weights: Weights
    strategy: Strategy
    dtype: str
    mfu: float
    micro_batches: int = 1
    checkpointing: bool = False

    @property
    def computes_in(self) -> int:
        """Bytes of a number in which layers compute."""
        return 2 if self.dtype in ("bf16", "fp8") else 4

    @cached_property
    def parts(self) -> dict[str, Counts]:
        """Task -> part -> what a rank does in a step: the mean over steps with and without a batch of the task."""
        return {
            task: {part: Count.combine([(1 / self.tasks[task].every, count)]) for part, count in counts.items()}
            for task, counts in self._with_all_tasks.items()
        }

    @cached_property
    def _with_all_tasks(self) -> dict[str, Counts]:
        """As `parts`, of a step with a batch of each task."""
        return {task: of.counts(self.cluster.world) for task, of in self.tasks.items()}

    @cached_property
    def _by_part(self) -> Counts:
        return _summed(self.parts)

    @property
    def losses(self) -> list[tuple[TaskModel, str]]:
        """The contrastive losses: task and part."""
        return [(of, part) for of in self.tasks.values() for part in of.losses]

    @property
    def model_flops(self) -> float:
        """Of a rank's step, without recomputation, with the contrastive losses."""
        return sum(count.flops for count in self._by_part.values())

    # ---- seconds of a step

    def compute_seconds(self) -> float:
        """Towers, pools and heads, and what is recomputed of them; not less than the host takes to launch it all."""
        return max(self.busy_seconds(), self.launch_seconds())

    def launch_seconds(self) -> float:
        """What the host takes to launch the operators of a step, the optimizer's too, but not the losses'."""
        named = {part for _, part in self.losses}
        operators = sum(count.operators for part, count in self._by_part.items() if part not in named)
        return (operators + self.weights.update.operators) * default("launch_us")[0] * 1e-6

    def busy_seconds(self) -> float:
        """What the device takes for towers, pools and heads at the assumed share of its peak."""
        named = {part for _, part in self.losses}
        work = sum(count.flops for part, count in self._by_part.items() if part not in named)
        towers = sum(self._by_part.get(part, Count()).forward for part in (IMAGE_TOWER, TEXT_TOWER))
        again = (self.micro_batches > 1) + self.checkpointing
        return (work + again * towers) / (self.cluster.device.peak(self.dtype) * self.mfu)

    def loss_seconds(self) -> float:
        """Contrastive losses, which run in float32: their FLOPs at that peak and their bytes at the memory's rate.

        Not less than the host takes to launch their operators, which may be more with each rank.
        """
        total = sum((self._by_part[part] for _, part in self.losses), Count())
        fp32, hbm = self.cluster.device.peak("fp32"), self.cluster.device.hbm_gbs * 1e9
        return max(total.flops / fp32 + total.moved / hbm, total.operators * default("launch_us")[0] * 1e-6)

    def traffic(self) -> Traffic:
        """What ranks exchange."""
        embeddings = sum(2 * of.mean_batch * self.cluster.world * of.embed_dim * 4 for of, _ in self.losses)
        return traffic(self.cluster, self.strategy, self.weights, embeddings, self.computes_in)

    def step(self) -> dict[str, float]:
        """Seconds of a step by what they are spent on. A third of the computation is the forward pass."""
        compute, loss = self.compute_seconds(), self.loss_seconds()
        exposed = self.traffic().exposed(compute / 3, compute * 2 / 3)
        return {"compute": compute, "loss": loss, "exposed": exposed, "step": compute + loss + exposed}

    def samples_per_second(self) -> float:
        """Of all tasks and ranks."""
        return sum(of.mean_batch for of in self.tasks.values()) * self.cluster.world / self.step()["step"]

    def scaling(self) -> list[dict[str, float]]:
        """Weak scaling: each GPU keeps its batch, and the step of ever more GPUs is set beside that of one."""
        rows = []
        for gpus in SCALES:
            inside = min(gpus, self.cluster.gpus_per_node)
            cluster = replace(self.cluster, nodes=-(-gpus // inside), gpus_per_node=inside)
            of = replace(self, cluster=cluster)
            batch = sum(task.batch_size for task in self.tasks.values()) * cluster.world
            rows.append({"gpus": cluster.world, "batch": batch, **of.step(), "samples/s": of.samples_per_second()})
        alone = rows[0]["samples/s"]
        return [row | {"efficiency": row["samples/s"] / row["gpus"] / alone} for row in rows]

    # ---- memory

    def memory(self) -> dict[str, float]:
        """Bytes of a GPU by what they are for, in a step with all tasks; `total` with what is reserved."""
        peak = sum(of.loss(part, self.cluster.world).peak for of, part in self.losses)
        shards = self.weights.shards(self.strategy, self.cluster.nodes, self.cluster.gpus_per_node)
        parts = per_gpu(
            self.weights,
            _summed(self._with_all_tasks),
            peak,
            self.strategy,
            shards,
            self.cluster.world,
            self.computes_in,
            self.micro_batches,
            self.checkpointing,
        )
        parts["reserved"] = default("reserved_gb")[0] * 1e9
        return parts | {"total": sum(parts.values())}

    @property
    def fits(self) -> bool:
        return self.memory()["total"] <= self.cluster.device.hbm_gb * 1e9

    # ---- the whole run

    def cost(self, steps: int | None, price: float | None) -> dict[str, float | None]:
        """GPU-hours, days and money of a run; None where the number of steps, or the price, is not known."""
        days = None if steps is None else steps * self.step()["step"] / 86400
        gpu_hours = None if days is None else days * 24 * self.cluster.world
        money = None if gpu_hours is None or price is None else gpu_hours * price
        return {"steps": steps, "days": days, "gpu_hours": gpu_hours, "usd": money}

    def storage(self) -> dict[str, float | None]:
        """Task -> bytes of encoded images that are read in a second, by all ranks; None for generated ones."""
        per_second = 1 / self.step()["step"]
        return {
            task: of.image_bytes and of.image_bytes * of.mean_batch * self.cluster.world * per_second
            for task, of in self.tasks.items()
        }


def _summed(tasks: Mapping[str, Counts]) -> Counts:
    """Part -> what is done for all tasks."""
    total: Counts = {}
    for counts in tasks.values():
        for part, count in counts.items():
            total[part] = total.get(part, Count()) + count
    return total


def ways_to_fit(estimate: Estimate, keys: Mapping[str, str]) -> list[str]:
    """What would make a run fit that does not, one change each, and what it would take then.

    Args:
        estimate: Of a run.
        keys: Task -> YAML keys of its batch size.
    """
    found = [_fitting(replace(estimate, strategy=other), _SHARDED[other]) for other in STRATEGIES if other != "ddp"]
    if estimate.strategy != "ddp":
        found = []
    found.append(_gradient_caching(estimate))
    found.append(_fitting(replace(estimate, checkpointing=True), "activation checkpointing of the towers' blocks"))
    found += [_smaller_batch(estimate, task, key) for task, key in keys.items()]
    return [line for line in found if line]


_SHARDED = {
    "fsdp": "trainer.strategy: indiclip.training.sharding.ShardedStrategy, sharded over all GPUs (fsdp)",
    "hsdp": "trainer.strategy: indiclip.training.sharding.ShardedStrategy, sharded within each node (hsdp)",
}


def _gradient_caching(estimate: Estimate) -> str:
    """The fewest parts, a power of two, with which the run fits."""
    for k in (2**power for power in range(1, 16)):
        divides = all(of.batch_size % k == 0 for of in estimate.tasks.values())
        if divides and k > estimate.micro_batches:
            change = f"model.micro_batches: {k} (gradient caching)"
            if line := _fitting(replace(estimate, micro_batches=k), change):
                return line
    return ""


def _fitting(estimate: Estimate, change: str) -> str:
    gigabytes = estimate.memory()["total"] / 1e9
    return f"{change}: {gigabytes:.1f} GB" if estimate.fits else ""


def _smaller_batch(estimate: Estimate, task: str, key: str) -> str:
    """The largest half, quarter, ... of a task's batch with which the run fits."""
    of, world = estimate.tasks[task], estimate.cluster.world
    size = of.batch_size
    while size > 1:
        size //= 2
        tasks = {**estimate.tasks, task: replace(of, batch_size=size, _at_worlds={})}
        if line := _fitting(replace(estimate, tasks=tasks), f"{key}: {size * world}"):
            return line
    return ""
