"""`indiclip tokenizer report`: what its words mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from indiclip.commands.words import Parser, count, run_command, whole

_HELP = """\
usage: indiclip tokenizer <command> ... [options]

  report   tokens per word and texts cut short, per language
           indiclip tokenizer report tokenizers/india clip --text captions.tsv --max_tokens_per_word 2.2 hi=1.5

A tokenizer is made by `python tools/train_tokenizer.py --help`.
`indiclip tokenizer report --help`: all options.
"""


def _report(argv: list[str]) -> int:
    parser = Parser(
        "tokenizer report",
        "Count, per language, what tokenizers make of texts: tokens per word (words are what stands\n"
        "between white space; start and end tokens are not counted), texts longer than the context length (start and\n"
        "end counted), and unknown tokens.\n"
        "The bounds hold for the first tokenizer; the others stand beside it. Ends with 1 where one is broken.",
        "example: indiclip tokenizer report conf/mela.yaml clip --text names.tsv --max_truncated 0.01",
    )
    parser.add_argument(
        "tokenizers",
        nargs="+",
        metavar="TOKENIZER",
        help="a tokenizer.json, its folder, a SentencePiece .model, a config .yaml, `bytes`, or `clip` (OpenCLIP's)",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="FILE",
        help="tables with a column per language, or with `lang` and `text`; .txt",
    )
    parser.add_argument(
        "--held_out_only",
        "--held-out-only",
        action="store_true",
        help="only the rows that tools/train_tokenizer.py keeps aside",
    )
    parser.add_argument(
        "--holdout",
        type=_share,
        default=0.1,
        metavar="X",
        help="their share, at most that of the training (default: 0.1)",
    )
    parser.add_argument(
        "--context_length",
        type=count,
        default=64,
        metavar="N",
        help="of tokenizers that no config gives one (default: 64)",
    )
    parser.add_argument(
        "--max_tokens_per_word", nargs="+", default=[], metavar="X", help="of every language; `hi=1.5`: of one"
    )
    parser.add_argument(
        "--max_ratio", type=float, metavar="X", help="of the worst language's tokens per word to the best's"
    )
    parser.add_argument("--max_truncated", type=_share, metavar="X", help="share of a language's texts, such as 0.01")
    parser.add_argument("--max_unknown", type=whole, metavar="N", help="of a language")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(argv)
    from indiclip.commands.tokenizer_report import run

    return run(options)


def main(argv: list[str]) -> int:
    """Runs a command. Returns the exit status: 0, 1 where a bound is broken, 2 for a mistake in the command."""
    return run_command("tokenizer", _HELP, _COMMANDS, argv)


def _share(text: str) -> float:
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"found {text!r}; expected a share from 0 to 1")


_COMMANDS: dict[str, Callable[[list[str]], int]] = {"report": _report}
