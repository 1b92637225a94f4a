"""Gradients of a batch that does not fit the device, exactly those of the whole batch (gradient caching).

Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021,
arXiv:2101.06983. Each part of the batch goes through the model twice. First without gradients, for what the losses need
of it: pooled vectors where samples are compared with each other, sums and counts elsewhere. Then, with the losses'
gradients on these, once more, and the gradients go on into the weights. Memory is that of one part; the price is one
more forward pass. Plain accumulation of gradients would compare each sample with those of its own part alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from indiclip.autograd import with_gradients
from indiclip.head import Losses, WholeBatch
from indiclip.pooling import running_statistics
from indiclip.ratios import added
from indiclip.types import Batch, part_of

Outputs = dict[str, Losses | WholeBatch]  # of each head


def split(batches: dict[str, Batch], number: int) -> list[dict[str, Batch]]:
    """`number` parts of a step. The last has images of every task, also where a task has fewer images than parts."""
    parts: list[dict[str, Batch]] = [{} for _ in range(number)]
    for task, batch in batches.items():
        count = len(batch["keys"])
        bounds = [i * count // number for i in range(number + 1)]
        for part, first, last in zip(parts, bounds, bounds[1:], strict=False):
            if first < last:
                part[task] = part_of(batch, first, last)
    return [part for part in parts if part]


class CachedGradients:
    """The gradients of a step by its parts.

    Args:
        parts: Of the step.
        outputs: What the heads make of a part, given its number too; random parts are the same when called again.
        total: The loss of the outputs of all parts.
        module: Its parameters and buffers are all that `outputs` and `total` use.
        scale: Of gradients, where the caller will scale those of the loss.
    """

    def __init__(
        self,
        parts: list[dict[str, Batch]],
        outputs: Callable[[int, dict[str, Batch]], Outputs],
        total: Callable[[Outputs], Tensor],
        module: nn.Module,
        scale: Callable[[Tensor], Tensor],
    ) -> None:
        self._parts, self._outputs, self._total, self._scale = parts, outputs, total, scale
        self._module = module

    def run(
        self, losses: Callable[[], Mapping[str, Tensor]], watched: Sequence[Tensor] = (), accumulate: bool = True
    ) -> tuple[Tensor, dict[str, list[Tensor | None]]]:
        """The loss of the step, with the gradients of all parts but the last already in the parameters.

        Args:
            losses: Gives each head's part of the total, once that is made.
            watched: Parameters on which each head's own gradient is wanted too.
            accumulate: False makes no others.

        Returns:
            A scalar whose backward pass adds the gradients of the last part, and those of what `total` used itself. So
            a wrapper that waits for every parameter's gradient once, as DDP, finds them all there. And each head's
            gradients on `watched`.
        """
        with torch.no_grad():
            cached = [_as_leaves(self._outputs(i, part)) for i, part in enumerate(self._parts)]
        statistics = running_statistics(self._module)  # which the second pass must find as the first did
        before = [buffer.clone() for buffer in statistics]
        loss = self._total(merge(cached))
        after = [buffer.clone() for buffer in statistics]
        _set(statistics, before)
        own = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        leaves = [_values(of_part) for of_part in cached]
        inputs = [*own, *(leaf for of_part in leaves for leaf in of_part)]
        of_heads = {name: _Replayed(part, watched, cached, name) for name, part in losses().items() if watched}
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)

        reached: list[tuple[Tensor, Tensor]] = []
        own_gradients, remaining = gradients[: len(own)], iter(gradients[len(own) :])
        of_leaves = [[next(remaining) for _ in of_part] for of_part in leaves]
        for number, part in enumerate(self._parts):
            outputs = self._outputs(number, part)
            for name in of_heads.keys() & outputs.keys():
                of_heads[name].add(number, outputs)
            pairs = zip(_values(outputs), of_leaves[number], strict=True)
            reached = [(value, gradient) for value, gradient in pairs if value.requires_grad and gradient is not None]
            if accumulate and number < len(self._parts) - 1:
                values, of_values = zip(*reached, strict=True)
                torch.autograd.backward(values, [self._scale(gradient) for gradient in of_values])
        reached += [(p, gradient) for p, gradient in zip(own, own_gradients, strict=True) if gradient is not None]
        _set(statistics, after)
        found = {name: replayed.gradients for name, replayed in of_heads.items()}
        if not accumulate:
            return loss.detach(), found
        reached_inputs, of_inputs = zip(*reached, strict=True)
        return with_gradients(loss.detach(), of_inputs, reached_inputs), found


class _Replayed:
    """The gradient of one head's loss on some parameters, of which each part adds its share when it is computed again.

    Args:
        loss: Of the head, made of the cached outputs.
        parameters: See above.
        cached: The outputs of all parts.
        name: Of the head.
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor], cached: list[Outputs], name: str) -> None:
        self._name, self._parameters = name, parameters
        leaves = [_values({name: outputs[name]}) if name in outputs else [] for outputs in cached]
        inputs = [*parameters, *(leaf for of_part in leaves for leaf in of_part)]
        found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        self.gradients: list[Tensor | None] = list(found[: len(parameters)])
        of_leaves = iter(found[len(parameters) :])
        self._of_leaves = [[next(of_leaves) for _ in of_part] for of_part in leaves]

    def add(self, number: int, outputs: Outputs) -> None:
        """The share of a part, whose outputs now have a graph."""
        pairs = zip(_values({self._name: outputs[self._name]}), self._of_leaves[number], strict=True)
        reached = [(value, gradient) for value, gradient in pairs if value.requires_grad and gradient is not None]
        if not reached:
            return
        values, gradients = zip(*reached, strict=True)
        more = torch.autograd.grad(values, self._parameters, gradients, retain_graph=True, allow_unused=True)
        self.gradients = [
            one if other is None else other if one is None else one + other
            for one, other in zip(self.gradients, more, strict=True)
        ]


def merge(parts: list[Outputs]) -> Outputs:
    """The outputs of all parts as if they were of one; rows that heads share in each part are shared in the whole."""
    names = dict.fromkeys(name for outputs in parts for name in outputs)
    whole: dict[tuple[int, ...], Any] = {}
    return {name: _merge([outputs[name] for outputs in parts if name in outputs], whole) for name in names}


def _merge(parts: list[Any], whole: dict[tuple[int, ...], Any]) -> Losses | WholeBatch:
    if not isinstance(parts[0], WholeBatch):
        return Losses(added([part.terms for part in parts]), added([part.logged for part in parts]))
    rows = [*zip(*(part.rows for part in parts), strict=True)]
    keys = [tuple(map(id, pieces)) for pieces in rows]
    for key, pieces in zip(keys, rows, strict=True):
        if key not in whole:
            whole[key] = _concatenated(pieces)
    return WholeBatch(parts[0].function, tuple(whole[key] for key in keys))


def _concatenated(pieces: tuple[Any, ...]) -> Any:
    """All rows; those of tensors are filled with zeros up to the longest, as patches and tokens are in a batch."""
    if not isinstance(pieces[0], Tensor):
        return [row for piece in pieces for row in piece]
    longest = [max(sides) for sides in zip(*(piece.shape[1:] for piece in pieces), strict=True)]
    return torch.cat([_filled(piece, longest) for piece in pieces])


def _filled(piece: Tensor, shape: list[int]) -> Tensor:
    missing = [side - own for side, own in zip(shape, piece.shape[1:], strict=True)]
    return F.pad(piece, [n for side in reversed(missing) for n in (0, side)]) if any(missing) else piece


def _set(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def _as_leaves(outputs: Outputs) -> Outputs:
    """The outputs with leaves as their tensors, one for each, however many heads have it."""
    leaves: dict[int, Tensor] = {}

    def leaf(tensor: Tensor) -> Tensor:
        if id(tensor) not in leaves:
            leaves[id(tensor)] = tensor.detach().requires_grad_(tensor.is_floating_point())
        return leaves[id(tensor)]

    found: Outputs = apply_to_collection(outputs, Tensor, leaf)
    return found


def _values(outputs: Outputs) -> list[Tensor]:
    """The tensors through which gradients may flow, each once, in an order of their own.

    What is logged is not among them: it may be more when a part comes again, after others had a new language.
    """
    found: list[Tensor] = []
    for output in outputs.values():
        through = output.terms if isinstance(output, Losses) else output.rows
        apply_to_collection(through, Tensor, found.append)
    return [*{id(tensor): tensor for tensor in found if tensor.is_floating_point()}.values()]
