"""A benchmark run: find the images of the cards, encode each once, score them by every protocol.

The command `indiclip bench` and the callback `IndiaBench` both run this; they differ in the model and in the ranks.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from indiclip.evals.card_scorer import CardScorer, languages_left_out, texts_of
from indiclip.evals.encode import ALONE, Encoded, Ranks, cut_texts, encode_images, encode_texts
from indiclip.evals.find import Bench, card_result
from indiclip.evals.images.items import Items, digest_of
from indiclip.evals.models.embedder import Embedder
from indiclip.evals.protocols.languages import languages_of
from indiclip.evals.protocols.protocol import Options
from indiclip.evals.results import Result, name_of
from indiclip.evals.samples import sample_of

_NAMED = 10  # unreadable images of a card; the others are counted
_FEW = 5_000  # images that are scored by one thread


def run_bench(
    embedder: Embedder,
    bench: Bench,
    options: Options,
    ranks: Ranks = ALONE,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Result | None:
    """Encode and score.

    Args:
        embedder: The model.
        bench: From `find_bench`.
        options: What is scored.
        ranks: Who encodes together.
        batch_size: Images in a batch.
        num_workers: Loader processes.
        progress: Is told how many more images were done.

    Returns:
        The result on rank 0, None on the others.

    Raises:
        ValueError: A view that the model cannot give.
    """
    views = embedder.views(list(dict.fromkeys(options.views)))
    begin = time.monotonic()
    asked = [_asked_for(items, options) for items in bench.items]
    every: ConcatDataset[Any] = ConcatDataset([items.images for items in asked])
    images = encode_images(embedder, every, views, batch_size, num_workers, ranks, progress)
    encoded = time.monotonic()
    texts = {}
    if embedder.embeds_text:
        wanted = [text for items in asked for text in texts_of(items, options)]
        texts = encode_texts(embedder, wanted, ranks)
    prompted = time.monotonic()
    if ranks.rank:
        return None
    result = Result(embedder.name, embedder.lengths, [view.name for view in views], cards=list(bench.skipped))
    cut = cut_texts(embedder, list(texts)) if hasattr(embedder, "tokenize") else set[str]()
    _score_all(result, asked, options, images, texts, cut)
    result.about |= {
        "seconds": {
            "images": round(encoded - begin, 3),
            "texts": round(prompted - encoded, 3),
            "scores": round(time.monotonic() - prompted, 3),
        },
        "images": len(every),
        "texts": len(texts),
    }
    return result


def _asked_for(items: Items, options: Options) -> Items:
    """Without the gallery, where no protocol looks at it."""
    active = [one for one in items.card.protocols if options.probes or not one.is_probe]
    if any(one.uses_gallery for one in active) or items.tested_N.all():
        return items
    return items.select(np.flatnonzero(items.tested_N).tolist())


def logged_names(lengths: Sequence[int], bench: Bench, options: Options) -> list[str]:
    """What `Result.logged` will call the numbers of an embedder of images and texts.

    Zeros are scored, whose numbers have the same names, and from which a probe has nothing to learn: it takes no time.
    """
    num_images = sum(items.num_images for items in bench.items)
    zeros_NE = torch.zeros(num_images, lengths[-1])
    images = Encoded(dict.fromkeys(options.views, zeros_NE), {}, [""] * num_images)
    texts = dict.fromkeys(
        (text for items in bench.items for text in texts_of(items, options)), torch.zeros(lengths[-1])
    )
    result = Result("zeros", list(lengths), list(options.views), cards=list(bench.skipped))
    _score_all(result, bench.items, replace(options, resamples=2), images, texts)
    return list(result.logged())


def _score_all(
    result: Result,
    every: list[Items],
    options: Options,
    images: Encoded,
    texts: dict[str, Tensor],
    cut: Set[str] = frozenset(),
) -> None:
    first = 0
    with _threads(1 if sum(items.num_images for items in every) < _FEW else torch.get_num_threads()):
        for items in every:
            last = first + items.num_images
            part = {view: image_NE[first:last] for view, image_NE in images.images.items()}
            failed = {place - first: why for place, why in images.unreadable.items() if first <= place < last}
            contents = images.contents[first:last] if items.num_images else []
            items = replace(items, contents=contents, notes=list(items.notes))
            if counts := _count_cut(items, options, cut):
                of_languages = ", ".join(f"{code} {count:,} of {of:,}" for code, (count, of) in counts.items())
                what = "captions" if items.captions else "prompts"
                items.notes.append(f"{what} longer than the text tower reads, which were cut: {of_languages}")
            _score_into(result, items, part, failed, texts, options)
            first = last


def _count_cut(items: Items, options: Options, cut: Set[str]) -> dict[str, tuple[int, int]]:
    """Language -> how many of its prompts and captions were cut, and of how many."""
    asked = {language.code: list(language.prompts) for language in languages_of(items.card, options)}
    for code, of_images in items.captions.items():
        if options.wants(code):
            tested = itertools.compress(of_images, items.tested_N)
            asked.setdefault(code, []).extend(text for texts in tested for text in texts)
    counts = {code: (sum(text in cut for text in texts), len(texts)) for code, texts in asked.items()}
    return {code: found for code, found in counts.items() if found[0]}


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many threads for torch. Beside other work the thousands of small operations on a few images wait for each
    other's threads: seconds become minutes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _score_into(
    result: Result,
    items: Items,
    images: dict[str, Tensor],
    unreadable: dict[int, str],
    texts: dict[str, Tensor],
    options: Options,
) -> None:
    notes = list(items.notes)
    if unreadable and len(unreadable) == len(items):
        notes = []  # the reason for which it is skipped is the files
    notes += _unreadable(list(unreadable.values()))
    if unreadable:
        readable = np.setdiff1d(np.arange(len(items)), list(unreadable))
        images = {view: image_NE[readable] for view, image_NE in images.items()}
        items = items.select(readable.tolist())
    scorer = CardScorer(items, images, texts, result.lengths, options).run()
    if texts and len(items):
        notes += languages_left_out(items, options, {score.language for score in scorer.scores})
    result.scores += scorer.scores
    result.answers |= scorer.answers
    main = items.card.protocols[0]
    if not scorer.scores:
        notes.insert(0, _why_no_score(items, texts))
    elif (texts or not main.embeds_text) and not any(score.protocol == main.name for score in scorer.scores):
        notes.insert(0, f"the images have nothing that {main.name} asks about, so there is no main number")
    name = name_of(items.card.id, scorer.part)
    result.about.setdefault("data", {})[name] = items.digest
    prompts = {of.code: digest_of([*of.prompts, *of.class_D.tolist()]) for of in scorer.languages}
    result.about.setdefault("asked", {})[name] = prompts
    found = card_result(items.card, scorer.part, "scored" if scorer.scores else "skipped", notes)
    if scorer.scores:
        found.names = items.card.shown_names(options.languages or [])
        result.samples += sample_of(items, next(iter(images.values())))
    result.cards.append(replace(found, num_images=int(items.tested_N.sum()), num_classes=len(items.shown_classes)))


def _unreadable(reasons: list[str]) -> list[str]:
    lines = [f"not counted, unreadable: {why}" for why in reasons[:_NAMED]]
    return lines + [f"not counted, unreadable: {len(reasons) - _NAMED:,} more"] * (len(reasons) > _NAMED)


def _why_no_score(items: Items, texts: dict[str, Tensor]) -> str:
    if not items.tested_N.any():
        return "none of the images to score can be read"
    if not texts:
        return "the model embeds no texts, and no probe was asked for or has enough to learn from"
    if items.card.classes and not items.shown_classes:
        return "no image to score shows a class of the card"
    if not items.captions:
        return "no protocol of the card has enough images to score"
    return "no image has a caption in the languages that were asked for"
