"""`indiclip bench cards`, `import`, `compare` and `leaderboard`, and `indiclip leaderboard`."""

import sys
from pathlib import Path

from indiclip.evals.cards.card import SUITES, load_card
from indiclip.evals.cards.table import list_cards, list_protocols, show_card
from indiclip.evals.comparison import in_words
from indiclip.evals.images.convert import convert
from indiclip.evals.leaderboard_pages import add
from indiclip.evals.reports.comparison_page import write_comparison
from indiclip.evals.results import load_result
from indiclip.names import plain

_SHOWN = 10  # images that were left out


def cards(card: str | None, all_names: bool = False) -> int:
    """Prints the cards and protocols that come with IndiCLIP, a suite's cards, or one card. Returns the exit status."""
    if card is None:
        lines = [*list_cards(), "", *list_protocols()]
    else:
        lines = list_cards((card,)) if card in SUITES else show_card(load_card(card), all_names)
    print("\n".join(lines))
    return 0


def import_images(source: str, card: str, out: str, layout: str, split: str, language: str, skip_unknown: bool) -> int:
    """Writes a card's images in another layout. Returns the exit status."""
    done = convert(source, card, out, layout, split, language, skip_unknown)
    counts = ", ".join(f"{split} {count:,}" for split, count in done.images.items())
    print(f"{plain(str(done.folder))}: {done.images.total():,} images of {card} ({counts}), layout {layout}")
    for note in done.notes:
        print(f"  {plain(note)}")
    if done.left_out:
        print(f"  left out: {len(done.left_out):,} that cannot be read")
        for line in done.left_out[:_SHOWN]:
            print(f"    {plain(line)}")
        if (more := len(done.left_out) - _SHOWN) > 0:
            print(f"    ... {more} more")
    return 0


def compare(run_a: Path, run_b: Path, out: Path) -> int:
    """Sets two runs side by side. Returns the exit status."""
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder; expected a file such as compare.html")
    print(in_words(write_comparison(out, load_result(run_a), load_result(run_b))))
    print(f"wrote {out}")
    return 0


def leaderboard(runs: list[Path], file: Path) -> int:
    """Adds runs to a leaderboard. Returns the exit status."""
    if file.suffix != ".jsonl":
        raise ValueError(f"--file {file}: expected a name that ends in .jsonl; the tables stand beside it")
    _add(file, runs)
    print(f"wrote {file}, {file.with_suffix('.html')}, {file.with_suffix('.md')}")
    return 0


def site(runs: list[Path], out: Path) -> int:
    """Adds runs to a leaderboard that is a folder of pages. Returns the exit status."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file is in the way; expected a folder")
    _add(out / "leaderboard.jsonl", runs, site=True)
    print(f"wrote {out / 'index.html'}, leaderboard.md and leaderboard.jsonl beside it")
    return 0


def _add(file: Path, runs: list[Path], site: bool = False) -> None:
    added = add(file, [(load_result(run, predictions=False), run) for run in runs], site)
    for line in added.skipped:
        print(plain(f"indiclip: {line}"), file=sys.stderr)
    for model in added.without_row:
        print(plain(f"indiclip: {model}: scored no photographs, so it is in no table"), file=sys.stderr)
    print(file.with_suffix(".md").read_text("utf-8"))
