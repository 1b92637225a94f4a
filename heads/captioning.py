"""Captioning: a small decoder writes the caption of an image from its tokens; and names at places, places of names.

It is what CoCa adds to the contrastive loss (Yu et al., TMLR 2022, arXiv:2205.01917); with parallel prediction that of
CapPa (Tschannen et al., NeurIPS 2023, arXiv:2306.07915); and with `regions` that of LocCa (Wan et al., NeurIPS 2024,
arXiv:2403.19596), with which SigLIP 2 trains from its first step (arXiv:2502.14786).

Shape letters: see `indiclip.types`; L predicted tokens of all images, G groups of images.
"""

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.utils import draw_bounding_boxes

from indiclip.chunked_cross_entropy import chunked_cross_entropy
from indiclip.head import (
    Datasets,
    Frame,
    Head,
    Line,
    Losses,
    Measure,
    Panel,
    Picture,
    Prediction,
    Ratio,
    all_captioned,
    plain,
    same_classes,
)
from indiclip.ratios import by_group
from indiclip.tasks.caption_decoder import CaptionDecoder, Memory
from indiclip.tasks.caption_metric import CaptionMetric, caption_measures
from indiclip.tasks.caption_sequences import Prompted, Region, boxes_of_class, drawn_regions, region_texts, sequences_of
from indiclip.tasks.caption_vocabulary import CaptionVocabulary
from indiclip.types import (
    Batch,
    Features,
    Texts,
    caption_languages,
    language_code,
    on_device,
    random_seeds,
)

if TYPE_CHECKING:
    from indiclip.datasets.base import SampleDataset
    from indiclip.encoder import Encoder

_LANGUAGE = re.compile("([a-z]{2,3}(-.+)?)?")  # an English name of a language is longer


class Captioning(Head):
    """A transformer decoder with cross attention to the image's tokens; each text counts alike, however long it is.

    Losses: `caption`; with `regions` also `refer` (the box of a name) and `ground` (a box, and the name of what is in
    it), of one box per image with boxes, drawn in each step. A caption is written in its sample's `language`, which the
    decoder is told by its code. Logged beside them: `causal` and `parallel`, the two parts of `caption`, and once
    captions of two languages were seen, `caption/<language>`.

    Args:
        width: Of the decoder; None is the text tower's.
        depth: Its layers. SigLIP 2 has half as many as its text tower.
        num_heads: Of its attention; None is one per 64 of its width.
        text_layers: Of its layers, the lowest ones that see the text alone. CoCa: half of them; LocCa: none.
        parallel: Share of the captions of which all tokens are predicted at once, from masks. CoCa: 0; CapPa: 0.75;
            LocCa and SigLIP 2: 0.5.
        regions: Whether to learn from boxes too, where samples have them with classes that have names.
        num_bins: Places along each side of an image that a box may begin and end at.
        max_tokens: Longer texts are cut to this many tokens, in training as in writing; None is the most, the
            tokenizer's `context_length`.
        language: In which captions of images without a `language` are written; "" leaves it to the decoder.
        **common: Of every `Head`.

    Raises:
        ValueError: A number that is out of its range, or a `language` that is no code.
    """

    title = "Captioning"
    metric: CaptionMetric
    required_fields = ("caption",)
    embeds_images = embeds_text = False
    reads_tokens = True

    def __init__(
        self,
        width: int | None = None,
        depth: int = 3,
        num_heads: int | None = None,
        text_layers: int = 0,
        parallel: float = 0.5,
        regions: bool = False,
        num_bins: int = 500,
        max_tokens: int | None = None,
        language: str = "",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        counts = {"width": width, "num_heads": num_heads, "max_tokens": max_tokens}
        given = {name: count for name, count in counts.items() if count is not None}
        self.check_range(1, depth=depth, **given)
        self.check_range(2, num_bins=num_bins)
        self.check_range(0, depth - 1, text_layers=text_layers)  # one layer at least sees the image
        self.check_range(0, 1, parallel=parallel)
        if not regions:
            self.note_idle("without regions", num_bins=num_bins)
        if not _LANGUAGE.fullmatch(language) or language != language_code(language):
            raise ValueError(f"heads.{self.name}.language: found {language!r}; expected a code such as hi or hi-Latn")
        self.width, self.depth, self.num_heads, self.text_layers = width, depth, num_heads, text_layers
        self.parallel, self.regions, self.num_bins = parallel, regions, num_bins
        self.max_tokens, self.language = max_tokens, language
        self.needs_all_patches = self.reads_objects = regions
        self._languages: set[str] = set()  # of all captions that were trained on
        self._name_ids: dict[str, list[int]] = {}

    def bind(self, encoder: "Encoder") -> None:
        width = self.width or encoder.text.width
        num_heads = self.num_heads or max(1, width // 64)
        if width % num_heads:
            raise ValueError(
                f"heads.{self.name}.num_heads: found {num_heads}; expected a number that divides the width {width}"
            )
        tokenizer = encoder.text.tokenizer
        if self.max_tokens is not None:
            self.check_range(1, tokenizer.context_length, max_tokens=self.max_tokens)
        self.frame_ids, self.longest = tokenizer.frame_ids, self.max_tokens or tokenizer.context_length
        self.vocabulary = CaptionVocabulary(tokenizer.vocab_size, self.num_bins)
        self.decoder = CaptionDecoder(
            num_ids=self.vocabulary.size,
            width=width,
            depth=self.depth,
            num_heads=num_heads,
            memory_width=encoder.backbone.width,
            num_positions=self.vocabulary.longest_prompt + self.longest,
            text_layers=self.text_layers,
        )
        self.metric = CaptionMetric()

    def check(self, train: Datasets, held_out: Datasets) -> None:
        all_captioned(f"heads.{self.name}", self.task, {**train, **held_out})
        if self.regions and train:
            same_classes(self.task, train)
            if not any(dataset.classes for dataset in train.values()):
                raise ValueError(
                    f"heads.{self.name}.regions: needs boxes whose classes have names, but {', '.join(train)} has none"
                )

    def check_samples(self, samples: Mapping[str, Mapping[str, Any]]) -> None:
        if self.regions and samples and not any("boxes_xyxy" in sample for sample in samples.values()):
            raise ValueError(
                f"heads.{self.name}.regions: needs boxes, but the first samples of {', '.join(samples)} have none; "
                "expected false, or a source with boxes_xyxy"
            )

    def loss(self, features: Features, batch: Batch, encoder: "Encoder") -> Losses:
        memory = self.decoder.read(features.tokens_BND, features.valid_BN)
        captions, is_parallel = self._captions(batch, encoder)
        terms = {"caption": (losses := self._losses(captions, memory)).mean}
        if self.regions:
            refer, ground = self._region_texts(batch, drawn_regions(batch), encoder)
            terms |= {"refer": self._losses(refer, memory).mean, "ground": self._losses(ground, memory).mean}
        groups = {"causal": ~is_parallel, "parallel": is_parallel} if 0 < self.parallel < 1 else {}
        return Losses(terms, by_group(losses.loss_B, groups | self._by_language(batch)))

    def _losses(self, texts: Sequence[Prompted | None], memory: Memory) -> "TextLosses":
        sequences = sequences_of(texts, self.vocabulary).to(self.decoder.table.device)
        hidden_BTW = self.decoder(sequences.ids_BT, memory, sequences.mask_BTT)
        hidden_LW = hidden_BTW.flatten(0, 1)[sequences.places_L]
        total, losses_L = chunked_cross_entropy(hidden_LW, self.decoder.table, sequences.targets_L, sequences.weights_L)
        loss_B = losses_L.new_zeros(len(texts)).index_add(0, sequences.image_L, losses_L * sequences.weights_L)
        number = torch.full_like(total.detach(), sum(count > 0 for count in sequences.num_tokens))
        return TextLosses(Ratio(total, number), loss_B, sequences.num_tokens)

    def _captions(self, batch: Batch, encoder: "Encoder") -> tuple[list[Prompted | None], np.ndarray]:
        """The captions, and which of them are predicted in parallel."""
        captions = self.target(batch, "caption")
        rows = captions.token_ids if isinstance(captions, Texts) else encoder.text.tokenizer.encode(list(captions))
        share = self.parallel if self.training else 0.0
        is_parallel = [Random(f"parallel {seed}").random() < share for seed in random_seeds(batch)]
        texts: list[Prompted | None] = [
            Prompted(self.vocabulary.caption_prompt(language), self._text_ids(row), parallel)
            for language, row, parallel in zip(caption_languages(batch), rows, is_parallel, strict=True)
        ]
        return texts, np.array(is_parallel)

    def _text_ids(self, row: list[int]) -> list[int]:
        return [id for id in row if id not in self.frame_ids][: self.longest]

    def _region_texts(
        self, batch: Batch, regions: Sequence[Region | None], encoder: "Encoder"
    ) -> tuple[list[Prompted | None], list[Prompted | None]]:
        name_ids = {region.name: self._name(region.name, encoder) for region in regions if region}
        return region_texts(regions, name_ids, batch["images"]["sizes_hw"], self.vocabulary)

    def _name(self, name: str, encoder: "Encoder") -> list[int]:
        if name not in self._name_ids:
            self._name_ids[name] = self._text_ids(encoder.text.tokenizer.encode([name])[0])
        return self._name_ids[name]

    def _by_language(self, batch: Batch) -> dict[str, np.ndarray]:
        """`caption/<language>`: the images with a caption in it, where the run has more than one."""
        codes = caption_languages(batch)
        names = sorted({*codes} - {""})
        self._languages.update(names)
        if len(self._languages) < 2:
            return {}
        return {f"caption/{name}": np.array(codes) == name for name in names}

    def predict(self, features: Features, batch: Batch, encoder: "Encoder") -> list[Prediction]:
        """`caption` and its `language`; with `regions` also `name` and `box_xyxy` (4,) of what the decoder names first.

        Where the truth is known: `cross_entropy` of the caption, a sum over its `num_tokens`; `iou`, of the box that is
        written for the name of one of the image's boxes with the box of this class that it is nearest to; `named`,
        whether the name that is written for that box is right.
        """
        memory = self.decoder.read(features.tokens_BND, features.valid_BN)
        languages = [language or self.language for language in caption_languages(batch)]
        prompts = [self.vocabulary.caption_prompt(language) for language in languages]
        found: list[Prediction] = [
            {"caption": caption, "language": language}
            for caption, language in zip(self._write(prompts, memory, encoder), languages, strict=True)
        ]
        if None not in (batch["targets"].get("caption") or [None]):
            losses = self._losses(self._captions(batch, encoder)[0], memory)
            for one, loss, count in zip(found, losses.loss_B.tolist(), losses.num_tokens, strict=True):
                one |= {"cross_entropy": loss * count, "num_tokens": count}
        if self.regions:
            self._predict_regions(found, memory, batch, encoder)
        return found

    def _write(self, prompts: list[list[int]], memory: Memory, encoder: "Encoder") -> list[str]:
        rows = self.decoder.write(prompts, memory, self.vocabulary.texts, self.longest, self.vocabulary.end)
        return encoder.text.tokenizer.decode(rows)

    def _predict_regions(self, found: list[Prediction], memory: Memory, batch: Batch, encoder: "Encoder") -> None:
        ids, sizes_hw = self.vocabulary, batch["images"]["sizes_hw"]
        device = self.decoder.table.device
        boxes = self.decoder.write([[ids.ground]] * len(found), memory, ids.places, 4)
        names = self._write([[ids.ground, *box] for box in boxes], memory, encoder)
        for one, box, name, size_hw in zip(found, boxes, names, sizes_hw, strict=True):
            one |= {"name": name, "box_xyxy": on_device(ids.box_xyxy(box, size_hw), device)}
        regions = drawn_regions(batch)
        if not any(regions):
            return
        refer, ground = self._region_texts(batch, regions, encoder)
        boxes = self.decoder.write([text.prompt if text else [ids.refer] for text in refer], memory, ids.places, 4)
        prompts = [[ids.ground, *text.answer[:4]] if text else [ids.ground] for text in ground]
        names = self._write(prompts, memory, encoder)
        for image, region in enumerate(regions):
            if region is not None:
                own_14 = torch.tensor([ids.box_xyxy(boxes[image], sizes_hw[image])])
                iou = box_iou(own_14, boxes_of_class(batch, image, region.name)).max().item()
                (right,) = encoder.text.tokenizer.decode([self._name(region.name, encoder)])
                found[image] |= {"iou": iou, "named": names[image] == right}

    def to_json(self, prediction: Prediction, frame: Frame) -> dict[str, Any]:
        """`caption` and `language`; with `regions` also `name` and `box` (x1, y1, x2, y2)."""
        found = {"caption": prediction["caption"], "language": prediction["language"]}
        if "name" in prediction:
            found |= {"name": prediction["name"], "box": plain(frame.boxes(prediction["box_xyxy"]))}
        return found

    def update_metric(self, predictions: list[Prediction], features: Features, batch: Batch) -> None:
        drawn = self.target(batch, "caption")
        everything = batch["targets"].get("captions", [None] * len(predictions))
        for prediction, caption, of_image, language in zip(
            predictions, drawn, everything, caption_languages(batch), strict=True
        ):
            self.metric.update(prediction, list((of_image or {}).get(language) or [caption]), language)

    def measures(self, held_out: "SampleDataset") -> dict[str, Measure]:
        return caption_measures(self.regions, len(held_out.classes))

    def visualize(self, image_HW3: np.ndarray, prediction: Prediction, target: Prediction) -> Picture:
        lines = [Line("the model's caption:"), Line(prediction["caption"], prediction["language"])]
        if "caption" in target:
            lines += [Line("its caption:"), Line(target["caption"], language_code(target.get("language")))]
        if "name" not in prediction:
            return image_HW3, lines
        box_4 = prediction["box_xyxy"]
        pixels_3HW = torch.from_numpy(image_HW3.copy()).permute(2, 0, 1)
        drawn_3HW = draw_bounding_boxes(pixels_3HW, box_4[None], colors=(20, 160, 150))
        place = (float(box_4[0]), float(box_4[1]), prediction["name"])
        return [Panel(drawn_3HW.permute(1, 2, 0).numpy(), "what the model names first", [place])], lines


class TextLosses(NamedTuple):
    """Cross entropies of texts.

    Attributes:
        mean: Over the images that have a text, of the mean over its tokens.
        loss_B: The mean of each image's tokens, without gradient; 0 where it has no text.
        num_tokens: Of each image, its end too.
    """

    mean: Ratio
    loss_B: Tensor
    num_tokens: list[int]
