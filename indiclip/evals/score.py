"""Embeddings of a card's images and texts -> its numbers: every protocol, language, length and view.

Shape letters: see `indiclip.evals.card_scorer`; T texts, L lengths.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from indiclip.evals.card_scorer import TOP, CardScorer, Language, Options, Setting, language_of, languages_of
from indiclip.evals.images.items import Items
from indiclip.evals.protocols import metrics, probes
from indiclip.evals.protocols.cosines import as_near, chunks, truncate_normalize
from indiclip.evals.protocols.distances import haversine_km, within_km
from indiclip.evals.protocols.metrics import Interval
from indiclip.evals.protocols.retrieval import CaptionRanks, caption_ranks, chance_recall, class_ranks
from indiclip.evals.protocols.zero_shot import Ranking, hard_pairs, rank_classes
from indiclip.evals.results import CLEAN, IMAGES

RECALL_AT = (1, 5, 10)


def score(scorer: CardScorer) -> CardScorer:
    """Adds all numbers of a card (without texts: those of images alone), and the predictions of its main setting."""
    if not scorer.items.tested_N.any():
        return scorer
    task = scorer.card.task
    for setting in scorer.settings if scorer.texts else []:
        if task == "matching":
            _match(scorer, setting)
        if task == "retrieval":
            _retrieve(scorer, setting)
        else:
            _classify(scorer, setting)
    if scorer.options.probes and task != "retrieval":
        for view in scorer.images:
            _probe(scorer, view)
    return scorer


def texts_of(items: Items, options: Options) -> Iterator[str]:
    """Every text that `score` asks for."""
    for language in languages_of(items.card, options):
        yield from language.prompts
        yield from language_of(items.card, "en", language.class_D.tolist()).prompts
    for image in np.flatnonzero(items.tested_N).tolist():
        if items.candidates:
            yield from _asked(items, items.candidates[image])
        for code, texts_N in (items.captions or {}).items():
            if options.wants(code):
                yield from texts_N[image]


def _asked(items: Items, texts: Sequence[str]) -> list[str]:
    """Texts that may stand in an image, as the card's first English prompt asks for them."""
    template = items.card.templates("en")[0]
    return [template.replace("{c}", text) for text in texts]


def _classify(scorer: CardScorer, setting: Setting) -> None:
    """Zero-shot in every language, hard pairs, images found by a class's name, places, and what English does better."""
    # Where images are matched with texts, telling the classes (scripts) apart comes second.
    protocol = "zero_shot" if scorer.card.task == "classification" else "classes"
    image_NE, label_N = scorer.images[setting.view], scorer.label_N
    for language in scorer.languages:
        class_DE, class_D = scorer.class_embeddings(language, setting.length), language.class_D
        ranking = rank_classes(image_NE, class_DE, label_N, class_D, nearest=TOP)
        label_M, rank_M, chance = label_N[ranking.image_M], ranking.rank_M, 1 / len(class_D)
        if not len(rank_M):
            continue
        sizes, code = (len(rank_M), len(class_D)), language.code
        for subset, of_M in scorer.subsets(ranking.image_M).items():
            values = {"acc1": scorer.rate(rank_M[of_M] == 0)}
            if subset in ("", CLEAN):
                values = scorer.accuracies(rank_M[of_M], label_M[of_M], len(class_D))
            scorer.add(setting, protocol, code, values, int(of_M.sum()), len(class_D), chance, subset)
        found = class_ranks(image_NE, class_DE, label_N, class_D)
        right_M, at = np.bincount(label_M)[found.class_M], (1, TOP)
        values = _recalls_at(scorer, "text_to_image", found.rank_M, at)
        chances = _chances("text_to_image", right_M, len(rank_M), at)
        scorer.add(setting, protocol, code, values, len(right_M), len(rank_M), chances)
        hard = hard_pairs(image_NE, class_DE, label_N, scorer.confusable, class_D)
        if len(hard.image_M):
            values = {"acc1": scorer.rate(hard.hit_M)}
            scorer.add(setting, "hard_pairs", code, values, len(hard.image_M), len(class_D), hard.chance)
        if code != "en":
            english_DE = scorer.class_embeddings(language_of(scorer.card, "en", class_D.tolist()), setting.length)
            english_M = rank_classes(image_NE, english_DE, label_N, class_D).rank_M == 0
            scorer.add(setting, protocol, code, scorer.gap_to_english(english_M, rank_M == 0, label_M), *sizes)
        if scorer.places_C2 is not None:
            km_M = haversine_km(scorer.places_C2[label_M], scorer.places_C2[_predicted(ranking, label_M)])
            scorer.add(setting, "places", code, _distances(scorer, km_M), *sizes)
        if setting.main:
            hard_hits = dict(zip(hard.image_M.tolist(), hard.hit_M.tolist(), strict=True))
            _keep_classes(scorer, protocol, language, ranking, hard_hits)


def _predicted(ranking: Ranking, label_M: np.ndarray) -> np.ndarray:
    """The class of each image's answer. A tie counts against the right class, wherever it came among equals."""
    first_M, second_M = ranking.nearest_MK[:, 0], ranking.nearest_MK[:, 1]
    return np.where((ranking.rank_M > 0) & (first_M == label_M), second_M, first_M)


def _distances(scorer: CardScorer, km_M: np.ndarray) -> dict[str, Interval]:
    values = {"median_km": metrics.bootstrap_median(km_M, *scorer.draws)}
    return values | {f"within_{limit}_km": scorer.rate(hit_M) for limit, hit_M in within_km(km_M).items()}


def _keep_classes(
    scorer: CardScorer, protocol: str, language: Language, ranking: Ranking, hard_hits: dict[int, bool]
) -> None:
    ids, image_M, nearest_MK = np.array(scorer.card.ids, dtype=object), ranking.image_M, ranking.nearest_MK
    label_M = scorer.label_N[image_M]
    columns = (image_M, ids[label_M], ids[_predicted(ranking, label_M)], ranking.rank_M, ids[nearest_MK])
    rows = zip(*(column.tolist() for column in (*columns, ranking.cosine_MK)), strict=True)
    for image, truth, predicted, rank, top, cosines in rows:
        scorer.keep(protocol, language.code, image, truth, predicted, rank, top, cosines, hard_hits.get(image))


def _match(scorer: CardScorer, setting: Setting) -> None:
    """Which of a few texts stands in the image."""
    assert scorer.items.candidates is not None
    image_M = np.flatnonzero(scorer.items.tested_N)
    images = truncate_normalize(scorer.images[setting.view], setting.length)
    rank_M, chance_M, tops, cosines = [], [], [], []
    for image in image_M.tolist():
        texts = scorer.items.candidates[image]
        cosine_T = truncate_normalize(scorer.embed(_asked(scorer.items, texts)), setting.length) @ images[image]
        rank_M.append(int(as_near(cosine_T[1:], cosine_T[0]).sum()))
        chance_M.append(1 / len(texts))
        if setting.main:
            order = cosine_T.nan_to_num(nan=-2).argsort(descending=True, stable=True)[:TOP].tolist()
            tops.append([texts[i] for i in order])
            cosines.append(cosine_T[order].tolist())
    for subset, of_M in scorer.subsets(image_M).items():
        chance = float(np.mean(np.array(chance_M)[of_M]))
        values = {"acc1": scorer.rate(np.array(rank_M)[of_M] == 0)}
        if not subset:
            values["acc1_corrected"] = metrics.chance_corrected(values["acc1"], chance)
        scorer.add(setting, "matching", "en", values, int(of_M.sum()), round(1 / chance), chance, subset)
    for image, rank, top, cosine in zip(image_M.tolist(), rank_M, tops, cosines, strict=False):
        truth = scorer.items.candidates[image][0]
        predicted = top[0] if rank == 0 or top[0] != truth else top[1]
        scorer.keep("matching", "en", image, truth, predicted, rank, top, cosine)


def _retrieve(scorer: CardScorer, setting: Setting) -> None:
    """Captions and images find each other, in every language; and what English does better on the same images."""
    captions = scorer.items.captions or {}
    tested = np.flatnonzero(scorer.items.tested_N).tolist()
    for code, texts_N in captions.items():
        image_M = np.array([i for i in tested if texts_N[i]], dtype=np.int64)
        if not len(image_M) or not scorer.options.wants(code):
            continue
        rank_M = _recalls(scorer, setting, code, image_M)
        for subset, of_M in scorer.subsets(image_M).items():
            # What was seen in training is no candidate either; of a group the images look among all captions.
            if subset == CLEAN:
                _recalls(scorer, setting, code, image_M[of_M], subset)
            elif subset:
                values = _recalls_at(scorer, "image_to_text", rank_M[of_M])
                scorer.add(setting, "retrieval", code, values, int(of_M.sum()), len(rank_M), subset=subset)
        if code != "en" and "en" in captions:
            _caption_gap_to_english(scorer, setting, code, [i for i in image_M.tolist() if captions["en"][i]])
        if setting.main:
            _keep_captions(scorer, code, image_M, rank_M)


def _recalls(scorer: CardScorer, setting: Setting, code: str, image_M: np.ndarray, subset: str = "") -> np.ndarray:
    """Adds the recalls of some images and their captions. Returns the images' ranks."""
    (rank_M, rank_T), image_T = _caption_ranks(scorer, setting, code, image_M)
    values = _recalls_at(scorer, "image_to_text", rank_M)
    chances = _chances("image_to_text", np.bincount(image_T), len(rank_T))
    scorer.add(setting, "retrieval", code, values, len(rank_M), len(rank_T), chances, subset)
    values = {f"text_to_image_r{k}": metrics.caption_hit_rate(rank_T < k, image_T, *scorer.draws) for k in RECALL_AT}
    chances = _chances("text_to_image", np.ones(len(rank_T), np.int64), len(rank_M))
    scorer.add(setting, "retrieval", code, values, len(rank_T), len(rank_M), chances, subset)
    return rank_M


def _recalls_at(scorer: CardScorer, way: str, rank_M: np.ndarray, at: Sequence[int] = RECALL_AT) -> dict[str, Interval]:
    return {f"{way}_r{k}": scorer.rate(rank_M < k) for k in at}


def _chances(way: str, right_Q: np.ndarray, num_candidates: int, at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Recalls of candidates in random order, see `chance_recall`."""
    return {f"{way}_r{k}": chance_recall(right_Q, num_candidates, k) for k in at}


def _caption_ranks(
    scorer: CardScorer, setting: Setting, code: str, image_M: Sequence[int] | np.ndarray
) -> tuple[CaptionRanks, np.ndarray]:
    """The ranks of some images and their captions, and whose each caption is: a place in `image_M`."""
    texts, image_T = _captions_of(scorer, code, image_M)
    return caption_ranks(scorer.images[setting.view][image_M], scorer.embed(texts), image_T, setting.length), image_T


def _captions_of(scorer: CardScorer, code: str, image_M: Sequence[int] | np.ndarray) -> tuple[list[str], np.ndarray]:
    """The captions of some images, and whose each is, int64 (T,): a place in `image_M`."""
    assert scorer.items.captions is not None
    texts_M = [scorer.items.captions[code][i] for i in image_M]
    return [text for texts in texts_M for text in texts], np.repeat(np.arange(len(texts_M)), list(map(len, texts_M)))


def _caption_gap_to_english(scorer: CardScorer, setting: Setting, code: str, image_M: list[int]) -> None:
    """English less a language, over the images that have captions in both, as candidates too."""
    if not image_M:
        return
    english, other = (_caption_ranks(scorer, setting, language, image_M)[0].rank_N for language in ("en", code))
    label_M = np.zeros(len(image_M), np.int64)
    values = {
        f"parity_image_to_text_r{k}": metrics.parity_gap(english < k, other < k, label_M, "images", *scorer.draws)
        for k in RECALL_AT
    }
    scorer.add(setting, "retrieval", code, values, len(image_M), len(image_M))


def _keep_captions(scorer: CardScorer, code: str, image_M: np.ndarray, rank_M: np.ndarray) -> None:
    texts, owners = _captions_of(scorer, code, image_M)
    image_ME = truncate_normalize(next(iter(scorer.images.values()))[image_M])
    text_TE = truncate_normalize(scorer.embed(texts))
    owner_T = torch.from_numpy(owners)
    for part in chunks(len(image_M), len(texts)):
        cosine_BT = image_ME[part] @ text_TE.T
        near_BT = cosine_BT.nan_to_num(nan=-2)
        top_BK = near_BT.topk(min(TOP, len(texts)), dim=1).indices
        is_own_BT = owner_T == torch.arange(part.start, part.stop)[:, None]
        wrong_B = near_BT.masked_fill(is_own_BT, -3).argmax(1).tolist()
        own_B = is_own_BT.int().argmax(1).tolist()  # the first of them
        columns = zip(
            image_M[part],
            rank_M[part],
            own_B,
            wrong_B,
            top_BK.tolist(),
            cosine_BT.gather(1, top_BK).tolist(),
            strict=True,
        )
        for image, rank, own, wrong, top, cosines in columns:
            predicted = texts[own if rank == 0 else wrong]
            scorer.keep(
                "retrieval", code, int(image), texts[own], predicted, int(rank), [texts[i] for i in top], cosines
            )


def _probe(scorer: CardScorer, view: str) -> None:
    """kNN and a linear classifier on the images alone, at every length."""
    image_NE, label_N, is_train_N = scorer.images[view], scorer.items.labels, scorer.items.is_train
    asked = {
        "knn": probes.knn(image_NE, label_N, is_train_N, scorer.lengths),
        "linear_probe": probes.linear_probe(image_NE, label_N, is_train_N, scorer.items.keys, scorer.lengths),
    }
    for protocol, found in asked.items():
        label_M = label_N[found.image_M]
        # Those that it can answer: without a gallery, the ones that have another image to be learned from.
        answers = label_M if is_train_N is None else label_N[is_train_N & (label_N >= 0)]
        num_classes = len(np.unique(answers))
        if not len(label_M) or num_classes < 2:
            continue
        for place, length in enumerate(scorer.lengths):
            setting = Setting(view, length, main=False)
            rank_M = (found.class_LM[place] != label_M).astype(np.int64)
            values = scorer.accuracies(rank_M, label_M, num_classes)
            values.pop("acc5", None)
            scorer.add(setting, protocol, IMAGES, values, len(label_M), num_classes, 1 / num_classes)
