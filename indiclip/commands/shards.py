"""`indiclip shards index|check|pack|stats`: what its words mean, and a line per mistake."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

from indiclip.commands.words import Parser, count, run_command, whole

_HELP = """\
usage: indiclip shards <command> ... [options]

  index   find the samples of shards, beside the shards     indiclip shards index train-*.tar
  check   read everything and say what is wrong with it     indiclip shards check train-*.tar --out problems.jsonl
  pack    make shards of images and captions, or of COCO    indiclip shards pack photos/ --out shards --name train
  stats   captions, languages, sizes, classes               indiclip shards stats train-*.tar --json

SHARDS are files, globs, brace expansions (`train-{0000..0009}.tar.gz`) or URLs (`s3://`, `gs://`, `https://`).
`indiclip shards pack --help` and the like: all options of a command.
"""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def _parser(command: str, example: str, about: str, takes_shards: bool = True) -> Parser:
    parser = Parser(f"shards {command}", about, f"example: {example}")
    if takes_shards:
        where = "files, globs, brace expansions, or URLs such as s3://bucket/train-*.tar"
        parser.add_argument("shards", nargs="+", metavar="SHARDS", help=where)
    parser.add_argument("--workers", type=whole, metavar="N", help="processes (default: one per processor)")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the result as JSON")
    return parser


def _index(argv: list[str]) -> int:
    parser = _parser(
        "index",
        "indiclip shards index --crc 'shards/train-{0000..0099}.tar'",
        "Find the samples of each shard and keep that beside it (.index.npz), for remote shards in the cache folder\n"
        "(INDICLIP_CACHE). Training does the same in the cache folder where there is no index; one that lies beside\n"
        "the shards serves every machine. Ends with 1 where a shard is damaged.",
    )
    parser.add_argument("--crc", action="store_true", help="also keep a checksum of every image; reads everything")
    options = parser.parse_args(argv)
    from indiclip.commands.index import run

    return run(**vars(options))


def _check(argv: list[str]) -> int:
    parser = _parser(
        "check",
        "indiclip shards check 'shards/train-*.tar' --out problems.jsonl",
        "Decode every image, read every caption, label and box, and print what is wrong. Ends with 0 where training\n"
        "can use everything (there may be warnings), with 1 where it cannot.",
    )
    parser.add_argument("--out", metavar="FILE", help="write every problem and warning, a line of JSON each")
    parser.add_argument(
        "--max_characters", type=count, default=1000, metavar="N", help="longer captions are a warning (default: 1000)"
    )
    options = parser.parse_args(argv)
    from indiclip.commands.check import run

    return run(**vars(options))


def _pack(argv: list[str]) -> int:
    parser = _parser(
        "pack",
        "indiclip shards pack captions.csv --images photos --out shards --name train",
        "Make shards of\n"
        "  a folder       CLASS/*.jpg, or x.jpg with x.txt or x.json beside it\n"
        "  a table        .csv, .tsv, .parquet: a column of image files and one of captions\n"
        "                 (a column `language`, or a caption column called `hi`, declares the language)\n"
        "  a COCO file    .json with boxes, masks, captions, DensePose; read it with BoxShards\n"
        "The files' bytes are kept. What cannot be read is left out and listed in NAME-left-out.jsonl. The order is\n"
        "drawn from the seed; the same files and options give the same bytes. All shards are written, or none: one\n"
        "that is stopped leaves nothing behind.",
        takes_shards=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder, a table, or a COCO file")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the shards go; made if need be")
    parser.add_argument("--name", required=True, help="begins the shards' names: NAME-000000.tar")
    parser.add_argument("--samples", type=count, default=10_000, metavar="N", help="most per shard (default: 10000)")
    parser.add_argument("--size", type=_bytes, default=5 * 10**8, help="most bytes per shard (default: 500MB)")
    parser.add_argument("--seed", type=int, default=0, help="decides the order (default: 0)")
    parser.add_argument("--images", metavar="FOLDER", help="where the images lie (default: the table's folder)")
    parser.add_argument("--captions", metavar="FILE", help="COCO's captions of the same images")
    parser.add_argument("--image_column", default="file", metavar="NAME", help="of a table (default: file)")
    parser.add_argument("--caption_column", default="caption", metavar="NAME", help="of a table (default: caption)")
    parser.add_argument(
        "--on_bad_row", default="error", choices=["error", "skip"], help="malformed rows of a table (default: error)"
    )
    options = parser.parse_args(argv)
    from indiclip.commands.pack import run

    return run(options)


def _stats(argv: list[str]) -> int:
    parser = _parser(
        "stats",
        "indiclip shards stats 'shards/train-*.tar' --patch_size 14",
        "Count captions, scripts, languages, image sizes, formats and classes. A language is named where the sample\n"
        "declares it (`language` in its JSON) or where its script is that of one language; it is never guessed.",
    )
    parser.add_argument("--patch_size", type=count, default=16, metavar="N", help="pixels (default: 16)")
    parser.add_argument("--max_tokens", type=count, default=256, metavar="N", help="per image (default: 256)")
    options = parser.parse_args(argv)
    from indiclip.commands.stats import run

    return run(**vars(options))


_COMMANDS: dict[str, Callable[[list[str]], int]] = {"index": _index, "check": _check, "pack": _pack, "stats": _stats}


def main(argv: list[str]) -> int:
    """Runs a command. Returns the exit status: 0, 1 where something is wrong with the data, 2 for a mistake in the
    command, 130 after Ctrl-C, 143 after SIGTERM.
    """
    return run_command("shards", _HELP, _COMMANDS, argv)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a size such as 500MB or 2GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
