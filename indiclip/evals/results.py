"""What a benchmark run found: scores, predictions, what was skipped, and the files that keep them."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from indiclip import json_lines
from indiclip.evals.suites import SUITES, packaged
from indiclip.masking import mask
from indiclip.names import well_formed

if TYPE_CHECKING:
    from indiclip.evals.samples import Sample

PHOTOGRAPHS, PROCEDURAL = "photographs", "procedural"
IMAGES = "images"  # stands for a language where no text is involved
PROBES = {"knn": "kNN", "linear_probe": "probe"}  # protocol -> what it is called at the head of a column
CLEAN = "clean"  # the subset of the images that are not among the training data
_SUMMARY = ("corrected", "acc1", "mean_per_class_recall", "image_to_text_r5")


class Score(NamedTuple):
    """One number, with its 95% interval."""

    suite: str  # india, world, own
    card: str
    part: str  # photographs or procedural
    protocol: str  # zero_shot, hard_pairs, retrieval, matching, places, knn, linear_probe, ...
    language: str  # of the texts; `images` where there are none
    metric: str  # acc1, acc5, mean_per_class_recall, image_to_text_r5, parity_acc1, median_km, ...
    length: int  # of the embeddings
    view: str  # at which size and aspect the images were encoded
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    num_items: int = 0  # images, or texts, that the number is over
    num_classes: int = 0  # candidates
    subset: str = ""  # a group of the images, such as a script; `clean`: without those seen in training

    @property
    def key(self) -> tuple[str, str]:
        """The part of a card that it is of."""
        return self.card, self.part


class Prediction(NamedTuple):
    """What a protocol answered for one image, at the full length and the first view."""

    card: str
    part: str
    protocol: str
    language: str
    key: str  # of the image
    truth: str  # class id, or the right text
    predicted: str
    rank: int  # how many wrong ones are at least as near as the right one
    top: list[str]  # the nearest, best first
    cosines: list[float]  # of these
    hard_hit: bool | None  # right among the confusable classes only; None where the class has none
    flagged: bool  # found among the training images
    content: str = ""  # a digest of the image's bytes


@dataclass(eq=False)
class Answers:
    """The predictions of a card, a protocol and a language, in columns: see `Prediction`.

    Attributes:
        keys_M: str, as are `truth_M`, `predicted_M` and `top_MK`: NumPy arrays of objects.
        rank_M: int64.
        cosine_MK: float32.
        hard_hit_M: bool or None.
        flagged_M: bool.
        content_M: str.
    """

    card: str
    part: str
    protocol: str
    language: str
    keys_M: np.ndarray
    truth_M: np.ndarray
    predicted_M: np.ndarray
    rank_M: np.ndarray
    top_MK: np.ndarray
    cosine_MK: np.ndarray
    hard_hit_M: np.ndarray
    flagged_M: np.ndarray
    content_M: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Answers) and list(self.rows()) == list(other.rows())

    @property
    def key(self) -> tuple[str, str]:
        """The part of a card that they are of."""
        return self.card, self.part

    def rows(self) -> Iterator[Prediction]:
        """Image by image."""
        where = (self.card, self.part, self.protocol, self.language)
        columns = (getattr(self, one.name).tolist() for one in fields(self)[len(where) :])
        return (Prediction(*where, *row) for row in zip(*columns, strict=True))


@dataclass
class CardResult:
    """What became of a card."""

    suite: str
    card: str
    title: str
    part: str
    metric: str  # the main one
    status: str  # `scored`, `skipped`, or `absent`: no photographs of a category of India whose generated part is
    num_images: int = 0
    num_classes: int = 0  # with images
    of_classes: int = 0  # on the card
    source: str = ""
    licence: str = ""
    notes: list[str] = field(default_factory=list)  # why it was skipped; what is not as the card says
    protocol: str = "zero_shot"  # the main one
    plain: list[str] = field(
        default_factory=lambda: ["zero_shot"]
    )  # protocols whose metrics are logged without their name
    candidates: str = "classes"  # what the main protocol ranks: classes, an image's own texts, or all images
    places: dict[str, list[Any]] = field(
        default_factory=dict
    )  # class -> latitude, longitude, state; where they have any
    names: dict[str, dict[str, str]] = field(default_factory=dict)  # class id -> language -> name, two at most
    is_texts: bool = False  # `num_images` counts texts: no image is looked at

    @property
    def key(self) -> tuple[str, str]:
        """What tells it apart in a run."""
        return self.card, self.part


@dataclass
class Result:
    """A benchmark run."""

    model: str
    lengths: list[int]
    views: list[str]
    cards: list[CardResult] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)  # options, versions, seconds, contamination
    samples: list["Sample"] = field(default_factory=list, repr=False, compare=False)  # for the report, saved nowhere

    @property
    def predictions(self) -> list[Prediction]:
        """All answers, image by image."""
        return [row for answers in self.answers for row in answers.rows()]

    @predictions.setter
    def predictions(self, rows: Iterable[Prediction]) -> None:
        self.answers = answers_of(rows)

    def is_main_setting(self, score: Score) -> bool:
        """Whether a score is of the full length and the first view."""
        return (score.length, score.view) == (self.lengths[-1], self.views[0])

    def main(self, language: str = "en") -> dict[tuple[str, str], Score]:
        """(card, part) -> its main metric at the full length and the first view."""
        mains = {card.key: (card.protocol, card.metric) for card in self.cards}
        return {
            score.key: score
            for score in self.scores
            if score.language == language
            and (score.protocol, score.metric) == mains.get(score.key)
            and self.is_main_setting(score)
            and not score.subset
        }

    def probes(self, protocol: str) -> dict[tuple[str, str], Score]:
        """(card, part) -> accuracy of kNN or the linear probe at the full length and the first view."""
        return {
            score.key: score
            for score in self.scores
            if (score.protocol, score.metric, score.subset) == (protocol, "acc1", "") and self.is_main_setting(score)
        }

    def logged(self) -> dict[str, float]:
        """`eval/<suite>/<card>/<language>/<metric>` -> value: all metrics in the main setting, the main ones in others.

        The generated part of a card is `<card>_procedural`; a metric begins with its protocol's name but for those of
        the protocols that `CardResult.plain` names; `_64` at its end is a length other than the full one, `@256-square`
        a view other than the first.
        """
        cards = {card.key: card for card in self.cards}
        values = {}
        for score in self.scores:
            elsewhere = f"_{score.length}" * (score.length != self.lengths[-1])
            elsewhere += f"@{score.view}" * (score.view != self.views[0])
            card = cards[score.key]
            if score.subset or (elsewhere and score.metric not in ("acc1", card.metric)):
                continue
            metric = score.metric if score.protocol in card.plain else f"{score.protocol}_{score.metric}"
            values[f"eval/{score.suite}/{name_of(*score.key)}/{score.language}/{metric}{elsewhere}"] = score.value
        for language, mean in self.headline()["mean"].items():
            values[f"eval/india/mean/{language}/corrected"] = mean["value"]
        return values

    def photographs(self, suite: str = "india") -> list[CardResult]:
        """Cards of a suite whose photographs were scored."""
        return [c for c in self.cards if (c.suite, c.part, c.status) == (suite, PHOTOGRAPHS, "scored")]

    def languages(self) -> list[str]:
        """Languages with any score, `en` first; `images` is one of them where it has the main number of a card."""
        found = {score.language for score in self.scores}
        if not self.main(IMAGES):
            found.discard(IMAGES)
        return sorted(found, key=lambda language: (language != "en", language))

    def headline(self, suite: str = "india") -> dict[str, Any]:
        """The mean of the photographs' main metrics, corrected for chance, per language, and how many of the suite's
        categories it covers, whether the run asked for all of them or not.

        A card counts in the mean of each language in which it has a score that is a number; generated parts count in
        none.
        """
        photographs = [card for card in self.cards if card.suite == suite and card.part == PHOTOGRAPHS]
        scored = {card.key for card in photographs if card.status == "scored"}
        means: dict[str, dict[str, Any]] = {}
        for language in self.languages():
            every = [
                corrected(score.value, score.chance) for key, score in self.main(language).items() if key in scored
            ]
            values = [value for value in every if math.isfinite(value)]
            if values:
                means[language] = {"value": sum(values) / len(values), "cards": len(values)}
        of = len(packaged(suite)) if photographs and suite in SUITES else len(photographs)
        return {"suite": suite, "covered": len(scored), "of": of, "mean": means}

    def save(self, folder: Path) -> None:
        """Write `metrics.json` and `predictions.parquet`, each as a whole.

        Raises:
            ImportError: pyarrow is not installed.
            OSError: The disk is full, or the folder cannot be written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        _write_answers(folder / "predictions.parquet", self.answers)
        content = {
            "model": self.model,
            "headline": self.headline(),
            "lengths": self.lengths,
            "views": self.views,
            "cards": [asdict(card) for card in self.cards],
            "scores": [{name: finite(value) for name, value in score._asdict().items()} for score in self.scores],
            "about": self.about,
        }
        text = well_formed(mask(json.dumps(content, indent=1, ensure_ascii=False))) + "\n"
        json_lines.write_whole(folder / "metrics.json", text.encode())


def part_of(is_procedural: bool) -> str:
    """What a card's images are called."""
    return PROCEDURAL if is_procedural else PHOTOGRAPHS


def name_of(card: str, part: str) -> str:
    """What a part of a card is called: the photographs by the card's id, what is generated `<id>_procedural`."""
    return card if part == PHOTOGRAPHS else f"{card}_{part}"


def is_summary(name: str) -> bool:
    """Whether a benchmark's logged name is one that a summary has room for: in English, or a mean over the cards."""
    _, _, card, language, metric = name.split("/")
    return metric in _SUMMARY and (language == "en" or card == "mean")


def corrected(value: float, chance: float | None) -> float:
    """0 at chance, 1 where all is right; NaN where guessing is always right."""
    if chance is None:
        return value
    return (value - chance) / (1 - chance) if chance < 1 else math.nan


def less_english(score: Score) -> Score:
    """A gap, by which English is better, as how far the language is from English; other scores as they are."""
    if not score.metric.startswith("parity_"):
        return score
    low, high = (None if end is None else -end for end in (score.high, score.low))
    return score._replace(value=-score.value, low=low, high=high)


def load_result(folder: Path, predictions: bool = True) -> Result:
    """A saved run.

    Raises:
        FileNotFoundError: No `metrics.json` there.
        ValueError: It is not one of our files.
    """
    file = folder / "metrics.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected the folder of a finished `indiclip bench`")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        result = Result(content["model"], content["lengths"], content["views"], about=content["about"])
        result.cards = [CardResult(**_of_before(card) | card) for card in content["cards"]]
        numbers = (row | {"value": math.nan if row["value"] is None else row["value"]} for row in content["scores"])
        result.scores = [Score(**row) for row in numbers]
    except KeyError as error:
        raise ValueError(f"{file}: not the metrics of `indiclip bench`: the key {error} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not the metrics of `indiclip bench` ({type(error).__name__}: {error})") from error
    if predictions and (folder / "predictions.parquet").is_file():
        result.answers = answers_of(_read_predictions(folder / "predictions.parquet"))
    return result


def _of_before(card: dict[str, Any]) -> dict[str, Any]:
    """What runs did not say of a card when all cards had one of three main protocols."""
    protocol = {"image": "retrieval", "text": "retrieval"}.get(card["metric"].partition("_")[0], "zero_shot")
    protocol = "matching" if card["card"] == "ocr_indic" else protocol
    candidates = {"retrieval": "images", "matching": "texts"}.get(protocol, "classes")
    return {"protocol": protocol, "plain": ["zero_shot", "matching", "retrieval", "places"], "candidates": candidates}


def answers_of(predictions: Iterable[Prediction]) -> list[Answers]:
    """Predictions in columns, an `Answers` for each card, part, protocol and language."""
    groups: dict[tuple[str, str, str, str], list[Prediction]] = {}
    for row in predictions:
        groups.setdefault(row[:4], []).append(row)
    return [Answers(*where, *map(column_of, list(zip(*rows, strict=True))[4:])) for where, rows in groups.items()]


def column_of(values: Sequence[Any]) -> np.ndarray:
    """Values of any kind, lists of different lengths too, one of each image."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def check_out(folder: Path) -> None:
    """Raise ValueError for a folder whose files are not a benchmark's, which its own would replace."""
    expected = "a new folder, or one of an earlier `indiclip bench`"
    check_is_no_training(folder, expected)
    if not (folder / "metrics.json").exists():
        return
    with suppress(ValueError, OSError):
        content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"model", "cards", "scores"} <= content.keys():
            return
    raise ValueError(_taken(folder, "a metrics.json of another kind", expected))


def check_is_no_training(folder: Path, expected: str) -> None:
    """Raise ValueError for the folder of a training run, which others' files would be lost in."""
    if found := next((name for name in ("config.yaml", "checkpoints") if (folder / name).exists()), ""):
        raise ValueError(_taken(folder, found, expected))


def _taken(folder: Path, found: str, expected: str) -> str:
    return f"--out {folder}: holds {found}, of a training run or another program; expected {expected}"


def check_parquet() -> None:
    """Raise ImportError, saying what to do, unless predictions can be written."""
    _pyarrow()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "predictions.parquet needs pyarrow, which is not installed: pip install 'indiclip[parquet]'"
        ) from error
    return pyarrow


def _write_answers(file: Path, answers: list[Answers]) -> None:
    pyarrow = _pyarrow()
    text, texts = pyarrow.string(), pyarrow.list_(pyarrow.string())
    kinds = [text] * 7 + [pyarrow.int32(), texts, pyarrow.list_(pyarrow.float32()), pyarrow.bool_(), pyarrow.bool_()]
    kinds += [text]
    schema = pyarrow.schema(zip(Prediction._fields, kinds, strict=True))
    tables = [pyarrow.Table.from_pylist([_well_formed(row) for row in of.rows()], schema) for of in answers]
    table = pyarrow.concat_tables([schema.empty_table(), *tables])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    json_lines.write_whole(file, sink.getvalue().to_pybytes())


def _well_formed(row: Prediction) -> dict[str, Any]:
    """With text that Parquet can hold: a card's captions and a class's name may come from anywhere."""
    columns = row._asdict()
    try:
        "".join((*row[:7], *row.top)).encode()
    except UnicodeEncodeError:
        columns |= {name: well_formed(value) for name, value in columns.items() if isinstance(value, str)}
        columns["top"] = list(map(well_formed, row.top))
    return columns


def _read_predictions(file: Path) -> list[Prediction]:
    there = set(_pyarrow().parquet.read_schema(file).names)  # earlier runs have no `content`
    table = _pyarrow().parquet.read_table(file, columns=[name for name in Prediction._fields if name in there])
    return [Prediction(**row) for row in table.to_pylist()]


def finite(value: Any) -> Any:
    """A value for JSON, which has no number for NaN: None instead."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
