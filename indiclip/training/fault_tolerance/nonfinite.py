"""A step whose loss or gradient is not finite changes nothing, on any rank."""

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from indiclip import json_lines
from indiclip.distributed import gathered
from indiclip.module import MultiTask
from indiclip.pooling import running_statistics
from indiclip.training.fault_tolerance.ranks import AgreedStop


class NonFinite:
    """Finds such steps, undoes what they did, and reports them in `nonfinite.jsonl`.

    Nothing here makes the host wait for a GPU, but for the report of a step that was found, and for an optimizer that
    cannot be told on the device to do nothing: one that is not fused.

    Args:
        most_in_a_row: The run stops at so many; 0 stops at the first.
    """

    def __init__(self, most_in_a_row: int) -> None:
        self.most_in_a_row = most_in_a_row
        self.count = self.in_a_row = 0
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def open(self, trainer: Trainer, folder: Path) -> None:
        """Count on in a run that goes on, from 0 else. A collective."""
        file = folder / "nonfinite.jsonl"
        rows = json_lines.read(file) if trainer.ckpt_path and trainer.is_global_zero else []
        kept = [row for row in rows if row["step"] <= trainer.global_step]  # the others come again
        if trainer.is_global_zero and file.is_file():
            json_lines.rewrite(file, kept)
        self.count, self.in_a_row = trainer.strategy.broadcast(len(kept)), 0

    def begin(self, module: MultiTask) -> None:
        """Keep the running statistics of batch norm, which the forward pass is about to change."""
        buffers = running_statistics(module)
        if [id(buffer) for buffer, _ in self._statistics] != [id(buffer) for buffer in buffers]:
            self._statistics = [(buffer, buffer.clone()) for buffer in buffers]
        for buffer, kept in self._statistics:
            kept.copy_(buffer)

    def found(self, module: MultiTask, losses: dict[str, Tensor], scaled: bool) -> Tensor:
        """1.0 where this rank's losses or gradients are not finite, else 0.0; a scalar on the device.

        Args:
            losses: Which heads' losses were not finite, see `bad_losses`.
            scaled: The gradients are those of a loss scaled for float16, whose overflow is the scaler's business.
        """
        bad = torch.stack([*losses.values()]).any()
        if not scaled:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            bad = bad | ~torch.isfinite(norm)
        return bad.float()

    def undo(self, module: MultiTask, optimizer: Optimizer, found: Tensor) -> None:
        """Make the coming optimizer step do nothing where any rank `found` something."""
        module.skipped = skip = found.clamp(max=1)
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = skip  # type: ignore[attr-defined]  # read by the fused kernel, as GradScaler's is
        elif skip:
            optimizer.zero_grad(set_to_none=True)
        for buffer, kept in self._statistics:
            buffer.copy_(torch.where(skip > 0, kept, buffer))

    def act(self, trainer: Trainer, folder: Path, step: int, losses: dict[str, Tensor], keys: dict[str, Any]) -> None:
        """Report a step that some rank found; all ranks call this.

        Raises:
            AgreedStop: It was one too many in a row.
        """
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        module = trainer.lightning_module
        assert isinstance(module, MultiTask)
        tasks = {head.name: head.task for head in module.each_head()}
        mine = {"heads": [name for name, bad in losses.items() if bad], "keys": keys}
        ranks = [{"rank": rank, **found} for rank, found in enumerate(gathered(mine))]
        heads = sorted({head for found in ranks for head in found["heads"]})
        named = [head if head == tasks[head] else f"{head} (task {tasks[head]})" for head in heads]
        what = f"the loss of {', '.join(named)}" if heads else "the gradient"
        blamed = [found for found in ranks if found["heads"]] or ranks
        if trainer.is_global_zero:
            json_lines.append(folder / "nonfinite.jsonl", [{"step": step, "heads": heads, "ranks": blamed}])
            print(f"step {step}: {what} is not finite: skipped ({self.in_a_row} in a row)", flush=True)
        if self.in_a_row > self.most_in_a_row:
            some = [key for found in blamed for keys in found["keys"].values() for key in keys][:3]
            raise AgreedStop(
                trainer,
                f"step {step}: {what} was not finite in {self.in_a_row} steps in a row; samples {', '.join(some)}, ... "
                f"(all of them: {folder / 'nonfinite.jsonl'})",
            )


def bad_losses(module: MultiTask) -> dict[str, Tensor]:
    """Whether each head's loss is not finite; scalars on the device."""
    return {name: ~torch.isfinite(loss.detach()) for name, loss in module.head_losses.items()}
