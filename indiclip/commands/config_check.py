"""`indiclip check`: what its words mean."""

from __future__ import annotations

from difflib import get_close_matches

from indiclip.commands.words import Parser, count, guarded, whole

_ABOUT = """\
Read what a config would train and validate on, as training reads it: the sources are built with the same parser,
every sample goes through its source's transform. For each source the check says how much of its files is used and
what is left out for which reason, and which samples are unreadable. It ends with 0 where training would go on to its
end, with 1 where it would be stopped by unreadable samples (data.quarantine), with 2 for a mistake in the config.
Options of `indiclip fit` such as --data.quarantine 0.02 may follow."""


def main(argv: list[str]) -> int:
    """Runs the command. Returns the exit status: see `guarded`."""
    return guarded("indiclip check", _command, argv)


def _command(argv: list[str]) -> int:
    example = "example: indiclip check --config conf/real_small.yaml --samples 200"
    parser = Parser("check", _ABOUT, example)
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="as for fit; may be repeated")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--samples", type=count, default=1000, metavar="N", help="of each source, evenly spaced (default: 1000)"
    )
    amount.add_argument("--all", action="store_true", help="read every sample")
    parser.add_argument("--workers", type=whole, metavar="N", help="processes (default: one per processor)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options, others = parser.parse_known_args(argv)
    for word in others:  # the rest is for `fit`, which does not know these
        if near := get_close_matches(word.partition("=")[0], ["--samples", "--all", "--workers", "--json"], 1, 0.8):
            parser.error(f"{word}: no such option; nearest is {near[0]!r}")
    from indiclip.commands.config_samples import run

    return run(options, [word for file in options.config for word in ("--config", file)] + others)
