"""Which of a sample's captions is its caption, where it has several, in one language or in many.

In training the languages of an image take turns, in an order that is drawn anew for every round: after as many epochs
as it has languages, an image was seen with each of them once, and every batch mixes them. Within a language its texts
take turns from round to round in the same way. The draw is a function of the plan's place alone, so it is the same
after a resume and with other numbers of workers and ranks; and it is no function of the augmentation's seed, so that no
language sees other crops.
"""

from __future__ import annotations

import re

from indiclip.datasets.tables import stable_hash
from indiclip.types import Sample

CODE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")  # the form of a BCP-47 code: hi, hi-Latn, sat-Olck


def draw_caption(sample: Sample, stream: str, epoch: int = 0) -> Sample:
    """The sample with one of its `captions` as `caption`, and its `language` where that is known.

    A sample without `captions` stays as it is.

    Args:
        stream: Names the image. Two streams have their languages in independent orders.
        epoch: How many times the image was seen before.
    """
    captions = sample.get("captions")
    if not captions:
        return sample
    rounds, turn = divmod(epoch, len(captions))
    # By a hash for each language: another language moves only the images that get it.
    order = sorted(captions, key=lambda language: stable_hash(f"{stream}:{rounds}:{language}"))
    language, texts = order[turn], captions[order[turn]]
    if len(texts) > 1:
        cycle, turn = divmod(rounds, len(texts))
        texts = sorted(texts, key=lambda text: stable_hash(f"{stream}:{cycle}:{language}:{text}"))
    else:
        turn = 0
    drawn = sample | Sample(caption=texts[turn])
    return drawn | Sample(language=language) if language else drawn
