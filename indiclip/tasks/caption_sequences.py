"""What a caption decoder reads and is to predict, of one text per image: captions, and names and places of things.

Shape letters: see `indiclip.types`; L predicted tokens of all images.
"""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from indiclip.tasks.caption_vocabulary import CaptionVocabulary
from indiclip.types import Batch, class_names, random_seeds


class Prompted(NamedTuple):
    """A text to be predicted, without its end.

    Attributes:
        prompt: What stands before it.
        answer: Its ids.
        parallel: Whether each of its tokens is predicted from the image and the prompt alone.
    """

    prompt: list[int]
    answer: list[int]
    parallel: bool = False


class Sequences(NamedTuple):
    """One sequence per image.

    Attributes:
        ids_BT: What is read; ends are padding.
        mask_BTT: True where a token may look at another; None where at all before it, and at no other.
        places_L: Among the B * T places, those at which something is predicted.
        targets_L: What is to be predicted there: the answers' ids, each with an end.
        weights_L: One over the number of these of the same image; 0 where an image has no text.
        image_L: The image of each.
        num_tokens: Predicted tokens of each image; on the host, 0 where it has no text.
    """

    ids_BT: Tensor
    mask_BTT: Tensor | None
    places_L: Tensor
    targets_L: Tensor
    weights_L: Tensor
    image_L: Tensor
    num_tokens: list[int]

    def to(self, device: torch.device) -> "Sequences":
        """On the device, without waiting for it."""
        parts: list[Any] = [part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self]
        return Sequences(*parts)


def sequences_of(texts: Sequence[Prompted | None], vocabulary: CaptionVocabulary) -> Sequences:
    """Put texts together, on the host. An image without a text reads an end, and predicts one with weight 0.

    Parallel prediction is that of CapPa (Tschannen et al., NeurIPS 2023, arXiv:2306.07915): the answer's tokens are
    replaced by masks, and all see each other. Padding nobody sees, so that a text's loss does not depend on the others
    of its batch; so the number of masks tells how long the text is, which CapPa's texts of one length do not.
    """
    nothing = Prompted([vocabulary.end], [])
    filled = [text or nothing for text in texts]
    inputs = [
        torch.tensor([*text.prompt, *([vocabulary.mask] * len(text.answer) if text.parallel else text.answer)])
        for text in filled
    ]
    ids_BT = pad_sequence(inputs, batch_first=True, padding_value=vocabulary.end)
    longest = ids_BT.shape[1]
    # The last token of the prompt predicts the answer's first, and its last token the end.
    counts = [len(text.answer) + 1 for text in filled]
    first_places = [row * longest + len(text.prompt) - 1 for row, text in enumerate(filled)]
    # Of lists: how long they are is then known without values, which a plan's tensors do not have.
    places = [place for first, n in zip(first_places, counts, strict=True) for place in range(first, first + n)]
    weights = [(text is not None) / n for text, n in zip(texts, counts, strict=True) for _ in range(n)]
    return Sequences(
        ids_BT=ids_BT,
        mask_BTT=_mask(inputs, [text.parallel for text in filled], longest),
        places_L=torch.tensor(places),
        targets_L=torch.tensor([id for text in filled for id in (*text.answer, vocabulary.end)]),
        weights_L=torch.tensor(weights),
        image_L=torch.tensor([image for image, n in enumerate(counts) for _ in range(n)]),
        num_tokens=[count if text else 0 for count, text in zip(counts, texts, strict=True)],
    )


def _mask(inputs: list[Tensor], is_parallel: list[bool], longest: int) -> Tensor | None:
    if not any(is_parallel):
        return None
    valid_BT = torch.arange(longest) < torch.tensor([len(row) for row in inputs])[:, None]
    parallel_B11 = torch.tensor(is_parallel)[:, None, None]
    earlier_TT = torch.ones(longest, longest, dtype=torch.bool).tril()
    return earlier_TT | parallel_B11 & valid_BT[:, None]


class Region(NamedTuple):
    """A box of an image, in resized pixels, and the name of its class."""

    name: str
    box_xyxy: list[float]


def drawn_regions(batch: Batch) -> list[Region | None]:
    """A box of each image that has one which is no crowd and whose class has a name, drawn by the sample's seed."""
    boxes, classes, crowd = (batch["targets"].get(name) for name in ("boxes_xyxy", "classes", "crowd"))
    names = class_names(batch)
    if boxes is None or classes is None or not names:
        return [None] * len(batch["keys"])
    labels, boxes_xyxy = classes.on_host.tolist(), boxes.on_host.tolist()
    in_crowd = [False] * len(labels) if crowd is None else crowd.on_host.tolist()
    regions: list[Region | None] = []
    for image, seed in enumerate(random_seeds(batch)):
        rows = boxes.rows_of(image) if classes.known[image] else slice(0, 0)
        single = [row for row in range(rows.start, rows.stop) if not in_crowd[row]]
        row = Random(f"region {seed}").choice(single) if single else None
        regions.append(None if row is None else Region(names[labels[row]], boxes_xyxy[row]))
    return regions


def region_texts(
    regions: Sequence[Region | None],
    name_ids: Mapping[str, list[int]],
    sizes_hw: Sequence[tuple[int, int]],
    vocabulary: CaptionVocabulary,
) -> tuple[list[Prompted | None], list[Prompted | None]]:
    """LocCa's two tasks beside captions: the box of a name (AREF), and a box with its name (GCAP)."""
    refer: list[Prompted | None] = []
    ground: list[Prompted | None] = []
    for region, size_hw in zip(regions, sizes_hw, strict=True):
        name = name_ids[region.name] if region else []
        box = vocabulary.box(region.box_xyxy, size_hw) if region else []
        refer.append(Prompted([vocabulary.refer, *name], box) if region else None)
        ground.append(Prompted([vocabulary.ground], [*box, *name]) if region else None)
    return refer, ground


def boxes_of_class(batch: Batch, image: int, name: str) -> Tensor:
    """An image's boxes (M, 4), on the host."""
    boxes, classes = batch["targets"]["boxes_xyxy"], batch["targets"]["classes"]
    rows = boxes.rows_of(image)
    boxes_M4: Tensor = boxes.on_host[rows][classes.on_host[rows] == class_names(batch).index(name)]
    return boxes_M4.float()
