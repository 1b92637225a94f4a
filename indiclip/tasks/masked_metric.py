"""How often hidden patches and tokens are guessed, and pairs told from what does not belong together."""

from collections import defaultdict

import torch
from torch import Tensor

from indiclip.head import ListMetric


class MaskedMetric(ListMetric):
    """`<loss>_accuracy`, and `<loss>_most_frequent`: what always guessing the most frequent answer gets on these data.

    Where targets are vectors, `<loss>_explained` is the share of their squares that is explained; guessing zeros has 0.
    """

    def update(self, name: str, guessed: Tensor, true: Tensor) -> None:
        """Add guesses (K,) of numbers, or (K, D) of vectors."""
        if true.is_floating_point():
            squares = torch.stack([(guessed - true).double().square().sum(), true.double().square().sum()])
            self.add("vectors", name, squares, squares)
        else:
            self.add("numbers", name, guessed.to(torch.int64), true)

    def compute(self) -> dict[str, Tensor]:
        columns: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for kind, name, guessed, true in self.rows_of_all_ranks():
            columns[kind, name].append((guessed, true))
        found: dict[str, Tensor] = {}
        for (kind, name), pairs in columns.items():
            if kind == "vectors":
                error, total = torch.stack([squares for squares, _ in pairs]).sum(0)
                found[f"{name}_explained"] = (1 - error / total).float()
                continue
            guessed_K, true_K = (torch.cat(column) for column in zip(*pairs, strict=True))
            if len(true_K):
                found[f"{name}_accuracy"] = (guessed_K == true_K).float().mean()
                found[f"{name}_most_frequent"] = true_K.bincount().max() / len(true_K)
        return found
