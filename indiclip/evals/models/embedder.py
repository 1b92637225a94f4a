"""What the benchmark asks of a model, our own encoder as such a model, and which model a `--model` names.

Shape letters: see `indiclip.types`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from indiclip import checkpoint
from indiclip.encoder import Encoder
from indiclip.names import check_choice, check_whole
from indiclip.patches import stack
from indiclip.preprocessing import Picture, read_upright
from indiclip.pretrained.model_names import library_of
from indiclip.types import Images

NATIVE_TOKENS = 256  # `Encoder.embed_image`'s own budget
TEXT_CHUNK = 256  # texts in one forward pass; fixed, so that a number does not depend on the machine
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Precision = Literal["fp32", "bf16", "fp16"]


class View(NamedTuple):
    """At which size and aspect images are encoded.

    Attributes:
        name: As the user wrote it.
        tokens: Most patches; None is the model's own preprocessing.
        aspect: `square` stretches, or crops, every image to a square.
    """

    name: str
    tokens: int | None
    aspect: Literal["kept", "square"]


class Embedder(ABC):
    """A model that gives embeddings of images, and mostly of texts.

    `prepare` and `collate` run in loader processes: a copy that is pickled for one holds no weights.

    Attributes:
        name: For tables.
        lengths: Embedding lengths to score, ascending; the last is the full one.
        device: Where it computes.
        precision: `bf16` or `fp16` compute under autocast.
        embeds_text: Whether `embed_texts` works.
        logit_factor: By which it multiplies cosines before a softmax; what trained CLIP models have where it has none.
        weights: Which weights of a run they are, in words; empty where there is nothing to choose.
        preprocessing: How it reads images, of plain types: for the record.
    """

    name: str
    preprocessing: dict[str, Any]
    lengths: list[int]
    device: torch.device
    precision: Precision
    embeds_text = True
    logit_factor = 100.0
    weights = ""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("encoder", "model")}

    def views(self, names: Sequence[str]) -> list[View]:
        """The views of these names. Raises ValueError for one that this model does not have."""
        return [self._view(name) for name in names]

    @abstractmethod
    def prepare(self, image: Picture, view: View) -> Any:
        """One image as tensors. Raises UnreadableSample."""

    @abstractmethod
    def collate(self, prepared: list[Any]) -> Any:
        """A batch of prepared images."""

    def embed_images(self, batch: Any) -> Tensor:
        """Unit-length embeddings (B, E) of full length, float32 on the CPU."""
        with self._computing():
            return self._embed_images(batch).float().cpu()

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Unit-length embeddings (len(texts), E), float32 on the CPU. Raises ValueError where there are none.

        The model sees each distinct text once, `TEXT_CHUNK` at a time.
        """
        position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        distinct = list(position)
        rows = [torch.zeros(0, self.lengths[-1])]
        with self._computing():
            for start in range(0, len(distinct), TEXT_CHUNK):
                rows.append(self._embed_texts(distinct[start : start + TEXT_CHUNK]).float().cpu())
        return torch.cat(rows)[[position[text] for text in texts]]

    @abstractmethod
    def tokenize(self, texts: list[str]) -> Mapping[str, Tensor]:
        """What the text tower gets of these texts, integers (len(texts), T). Raises as `embed_texts` does."""

    @abstractmethod
    def _view(self, name: str) -> View: ...

    def _no_view(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{self.name}: has no view {name!r}; expected {expected}")

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """While it embeds: in its precision, or in float32 whatever is around it."""
        dtype = _AUTOCAST[self.precision]
        # Not inference mode: what a module keeps from there could not be trained with.
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    @abstractmethod
    def _embed_images(self, batch: Any) -> Tensor:
        """Unit-length embeddings, on any device."""

    @abstractmethod
    def _embed_texts(self, texts: list[str]) -> Tensor:
        """The same of a chunk of texts."""


class EncoderEmbedder(Embedder):
    """Our encoder, loaded or in the middle of its training; it stays on its device.

    Views: `native` is the largest budget (256 patches or the backbone's, if less), a number such as `64` another.
    Both keep the aspect and enlarge no image. `native-square` and `64-square` stretch every image, small ones too, to
    the largest square of whole patches in that budget, as SigLIP does, and CLIP but for its crop. A backbone of one
    size has `native` (the image fills the canvas as far as its aspect allows) and `native-square`.

    Args:
        encoder: Put into evaluation mode for each call only.
        name: For tables.
        precision: `bf16` or `fp16` compute under autocast.
        lengths: Lengths to score instead of the trained ones.

    Raises:
        ValueError: Lengths that the embedding cannot be cut to, or an unknown precision.
    """

    def __init__(
        self, encoder: Encoder, name: str, precision: Precision = "fp32", lengths: Sequence[int] | None = None
    ) -> None:
        check_choice("precision", precision, _AUTOCAST)
        self.weights = next(iter(encoder.initialised), "")
        self.encoder, self.name, self.device, self.precision = encoder, name, encoder.device, precision
        self.logit_factor = encoder.logit_factor
        self.lengths = encoder.lengths if lengths is None else with_full_length(lengths, encoder.embed_dim)
        backbone = encoder.backbone
        self._preprocessing, self._max_tokens = backbone.preprocessing, backbone.max_tokens
        canvas_hw = backbone.canvas_hw and list(backbone.canvas_hw)
        pixels = {"mean": list(backbone.mean), "std": list(backbone.std), "antialias": True, "canvas_hw": canvas_hw}
        self.preprocessing = {**self._preprocessing._asdict(), **pixels}

    def prepare(self, image: Picture, view: View) -> dict[str, Any]:
        assert view.tokens is not None
        pixels_CHW = read_upright(image)
        height, width = pixels_CHW.shape[-2:]
        stretched = view.aspect == "square"
        fit = self._preprocessing
        return fit.cut(pixels_CHW, fit.square_hw(view.tokens) if stretched else fit.fit_hw(height, width, view.tokens))

    def collate(self, prepared: list[dict[str, Any]]) -> Images:
        return stack(prepared)

    def _embed_images(self, batch: Images) -> Tensor:
        return self.encoder.embed_image(batch)

    def _embed_texts(self, texts: list[str]) -> Tensor:
        return self.encoder.embed_text(texts)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        ids_BT, valid_BT = self.encoder.tokenize(texts)
        return {"input_ids": ids_BT, "attention_mask": valid_BT}

    def _view(self, name: str) -> View:
        found = re.fullmatch(r"(native|[1-9][0-9]*)(-square)?", name)
        if found is None or (not self._any_size and found[1] != "native"):
            numbers = ", or a number of patches such as 64 or 64-square" if self._any_size else ""
            raise self._no_view(name, f"native, native-square{numbers}")
        most = min(NATIVE_TOKENS, self._max_tokens) if self._any_size else self._max_tokens
        tokens = most if found[1] == "native" else int(found[1])
        if tokens > self._max_tokens:
            raise ValueError(f"{self.name}: view {name!r} is more than the {self._max_tokens} patches of its backbone")
        return View(name, tokens, "square" if found[2] else "kept")

    @property
    def _any_size(self) -> bool:
        return self._preprocessing.canvas_hw is None

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Evaluation mode; afterwards each part is as it was, frozen ones too."""
        modes = [(module, module.training) for module in self.encoder.modules()]
        self.encoder.eval()
        try:
            with super()._computing():
                yield
        finally:
            for module, training in modes:
                module.training = training


def with_full_length(lengths: Sequence[int] | None, full: int) -> list[int]:
    """Lengths to score, ascending, the full one among them."""
    for length in lengths or []:
        check_whole({"lengths": length}, 1, full)
    return sorted({*(lengths or []), full})


def load_embedder(
    model: str,
    device: str | torch.device = "cpu",
    *,
    precision: Precision = "fp32",
    lengths: Sequence[int] | None = None,
    trust_code: bool = False,
    weights: str = "auto",
) -> Embedder:
    """The model that `--model` names, from local files.

    - `runs/quickstart`, `x.ckpt`: ours.
    - A folder with `open_clip_config.json` and weights: OpenCLIP. One with transformers' `config.json` of a CLIP,
      SigLIP, SigLIP 2 or MetaCLIP 2, weights in safetensors, tokenizer and image processor. One with timm's
      `config.json` and weights.
    - `open_clip:ViT-B-32`, `timm:vit_tiny_patch16_224`: that architecture with random weights;
      `open_clip:ViT-B-32:weights.safetensors`, `timm:NAME:weights.pt`: with those.
    - `open_clip:FOLDER`, `transformers:FOLDER`, `timm:FOLDER`: for a folder that holds the files of several.
    - `open_clip:hf-hub:NAME`, `transformers:hf-hub:NAME`, `timm:hf-hub:NAME`, `open_clip:ViT-B-32:hf-hub:TAG`:
      downloaded by that library. Nothing else is.

    No file is unpickled, but for tensors.

    Args:
        model: See above.
        device: Where to put it.
        precision: `bf16` or `fp16` compute under autocast.
        lengths: Embedding lengths to score beside the full one, instead of those that our models were trained for.
        trust_code: See `indiclip.checkpoint.load`.
        weights: Of a run, see `indiclip.checkpoint.load`.

    Raises:
        FileNotFoundError: No such file or folder, or one that a model lacks.
        ValueError: Anything else that is no model.
    """
    check_choice("precision", precision, _AUTOCAST)
    place = _device(device)
    library, name = library_of(model)
    if library == "vitdet":
        raise ValueError(f"{model}: is a backbone for detectron2, without embeddings")
    if library == "indiclip":
        return EncoderEmbedder(checkpoint.load(name, place, trust_code, weights), model, precision, lengths)
    if weights not in ("auto", "last"):
        raise ValueError(f"--weights {weights}: {model} is no run of ours and has one set of weights; expected last")
    from indiclip.evals.models.external_loading import LOADERS
    from indiclip.evals.models.external_models import Options

    return LOADERS[library](name, model, Options(place, precision, lengths))


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.zeros(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        if reason.startswith("Expected one of"):  # twenty kinds of device
            reason = "expected cpu, cuda, or one GPU such as cuda:1"
        raise ValueError(f"device: {str(device)!r} is not available here ({reason})") from error
