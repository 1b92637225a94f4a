"""Where the temperature of a model's embeddings lies, and whether a run may begin with it."""

from collections.abc import Iterable, Iterator

from indiclip.head import Head
from indiclip.losses import ContrastiveLoss, PairLoss


def logits_of(heads: Iterable[Head]) -> str:
    """Where the temperature of a model's embeddings lies: the path of a loss, such as `heads.contrastive.criterion`.

    That of the contrastive loss, if it has a weight. Of a model that only distils it is that of the distance to the
    teacher, as nothing trains the other. Empty where there are several such losses, or none.
    """
    losses = [(path, loss, head.weight) for head in heads for path, loss in _losses(head)]
    trained = [(path, loss) for path, loss, weight in losses if weight] or [(path, loss) for path, loss, _ in losses]
    paths = [path for path, loss in trained if isinstance(loss, ContrastiveLoss)] or [path for path, _ in trained]
    return paths[0] if len(paths) == 1 else ""


def check_scales(heads: Iterable[Head]) -> None:
    """Raise ValueError for a pretrained temperature that the first step would change, see `PairLoss.check_scale`."""
    for head in heads:
        for _, loss in _losses(head):
            loss.check_scale()


def _losses(head: Head) -> Iterator[tuple[str, PairLoss]]:
    for path, loss in head.named_modules():
        if isinstance(loss, PairLoss):
            yield f"heads.{head.name}.{path}", loss
