"""Train a tokenizer on the captions of a config's sources, on text files, or on both; in any languages and scripts.

    python tools/train_tokenizer.py --config conf/quickstart.yaml --vocab-size 1024 --out tokenizer.json
    python tools/train_tokenizer.py --text data/text/* --vocab-size 64000 --out tokenizers/india

A byte-level BPE, so that no text is unknown to it. Words keep their leading space and are split nowhere else: vowel
signs, viramas and joiners (ZWJ, ZWNJ) belong to them. A config reads it with
`tokenizer: {class_path: indiclip.tokenizers.FastTokenizer, init_args: {source: <out>}}`, and transformers reads the
folder with `AutoTokenizer.from_pretrained`, the file with `PreTrainedTokenizerFast(tokenizer_file=...)`.

With `--siglip2` it is of SigLIP 2's kind: lower case, a BPE of letters with bytes for those that were not seen, and an
end token. `indiclip export --to siglip2` needs it, read with `clean: nothing`: transformers reads the tokenizer of a
SigLIP 2 folder as such a one, and does not put texts in NFC.

Text files are tables with a column per language (`hi`, `ta`, `hi-Latn`), tables with the columns `lang` and `text`, or
.txt. A share of their rows is held out, in all languages at once; `indiclip tokenizer report --held_out_only` measures
on those.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain, cycle, islice
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from omegaconf import OmegaConf
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from indiclip.config_files import read_config
from indiclip.datasets.base import SampleDataset
from indiclip.datasets.corpora import read_texts
from indiclip.images import UnreadableSample
from indiclip.loading.data_module import MultiTaskData
from indiclip.training.config_errors import one_line

HOLDOUT = 0.1  # share of the text files' rows that nothing is trained on
SPECIAL = ["<pad>", "<s>", "</s>"]
SIGLIP2_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]  # the order of Gemma's
# Words, punctuation, white space. An apostrophe inside a word is a part of it: English contractions, Assamese vowels.
# Not \w: it lacks the joiners, and GPT-2's \p{L} lacks the vowel signs.
PIECES = r" ?[^\s\p{P}]+(?:['’][^\s\p{P}]+)*| ?\p{P}+|\s+"


def train(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` ids (no less than 259: three special ones and the bytes)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
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


def train_siglip2(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """The same of SigLIP 2's kind; no less than 261 ids."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    # While training only: no token may hold the end of a word and the beginning of the next.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split(Regex(r"\p{P}"), "isolated")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SIGLIP2_SPECIAL, *bytes_],
        initial_alphabet=[*string.ascii_lowercase, *string.digits, *string.punctuation],
        limit_alphabet=1000,
        show_progress=False,
    )
    tokenizer.train_from_iterator((unicodedata.normalize("NFC", text) for text in captions), trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SIGLIP2_SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))  # a text may spell "<0x41>", which is no byte then
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer


def captions_of(config: Path, samples: int) -> Iterator[str]:
    """The captions of the first `samples` samples of each training source of a config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MultiTaskData, "data")
    data = OmegaConf.to_container(OmegaConf.create(read_config(config)), resolve=True)["data"]  # type: ignore[index,call-overload]
    built = parser.instantiate(parser.parse_object(Namespace(data=data)))
    for source in built.data.train:
        for i in track(range(min(samples, len(source.dataset))), source.task, transient=True):
            yield from _captions(source.dataset, i)


def _captions(dataset: SampleDataset, index: int) -> list[str]:
    """All captions of a sample; the image is read only where the dataset cannot tell them without."""
    if found := dataset.captions(index):
        return [text for texts in found.values() for text in texts]
    try:
        sample = dataset[index]
    except UnreadableSample:
        return []
    if captions := sample.get("captions"):
        return [text for texts in captions.values() for text in texts]
    return [sample["caption"]] if "caption" in sample else []


def training_texts(files: list[str], holdout: float) -> dict[str, list[str]]:
    """Language -> the texts to train on: of rows that are not held out, and equal to no text that is held out.

    Short texts recur under other keys ("OK"); without the second condition they would be trained on after all.
    """
    held_out = {(row.language, row.text) for row in read_texts(files) if row.is_held_out(holdout)}
    texts: dict[str, list[str]] = {}
    for row in read_texts(files):
        if not row.is_held_out(holdout) and (row.language, row.text) not in held_out:
            texts.setdefault(row.language, []).append(row.text)
    return texts


def balanced(texts: dict[str, list[str]], exponent: float) -> Iterator[str]:
    """Texts such that each language's share goes with the `exponent`-th power of how many it has.

    The language with most gives each of its texts once; others repeat theirs. An exponent of 1 repeats nothing, one
    of 0 makes all languages equal (arXiv:1901.07291, section 3.1, has 0.5).
    """
    most = max(map(len, texts.values()), default=0)
    for of_language in texts.values():
        yield from islice(cycle(of_language), round(most * (len(of_language) / most) ** exponent))


def save(tokenizer: Tokenizer, out: Path) -> None:
    """As one file where `out` ends with .json, else as a folder that transformers reads."""
    if out.suffix == ".json":
        out.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(out))
        return
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL if tokenizer.token_to_id(SPECIAL[1]) is not None else [SIGLIP2_SPECIAL[i] for i in (0, 2, 1)]
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(out)


def main(argv: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="its data.train is read; nothing of it is held out")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help=".tsv, .csv or .txt files")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--siglip2", action="store_true", help="of the kind that SigLIP 2 reads")
    parser.add_argument("--samples", type=int, default=20_000, help="of each of the config's sources")
    parser.add_argument("--holdout", type=float, default=HOLDOUT, help="share of the text files' rows (default: 0.1)")
    parser.add_argument("--exponent", type=float, default=0.5, help="0: all languages alike, 1: as they come")
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer.json to write, or a folder")
    arguments = parser.parse_args(argv)
    least = 256 + len(SIGLIP2_SPECIAL if arguments.siglip2 else SPECIAL)
    if arguments.vocab_size < least:
        parser.error(f"--vocab-size: found {arguments.vocab_size}, expected at least {least}")
    if not arguments.config and not arguments.text:
        parser.error("give --config, --text, or both")
    if arguments.config and not arguments.config.is_file():
        parser.error(f"--config: no file {arguments.config}")
    for name, value in (("--holdout", arguments.holdout), ("--exponent", arguments.exponent)):
        if not 0 <= value <= 1:
            parser.error(f"{name}: found {value}, expected 0 to 1")
    try:
        texts = training_texts(arguments.text, arguments.holdout)
    except (ValueError, FileNotFoundError) as error:
        parser.error(f"--text: {error}")
    if arguments.text and not texts:
        parser.error(f"--text: no text to train on in {', '.join(arguments.text)} (--holdout {arguments.holdout})")
    captions = captions_of(arguments.config, arguments.samples) if arguments.config else ()
    make = train_siglip2 if arguments.siglip2 else train
    try:
        tokenizer = make(chain(captions, balanced(texts, arguments.exponent)), arguments.vocab_size)
    except (ValueError, FileNotFoundError) as error:  # of the config's sources, which are read here
        parser.error(f"--config: {one_line(error)}")
    save(tokenizer, arguments.out)
    print(f"{arguments.out}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    sys.exit(main())
