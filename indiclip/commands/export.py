"""`indiclip export`: an encoder for another library, with a proof."""

import sys
import warnings
from pathlib import Path

from indiclip.export.exporter import Refused, export
from indiclip.export.new_folder import check_new
from indiclip.export.source import open_source
from indiclip.export.target import find_target
from indiclip.pretrained.runs import checkpoint_file
from indiclip.pretrained.sharded import is_sharded, read_sharded
from indiclip.quiet import quiet_transformers
from indiclip.training.fault_tolerance.checkpoints import write
from indiclip.training.fault_tolerance.manifest import what_is_wrong

_MISTAKE = 2
_OWN = "checkpoint"  # of `--to`


def run(
    source: str,
    to: str,
    out: Path,
    weights: str,
    length: int | None,
    allow_loss: bool,
    licence: str,
    trust_code: bool,
    classes: Path | None,
    templates: Path | None,
    int8: bool,
) -> int:
    """Returns the exit status."""
    if to == _OWN:
        return _one_file(source, out)
    given = {"classes": classes, "templates": templates, "int8": int8}
    options = {name: value for name, value in given.items() if value}
    find_target(to, options)  # before anything is read
    check_new(out)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters is measured
        opened = open_source(source, weights, length, trust_code)
        print(f"weights: {opened.chosen}")
        try:
            record = export(opened, to, out, allow_loss, licence, options)
        except Refused as refused:
            for line in refused.lines:
                print(f"indiclip export: {line}", file=sys.stderr)
            return _MISTAKE
    for case, measured in record["image"].items():
        print(f"  image, {case}: {_in_words(measured)}")
    for case, measured in record.get("text", {}).items():
        print(f"  texts, {case}: {_in_words(measured)}")
    for note in (*record["losses"], *record["notes"]):
        print(f"  note: {note}")
    kept = "within" if record["within_bound"] else "MORE THAN"
    print(f"{out}: {to}, {record['largest_difference']:.1e} at most, {kept} the bound of {record['bound']:.0e}")
    return 0


def _one_file(source: str, out: Path) -> int:
    """A checkpoint that is a folder of shards as a file that any number of ranks goes on from."""
    folder = checkpoint_file(Path(source)).resolve()
    if not is_sharded(folder):
        raise ValueError(f"{folder}: is one file already; expected a checkpoint that is a folder")
    if reason := what_is_wrong(folder):
        raise ValueError(f"{folder}: {reason}")
    if out.exists():
        raise ValueError(f"{out}: is there already; expected the name of a new file")
    checkpoint = read_sharded(folder)
    part = out.with_name(f".{out.name}.part")
    try:
        write(checkpoint, part)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    print(f"{out}: {folder}, step {checkpoint['global_step']}, in one file")
    return 0


def _in_words(measured: dict[str, object]) -> str:
    if "cannot" in measured:
        return f"not compared: {measured['cannot']}"
    rows = [row for row in measured.values() if isinstance(row, dict)]
    difference, cosine = max(row["difference"] for row in rows), min(row["cosine"] for row in rows)
    return f"{difference:.1e} apart, cosine {cosine:.7f}"
