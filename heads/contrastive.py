"""Image-text matching: the contrastive loss, retrieval and zero-shot accuracy; the first two by language too.

Shape letters: see `indiclip.types`; C classes, L trained embedding lengths, S texts: every caption of every image.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from indiclip.evals.protocols.cosines import pair_ranks
from indiclip.head import (
    Datasets,
    Frame,
    Head,
    Line,
    ListMetric,
    Losses,
    Measure,
    Picture,
    Prediction,
    Ratio,
    WholeBatch,
    all_captioned,
    plain,
    same_classes,
)
from indiclip.losses import ContrastiveLoss, Mixture, SigmoidLoss, SoftmaxLoss, caption_ids
from indiclip.ratios import by_group
from indiclip.types import Batch, Features, caption_languages, class_names, language_code, on_device

if TYPE_CHECKING:
    from indiclip.datasets.base import SampleDataset
    from indiclip.encoder import Encoder


class Contrastive(Head):
    """Pulls an image to its caption, and to the captions of images with the same label.

    Once captions of two languages were seen, `loss/<language>` is logged: the mean of its pairs' parts of the loss; it
    stays as it was where a step has no pair of it. Samples without a `language` count in none. Held-out images with
    captions are scored with all of them, in each of their languages, see `EmbeddingMetric`.

    Args:
        loss: `sigmoid` (SigLIP) or `softmax` (CLIP), over the encoder's trained lengths.
        length_weights: Weight of each of the encoder's lengths, ascending; None is equal.
        init_logit_scale: Factor on the cosines at the start, one over the temperature; None is the paper's, 10 or
            1 / 0.07. Logits that `model.encoder.init_from` gives win over this one and the next.
        init_logit_bias: Added to the logits at the start, with `sigmoid` alone; None is the paper's, -10.
        max_logit_scale: Most that the factor may become; None is 100 with `softmax` and no bound with `sigmoid`.
        templates: Prompts of a class in zero-shot classification; `{}` stands for its name.
        retrieval_at: The k of retrieval recall@k.
        **common: Of every `Head`.
    """

    title = "Image-text matching"
    metric: "EmbeddingMetric"
    required_fields = ("caption",)
    needs_all_patches = reads_objects = False
    mixes = True

    def __init__(
        self,
        loss: Literal["sigmoid", "softmax"] = "sigmoid",
        length_weights: list[float] | None = None,
        init_logit_scale: float | None = None,
        init_logit_bias: float | None = None,
        max_logit_scale: float | None = None,
        templates: list[str] | None = None,
        retrieval_at: list[int] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if init_logit_bias is not None and loss != "sigmoid":
            raise ValueError(f"heads.{self.name}.init_logit_bias: the loss {loss} has none; expected the loss sigmoid")
        self.check_range(-100, 100, init_logit_bias=init_logit_bias)
        self.check_range(1e-3, 1e6, max_logit_scale=max_logit_scale, init_logit_scale=init_logit_scale)
        self.loss_name, self.length_weights = loss, length_weights
        self._logits = {"init_logit_scale": init_logit_scale, "max_logit_scale": max_logit_scale}
        self._logits |= {} if init_logit_bias is None else {"init_logit_bias": init_logit_bias}
        self.templates = templates or ["{}"]
        if any(template.count("{}") != 1 for template in self.templates):
            found = f"heads.{self.name}.templates: {self.templates}"
            raise ValueError(f"{found} must each contain {{}} for the class name, once")
        self.retrieval_at = retrieval_at or [1, 5]
        self._class_text: dict[tuple[str, ...], list[Tensor]] = {}  # class names -> their embeddings, at each length
        self._languages: set[str] = set()  # of all captions that were trained on
        self.register_load_state_dict_post_hook(_forget_class_text)  # type: ignore[no-untyped-call]

    def bind(self, encoder: "Encoder") -> None:
        make = {"sigmoid": SigmoidLoss, "softmax": SoftmaxLoss}[self.loss_name]
        self.criterion: ContrastiveLoss = make(
            encoder.lengths, self.length_weights, key=f"heads.{self.name}.", **self._logits
        )
        self.criterion.begin_with(encoder.initial_logits)
        self.metric = EmbeddingMetric(encoder.lengths, self.retrieval_at)

    def check(self, train: Datasets, held_out: Datasets) -> None:
        same_classes(self.task, train)
        all_captioned(f"heads.{self.name}", self.task, {**train, **held_out})

    def loss(self, features: Features, batch: Batch, encoder: "Encoder") -> WholeBatch:
        captions = self.target(batch, "caption")
        image_BD, text_BD = encoder.pool_features(features), encoder.pool_text(captions)
        # Not blocking: else the CPU would wait here until the GPU has embedded everything.
        ids_B = caption_ids(captions).to(image_BD.device, non_blocking=True)
        rows = (image_BD, text_BD, _labels(batch, image_BD), ids_B, caption_languages(batch))
        mixed = [batch["targets"][name] for name in ("mix_partner", "mix_share") if name in batch["targets"]]
        return WholeBatch(partial(self.pair_losses, encoder), (*rows, *mixed))

    def after_step(self, encoder: "Encoder", progress: float, made: Tensor) -> None:
        self.criterion.bound_scale()

    def train(self, mode: bool = True) -> Self:
        self._class_text.clear()  # other heads may have trained the text tower since the last validation
        return super().train(mode)

    def pair_losses(
        self,
        encoder: "Encoder",
        image_BD: Tensor,
        text_BD: Tensor,
        labels_B: Tensor,
        ids_B: Tensor,
        codes: list[str],
        *mixed: list[Any],
    ) -> Losses:
        """The losses of the pooled vectors of all pairs of this rank; `mixed` are the images' partners and shares."""
        image_BE, text_BE = encoder.project_image(image_BD), encoder.project_text(text_BD)
        mixture = Mixture(*(on_device(numbers, image_BE.device) for numbers in mixed)) if mixed else None
        loss = self.criterion(image_BE, text_BE, labels_B=labels_B, caption_ids_B=ids_B, mixture=mixture)
        return Losses({"loss": loss}, self._loss_by_language(codes))

    def _loss_by_language(self, codes: list[str]) -> dict[str, Ratio]:
        """`loss/<language>` of the batch's languages, where the run has more than one."""
        names = sorted({*codes} - {""})
        self._languages.update(names)
        if len(self._languages) < 2 or not names:
            return {}
        pair_losses_B = self.criterion.pair_losses_B
        assert pair_losses_B is not None
        return by_group(pair_losses_B, {f"loss/{name}": np.array(codes) == name for name in names})

    def predict(self, features: Features, batch: Batch, encoder: "Encoder") -> list[Prediction]:
        """`image_E`, `text_E` (None without a caption), `hits_L` (zero-shot right at each length, where a class is
        known), `nearest` (the captions of this batch closest to the image, best first), `nearest_languages` (of each,
        "" where it is unknown) and `texts_TE` (language -> embeddings of all its captions in it).
        """
        drawn = batch["targets"].get("caption", [None] * len(batch["keys"]))
        captions = _captions(batch)
        image_BE, text_of = encoder.embed_features(features), _embed_by_language(captions, encoder)
        distinct = list(dict.fromkeys(caption for caption in drawn if caption is not None))
        nearest: list[list[int]] = [[] for _ in drawn]
        language_of = dict(zip(drawn, caption_languages(batch), strict=True))
        hits = self._zero_shot(image_BE, batch, encoder)
        with torch.autocast(image_BE.device.type, enabled=False):  # bfloat16 has 8 bits: many cosines would be equal
            if distinct:
                text_CE = torch.stack([text_of[caption] for caption in distinct])
                nearest = (image_BE @ text_CE.T).topk(min(5, len(distinct)), dim=1).indices.tolist()
        return [
            {
                "image_E": image_E,
                "text_E": text_of.get(caption),
                "hits_L": hits_L,
                "nearest": [distinct[i] for i in best],
                "nearest_languages": [language_of[distinct[i]] for i in best],
                "texts_TE": {name: torch.stack([text_of[text] for text in texts]) for name, texts in by.items()},
            }
            for image_E, caption, hits_L, best, by in zip(image_BE, drawn, hits, nearest, captions, strict=True)
        ]

    def to_json(self, prediction: Prediction, frame: Frame) -> dict[str, Any]:
        """`nearest`, `embedding` and, where the class is known, `zero_shot_hits`, see `predict`."""
        found = {"nearest": prediction["nearest"], "embedding": plain(prediction["image_E"])}
        hits_L = prediction["hits_L"]
        return found if hits_L is None else found | {"zero_shot_hits": plain(hits_L)}

    def update_metric(self, predictions: list[Prediction], features: Features, batch: Batch) -> None:
        self.target(batch, "caption")
        image_BE = torch.stack([prediction["image_E"] for prediction in predictions])
        hits = [prediction["hits_L"] for prediction in predictions if prediction["hits_L"] is not None]
        texts_TE = [prediction["texts_TE"] for prediction in predictions]
        self.metric.update(image_BE, _captions(batch), texts_TE, caption_languages(batch), hits)

    def measures(self, held_out: "SampleDataset") -> dict[str, Measure]:
        chance: dict[str, Any] = {}
        if num_classes := len(held_out.classes):
            chance = {"trivial": 1 / num_classes, "answer": f"guessing among {num_classes} classes"}
        *shorter, _ = self.metric.lengths
        accuracy = "zero-shot accuracy"
        full = f"{accuracy} at full length" if shorter else accuracy
        found = {
            f"zero_shot_{length}": Measure(f"{accuracy} at length {length}", "higher", **chance) for length in shorter
        }
        found["zero_shot"] = Measure(full, "higher", **chance, main=True)
        largest = max(self.retrieval_at)
        for k in sorted(self.retrieval_at):
            found[f"image_to_text_r{k}"] = Measure(f"image to text, recall at {k}", "higher", main=k == largest)
            found[f"text_to_image_r{k}"] = Measure(f"text to image, recall at {k}", "higher")
        gap = f"image to text, recall at {largest}: English less this language"
        found[f"image_to_text_r{largest}_gap"] = Measure(gap, "lower")
        return found | {"images": Measure("images with captions", "", "images")}

    def visualize(self, image_HW3: np.ndarray, prediction: Prediction, target: Prediction) -> Picture:
        nearest = [
            Line(caption, language, "✓" if caption == target.get("caption") else "·")
            for caption, language in zip(prediction["nearest"], prediction["nearest_languages"], strict=True)
        ]
        own = (
            Line(target["caption"], language_code(target.get("language")))
            if "caption" in target
            else Line("no caption")
        )
        own_lines = [Line("its caption:"), own] if "caption" in target else [own]
        return image_HW3, [*own_lines, *[Line("nearest captions, best first:"), *nearest] * bool(nearest)]

    def _zero_shot(self, image_BE: Tensor, batch: Batch, encoder: "Encoder") -> list[Tensor | None]:
        """For each image whether the nearest class is the right one, at each trained length."""
        names, right_B = tuple(class_names(batch)), _labels(batch, image_BE)
        labels = right_B.tolist()
        if not names or max(labels) < 0:
            return [None] * len(image_BE)
        if names not in self._class_text or self._class_text[names][0].device != image_BE.device:
            self._class_text[names] = self._class_embeddings(names, encoder)
        with torch.autocast(image_BE.device.type, enabled=False):  # see `predict`
            hits_LB = torch.stack(
                [
                    (image_BE[:, :length] @ class_CE.T).argmax(1) == right_B
                    for length, class_CE in zip(encoder.lengths, self._class_text[names], strict=True)
                ]
            )
        return [hits_LB[:, i] if label >= 0 else None for i, label in enumerate(labels)]

    def _class_embeddings(self, names: Sequence[str], encoder: "Encoder") -> list[Tensor]:
        """Mean of the templates' embeddings of each class, at each length (unit length)."""
        prompts = [template.replace("{}", name) for name in names for template in self.templates]
        full_CTE = encoder.embed_text(prompts).reshape(len(names), len(self.templates), -1)
        cut = [F.normalize(full_CTE[..., :length], dim=-1) for length in encoder.lengths]
        return [F.normalize(class_CTE.mean(1), dim=-1) for class_CTE in cut]


class EmbeddingMetric(ListMetric):
    """Retrieval both ways and zero-shot accuracy over everything seen since the last reset.

    An image has found its text when any of its captions is near enough; equal captions count as one candidate.

    `image_to_text_r<k>` is among all images and their captions in the language that was drawn for each.
    `image_to_text_r<k>/<language>` is among the images with captions in it and those captions: languages that all
    images have are scored on the same images. `image_to_text_r<k>_gap/<language>`, for the largest k, is English's
    recall less the language's, both among the images that have the two. Where not all images have all languages,
    `images/<language>` says how many have it: it is easier to find one image among fewer. With captions in fewer than
    two languages there is none of these.

    Args:
        lengths: Embedding lengths, ascending; the last is the full one.
        retrieval_at: The k of recall@k.
    """

    def __init__(self, lengths: list[int], retrieval_at: list[int]) -> None:
        super().__init__()
        self.lengths, self.retrieval_at = lengths, retrieval_at

    def update(
        self,
        image_BE: Tensor,
        captions: list[dict[str, list[str]]],
        texts_TE: list[dict[str, Tensor]],
        drawn: list[str],
        hits: list[Tensor],
    ) -> None:
        """Add a batch.

        Args:
            image_BE: Images.
            captions: Language ("" where it is unknown) -> captions, of each image.
            texts_TE: Language -> their embeddings, of each image.
            drawn: The language in which each image counts where languages are not told apart.
            hits: A bool (L,) for each labelled image.
        """
        self.add(image_BE.float(), captions, texts_TE, drawn, hits)

    def compute(self) -> dict[str, Tensor]:
        """`zero_shot` (at the full length) and `zero_shot_<length>`, `image_to_text_r<k>`, `text_to_image_r<k>`; the
        last two by language as well.
        """
        columns = zip(*self.rows_of_all_ranks(), strict=True)
        image_E, captions, texts_TE, drawn, hits = ([*chain.from_iterable(column)] for column in columns)
        result: dict[str, Tensor] = {}
        if hits:
            names = [*(f"zero_shot_{length}" for length in self.lengths[:-1]), "zero_shot"]
            result |= zip(names, torch.stack(hits).float().mean(0), strict=True)
        texts = [
            (image, language, text, language == of_image)
            for image, (by, of_image) in enumerate(zip(captions, drawn, strict=True))
            for language, of_language in by.items()
            for text in of_language
        ]
        images, languages, words, is_drawn = zip(*texts, strict=True)
        image_BE = torch.stack(image_E).to(self.device)
        text_SE = torch.cat([text_TE for by in texts_TE for text_TE in by.values()]).to(image_BE)
        image_S, ids_S = torch.tensor(images, device=self.device), caption_ids(words).to(self.device)
        chosen = {
            name: torch.from_numpy(np.array(languages) == name).to(self.device) for name in sorted({*languages} - {""})
        }
        known: dict[bytes, dict[str, Tensor]] = {}

        def recalls(chosen_S: Tensor) -> dict[str, Tensor]:
            key = chosen_S.cpu().numpy().tobytes()  # mostly, all images have all languages
            if key not in known:
                of_texts = image_S[chosen_S], text_SE[chosen_S], ids_S[chosen_S]
                known[key] = _recalls(image_BE, *of_texts, self.retrieval_at)
            return known[key]

        result |= recalls(torch.tensor(is_drawn, device=self.device))
        if len(chosen) < 2:
            return result
        counts = {name: torch.unique(image_S[chosen_S]).numel() for name, chosen_S in chosen.items()}
        if min(counts.values()) < torch.unique(image_S[torch.stack([*chosen.values()]).any(0)]).numel():
            result |= {f"images/{name}": torch.tensor(float(count)) for name, count in counts.items()}
        best = f"image_to_text_r{max(self.retrieval_at)}"
        for name, chosen_S in chosen.items():
            result |= {f"{metric}/{name}": value for metric, value in recalls(chosen_S).items()}
            if name != "en" and "en" in chosen:
                both_S = torch.isin(image_S, image_S[chosen_S]) & torch.isin(image_S, image_S[chosen["en"]])
                if both_S.any():
                    gap = recalls(chosen["en"] & both_S)[best] - recalls(chosen_S & both_S)[best]
                    result[f"{best}_gap/{name}"] = gap
        return result


def _recalls(
    image_BE: Tensor, image_S: Tensor, text_SE: Tensor, ids_S: Tensor, retrieval_at: list[int]
) -> dict[str, Tensor]:
    """`image_to_text_r<k>` and `text_to_image_r<k>` of the images that have one of these texts."""
    images, image_S = torch.unique(image_S, return_inverse=True)
    ids, text_S = torch.unique(ids_S, return_inverse=True)
    order_S = torch.arange(len(text_S), device=text_S.device)
    first_C = order_S.new_full(ids.shape, len(text_S)).scatter_reduce(0, text_S, order_S, "amin")
    rank_B, rank_C = pair_ranks(image_BE[images], text_SE[first_C], image_S, text_S)
    return {
        f"{name}_r{k}": (rank < k).float().mean()
        for k in retrieval_at
        for name, rank in (("image_to_text", rank_B), ("text_to_image", rank_C))
    }


def _forget_class_text(head: Contrastive, incompatible_keys: Any) -> None:
    """Other weights were loaded."""
    head._class_text.clear()


def _captions(batch: Batch) -> list[dict[str, list[str]]]:
    """All captions of each image by language; `caption` is one of them."""
    nothing: list[Any] = [None] * len(batch["keys"])
    all_captions, drawn = (batch["targets"].get(name, nothing) for name in ("captions", "caption"))
    found: list[dict[str, list[str]]] = []
    for by, caption, own in zip(all_captions, drawn, caption_languages(batch), strict=True):
        of_image: dict[str, list[str]] = {}
        for language, texts in (by or {}).items():
            of_image.setdefault(language_code(language), []).extend(texts)
        if caption is not None and caption not in of_image.get(own, []):
            of_image.setdefault(own, []).append(caption)
        found.append({language: texts for language, texts in of_image.items() if texts})
    return found


def _embed_by_language(captions: list[dict[str, list[str]]], encoder: "Encoder") -> dict[str, Tensor]:
    """Each text's embedding; one language after the other, so that batches stay small."""
    text_of: dict[str, Tensor] = {}
    for language in sorted({language for by in captions for language in by}):
        texts = list(dict.fromkeys(text for by in captions for text in by.get(language, [])))
        text_of |= zip(texts, encoder.embed_text(texts), strict=True)
    return text_of


def _labels(batch: Batch, like_BE: Tensor) -> Tensor:
    """Class of each image, -1 for none; always given, because either all ranks have labels or none."""
    none_B = torch.full((len(like_BE),), -1, device=like_BE.device)
    labels_B: Tensor = batch["targets"].get("label", none_B)
    return labels_B
