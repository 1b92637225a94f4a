"""Tensors that have a shape and no data, in place of a model's weights and a batch's numbers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from indiclip.types import Rows

_MOST_VALUES = 2**20  # of a tensor of whole numbers that is computed


class HostValues:
    """The real values of whole numbers beside their fake tensors, for models that read some of them on the host.

    As timm's position tables do with the coordinates of patches. What follows from floating-point numbers is not known.
    """

    def __init__(self) -> None:
        self._of: Any = WeakTensorKeyDictionary()

    def know(self, fake: Tensor, real: Tensor) -> None:
        """Keep the values of a tensor."""
        if not real.is_floating_point():
            self._of[fake] = real

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Compute what an operator gives, where all that it gets is known."""
        outs = [value for value in tree_iter(out) if isinstance(value, Tensor)]
        if not outs or any(value.is_floating_point() or value.numel() > _MOST_VALUES for value in outs):
            return
        try:
            args, kwargs = tree_map(self._real, (args, kwargs))
        except KeyError:
            return
        with unset_fake_temporarily():
            real = func(*args, **kwargs)
        for fake, value in zip(tree_iter(out), tree_iter(real), strict=True):
            if isinstance(fake, Tensor):
                self._of[fake] = value

    def read(self, fake: Tensor) -> Any:
        """The number in a tensor of one; None where it is not known."""
        real = self._of.get(fake)
        with unset_fake_temporarily():
            return None if real is None else real.item()

    def _real(self, value: Any) -> Any:
        return self._of[value] if isinstance(value, FakeTensor) else value


@contextmanager
def faked(module: nn.Module) -> Iterator[FakeTensorMode]:
    """While it lasts, the module has fake weights on the CPU, and all tensors that are made are fake."""
    before = [(part, dict(part._parameters), dict(part._buffers)) for part in module.modules()]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}  # tied weights stay tied

    def fake(value: Any) -> Any:
        if value is None:
            return None
        if id(value) not in made:
            with mode:
                empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
            is_weight = isinstance(value, nn.Parameter)
            made[id(value)] = nn.Parameter(empty, value.requires_grad) if is_weight else empty
        return made[id(value)]

    try:
        for part, weights, buffers in before:
            part._parameters.update({name: fake(value) for name, value in weights.items()})
            part._buffers.update({name: fake(value) for name, value in buffers.items()})
        with mode:
            yield mode
    finally:
        for part, weights, buffers in before:
            part._parameters.update(weights)
            part._buffers.update(buffers)


def fake_batch(value: Any, mode: FakeTensorMode, known: HostValues) -> Any:
    """A batch as on a device: tensors are fake, what stays on the host is real."""
    if isinstance(value, dict):
        return {name: fake_batch(part, mode, known) for name, part in value.items()}
    if isinstance(value, Rows):
        values, image_R = fake_batch(value.values, mode, known), fake_batch(value.image_R, mode, known)
        moved = Rows(values, image_R, value.counts, value.known)
        moved.on_host = value.on_host
        return moved
    if not isinstance(value, Tensor):
        return value
    fake = mode.from_tensor(value)
    known.know(fake, value)
    return fake


@contextmanager
def autocast_as_on_cuda(dtype: torch.dtype | None) -> Iterator[None]:
    """Mixed precision on the CPU, but with norms and softmax in float32, as CUDA's autocast has them; None is none."""
    with ExitStack() as stack:
        if dtype is not None:
            stack.enter_context(torch.autocast("cpu", dtype))
            stack.enter_context(_Float32Norms())
        yield


class _Float32Norms(TorchFunctionMode):
    """What CUDA's autocast computes in float32 and the CPU's does not, of what models keep (torch's list of both)."""

    _FUNCTIONS = (F.layer_norm, F.group_norm, F.rms_norm, F.softmax, F.log_softmax, torch.softmax, Tensor.softmax)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._FUNCTIONS:
            return func(*args, **(kwargs or {}))
        wide = [arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args]
        with torch.autocast("cpu", enabled=False):
            return func(*wide, **(kwargs or {}))
