"""What a training step does: operations, FLOPs and bytes by part, counted without computing anything.

The model's weights are replaced by fake tensors, which have a shape and no data, and one real step runs on them. So no
formula of ours has to follow the model: FLOPs are those of torch's own table, what the backward pass keeps is what
autograd keeps, and a head that somebody else wrote is counted like ours.
"""

import weakref
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from indiclip.chunked_cross_entropy import chunks_as_on
from indiclip.head import Head, computed
from indiclip.planning.fake import HostValues, autocast_as_on_cuda, fake_batch, faked
from indiclip.planning.parts import IMAGE_TOWER, blocks, parts_of
from indiclip.ratios import over_all_ranks
from indiclip.task_weights import Fixed, TaskWeights, gradients_of
from indiclip.types import Batch, Features

_aten = torch.ops.aten
_OUT_OF_PLACE = {_aten.addmm_: _aten.addmm}  # torch's table lacks the one that writes into its input
# Before 2.15 the table lacks attention on a CPU, whose arguments are those of CUDA's.
flop_registry.setdefault(
    _aten._scaled_dot_product_flash_attention_for_cpu, flop_registry[_aten._scaled_dot_product_flash_attention]
)
flop_registry.setdefault(
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    flop_registry[_aten._scaled_dot_product_flash_attention_backward],
)


def _convolution_backward(*args: Any, out_val: Any) -> float:
    """FLOPs of a convolution's gradients: of the input and of the weight as many as forward.

    torch's formula counts the weight's as if each group read all channels: in depthwise ones of C, C times.
    """
    formula = flop_registry[_aten.convolution_backward]
    *others, groups, (of_input, of_weight, _) = args
    flops_input, flops_weight = (
        formula(*others, groups, mask, out_val=out_val)
        for mask in ((of_input, False, False), (False, of_weight, False))
    )
    return float(flops_input + flops_weight / groups)


@dataclass(frozen=True)
class Count:
    """What is done for one part of a step.

    Attributes:
        forward: FLOPs (a multiply-add is two) of matrix products, convolutions and attention.
        backward: The same of the backward pass, and of gradients that a loss computes by itself.
        moved: Bytes that operators read and write, if each reads its inputs and writes its outputs once.
        attention: Those of the FLOPs that are of fused attention.
        exponentials: Numbers that an operator makes by exp, erf, tanh or the like, fused attention aside.
        operators: Calls of operators that are no mere views.
        saved: Bytes that are kept for the backward pass beside the weights, each storage once.
        block_inputs: Bytes that enter the blocks of the towers: what activation checkpointing keeps of them.
    """

    forward: float = 0
    backward: float = 0
    moved: float = 0
    attention: float = 0
    exponentials: float = 0
    operators: float = 0
    saved: float = 0
    block_inputs: float = 0

    @property
    def flops(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: "Count") -> "Count":
        return self.combine([(1, self), (1, other)])

    @staticmethod
    def combine(weighted: "list[tuple[float, Count]]") -> "Count":
        """The weighted sum."""
        names = Count.__dataclass_fields__
        return Count(**{name: sum(weight * getattr(count, name) for weight, count in weighted) for name in names})


# Operators that take an exponential of each number; of backward passes only those that take one again.
_EXPONENTIAL = {"exp", "tanh", "erf", "sigmoid", "gelu", "gelu_backward", "silu", "silu_backward", "softplus"}
_EXPONENTIAL |= {"softplus_backward", "_softmax", "_log_softmax", "_log_softmax_backward_data", "exp_", "sigmoid_"}

Counts = dict[str, Count]  # part -> what is done for it


def count_step(
    module: Any, batches: Mapping[str, Batch], autocast: torch.dtype | None = None, backward: bool = True
) -> dict[str, Counts]:
    """Count one training step, its optimizer aside.

    Args:
        module: A `MultiTask`, or what has its `encoder` and `each_head`; on any device, not sharded. It is not changed.
        batches: Task -> batch on the CPU, of this rank.
        autocast: Data type of mixed precision.
        backward: False counts the forward pass alone.

    Returns:
        Task -> part -> count. Parts are the two towers, `pools, projections`, and each head by its name; a contrastive
        loss is `<head> loss`.
    """
    counts: dict[str, Counts] = {}
    with faked(module) as fake, autocast_as_on_cuda(autocast), chunks_as_on("cuda"):
        for task, batch in batches.items():
            heads = [head for head in module.each_head() if head.task == task]
            known = HostValues()
            fake_of_task = fake_batch(batch, fake, known)
            with (
                OperatorCounter(module, IMAGE_TOWER, known) as counter,
                parts_of(module, heads, counter),
                _blocks_of(module.encoder, counter),
            ):
                losses = _losses(module.encoder, heads, fake_of_task, counter)
                if backward:
                    _backward(module, losses)
            counts[task] = counter.counts()
    return counts


def _losses(encoder: Any, heads: list[Head], batch: Batch, counter: "OperatorCounter") -> dict[str, Tensor]:
    """Of each head, in the step of a task as in `MultiTask.training_step`."""
    found: dict[str, Tensor] = {}
    with encoder.remembering():
        features: Mapping[str, Features]
        features = encoder.features_behind(batch["images"], {head.name: head.block for head in heads})
        for head in heads:
            with counter.part(head.name):
                losses = computed(head.loss(features[head.name], batch, encoder))
                found[head.name] = sum(over_all_ranks(losses.terms).values(), torch.zeros(()))
    return found


def _backward(module: Any, losses: Mapping[str, Tensor]) -> None:
    """As in `MultiTask.training_step`: of each head by itself where its strategy asks for that, and of their sum."""
    strategy: TaskWeights = getattr(module, "task_weights", Fixed())
    if watched := strategy.watched(module):
        gradients_of(losses, watched)
    total = sum(losses.values(), torch.zeros(()))
    if total.requires_grad and not strategy.makes_gradients:
        total.backward()  # type: ignore[no-untyped-call]


class OperatorCounter(TorchDispatchMode):
    """Counts every operator for the part of a model that it belongs to.

    An operator of the backward pass belongs to where its node of the graph was made: nodes are numbered one after the
    other, and the numbers at which a part begins and ends are noted.

    Args:
        module: Whose weights are no activations; they are fake already.
        part: What belongs to no other part.
        known: Values that `.item()` may ask for.
        read_as: What `.item()` gives of others, as of the step's number in an optimizer; None lets it raise.

    Attributes:
        sums: Part -> field of `Count` -> sum.
        peak: The most bytes that were alive at once beside the weights.
    """

    def __init__(
        self, module: nn.Module, part: str, known: HostValues | None = None, read_as: float | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known, self._read_as = known or HostValues(), read_as
        self.sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.peak, self._alive = 0, 0
        self._parts = [part]  # the innermost part comes last
        self._begins, self._of = [0], [part]  # node numbers, and the part from each on
        # Kept alive, so that no number is used twice. Those of the weights are no activations.
        weights = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
        self._kept = {storage._cdata: storage for storage in weights}
        self._tensors: dict[int, int] = dict.fromkeys(self._kept, 1)  # storage -> tensors that lie in it
        self._saving: Any = saved_tensors_hooks(self._save, lambda tensor: tensor)

    def __enter__(self) -> Any:
        self._saving.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._saving.__exit__(*error)

    def counts(self) -> Counts:
        """By part."""
        return {part: Count(**sums) for part, sums in self.sums.items()}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to a part."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, part: str, *_: Any) -> None:
        """What follows belongs to a part."""
        self._parts.append(part)
        self._note()

    def leave(self, *_: Any) -> None:
        """The part that was entered last has ended."""
        self._parts.pop()
        self._note()

    def enter_block(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A block of a tower begins, with these inputs."""
        entering = next((value for value in inputs if isinstance(value, Tensor)), None)
        self.sums[self._parts[-1]]["block_inputs"] += 0 if entering is None else _size(entering)

    def _note(self) -> None:
        self._begins.append(_next_node())
        self._of.append(self._parts[-1])

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._kept:
            self._kept[storage._cdata] = storage
            self.sums[self._parts[-1]]["saved"] += storage.nbytes()
        return tensor

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number not in self._tensors:
            self._tensors[number] = 0
            self._alive += size
            self.peak = max(self.peak, self._alive)
        self._tensors[number] += 1
        weakref.finalize(tensor, self._forget, number, size)

    def _forget(self, number: int, size: int) -> None:
        self._tensors[number] -= 1
        if not self._tensors[number]:
            del self._tensors[number]
            self._alive -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            read = self._known.read(args[0])
            if (read := self._read_as if read is None else read) is not None:
                return read
        out = func(*args, **kwargs)
        self._known.follow(func, args, kwargs, out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        if func.is_view or func.namespace == "prim":
            return out
        node = torch._C._current_autograd_node()
        part = self._parts[-1]
        if node is not None and node._sequence_nr() < 2**63:  # those of the weights' gradients have no number
            part = self._of[bisect_right(self._begins, node._sequence_nr()) - 1]
        sums = self.sums[part]
        sums["operators"] += 1
        read = {name: value for name, value in kwargs.items() if name != "out"}
        sums["moved"] += sum(_size(value) for value in tree_iter((args, read, out)) if isinstance(value, Tensor))
        name = func._overloadpacket.__name__
        if name in _EXPONENTIAL:
            sums["exponentials"] += sum(value.numel() for value in tree_iter(out) if isinstance(value, Tensor))
        packet = _OUT_OF_PLACE.get(func._overloadpacket, func._overloadpacket)
        formula = _convolution_backward if packet is _aten.convolution_backward else flop_registry.get(packet)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            sums["forward" if node is None else "backward"] += flops
            sums["attention"] += flops if "attention" in name else 0
        return out


@contextmanager
def _blocks_of(encoder: Any, counter: OperatorCounter) -> Iterator[None]:
    """While it lasts, the towers tell the counter what enters their blocks."""
    with ExitStack() as undo:
        for block in (*blocks(encoder.backbone), *blocks(encoder.text)):
            undo.callback(block.register_forward_pre_hook(counter.enter_block).remove)
        yield


def _next_node() -> int:
    """The number that the graph's next node will have in this thread."""
    return torch._C._autograd._get_sequence_nr()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
