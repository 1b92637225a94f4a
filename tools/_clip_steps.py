"""The contrastive step of our encoder and of OpenCLIP's, of one shape, for the tools that compare the two."""

from __future__ import annotations

import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from heads.contrastive import Contrastive
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.generated.mela import Mela
from indiclip.head import computed
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.planning.cpu import clock
from indiclip.preprocessing import Preprocessing
from indiclip.pretrained.open_clip_images import transformer_tensors as image_tensors
from indiclip.pretrained.open_clip_texts import transformer_tensors as text_tensors
from indiclip.text import TextTower
from indiclip.tokenizers import Tokenizer

CONTEXT = 77  # OpenCLIP's; its release pads every caption to it
Step = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Of both sides' towers."""

    width: int
    depth: int
    heads: int
    patch: int
    pixels: int
    text_width: int
    text_depth: int
    text_heads: int
    embed: int


SMALL = Shape(192, 6, 3, 8, 96, 192, 4, 3, 256)
B16 = Shape(768, 12, 12, 16, 224, 512, 12, 8, 512)
L14 = Shape(1024, 24, 16, 14, 224, 768, 12, 12, 768)


class Ours(nn.Module):
    """Our encoder and its contrastive head, with a text tower of OpenCLIP's shape.

    Args:
        shape: Of the towers.
        tokenizer: Of the captions.
        like: With its image tower too (a class token, a norm before the first block), and its weights.
    """

    def __init__(self, shape: Shape, tokenizer: Tokenizer, like: Theirs | None = None) -> None:
        super().__init__()
        architecture = {
            "model_type": "clip_text_model", "hidden_size": shape.text_width, "num_hidden_layers": shape.text_depth,
            "num_attention_heads": shape.text_heads, "intermediate_size": 4 * shape.text_width,
            "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "gelu",
        }  # fmt: skip
        options: dict[str, Any] = {}
        if like is not None:
            grid = shape.pixels // shape.patch
            options = {"norm_eps": 1e-5, "class_token": True, "pre_norm": True, "pos_embed_grid_size": [grid, grid]}
        backbone = NaFlexViT(
            width=shape.width, depth=shape.depth, num_heads=shape.heads, patch_size=shape.patch, options=options
        )
        text = TextTower(tokenizer, architecture)
        self.encoder = Encoder(backbone, text, shape.embed, [], pool="mean", text_pool="eos")
        self.head = Contrastive(loss="softmax")
        self.head.bind(self.encoder)
        if like is not None:
            self.encoder.load_state_dict(our_names(like, dict(like.model.named_parameters())))

    def loss(self, batch: Any, keys: bool = False) -> Tensor:
        """Of a task's batch, as the loader gives it; with `keys` also as training does it.

        Keys are labels and captions: pairs that share one are no negatives. OpenCLIP knows none.
        """
        features = self.encoder.features(batch["images"])
        if keys:
            return computed(self.head.loss(features, batch, self.encoder)).terms["loss"]
        text_BE = self.encoder.project_text(self.encoder.pool_text(batch["targets"]["caption"]))
        loss: Tensor = self.head.criterion(self.encoder.embed_features(features), text_BE)
        return loss

    @torch.no_grad()
    def class_scores(self, images: list[np.ndarray], names: list[str]) -> Tensor:
        """Cosines (B, C) of images and names."""
        tokens = images[0].shape[0] * images[0].shape[1] // self.encoder.backbone.patch_size**2
        return self.encoder.embed_image(images, max_tokens=tokens) @ self.encoder.embed_text(names).T


def our_names(theirs: Theirs, tensors: dict[str, Tensor], gradients: bool = False) -> dict[str, Tensor]:
    """OpenCLIP's parameters, or their gradients, by our names.

    Its table of tokens has two ids that end a text, of which it reads the last; ours has the first alone.
    """
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith(("visual.", "logit_scale"))}
    table, end = text["token_embedding.weight"].clone(), theirs.tokenizer.encode(["a"])[0][-1]
    table[end] = table[-1] + (table[end] if gradients else 0)
    image = {name.removeprefix("visual."): tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    return image_tensors(image) | text_tensors(text | {"token_embedding.weight": table[:-1]})


class Theirs(nn.Module):
    """OpenCLIP's CLIP; its training script's loss.

    Args:
        shape: Of its towers.
        tokenizer: Ours: the vocabulary and the captions' ids.
        open_clip: The package, see `load_open_clip`.
        variable_text: Pad captions to the longest of the batch; from 4.2 on.
        patch_dropout: Share of the patches that training leaves out.
    """

    def __init__(
        self, shape: Shape, tokenizer: Tokenizer, open_clip: Any, variable_text: bool = False, patch_dropout: float = 0
    ) -> None:
        super().__init__()
        self.tokenizer, self.variable_text = tokenizer, variable_text
        vision = open_clip.CLIPVisionCfg(
            layers=shape.depth, width=shape.width, head_width=shape.width // shape.heads, patch_size=shape.patch,
            image_size=shape.pixels, patch_dropout=patch_dropout, pool_type="avg",
        )  # fmt: skip
        self.end = tokenizer.vocab_size  # the largest id, at which the release pools
        text: dict[str, Any] = {"context_length": CONTEXT, "vocab_size": self.end + 1}
        text |= {"width": shape.text_width, "heads": shape.text_heads, "layers": shape.text_depth}
        if variable_text:
            text |= {"variable_text": True, "pool_type": "eos", "eos_id": self.end, "pad_id": tokenizer.pad_id}
            made: nn.Module = open_clip.CustomTextCLIP(shape.embed, vision, open_clip.CLIPTextCfg(**text))
        else:
            made = open_clip.CLIP(shape.embed, vision, open_clip.CLIPTextCfg(**text))
        self.model, self.criterion = made, open_clip.loss.ClipLoss()

    def loss(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Of normalised images (B, 3, H, W) and their captions' ids, see `ids`."""
        with torch.no_grad():
            cast(Any, self.model).logit_scale.clamp_(0, math.log(100))  # as its training script does after each step
        image, caption, scale = self.model(pixels, ids)
        total: Tensor = self.criterion(image, caption, scale)
        return total

    def ids(self, captions: list[str]) -> Tensor:
        """Token ids (B, T), as its loader's workers make them."""
        rows = self.tokenizer.encode(captions)
        ids = torch.zeros(len(rows), max(map(len, rows)) if self.variable_text else CONTEXT, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor([*row[:-1], self.end])
        return ids

    @torch.no_grad()
    def class_scores(self, images: list[np.ndarray], names: list[str]) -> Tensor:
        """Cosines (B, C) of images and names."""
        model: Any = self.model
        image = model.encode_image(normalised(images), normalize=True)
        scores: Tensor = image @ model.encode_text(self.ids(names), normalize=True).T
        return scores


def normalised(images: list[np.ndarray]) -> Tensor:
    """(B, 3, H, W) between -1 and 1, as our preprocessing makes them."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


def pairs(shape: Shape, batch_size: int, tokenizer: Tokenizer, **budget: Any) -> tuple[Any, Tensor, list[str]]:
    """Drawn images with one caption each: our batch, OpenCLIP's images and its captions."""
    scenes = drawn(shape.pixels, batch_size)
    samples = [scenes[i] for i in range(batch_size)]
    captions = [sample["captions"]["en"][0] for sample in samples]
    batch = our_batch(scenes, shape, tokenizer, **budget)
    return batch, normalised([sample["image"] for sample in samples]), captions


def drawn(pixels: int | list[int], number: int) -> Mela:
    """Images of one size, or of sides between two."""
    return Mela(number, pixels, "single", languages=["en"], seed=0)


def our_batch(scenes: Mela, shape: Shape, tokenizer: Tokenizer, **budget: Any) -> Any:
    """All of the scenes; with a budget of patches as training prepares them."""
    batch_size = len(scenes)
    source = Source("contrastive", scenes, batch_size, **{"max_tokens": (shape.pixels // shape.patch) ** 2} | budget)
    steps = Steps([source], 0, Preprocessing(shape.patch), train=bool(budget), encode=tokenizer.encode)
    return steps[0]["contrastive"]


def on_device(batch: Any, device: str) -> Any:
    """Our batch with its images there."""
    images = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch["images"].items()}
    return {**batch, "images": images}


def training_step(module: nn.Module, loss: Callable[[], Tensor], autocast: torch.dtype | None = None) -> Step:
    """Forward, loss, backward and fused AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    device = next(module.parameters()).device.type

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            total = loss()
        total.backward()
        optimizer.step()

    return step


def paired(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step, all of them once a round, after two rounds of warm-up; of one CPU thread those it ran."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter() if device == "cuda" else clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append((time.perf_counter() if device == "cuda" else clock()) - start)
    return seconds


def longest_operators(profile: Any, device: str) -> list[tuple[str, float, float, int]]:
    """Name, seconds, share of all and calls of each operator that torch's profiler saw, the longest first."""
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    found = [(event.key, getattr(event, attribute) / 1e6, event.count) for event in profile.key_averages()]
    total = sum(seconds for _, seconds, _ in found) or 1.0
    rows = [(name, seconds, seconds / total, calls) for name, seconds, calls in found]
    return sorted(rows, key=lambda row: -row[1])


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Median of theirs / ours, round by round."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def load_open_clip(source: str | None = None) -> Any:
    """The installed OpenCLIP, or the one whose sources lie in a folder, beside it in the same process."""
    with _without("open_clip"):
        sys.path.insert(0, source or "")
        try:
            package = importlib.import_module("open_clip")
            package.loss = importlib.import_module("open_clip.loss")
        finally:
            sys.path.pop(0)
    return package


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Nothing of a package is loaded; what is loaded meanwhile is forgotten, and what was is there again."""

    def of_package() -> dict[str, Any]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}

    before = of_package()
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in of_package():
            del sys.modules[name]
        sys.modules.update(before)
