"""Embeddings of a card's images and texts -> its numbers: every protocol, language, length and view.

Shape letters: see `indiclip.evals.sheet`; T texts, L lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from indiclip.evals import metrics, probes
from indiclip.evals.cosines import as_near, cut
from indiclip.evals.distances import haversine_km, within_km
from indiclip.evals.items import Items
from indiclip.evals.metrics import Interval
from indiclip.evals.results import IMAGES, Prediction, Score
from indiclip.evals.retrieval import caption_ranks, chance_recall, class_ranks
from indiclip.evals.sheet import TOP, Language, Options, Setting, Sheet, language_of, languages_of
from indiclip.evals.zero_shot import Ranking, hard_pairs, rank_classes

RECALL_AT = (1, 5, 10)


def score(
    items: Items,
    images: dict[str, Tensor],
    texts: dict[str, Tensor],
    lengths: Sequence[int],
    options: Options,
    flagged_N: np.ndarray | None = None,
) -> tuple[list[Score], list[Prediction]]:
    """All numbers of a card (without texts: those of images alone) and the main setting's predictions; see `Sheet`."""
    sheet = Sheet(items, images, texts, lengths, options, flagged_N)
    for setting in sheet.settings if texts else []:
        if items.card.task == "matching":
            _match(sheet, setting)
        if items.card.task == "retrieval":
            _retrieve(sheet, setting)
        else:
            _classify(sheet, setting)
    if options.probes and items.card.task != "retrieval":
        for view in images:
            _probe(sheet, view)
    return sheet.scores, sheet.predictions


def texts_of(items: Items, options: Options) -> Iterator[str]:
    """Every text that `score` asks for."""
    for language in languages_of(items.card, options)[0]:
        yield from language.prompts
        yield from language_of(items.card, "en", language.class_D.tolist()).prompts
    for texts in items.candidates or []:
        yield from _asked(items, texts)
    for code, captions in (items.captions or {}).items():
        if options.wants(code):
            yield from (text for texts in captions for text in texts)


def _asked(items: Items, texts: Sequence[str]) -> list[str]:
    """Texts that may stand in an image, as the card's first English prompt asks for them."""
    template = items.card.templates("en")[0]
    return [template.replace("{c}", text) for text in texts]


def _classify(sheet: Sheet, setting: Setting) -> None:
    """Zero-shot in every language, hard pairs, images found by a class's name, places, and what English does better."""
    # Where images are matched with texts, telling the classes (scripts) apart comes second.
    protocol = "zero_shot" if sheet.card.task == "classification" else "classes"
    image_NE, label_N = sheet.images[setting.view], sheet.label_N
    for language in sheet.languages:
        class_DE, class_D = sheet.class_embeddings(language, setting.length), language.class_D
        ranking = rank_classes(image_NE, class_DE, label_N, class_D, nearest=TOP)
        label_M, rank_M, chance = label_N[ranking.image_M], ranking.rank_M, 1 / len(class_D)
        if not len(rank_M):
            continue
        sizes, code = (len(rank_M), len(class_D)), language.code
        sheet.add(setting, protocol, code, sheet.accuracies(rank_M, label_M, len(class_D)), *sizes, chance)
        for subset, of_M in sheet.subsets(ranking.image_M).items():
            values = {"acc1": sheet.rate(rank_M[of_M] == 0)}
            sheet.add(setting, protocol, code, values, int(of_M.sum()), len(class_D), chance, subset)
        found = class_ranks(image_NE, class_DE, label_N, class_D)
        right_M = np.bincount(label_M)[found.class_M]
        recalls, chances = _recalls(sheet, "text_to_image", found.rank_M, right_M, len(label_M), (1, TOP))
        sheet.add(setting, protocol, code, recalls, len(right_M), len(class_D), chances)
        hard = hard_pairs(image_NE, class_DE, label_N, sheet.confusable, class_D)
        if len(hard.image_M):
            values = {"acc1": sheet.rate(hard.hit_M)}
            sheet.add(setting, "hard_pairs", code, values, len(hard.image_M), len(class_D), hard.chance)
        if code != "en":
            english_DE = sheet.class_embeddings(language_of(sheet.card, "en", class_D.tolist()), setting.length)
            english_M = rank_classes(image_NE, english_DE, label_N, class_D).rank_M == 0
            sheet.add(setting, protocol, code, sheet.parity(english_M, rank_M == 0, label_M), *sizes)
        if sheet.places_C2 is not None:
            km_M = haversine_km(sheet.places_C2[label_M], sheet.places_C2[ranking.nearest_MK[:, 0]])
            sheet.add(setting, "places", code, _distances(sheet, km_M), *sizes)
        if setting.main:
            hard_hits = dict(zip(hard.image_M.tolist(), hard.hit_M.tolist(), strict=True))
            _keep_classes(sheet, protocol, language, ranking, hard_hits)


def _distances(sheet: Sheet, km_M: np.ndarray) -> dict[str, Interval]:
    values = {"median_km": metrics.bootstrap_median(km_M, sheet.options.resamples, sheet.options.seed)}
    return values | {f"within_{limit:g}_km": sheet.rate(hit_M) for limit, hit_M in within_km(km_M).items()}


def _keep_classes(
    sheet: Sheet, protocol: str, language: Language, ranking: Ranking, hard_hits: dict[int, bool]
) -> None:
    ids, image_M, nearest_MK = np.array(sheet.card.ids, dtype=object), ranking.image_M, ranking.nearest_MK
    label_M = sheet.label_N[image_M]
    # A tie counts against the right class, wherever it came among equals.
    tied_M = (ranking.rank_M > 0) & (nearest_MK[:, 0] == label_M)
    predicted_M = np.where(tied_M, nearest_MK[:, min(1, nearest_MK.shape[1] - 1)], nearest_MK[:, 0])
    images = image_M.tolist()
    rows = zip(
        [sheet.items.keys[image] for image in images],
        ids[label_M].tolist(),
        ids[predicted_M].tolist(),
        ranking.rank_M.tolist(),
        ids[nearest_MK].tolist(),
        ranking.cosine_MK.tolist(),
        [hard_hits.get(image) for image in images],
        sheet.flagged_N[image_M].tolist(),
        strict=True,
    )
    where = (sheet.card.id, sheet.part, protocol, language.code)
    sheet.predictions += [Prediction(*where, *row) for row in rows]


def _match(sheet: Sheet, setting: Setting) -> None:
    """Which of a few texts stands in the image."""
    assert sheet.items.candidates is not None
    image_M = np.flatnonzero(sheet.tested_N)
    images, rank_M, tops, cosines, chance = cut(sheet.images[setting.view], setting.length), [], [], [], []
    for image in image_M.tolist():
        texts = sheet.items.candidates[image]
        cosine_T = cut(sheet.embed(_asked(sheet.items, texts)), setting.length) @ images[image]
        rank_M.append(int(as_near(cosine_T[1:], cosine_T[0]).sum()))
        chance.append(1 / len(texts))
        if setting.main:
            order = cosine_T.nan_to_num(nan=-2).argsort(descending=True, stable=True)[:TOP].tolist()
            tops.append([texts[i] for i in order])
            cosines.append(cosine_T[order].tolist())
    ranks, of_all = np.array(rank_M), float(np.mean(chance))
    values = {"acc1": sheet.rate(ranks == 0)}
    values["acc1_corrected"] = metrics.chance_corrected(values["acc1"], of_all)
    sheet.add(setting, "matching", "en", values, len(ranks), round(1 / of_all), of_all)
    for subset, of_M in sheet.subsets(image_M).items():
        of_subset = float(np.mean(np.array(chance)[of_M]))
        values = {"acc1": sheet.rate(ranks[of_M] == 0)}
        sheet.add(setting, "matching", "en", values, int(of_M.sum()), round(1 / of_subset), of_subset, subset)
    for image, rank, top, cosine in zip(image_M.tolist(), rank_M, tops, cosines, strict=False):
        truth = sheet.items.candidates[image][0]
        predicted = top[0] if rank == 0 or top[0] != truth else top[1]
        row = (sheet.items.keys[image], truth, predicted, rank, top, cosine, None, bool(sheet.flagged_N[image]))
        sheet.predictions.append(Prediction(sheet.card.id, sheet.part, "matching", "en", *row))


def _retrieve(sheet: Sheet, setting: Setting) -> None:
    """Captions and images find each other, in every language; and what English does better on the same images."""
    captions = sheet.items.captions or {}
    for code, texts_N in captions.items():
        if not sheet.options.wants(code):
            continue
        image_M = np.array([i for i in np.flatnonzero(sheet.tested_N).tolist() if texts_N[i]], dtype=np.int64)
        if not len(image_M):
            continue
        rank_M, rank_T = _caption_ranks(sheet, setting, texts_N, image_M)
        right_M, right_T = np.array([len(texts_N[i]) for i in image_M.tolist()]), np.ones_like(rank_T)
        values, chances = _recalls(sheet, "image_to_text", rank_M, right_M, len(rank_T))
        sheet.add(setting, "retrieval", code, values, len(rank_M), len(rank_T), chances)
        values, chances = _recalls(sheet, "text_to_image", rank_T, right_T, len(rank_M))
        sheet.add(setting, "retrieval", code, values, len(rank_T), len(rank_M), chances)
        for subset, of_M in sheet.subsets(image_M).items():
            values, chances = _recalls(sheet, "image_to_text", rank_M[of_M], right_M[of_M], len(rank_T))
            sheet.add(setting, "retrieval", code, values, int(of_M.sum()), len(rank_T), chances, subset)
        if code != "en" and "en" in captions:
            both_M = np.array([i for i in image_M.tolist() if captions["en"][i]], dtype=np.int64)
            _caption_parity(sheet, setting, code, both_M)
        if setting.main:
            _keep_captions(sheet, code, texts_N, image_M, rank_M)


def _recalls(
    sheet: Sheet,
    way: str,
    rank_Q: np.ndarray,
    right_Q: np.ndarray,
    num_candidates: int,
    at: Sequence[int] = RECALL_AT,
) -> tuple[dict[str, Interval], dict[str, float]]:
    """Recall of queries at each k, and what chance gives."""
    names = {k: f"{way}_r{k}" for k in at}
    chances = {name: chance_recall(right_Q, num_candidates, k) for k, name in names.items()}
    return {name: sheet.rate(rank_Q < k) for k, name in names.items()}, chances


def _caption_ranks(
    sheet: Sheet, setting: Setting, texts_N: list[list[str]], image_M: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    texts = [text for i in image_M.tolist() for text in texts_N[i]]
    image_T = np.repeat(np.arange(len(image_M)), [len(texts_N[i]) for i in image_M.tolist()])
    found = caption_ranks(sheet.images[setting.view][image_M], sheet.embed(texts), image_T, setting.length)
    return found.rank_N, found.rank_T


def _caption_parity(sheet: Sheet, setting: Setting, code: str, image_M: np.ndarray) -> None:
    """English less a language, over the images that have captions in both, as candidates too."""
    captions = sheet.items.captions or {}
    english, other = (_caption_ranks(sheet, setting, captions[language], image_M)[0] for language in ("en", code))
    label_M, options = np.zeros(len(image_M), np.int64), (sheet.options.resamples, sheet.options.seed)
    values = {
        f"parity_image_to_text_r{k}": metrics.parity_gap(english < k, other < k, label_M, "images", *options)
        for k in RECALL_AT
    }
    sheet.add(setting, "retrieval", code, values, len(image_M), len(image_M))


def _keep_captions(sheet: Sheet, code: str, texts_N: list[list[str]], image_M: np.ndarray, rank_M: np.ndarray) -> None:
    texts = [text for i in image_M.tolist() for text in texts_N[i]]
    cosine_MT = cut(next(iter(sheet.images.values())))[image_M] @ cut(sheet.embed(texts)).T
    best = cosine_MT.nan_to_num(nan=-2).topk(min(TOP, len(texts)), dim=1)
    for row, image in enumerate(image_M.tolist()):
        top = [texts[i] for i in best.indices[row].tolist()]
        truth, rank = texts_N[image][0], int(rank_M[row])
        of_image = (sheet.items.keys[image], truth, truth if rank == 0 else top[0], rank, top)
        cosines = cosine_MT[row, best.indices[row]].tolist()
        flagged = bool(sheet.flagged_N[image])
        sheet.predictions.append(
            Prediction(sheet.card.id, sheet.part, "retrieval", code, *of_image, cosines, None, flagged)
        )


def _probe(sheet: Sheet, view: str) -> None:
    """kNN and a linear classifier on the images alone, at every length."""
    image_NE, label_N, is_train_N = sheet.images[view], sheet.items.labels, sheet.items.is_train
    asked = {
        "knn": probes.knn(image_NE, label_N, is_train_N, sheet.lengths),
        "linear_probe": probes.linear_probe(image_NE, label_N, is_train_N, sheet.items.keys, sheet.lengths),
    }
    num_classes = len(np.unique(label_N[label_N >= 0]))
    for protocol, found in asked.items():
        label_M = label_N[found.image_M]
        if not len(label_M) or num_classes < 2:
            continue
        for place, length in enumerate(sheet.lengths):
            setting = Setting(view, length, main=False)
            rank_M = (found.class_LM[place] != label_M).astype(np.int64)
            values = sheet.accuracies(rank_M, label_M, num_classes)
            values.pop("acc5", None)
            sheet.add(setting, protocol, IMAGES, values, len(label_M), num_classes, 1 / num_classes)
