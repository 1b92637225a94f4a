"""`indiclip bench --model` and the commands beside it: what their words mean."""

from __future__ import annotations

from collections.abc import Callable

from indiclip.commands.bench_compare import compare, leaderboard
from indiclip.commands.bench_run import run
from indiclip.commands.words import Parser, run_command

_HELP = """\
usage: indiclip bench --model MODEL [options]
       indiclip bench <command> ... [options]

  --model       score an encoder, ours or anyone's
                  indiclip bench --model runs/mela --images photos
                  indiclip bench --model --help        all options
  cards         the benchmark's cards, or one card with its classes
                  indiclip bench cards edibles
  import        a card's images into another layout, bytes unchanged
                  indiclip bench import photos/edibles --card edibles --out wds
  compare       two runs side by side
                  indiclip bench compare runs/bench/a runs/bench/b
  leaderboard   many runs in one table
                  indiclip bench leaderboard runs/bench/*

A card says which classes are told apart, what they are called in each language,
and how it is asked. Your own is a .yaml file like those that come with IndiCLIP.
`indiclip bench import --help` and the like: all options of a command.
"""
_SHOWN = 10  # images that were left out


def _cards(argv: list[str]) -> int:
    parser = Parser(
        "bench cards",
        "List the cards that come with IndiCLIP, or show one: where its images are from,\n"
        "its prompts, and its classes with their names. A name with a * was romanised by\n"
        "rule.",
        "example: indiclip bench cards edibles",
    )
    parser.add_argument("card", nargs="?", metavar="CARD", help="the id of one of them, or a .yaml file")
    options = parser.parse_args(argv)
    from indiclip.evals.cards.card import load_card
    from indiclip.evals.cards.table import list_cards, show_card

    print("\n".join(show_card(load_card(options.card)) if options.card else list_cards()))
    return 0


def _import(argv: list[str]) -> int:
    parser = Parser(
        "bench import",
        "Write a card's images in another layout. SOURCE is\n"
        "  a folder     CLASS/*.jpg, also train/CLASS/ and test/CLASS/; or with a table\n"
        "               (columns file, class)\n"
        "  shards       *.tar with .cls, and classes.txt or classnames.txt;\n"
        "               clip-benchmark's folder\n"
        "  captions     COCO's or Karpathy's JSON, Crossmodal-3600's captions.jsonl, a table\n"
        "Labels go by the classes' names. Bytes of images are kept; what cannot be read is\n"
        "left out and named. The folder is written whole or not at all, and the same source\n"
        "gives the same bytes.",
        "example: indiclip bench import photos/edibles --card edibles --out edibles_wds",
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder, a table, or a file of captions")
    parser.add_argument("--card", required=True, metavar="CARD", help="what the images are of (indiclip bench cards)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the new folder; not there, or empty")
    parser.add_argument(
        "--layout", default="clip-benchmark", metavar="NAME", help="folder, or clip-benchmark (default)"
    )
    parser.add_argument("--split", default="test", metavar="NAME", help="of the images to score (default: test)")
    parser.add_argument(
        "--language", default="en", metavar="CODE", help="of names, prompts, captions for clip-benchmark (default: en)"
    )
    options = parser.parse_args(argv)
    from indiclip.evals.images.convert import convert

    done = convert(options.source, options.card, options.out, options.layout, options.split, options.language)
    counts = ", ".join(f"{split} {count:,}" for split, count in done.images.items())
    print(f"{done.folder}: {done.images.total():,} images of {options.card} ({counts}), layout {options.layout}")
    for note in done.notes:
        print(f"  {note}")
    if done.left_out:
        print(f"  left out: {len(done.left_out):,} that cannot be read")
        more = len(done.left_out) - _SHOWN
        print("\n".join(f"    {line}" for line in [*done.left_out[:_SHOWN], *([f"... {more} more"] * (more > 0))]))
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "": run,
    "cards": _cards,
    "import": _import,
    "compare": compare,
    "leaderboard": leaderboard,
}


def main(argv: list[str]) -> int:
    """Runs a command. Returns the exit status: 0, 2 for a mistake in the command or in the data."""
    return run_command("bench", _HELP, _COMMANDS, argv)
