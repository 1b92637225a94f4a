"""Masked modelling and matching (FLAVA): hidden patches and tokens are guessed, and pairs told from what is no pair.

Singh et al., "FLAVA: A Foundational Language And Vision Alignment Model", CVPR 2022, arXiv:2112.04482, section 3.2. Its
sixth loss, global contrastive, is the head `heads.contrastive`, beside which this one stands.

Shape letters: see `indiclip.types`; K hidden patches or tokens of all samples, W width of the multimodal encoder, L
losses, R micro-batches.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indiclip.distributed import sum_over_ranks
from indiclip.head import (
    Datasets,
    Frame,
    Head,
    Losses,
    Measure,
    Panel,
    Picture,
    Prediction,
    Ratio,
    WholeBatch,
    all_captioned,
    plain,
)
from indiclip.names import check_choice
from indiclip.tasks.masked_images import patches_per_side
from indiclip.tasks.masked_metric import MaskedMetric
from indiclip.tasks.masked_towers import Masked, MaskedImageTower, MaskedTextTower
from indiclip.tasks.mismatched_pairs import Matching
from indiclip.tasks.multimodal_encoder import MultimodalEncoder, PredictionHead, Tokens
from indiclip.tasks.patch_codebook import Codebook, PatchCodebook
from indiclip.teacher import Teacher
from indiclip.types import Batch, Features, Texts, in_float32, on_device, random_seeds

if TYPE_CHECKING:
    from indiclip.datasets.base import SampleDataset
    from indiclip.encoder import Encoder

_WORDS = {
    "mim": "hidden patches",
    "mmm_image": "hidden patches, with the text",
    "mlm": "hidden tokens",
    "mmm_text": "hidden tokens, with the image",
}
LOSSES = (*_WORDS, "itm")
_OF_TWO = {"mmm_image", "mmm_text", "itm"}  # which read image and text together
_OF_PATCHES = {"mim", "mmm_image"}
_BETA = 2.0  # of the smooth L1 loss on a teacher's vectors: data2vec (arXiv:2202.03555), section 4.1


class MaskedModelling(Head):
    """Losses of masked inputs, each a mean over the hidden patches or tokens, or pairs, of the whole step.

    `mim`: hidden patches from the image tower; `mlm`: hidden tokens from the text tower; `mmm_image` and `mmm_text`:
    both from a shallow encoder over both towers' tokens; `itm`: whether image and text are a pair, from its class
    token, for each pair and as many others. An image's other text is that half a step further on; it counts where it
    has another caption and class. See `indiclip.tasks.mismatched_pairs`.

    Masked images and texts are one more pass through the towers. Without another head of the same task, that of the
    whole images, which every step makes, is of no use.

    Args:
        losses: Their weights by name; None is all of them, each with weight 1 as FLAVA has it.
        targets: What `mim` and `mmm_image` guess: `codebook`, which of a k-means codebook's patches is nearest; or
            `teacher`, the vectors that an average of the image tower makes of the whole image.
        codebook: Of `targets: codebook`. It begins with patches of the first step, in which every guess is as good.
        teacher_decay: Of `targets: teacher`: share of the old average in a step.
        image_ratio: Share of an image's patches that are hidden, in blocks. FLAVA hides 75 of 196.
        text_ratio: Share of a text's tokens that are hidden: BERT's, without its random words.
        width: Of the encoder over both towers.
        depth: Its layers.
        num_heads: Of its attention.
        hard_negatives: Draw an image's other text from all of the step, the more often the more similar they are (Li et
            al., ALBEF, NeurIPS 2021, arXiv:2107.07651, section 3.2, which draws an image for each text too). Needs a
            head that trains embeddings; ranks exchange the tokens of all texts.
        **common: Of every `Head`.

    Raises:
        ValueError: An unknown loss, or a number out of its range.
    """

    title = "Masked modelling"
    metric: MaskedMetric
    images: MaskedImageTower | None
    texts: MaskedTextTower | None
    multimodal: MultimodalEncoder | None
    matching: Matching | None
    needs_all_patches = reads_objects = embeds_images = embeds_text = False

    def __init__(
        self,
        losses: dict[str, float] | None = None,
        targets: Literal["codebook", "teacher"] = "codebook",
        codebook: Codebook | None = None,
        teacher_decay: float = 0.996,
        image_ratio: float = 0.4,
        text_ratio: float = 0.15,
        width: int = 256,
        depth: int = 2,
        num_heads: int = 4,
        hard_negatives: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.losses = dict.fromkeys(LOSSES, 1.0) if losses is None else dict(losses)
        for name, weight in self.losses.items():
            check_choice(f"heads.{self.name}.losses", name, LOSSES)
            self.check_range(0, 1e9, 0, **{f"losses.{name}": weight})
        check_choice(f"heads.{self.name}.targets", targets, ("codebook", "teacher"))
        self.check_range(0, 1, 0, image_ratio=image_ratio, text_ratio=text_ratio)
        self.check_range(0, 1, teacher_decay=teacher_decay)
        self.check_range(1, width=width, depth=depth, num_heads=num_heads)
        if not self.losses:
            raise ValueError(f"heads.{self.name}.losses: found none; expected some of {', '.join(LOSSES)}")
        if width % num_heads:
            raise ValueError(f"heads.{self.name}.num_heads: {num_heads} does not divide the width {width}")
        if hard_negatives and "itm" not in self.losses:
            raise ValueError(f"heads.{self.name}.hard_negatives: found true without itm among the losses")
        self.targets, self.options, self.teacher_decay = targets, codebook or Codebook(), teacher_decay
        self.options.check(f"heads.{self.name}.codebook")
        self.image_ratio, self.text_ratio, self.hard_negatives = image_ratio, text_ratio, hard_negatives
        self.width, self.depth, self.num_heads = width, depth, num_heads
        self.of_two = not _OF_TWO.isdisjoint(self.losses)
        self.reads_images, self.reads_text = self.of_two or "mim" in self.losses, self.of_two or "mlm" in self.losses
        self.required_fields = ("caption",) if self.reads_text else ()
        self._note_idle_options(width=width, depth=depth, num_heads=num_heads, codebook=codebook)
        self.reads_embeddings = "hard_negatives" if hard_negatives else ""

    def _note_idle_options(self, codebook: Codebook | None, **of_multimodal: int) -> None:
        among = f"with losses {', '.join(self.losses)}"
        if not self.of_two:
            self.note_idle(among, **of_multimodal)
        if not self.reads_images:
            self.note_idle(among, image_ratio=self.image_ratio)
        if not self.reads_text:
            self.note_idle(among, text_ratio=self.text_ratio)
        if _OF_PATCHES.isdisjoint(self.losses):
            self.note_idle(among, targets=self.targets, codebook=codebook, teacher_decay=self.teacher_decay)
        elif self.targets == "teacher":
            self.note_idle("with targets teacher", codebook=codebook)
        else:
            self.note_idle("with targets codebook", teacher_decay=self.teacher_decay)

    def bind(self, encoder: "Encoder") -> None:
        backbone, text = encoder.backbone, encoder.text
        answers = self.options.size if self.targets == "codebook" else backbone.width
        of_image = {"mim": backbone.width, "mmm_image": self.width}
        of_text = {"mlm": text.width, "mmm_text": self.width}
        sizes = {name: (width, answers) for name, width in of_image.items()}
        sizes |= {name: (width, text.tokenizer.vocab_size) for name, width in of_text.items()}
        self.predictors = nn.ModuleDict({name: PredictionHead(*sizes[name]) for name in self.losses if name in sizes})
        self.images = self.texts = self.multimodal = self.matching = None
        if self.reads_images:
            self.per_side = patches_per_side(backbone, f"heads.{self.name}")
            self.images = MaskedImageTower(backbone, self.image_ratio, self._image_targets(encoder))
        if self.reads_text:
            self.texts = MaskedTextTower(text, self.text_ratio)
        if self.of_two:
            self.multimodal = MultimodalEncoder(backbone.width, text.width, self.width, self.depth, self.num_heads)
        if "itm" in self.losses:
            self.matching = Matching(self.width, self.hard_negatives)
        self.metric = MaskedMetric()

    def _image_targets(self, encoder: "Encoder") -> PatchCodebook | Teacher | None:
        if _OF_PATCHES.isdisjoint(self.losses):
            return None
        if self.targets == "teacher":
            return Teacher(encoder, has_pool=False)
        backbone = encoder.backbone
        mean_P, std_P = (of.repeat(self.per_side**2) for of in (backbone.mean_P, backbone.std_P))
        return PatchCodebook(self.options, mean_P, std_P)

    @property
    def codebook(self) -> PatchCodebook | None:
        return self.images.codebook if self.images is not None else None

    @property
    def teacher(self) -> Teacher | None:
        return self.images.teacher if self.images is not None else None

    def check(self, train: Datasets, held_out: Datasets) -> None:
        if self.reads_text:
            otherwise = ", and losses: {mim: 1.0} reads none"
            all_captioned(f"heads.{self.name}", self.task, {**train, **held_out}, otherwise)

    def tower_copies(self) -> list[nn.Module]:
        return [] if self.teacher is None or self.teacher.backbone is None else [self.teacher.backbone]

    def begin(self, encoder: "Encoder") -> None:
        if self.teacher is not None:
            self.teacher.follow(encoder, 0.0)

    def after_step(self, encoder: "Encoder", progress: float, made: Tensor) -> None:
        if self.codebook is not None:
            self.codebook.update(progress, made)
        if self.teacher is not None:
            self.teacher.follow(encoder, self.teacher_decay, made=made)

    def loss(self, features: Features, batch: Batch, encoder: "Encoder") -> WholeBatch:
        captions = self.target(batch, "caption") if self.reads_text else None
        found, pairs = self._read(batch, captions, encoder)
        sums = {name: self._sum(name, tokens_KD, of) for name, (tokens_KD, of) in found.items()}
        numbers = {name: float(sum(of.counts)) for name, (_, of) in found.items()}
        rows: dict[str, Tensor] = {}
        for _, of in found.values():
            rows |= of.statistics
        if pairs is not None and captions is not None and self.matching is not None:
            class_BW, image, text = pairs
            sums["itm"] = self.matching.losses(class_BW, is_pair=True).sum()
            numbers["itm"] = float(len(class_BW))
            rows |= self.matching.rows(image, text, features, batch, captions, encoder)
        rows["sums_RL"] = torch.stack([sums[name] for name in self.losses])[None]
        rows["numbers_RL"] = on_device([[numbers[name] for name in self.losses]], features.tokens.device)
        in_turn = "origin" not in batch or batch["origin"].in_turn
        return WholeBatch(partial(self.losses_of_rows, encoder, in_turn, tuple(rows)), tuple(rows.values()))

    def losses_of_rows(self, encoder: "Encoder", in_turn: bool, names: Sequence[str], *values: Tensor) -> Losses:
        """The losses of all of this rank's micro-batches; lets the codebook see its patches."""
        rows = dict(zip(names, values, strict=True))
        sums_L, numbers_L = rows["sums_RL"].sum(0), rows["numbers_RL"].sum(0)
        sums = {name: Ratio(sums_L[i], numbers_L[i]) for i, name in enumerate(self.losses)}
        logged: dict[str, Tensor] = {}
        if self.codebook is not None:
            self.codebook.see(rows["sums_RCQ"], rows["candidates_BJP"])
            share_C = F.normalize(sum_over_ranks(rows["sums_RCQ"].detach().sum(0)[:, -1]), p=1, dim=0)
            logged["code_perplexity"] = torch.special.entr(share_C).sum().exp()
        if self.matching is not None and self.multimodal is not None:
            num_parts = len(rows["sums_RL"])
            wrong, number = self.matching.mismatches(rows, self.multimodal, encoder, in_turn, num_parts)
            sums["itm"] = Ratio(sums["itm"].total + wrong, sums["itm"].number + number)
        return Losses({name: Ratio(self.losses[name] * of.total, of.number) for name, of in sums.items()}, logged)

    def _read(
        self, batch: Batch, captions: Texts | Sequence[str] | None, encoder: "Encoder"
    ) -> tuple[dict[str, tuple[Tensor, Masked]], tuple[Tensor, Tokens, Tokens] | None]:
        """Read masked images, and texts where there are captions.

        Returns:
            Of each masked loss the vectors (K, D) of what was hidden, with what it was; and of the pairs the class
            token's vector, and the tokens as the multimodal encoder takes them.
        """
        seeds = random_seeds(batch)
        vectors: dict[str, tuple[Tensor, Masked]] = {}
        image = text = pairs = None
        if self.images is not None:
            image = self.images(batch["images"], seeds, encoder)
            vectors["mim"] = image.tokens.tokens_BNW, image
        if self.texts is not None and captions is not None:
            text = self.texts(captions, seeds, encoder.text)
            vectors["mlm"] = text.tokens.tokens_BNW, text
        if image is not None and text is not None and self.multimodal is not None:
            both = self.multimodal.projected(image.tokens, text.tokens)
            class_BW, image_BNW, text_BTW = self.multimodal(*both)
            vectors |= {"mmm_image": (image_BNW, image), "mmm_text": (text_BTW, text)}
            pairs = (class_BW, *both)
        hidden = {
            name: (tokens_BND.flatten(0, 1).index_select(0, of.places_K), of)
            for name, (tokens_BND, of) in vectors.items()
            if name in self.predictors
        }
        return hidden, pairs

    def _sum(self, name: str, tokens_KD: Tensor, of: Masked) -> Tensor:
        """The sum of the losses of all that was hidden."""
        predictor = cast(PredictionHead, self.predictors[name])
        if of.targets.is_floating_point():
            errors_KD = F.smooth_l1_loss(in_float32(predictor(tokens_KD)), of.targets, reduction="none", beta=_BETA)
            return errors_KD.mean(1).sum()
        total = predictor.cross_entropy(tokens_KD, of.targets)
        if self.codebook is None or name not in _OF_PATCHES:
            return total
        guessing = len(tokens_KD) * math.log(self.options.size)  # in the first step, which has no codes yet
        return torch.where(self.codebook.is_learned, total, guessing)

    def predict(self, features: Features, batch: Batch, encoder: "Encoder") -> list[Prediction]:
        """For each masked loss `<loss>`, what was guessed and what is true: (2, K), or (2, K, D). `hidden`: which
        patches were.

        With `itm`, `match` and `mismatch`: the probabilities that the image's caption, with nothing hidden, is its own,
        and that the next image's is (None where the two are the same).
        """
        captions = batch["targets"].get("caption", [None] * len(batch["keys"]))
        known = captions if all(caption is not None for caption in captions) else None
        found, _ = self._read(batch, known, encoder)
        predictions: list[Prediction] = [{} for _ in captions]
        for name, (tokens_KD, of) in found.items():
            guess = in_float32(self.predictors[name](tokens_KD))
            both = torch.stack([guess if of.targets.is_floating_point() else guess.argmax(1), of.targets])
            for prediction, part, hidden in zip(predictions, torch.split(both, of.counts, 1), of.hidden, strict=True):
                prediction[name] = part
                if name in _OF_PATCHES:
                    prediction["hidden"] = hidden.tolist()
        if self.matching is not None and self.multimodal is not None and known is not None:
            nexts = [*known[1:], *known[:1]]
            match = partial(self.matching.probabilities, self.multimodal, features, encoder=encoder)
            own, following = match(captions=known), match(captions=nexts)
            for i, prediction in enumerate(predictions):
                prediction["match"] = own[i]
                prediction["mismatch"] = following[i] if nexts[i] != known[i] else None
        return predictions

    def to_json(self, prediction: Prediction, frame: Frame) -> dict[str, Any]:
        """`match`, see `predict`."""
        return {name: plain(prediction[name]) for name in ("match",) if name in prediction}

    def update_metric(self, predictions: list[Prediction], features: Features, batch: Batch) -> None:
        for prediction in predictions:
            for name in self.predictors.keys() & prediction.keys():
                self.metric.update(name, *prediction[name])
            for name, answer in (("match", 1), ("mismatch", 0)):
                if prediction.get(name) is not None:
                    told = torch.tensor([prediction[name] > 0.5])
                    self.metric.update("itm", told, torch.tensor([answer]))

    def measures(self, held_out: "SampleDataset") -> dict[str, Measure]:
        found = {}
        if "itm" in self.losses:
            pair = "image and text told to be a pair or not"
            found["itm_accuracy"] = Measure(pair, "higher", trivial=0.5, answer="always a pair", main=True)
            found["itm_most_frequent"] = Measure(f"{pair}: always the more frequent answer")
        for name in self.predictors:
            words = _WORDS[name]
            found[f"{name}_accuracy"] = Measure(f"{words} guessed", "higher", main=True)
            found[f"{name}_most_frequent"] = Measure(f"{words}: always the most frequent answer")
            found[f"{name}_explained"] = Measure(f"{words}: share of the teacher's vectors explained", "higher")
        return found

    def visualize(self, image_HW3: np.ndarray, prediction: Prediction, target: Prediction) -> Picture | None:
        """The image, what was hidden of it, and the codebook's patches that were guessed."""
        text = f"its caption belongs to it: {prediction['match']:.0%}" if "match" in prediction else ""
        name = next((name for name in ("mmm_image", "mim") if name in prediction), None)
        if name is None or self.codebook is None:
            return (image_HW3, text) if text else None
        patches = self.codebook.pixels(prediction[name][0].to(self.codebook.sums_CP.device)).cpu().numpy()
        side = round((patches.shape[1] / 3) ** 0.5)
        hidden_HW3, guessed_HW3 = image_HW3.copy(), image_HW3.copy()
        for place, patch_P in zip(prediction["hidden"], patches, strict=True):
            row, column = divmod(place, -(-image_HW3.shape[1] // side))
            cell = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
            height, width, _ = hidden_HW3[cell].shape  # less than the side at an edge
            hidden_HW3[cell], guessed_HW3[cell] = 127, patch_P.reshape(side, side, 3)[:height, :width]
        return [Panel(image_HW3, "image"), Panel(hidden_HW3, "hidden"), Panel(guessed_HW3, "guessed")], text
