"""Other people's models as `indiclip.evals.models.embedder.Embedder`: OpenCLIP, transformers, timm.

Each sees images and texts through its own library's preprocessing and tokenizer, so that its embeddings are those that
the library's documented use gives. Only the picture that goes in is ours for all models: upright, and transparency on
white.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from indiclip.evals.models.embedder import Embedder, Precision, View, with_full_length
from indiclip.names import reason_of
from indiclip.preprocessing import Picture, read_upright

# Shortest-side resizing makes a line of pixels enormous; past this the long side is squeezed.
_MAX_ASPECT = 100


class Options(NamedTuple):
    """See `indiclip.evals.models.embedder.load_embedder`."""

    device: torch.device = torch.device("cpu")
    precision: Precision = "fp32"
    lengths: Sequence[int] | None = None


class ExternalModel(Embedder):
    """What all of them share. Its one view is `native`, the model's own preprocessing.

    Args:
        name: For tables.
        model: The library's.
        transform: A PIL image as the model sees it.
        tokenizer: The library's; None where it embeds no text.
        options: Where and how it computes.
    """

    def __init__(self, name: str, model: Any, transform: Any, tokenizer: Any, options: Options) -> None:
        self.name, self._transform, self._tokenizer = name, transform, tokenizer
        words = re.sub(r" at 0x\w+", "", str(transform))  # where a function lies in memory
        self.preprocessing = {"transform": " ".join(words.split())}
        self.model = model.to(options.device).eval().requires_grad_(False)
        self.device, self.precision = options.device, options.precision
        if isinstance(log_scale := getattr(model, "logit_scale", None), Tensor):
            self.logit_factor = float(log_scale.detach().float().exp())
        try:
            blank = self.prepare(np.zeros((32, 48, 3), np.uint8), self._view("native"))
            length = self.embed_images(self.collate([blank])).shape[1]
            self.lengths = with_full_length(options.lengths, length)
            if self.embeds_text:
                self.embed_texts(["a"])
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, IndexError) as error:  # as the libraries say that sizes differ
            fit = "its preprocessing or tokenizer does not fit its weights"
            raise ValueError(f"{name}: {fit} ({type(error).__name__}: {reason_of(error)})") from error

    def prepare(self, image: Picture, view: View) -> Any:
        pixels = Image.fromarray(read_upright(image).permute(1, 2, 0).numpy())
        width, height = pixels.size
        size = (min(width, height * _MAX_ASPECT), min(height, width * _MAX_ASPECT))
        return self._prepare(pixels if size == pixels.size else pixels.resize(size), view)

    def collate(self, prepared: list[Any]) -> Any:
        return torch.stack(prepared)

    def _view(self, name: str) -> View:
        if name != "native":
            raise self._no_view(name, "native, its own preprocessing")
        return View(name, None, "square")

    def _prepare(self, image: Image.Image, view: View) -> Any:
        return self._transform(image)


class OpenClip(ExternalModel):
    """An OpenCLIP model with its transform and tokenizer."""

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        return {"input_ids": self._tokenizer(texts)}

    def _embed_images(self, batch: Any) -> Tensor:
        return _unit(self.model.encode_image(batch.to(self.device)))

    def _embed_texts(self, texts: list[str]) -> Tensor:
        return _unit(self.model.encode_text(self._tokenizer(texts).to(self.device)))


class Transformers(ExternalModel):
    """A dual encoder of transformers.

    It gets the parts of its processor and not that itself: SigLIP 2's has a patch size of its own, whatever the folder
    says.

    SigLIP 2 of any size ("NaFlex") also has views of a number of patches, such as `64`; its `native` is what the
    folder says, mostly 256.
    """

    def __init__(self, name: str, model: Any, transform: Any, tokenizer: Any, options: Options) -> None:
        self._context_length = int(model.config.text_config.max_position_embeddings)
        self._any_size = model.config.model_type == "siglip2"
        # SigLIP 2 was trained on lower-case text. Its folders of one size call themselves SigLIP and name Gemma's
        # tokenizer, which keeps capitals; transformers leaves this to the user.
        self._lowers = type(tokenizer).__name__.startswith("Gemma")
        super().__init__(name, model, transform, tokenizer, options)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        # SigLIP was trained on texts of one length. CLIP does not mind, and numbers no longer depend on the chunk.
        texts = [text.lower() for text in texts] if self._lowers else texts
        return dict(
            self._tokenizer(
                texts, padding="max_length", truncation=True, max_length=self._context_length, return_tensors="pt"
            )
        )

    def collate(self, prepared: list[Any]) -> Any:
        return {field: torch.cat([one[field] for one in prepared]) for field in prepared[0]}

    def _view(self, name: str) -> View:
        if not self._any_size:
            return super()._view(name)
        if name != "native" and not (name.isdecimal() and int(name)):
            raise self._no_view(name, "native, or a number of patches such as 64")
        return View(name, None if name == "native" else int(name), "kept")

    def _prepare(self, image: Image.Image, view: View) -> Any:
        budget = {} if view.tokens is None else {"max_num_patches": view.tokens}
        return dict(self._transform(images=[image], return_tensors="pt", **budget))

    def _embed_images(self, batch: Any) -> Tensor:
        return self._pooled(self.model.get_image_features, batch)

    def _embed_texts(self, texts: list[str]) -> Tensor:
        return self._pooled(self.model.get_text_features, self.tokenize(texts))

    def _pooled(self, tower: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        output = tower(**{field: tensor.to(self.device) for field, tensor in tensors.items()})
        return _unit(output if isinstance(output, Tensor) else output.pooler_output)


class Timm(ExternalModel):
    """An image model of timm without its classifier."""

    embeds_text = False

    def tokenize(self, texts: list[str]) -> NoReturn:
        words = "an image model of timm embeds no text; it can be scored by kNN and linear probe"
        raise ValueError(f"{self.name}: {words}")

    def _embed_images(self, batch: Any) -> Tensor:
        output = self.model(batch.to(self.device))
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise ValueError(f"{self.name}: gives {getattr(output, 'shape', type(output))}, not one vector per image")
        return _unit(output)

    def _embed_texts(self, texts: list[str]) -> NoReturn:
        self.tokenize(texts)


def _unit(vector_BE: Tensor) -> Tensor:
    return F.normalize(vector_BE.float(), dim=-1)
