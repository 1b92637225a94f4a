"""`ShardedStrategy`: FSDP and HSDP in a run.

trainer:
  strategy:
    class_path: indiclip.training.sharding.ShardedStrategy
    init_args: {data_parallel_size: 16, tensor_parallel_size: 8}
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor import empty as empty_shards
from torch.optim import Optimizer

from indiclip.pooling import running_statistics
from indiclip.sharding import gather, is_sharded, like, mesh_of, release
from indiclip.training.fault_tolerance import manifest
from indiclip.training.fault_tolerance.checkpoints import DurableCheckpointIO
from indiclip.training.fault_tolerance.ranks import AgreedStop
from indiclip.training.fault_tolerance.sharded_checkpoints import Saves

_CUDA_BACKEND = "cpu:gloo,cuda:nccl"  # checkpoints are written from the CPU


class ShardedStrategy(ModelParallelStrategy):
    """Weights, gradients and the optimizer's state shared out over ranks (FSDP2), or over groups of them (HSDP).

    Each rank reads samples of its own, whatever the mesh: `tensor_parallel_size` is the number of ranks that share one
    copy of the weights, `data_parallel_size` that of the copies. Checkpoints are folders, which all ranks write while
    they train on; any number of ranks, with any strategy, goes on from one.

    Args:
        data_parallel_size: Copies of the weights; `auto` is one for each node, or what the other size leaves.
        tensor_parallel_size: Ranks that share a copy; `auto` is those of a node, or what the other size leaves.
        process_group_backend: Of torch.distributed; None is NCCL beside gloo on GPUs, else gloo.
        timeout: For what ranks do together.
    """

    def __init__(
        self,
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int | Literal["auto"] = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size,
            tensor_parallel_size,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    # Lightning's two-step loading is for models that are not there before `setup`; ours is, and so a run that goes on
    # does everything in the order in which it does with ddp.
    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank is a data rank."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self) -> None:
        """Start the process groups.

        Raises:
            AgreedStop: The mesh does not fit the ranks.
        """
        if self.root_device.type == "cuda":
            self._process_group_backend = self._process_group_backend or _CUDA_BACKEND
        self.set_world_ranks()
        self._data_parallel_size, self._tensor_parallel_size = self._mesh()
        super().setup_environment()
        group = torch.distributed.new_group(backend="gloo")  # type: ignore[no-untyped-call]
        self._saves = Saves(group)

    def _mesh(self) -> tuple[int, int]:
        """Copies, and ranks of each."""
        world = self.num_nodes * self.num_processes
        given = self._data_parallel_size, self._tensor_parallel_size
        if given == ("auto", "auto"):
            return self.num_nodes, self.num_processes
        copies, shards = (None if size == "auto" else size for size in given)
        copies = copies or max(1, world // (shards or world))
        shards = shards or max(1, world // copies)
        if copies * shards != world:
            divisors = ", ".join(str(size) for size in range(1, world + 1) if world % size == 0)
            raise self._stop(
                f"trainer.strategy.data_parallel_size: found {copies} and tensor_parallel_size {shards}, "
                f"{copies * shards} ranks in all, and the run has {world}; expected two of {divisors} whose product is "
                f"{world}, or auto"
            )
        return copies, shards

    def _stop(self, message: str) -> AgreedStop:
        assert self.lightning_module is not None
        return AgreedStop(self.lightning_module.trainer, message, 2)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """As ddp does it before it begins: all ranks start with the weights of the first.

        Raises:
            AgreedStop: The model, or how it is to be trained, does not go with shards.
        """
        module = self._module()
        if not is_sharded(module):
            if self._layer_sync is not None:
                self._layer_sync.apply(module)
            for tensor in [*module.parameters(), *module.buffers()]:
                torch.distributed.broadcast(tensor.detach(), 0)
        with super().model_sharded_context():
            try:
                yield
            except ValueError as error:
                raise self._stop(str(error)) from error

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The step of this rank."""
        self._share_statistics()
        return super().training_step(*args, **kwargs)

    def _share_statistics(self) -> None:
        """As ddp does it: the running statistics of batch norm are those of the first rank."""
        for buffer in running_statistics(self._module()):
            torch.distributed.broadcast(buffer, 0)

    def on_validation_start(self) -> None:
        """Ranks may have different numbers of samples, and none may wait for another's weights."""
        self._share_statistics()
        gather(self._module())

    def on_validation_end(self) -> None:
        """Only a shard again."""
        release(self._module())

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Shards, as tensors that know of what they are a part."""
        return self._module().state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Likewise."""
        return (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Begin to save a folder; a collective.

        Raises:
            NotSaved: The save before has failed; the same on all ranks.
        """
        self._saves.begin(checkpoint, Path(self.broadcast(filepath)))

    def finish_saving(self) -> None:
        """Wait for it. Raises NotSaved, the same on all ranks, where it failed."""
        self._saves.finish()

    def when_saved(self, action: Callable[[], None]) -> None:
        """Do something when what is being saved is in its place; on the first rank."""
        self._saves.when_saved(action)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Not before the one that is being saved is whole."""
        if self.is_global_zero:
            self.when_saved(partial(manifest.remove, Path(filepath)))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Of a folder this rank's shards, whatever ranks wrote it; or a file."""
        return DurableCheckpointIO().load_checkpoint(self.broadcast(checkpoint_path), place=self._empty)

    def _empty(self, size: torch.Size, dtype: torch.dtype) -> Tensor:
        mesh = mesh_of(self._module())
        placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)] if mesh is not None and size else None
        return empty_shards(size, dtype=dtype, device_mesh=mesh, placements=placements)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Of shards or of whole tensors."""
        own = self._module().state_dict()
        found = {name: like(tensor, own.get(name, tensor)) for name, tensor in checkpoint["state_dict"].items()}
        self._module().load_state_dict(found, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Likewise."""
        own = dict(self._module().named_parameters())
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            for group in saved["param_groups"]:
                for name, key in zip(group["param_names"], group["params"], strict=True):
                    for state, value in saved["state"].get(key, {}).items():
                        if name in own and isinstance(value, Tensor) and value.shape == own[name].shape:
                            saved["state"][key][state] = like(value, own[name])
            optimizer.load_state_dict(saved)

    def teardown(self) -> None:
        """Wait for what is being saved."""
        saves = getattr(self, "_saves", None)  # none where the run ended before it began
        if saves is not None:
            with suppress(Exception):  # said already, or another rank is gone
                saves.finish()
        super().teardown()

    def _module(self) -> nn.Module:
        assert self.lightning_module is not None
        return self.lightning_module
