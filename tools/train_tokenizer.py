"""Train a tokenizer on the captions that a config's sources give, in whatever languages and scripts they are.

    python tools/train_tokenizer.py --config conf/quickstart.yaml --vocab-size 1024 --out conf/tokenizers/mela.json

A byte-level BPE (words keep their leading space, punctuation stands alone), so that no text is unknown to it. The
config reads it with `tokenizer: {class_path: indiclip.text.FastTokenizer, init_args: {source: <out>}}`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from omegaconf import OmegaConf
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset

from indiclip.data.images import UnreadableSample
from indiclip.data.module import MultiTaskData

SPECIAL = ["<pad>", "<s>", "</s>"]


def train(captions: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` ids (no less than 259: three special ones and the bytes)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "merged_with_next"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in SPECIAL[1:]]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def captions_of(config: Path, samples: int) -> Iterator[str]:
    """The captions of the first `samples` samples of each training source of a config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MultiTaskData, "data")
    data = OmegaConf.to_container(OmegaConf.load(config), resolve=True)["data"]  # type: ignore[index,call-overload]
    built = parser.instantiate(parser.parse_object(Namespace(data=data)))
    for source in built.data.train:
        dataset: Dataset = source.dataset  # type: ignore[type-arg]
        for i in track(range(min(samples, len(dataset))), source.task, transient=True):  # type: ignore[arg-type]
            yield from _captions(dataset, i)


def _captions(dataset: Any, index: int) -> list[str]:
    """All captions of a sample; the image is read only where the dataset cannot tell them without."""
    if hasattr(dataset, "captions"):
        found = dataset.captions(index)
        return list(found.values() if isinstance(found, dict) else found)
    try:
        caption = dataset[index].get("caption")
    except UnreadableSample:
        return []
    return [caption] if caption else []


def main(argv: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="its data.train is read")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=20_000, help="of each source")
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer.json to write")
    arguments = parser.parse_args(argv)
    if arguments.vocab_size < 256 + len(SPECIAL):
        parser.error(f"--vocab-size: found {arguments.vocab_size}, expected at least {256 + len(SPECIAL)}")
    if not arguments.config.is_file():
        parser.error(f"--config: no file {arguments.config}")
    tokenizer = train(captions_of(arguments.config, arguments.samples), arguments.vocab_size)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out))
    print(f"{arguments.out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    sys.exit(main())
