"""`indiclip tokenizer report`: what tokenizers make of texts, language by language, and whether bounds hold."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from indiclip.config_files import read_config
from indiclip.datasets.corpora import read_texts
from indiclip.datasets.tables import existing
from indiclip.names import check_range, did_you_mean
from indiclip.tokenizers import ByteTokenizer, FastTokenizer, SentencePieceTokenizer, Tokenizer

_UNCUT = 10**9  # a context length that no text reaches
_NAMES = ("bytes", "clip")
_KEYS = ("text.tokenizer", "init_args.text.init_args.tokenizer")  # of the encoder, by hand and in a run's config.yaml


@dataclass(frozen=True)
class Counts:
    """What a tokenizer makes of one language's texts. `truncated` is how many are longer than its context length."""

    texts: int
    words: int
    tokens: int
    truncated: int
    unknown: int

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / self.words

    @property
    def truncated_share(self) -> float:
        return self.truncated / self.texts


class ClipTokenizer(Tokenizer):
    """CLIP's tokenizer, as OpenCLIP has it; for comparison only. It makes all letters small."""

    def __init__(self, context_length: int = 77) -> None:
        try:
            from open_clip import SimpleTokenizer
        except ImportError as error:
            raise ValueError("clip: its tokenizer comes with OpenCLIP: pip install open_clip_torch") from error
        check_range({"tokenizer.context_length": context_length}, 3)
        self._tokenizer: Any = SimpleTokenizer()
        self.context_length = context_length
        self.vocab_size = self._tokenizer.vocab_size
        self.pad_id = 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        rows = (self._tokenizer.encode(text)[: self.context_length - 2] for text in texts)
        return [[start, *row, end] for row in rows]

    def decode(self, rows: list[list[int]]) -> list[str]:
        frame = self.frame_ids
        return [self._tokenizer.decode([id for id in row if id not in frame]).strip() for row in rows]

    def to_config(self) -> dict[str, Any]:
        return {"context_length": self.context_length}


def load(name: str, context_length: int) -> Tokenizer:
    """The tokenizer that a word of the command names.

    Raises:
        FileNotFoundError: No such file, and names the nearest; or a folder without a tokenizer.json.
        ValueError: The file is no tokenizer, `context_length` leaves no room for a token, or `clip` without OpenCLIP.
    """
    if name == "bytes":
        return ByteTokenizer(context_length)
    if name == "clip":
        return ClipTokenizer(context_length)
    try:
        path = existing(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; expected a file, a folder, or one of {_NAMES}{did_you_mean(name, _NAMES)}"
        ) from error
    if path.suffix in (".yaml", ".yml"):
        return _of_config(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(str(path), context_length)
    return FastTokenizer(str(path), context_length)


def measure(tokenizer: Tokenizer, texts: dict[str, list[str]]) -> dict[str, Counts]:
    """Language -> counts; of texts that each have a word."""
    uncut = type(tokenizer)(**tokenizer.to_config() | {"context_length": _UNCUT})
    frame = len(uncut.encode([""])[0])  # the start and end tokens
    found = {}
    for language, of_language in texts.items():
        lengths = [len(row) for row in uncut.encode(of_language)]
        found[language] = Counts(
            texts=len(lengths),
            words=sum(len(text.split()) for text in of_language),
            tokens=sum(lengths) - frame * len(lengths),
            truncated=sum(length > tokenizer.context_length for length in lengths),
            unknown=uncut.count_unknown(of_language),
        )
    return found


def ratio(found: dict[str, Counts]) -> float:
    """Tokens per word of the worst language over those of the best."""
    values = [counts.tokens_per_word for counts in found.values()]
    return max(values) / min(values)


def run(
    tokenizers: list[str],
    text: list[str],
    held_out_only: bool,
    holdout: float,
    context_length: int,
    max_tokens_per_word: list[str],
    max_ratio: float | None,
    max_truncated: float | None,
    max_unknown: int | None,
    as_json: bool,
) -> int:
    """Prints the report. Returns 1 where the first tokenizer breaks a bound, else 0."""
    texts: dict[str, list[str]] = {}
    for row in read_texts(text):
        if not held_out_only or row.is_held_out(holdout):
            texts.setdefault(row.language, []).append(row.text)
    if not texts:
        raise ValueError(f"--text: no {'held-out ' * held_out_only}text in {', '.join(text)}")
    limits = _limits(max_tokens_per_word, list(texts))
    loaded = {name: load(name, context_length) for name in tokenizers}
    found = {name: measure(tokenizer, texts) for name, tokenizer in loaded.items()}
    first = tokenizers[0]
    broken = _broken(found[first], limits, max_ratio, max_truncated, max_unknown)
    if as_json:
        print(json.dumps(_as_json(loaded, found, broken), ensure_ascii=False, indent=2))
    else:
        _show(loaded, found)
        for line in broken:
            print(f"{first}: {line}")
    return int(bool(broken))


def _limits(words: list[str], languages: list[str]) -> dict[str, float]:
    """`["2.2", "hi=1.5"]` -> the bound of every language that has one."""
    limits: dict[str, float] = {}
    for word in sorted(words, key=lambda word: "=" in word):  # single languages' bounds come last and win
        language, is_single, number = word.rpartition("=")
        try:
            bound = float(number)
        except ValueError:
            raise ValueError(f"--max_tokens_per_word: found {word!r}; expected a number, or such as hi=1.5") from None
        if is_single and language not in languages:
            near = did_you_mean(language, languages)
            raise ValueError(f"--max_tokens_per_word: the texts have no language {language!r}{near}; found {languages}")
        limits |= {language: bound} if is_single else dict.fromkeys(languages, bound)
    return limits


def _broken(
    found: dict[str, Counts],
    limits: dict[str, float],
    max_ratio: float | None,
    max_truncated: float | None,
    max_unknown: int | None,
) -> list[str]:
    """A line per bound that does not hold."""
    lines = []
    for language, counts in found.items():
        for what, number, bound in (
            ("tokens per word", counts.tokens_per_word, limits.get(language)),
            ("of the texts cut", counts.truncated_share, max_truncated),
            ("unknown", counts.unknown, max_unknown),
        ):
            if bound is not None and number > bound:
                lines.append(f"{language}: {number:.4g} {what}; at most {bound:g} expected")
    if max_ratio is not None and ratio(found) > max_ratio:
        worst, best = (pick(found, key=lambda name: found[name].tokens_per_word) for pick in (max, min))
        lines.append(f"{worst}: {ratio(found):.4g} times the tokens per word of {best}; at most {max_ratio:g} expected")
    return lines


def _as_json(
    tokenizers: dict[str, Tokenizer], found: dict[str, dict[str, Counts]], broken: list[str]
) -> dict[str, Any]:
    report = {}
    for name, tokenizer in tokenizers.items():
        languages = {
            language: asdict(counts)
            | {"tokens_per_word": counts.tokens_per_word, "truncated_share": counts.truncated_share}
            for language, counts in found[name].items()
        }
        sizes = {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
        report[name] = sizes | {"ratio": ratio(found[name]), "languages": languages}
    return {"tokenizers": report, "broken": broken}


def _show(tokenizers: dict[str, Tokenizer], found: dict[str, dict[str, Counts]]) -> None:
    names = [f"{Path(name).name} ({tokenizer.vocab_size:,} ids)" for name, tokenizer in tokenizers.items()]
    cuts = [f"cut at {tokenizer.context_length}" for tokenizer in tokenizers.values()]
    first = next(iter(found.values()))
    left = max(map(len, [*first, "worst / best"]))
    print(" " * (left + 16), *(f"{name:>33}" for name in names), sep="")
    print(
        f"{'language':<{left}}{'texts':>8}{'words':>8}",
        *(f"{'tokens/word':>13}{cut:>11}{'unknown':>8}" for cut in cuts),
    )
    for language, counts in first.items():
        cells = [f"{language:<{left}}{counts.texts:>8,}{counts.words:>8,}"]
        for of_tokenizer in found.values():
            own = of_tokenizer[language]
            cells.append(f"{own.tokens_per_word:>13.2f}{own.truncated_share:>11.1%}{own.unknown:>8,}")
        print(*cells)
    ratios = " ".join(f"{ratio(of):>13.2f}{'':>19}" for of in found.values())
    print(f"{'worst / best':<{left + 16}}", ratios.rstrip())


def _of_config(path: Path) -> Tokenizer:
    """The tokenizer at `model.encoder.text.tokenizer` of an experiment."""
    from jsonargparse import ArgumentParser
    from omegaconf import OmegaConf

    config = OmegaConf.create(read_config(path))
    node = next(filter(None, (OmegaConf.select(config, f"model.encoder.{key}") for key in _KEYS)), None)
    if node is None:
        raise ValueError(f"{path}: no key model.encoder.text.tokenizer")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Tokenizer, "tokenizer")
    built = parser.instantiate(parser.parse_object({"tokenizer": OmegaConf.to_container(node, resolve=True)}))
    tokenizer = built.tokenizer
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer
