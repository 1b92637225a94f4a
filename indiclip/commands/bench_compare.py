"""`indiclip bench compare` and `indiclip bench leaderboard`: what their words mean."""

from __future__ import annotations

from pathlib import Path

from indiclip.commands.words import Parser


def compare(argv: list[str]) -> int:
    """Sets two runs side by side. Returns the exit status."""
    parser = Parser(
        "bench compare",
        "Set two finished runs of the benchmark side by side: per card and language both\n"
        "scores, their difference with a 95% interval (a paired bootstrap over the images),\n"
        "and which images changed. Cards whose classes or images differ are named and not\n"
        "compared.",
        "example: indiclip bench compare runs/bench/a runs/bench/b --out compare.html",
    )
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="the folder of a run, with its metrics.json")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="another")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), metavar="FILE", help="the page (default: compare.html)"
    )
    options = parser.parse_args(argv)
    from indiclip.evals.comparison import in_words
    from indiclip.evals.pages.comparison_page import write_comparison
    from indiclip.evals.results import load_result

    try:
        a, b = load_result(options.run_a), load_result(options.run_b)
    except ImportError as error:
        raise ValueError(str(error)) from error
    print(in_words(write_comparison(options.out, a, b)))
    print(f"wrote {options.out}")
    return 0


def leaderboard(argv: list[str]) -> int:
    """Adds runs to a leaderboard. Returns the exit status."""
    parser = Parser(
        "bench leaderboard",
        "Add finished runs of the benchmark to a leaderboard, each instead of its earlier\n"
        "row, and write its tables beside it (.html, .md). Runs on other images stand in\n"
        "other tables.\n"
        "Without RUN the tables are only written anew. Several processes may add at once.",
        "example: indiclip bench leaderboard runs/bench/* --file leaderboard.jsonl",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs, with their metrics.json")
    parser.add_argument(
        "--file",
        type=Path,
        default=Path("leaderboard.jsonl"),
        metavar="FILE",
        help="made where there is none (default: leaderboard.jsonl)",
    )
    options = parser.parse_args(argv)
    if options.file.suffix != ".jsonl":
        raise ValueError(f"--file {options.file}: expected a name that ends in .jsonl; the tables stand beside it")
    from indiclip.evals.leaderboard import add
    from indiclip.evals.results import load_result

    add(options.file, [load_result(run, predictions=False) for run in options.runs])
    html, markdown = (options.file.with_suffix(suffix) for suffix in (".html", ".md"))
    print(markdown.read_text("utf-8"))
    print(f"wrote {options.file}, {html}, {markdown}")
    return 0
