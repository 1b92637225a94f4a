"""`indiclip bench cards`, `import`, `compare` and `leaderboard`."""

from pathlib import Path

from indiclip.evals.cards.card import SUITES, load_card
from indiclip.evals.cards.table import list_cards, show_card
from indiclip.evals.comparison import in_words
from indiclip.evals.images.convert import convert
from indiclip.evals.leaderboard import add
from indiclip.evals.reports.comparison_page import write_comparison
from indiclip.evals.results import load_result

_SHOWN = 10  # images that were left out


def cards(card: str | None) -> int:
    """Prints the cards that come with IndiCLIP, those of a suite, or one card. Returns the exit status."""
    suites = (card,) if card in SUITES else SUITES
    print("\n".join(list_cards(suites) if card in (None, *SUITES) else show_card(load_card(card))))
    return 0


def import_images(source: str, card: str, out: str, layout: str, split: str, language: str, skip_unknown: bool) -> int:
    """Writes a card's images in another layout. Returns the exit status."""
    done = convert(source, card, out, layout, split, language, skip_unknown)
    counts = ", ".join(f"{split} {count:,}" for split, count in done.images.items())
    print(f"{done.folder}: {done.images.total():,} images of {card} ({counts}), layout {layout}")
    for note in done.notes:
        print(f"  {note}")
    if done.left_out:
        print(f"  left out: {len(done.left_out):,} that cannot be read")
        for line in done.left_out[:_SHOWN]:
            print(f"    {line}")
        if (more := len(done.left_out) - _SHOWN) > 0:
            print(f"    ... {more} more")
    return 0


def compare(run_a: Path, run_b: Path, out: Path) -> int:
    """Sets two runs side by side. Returns the exit status."""
    print(in_words(write_comparison(out, load_result(run_a), load_result(run_b))))
    print(f"wrote {out}")
    return 0


def leaderboard(runs: list[Path], file: Path) -> int:
    """Adds runs to a leaderboard. Returns the exit status."""
    if file.suffix != ".jsonl":
        raise ValueError(f"--file {file}: expected a name that ends in .jsonl; the tables stand beside it")
    add(file, [load_result(run, predictions=False) for run in runs])
    html, markdown = (file.with_suffix(suffix) for suffix in (".html", ".md"))
    print(markdown.read_text("utf-8"))
    print(f"wrote {file}, {html}, {markdown}")
    return 0
