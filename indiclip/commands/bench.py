"""`indiclip bench cards`, `import`, `compare` and `leaderboard`, and `indiclip leaderboard`."""

import sys
from pathlib import Path

from indiclip.evals.cards.card import SUITES, load_card
from indiclip.evals.cards.table import list_cards, list_protocols, show_card
from indiclip.evals.comparison import in_words
from indiclip.evals.images.convert import convert
from indiclip.evals.leaderboard_pages import add
from indiclip.evals.reports.comparison_page import write_comparison
from indiclip.evals.result_files import check_is_no_training, load_result
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
    folders = _folder_of(run_a), _folder_of(run_b)
    a, b = map(load_result, folders)
    print(in_words(write_comparison(out, a, b, tuple(folder.resolve().name for folder in folders))))
    views = [view for view in a.views if view in b.views and view not in (a.views[0], b.views[0])]
    if a.views[0] != b.views[0] or views:
        line = f"compared: A at the view {a.views[0]}, B at {b.views[0]}"
        print(plain(f"{line}; both also have {', '.join(views)}, see their reports" if views else line))
    print(f"wrote {out}")
    return 0


def _folder_of(run: Path) -> Path:
    """A run's folder, also by the file in it."""
    return run.parent if run.name == "metrics.json" and run.is_file() else run


def leaderboard(runs: list[Path], file: Path | None = None, out: Path | None = None) -> int:
    """Adds runs to a leaderboard: one file with its tables beside it, or a folder of pages. Returns the exit status."""
    if out is not None:
        return site(runs, out, file)
    file = file or Path("leaderboard.jsonl")
    if file.suffix != ".jsonl":
        raise ValueError(f"--file {file}: expected a name that ends in .jsonl; the tables stand beside it")
    _add(file, runs)
    print(f"wrote {file}, {file.with_suffix('.html')}, {file.with_suffix('.md')}")
    return 0


def site(runs: list[Path], out: Path | None = None, file: Path | None = None) -> int:
    """Adds runs to a leaderboard that is a folder of pages, or to one that is a file. Returns the exit status."""
    if file is not None and out is not None:
        raise ValueError(f"--file {file}, --out {out}: expected one of them")
    if file is not None:
        return leaderboard(runs, file)
    out = out or Path("leaderboard")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file is in the way; expected a folder")
    if not (out / "leaderboard.jsonl").exists():
        check_is_no_training(out, "a new folder, or one of an earlier leaderboard")
    _add(out / "leaderboard.jsonl", runs, site=True)
    print(f"wrote {out / 'index.html'}, leaderboard.md and leaderboard.jsonl beside it")
    return 0


def _add(file: Path, runs: list[Path], site: bool = False) -> None:
    added = add(file, [(load_result(run, predictions=False), run) for run in map(_folder_of, runs)], site)
    for line in added.skipped:
        print(plain(f"indiclip: {line}"), file=sys.stderr)
    for model in added.without_row:
        print(plain(f"indiclip: {model}: no number on photographs, so it is in no table"), file=sys.stderr)
    print(file.with_suffix(".md").read_text("utf-8"))
