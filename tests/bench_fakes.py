"""Small results of the benchmark, and an embedder for whole runs, whose numbers a test can know."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from indiclip.datasets.tables import stable_hash
from indiclip.evals.models.embedder import View
from indiclip.evals.results import PHOTOGRAPHS, PROCEDURAL, CardResult, Prediction, Result, Score


def score(card: str, value: float, language: str = "en", metric: str = "acc1", **other) -> Score:
    fields = {"suite": "india", "part": PHOTOGRAPHS, "protocol": "zero_shot", "length": 8, "view": "native"} | other
    return Score(card=card, value=value, language=language, metric=metric, **fields)


def card(name: str, **other) -> CardResult:
    fields = {"suite": "india", "title": name.title(), "part": PHOTOGRAPHS, "metric": "acc1", "status": "scored"}
    fields |= {"protocol": "zero_shot", "plain": ["zero_shot", "places"]}
    return CardResult(card=name, **fields | {"num_images": 4, "num_classes": 2, "of_classes": 2} | other)


def answer(key: str, truth: str, predicted: str, rank: int | None = None, **other) -> Prediction:
    rank = int(truth != predicted) if rank is None else rank
    top = [predicted] if truth == predicted else [predicted, truth]
    fields = {"card": "food", "part": PHOTOGRAPHS, "protocol": "zero_shot", "language": "en", "hard_hit": None}
    fields |= {"flagged": False, "cosines": [0.5, 0.25][: len(top)]} | other
    return Prediction(key=key, truth=truth, predicted=predicted, rank=rank, top=top, **fields)


def small_run(model: str = "m", **about) -> Result:
    """Two scored cards, one skipped, one generated.

    English: food (0.6 - 0.2) / 0.8 = 0.5 and script (0.82 - 0.1) / 0.9 = 0.8, mean 0.65. Hindi: food 0.25 alone.
    """
    result = Result(model, [4, 8], ["native"], about={"date": "2026-01-02", **about})
    result.cards = [
        card("food", source="somewhere", licence="CC0"),
        card("script"),
        card("gods", status="skipped", notes=["no folder gods/"], num_images=0),
        card("script", part=PROCEDURAL),
    ]
    result.scores = [
        score("food", 0.6, low=0.5, high=0.7, chance=0.2, num_items=4),
        score("food", 0.4, "hi", chance=0.2, num_items=4),
        score("food", 0.3, chance=0.2, length=4),
        score("script", 0.82, chance=0.1, num_items=4),
        score("script", 0.99, chance=0.1, part=PROCEDURAL),
    ]
    result.predictions = [
        answer("1.jpg", "dosa", "dosa"),
        answer("2.jpg", "dosa", "roti"),
        answer("3.jpg", "roti", "roti"),
        answer("4.jpg", "roti", "roti"),
    ]
    return result


PURE = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
    "yellow": (255, 255, 0), "cyan": (0, 255, 255), "magenta": (255, 0, 255),
}  # fmt: skip


class Shades:
    """An embedder whose answers a test can count: an image's mean colour less grey, and a text's colour by name.

    What a text says besides a name of `PURE` does not matter; without one it is a vector of its own.

    Args:
        embeds_text: Whether it has texts.
    """

    name, lengths = "shades", [2, 3]

    def __init__(self, embeds_text=True):
        self.embeds_text, self.seen = embeds_text, 0

    def views(self, names):
        return [View(name, None, "kept") for name in names]

    def prepare(self, image, view):
        pixels = np.asarray(image, dtype=np.float64).reshape(-1, 3)
        return torch.tensor(pixels.mean(0) - 127.5, dtype=torch.float32)

    def collate(self, prepared):
        return torch.stack(prepared)

    def embed_images(self, batch):
        self.seen += len(batch)
        return F.normalize(batch, dim=1)

    def embed_texts(self, texts):
        return F.normalize(torch.tensor([self._colour(text) for text in texts]) - 127.5, dim=1)

    @staticmethod
    def _colour(text):
        found = [rgb for name, rgb in PURE.items() if name in text]
        own = np.random.default_rng(stable_hash(text)).uniform(0, 255, 3)
        return [float(value) for value in (found[0] if found else own)]


def shades_of(name, count, spread=120, side=4):
    """Flat PNGs of colours around one of `PURE`, the same at each call: some are nearer to another."""
    generator = np.random.default_rng(stable_hash(name))
    for _ in range(count):
        rgb = np.clip(np.array(PURE[name]) + generator.normal(0, spread, 3), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.tile(rgb, (side, side, 1))).save(file, "PNG")
        yield file.getvalue()
