"""A GPU that is not there: fake tensors raise on `.item()`, `nonzero`, indexing by a mask, and `NoWaits` on copies."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from indiclip import flex
from indiclip.generated.mela import Mela
from indiclip.loading.collate import collate
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.preprocessing import Preprocessing
from indiclip.types import Batch, Origin, Rows


def step_batch() -> Batch:
    """Scenes of several sizes, so that there is padding, with captions in three languages."""
    mela = [Mela(2, size, people=1.0, languages=["en", "hi", "ta"], seed=i) for i, size in enumerate([48, [64, 32]])]
    steps = [Steps([Source("t", dataset, 2, max_tokens=40)], 0, Preprocessing(8), train=True) for dataset in mela]
    samples = [steps[i].read("t", ref) for i in (0, 1) for ref in steps[i].plans["t"].batch(0)]
    return collate(samples) | {"origin": Origin("t", classes=mela[0].classes)}


def attention_kernel(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """In the place of flex attention's: of its shape, and depends on all three."""
    return q * k.sum() * v.sum()


class NoWaits(TorchDispatchMode):
    """Raises where a copy between host and device would make the host wait; the rest fake tensors raise on."""

    def __enter__(self) -> Any:
        self._compiled = flex._compiled
        flex._compiled = lambda: attention_kernel  # there is no compiler for such a GPU
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        flex._compiled = self._compiled
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            to, source = (args[0].device, args[1]) if len(args) > 1 else (kwargs.get("device"), args[0])
            waits = not kwargs.get("non_blocking") and not (len(args) > 2 and args[2])
            if to is not None and torch.device(to).type != source.device.type and waits:
                raise RuntimeError(f"{function} from {source.device} to {to} waits for the device")
        return function(*args, **kwargs)


def on_fake_gpu(mode: FakeTensorMode, module: torch.nn.Module) -> None:
    """Replace parameters and buffers by fake ones on `cuda`."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                fake = mode.from_tensor(value.detach()).to("cuda")
                part._parameters[name] = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = mode.from_tensor(value).to("cuda")


def moved(value: Any, device: str) -> Any:
    """As Lightning moves a batch."""
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, Rows):
        return value.to(device)
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
