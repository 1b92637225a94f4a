"""`indiclip shards index`: an index beside each shard."""

import errno
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from indiclip.commands.findings import show_lines
from indiclip.commands.parallel import results
from indiclip.datasets.inventory import Inventory
from indiclip.webdataset import cache, tar_index
from indiclip.webdataset.index_set import INDEXED
from indiclip.webdataset.shards import expand
from indiclip.webdataset.tar_index import TarIndex

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class _Indexed(NamedTuple):
    """A shard, and what its index says."""

    shard: str
    inventory: Inventory
    damaged: list[tuple[str, str]]  # (key, reason) of what is lost
    samples: int = 0
    built: bool = False
    elsewhere: str = ""  # the index, where it is not beside the shard


def run(shards: list[str], crc: bool, workers: int | None, as_json: bool) -> int:
    """Index shards and print what was found. Returns 1 where one is damaged."""
    done = list(results(partial(_index, crc=crc), expand(shards), workers, "indexing"))
    inventory = Inventory()
    for found in done:
        inventory += found.inventory
    damaged = {found.shard: found.damaged for found in done if found.damaged}
    summary = {
        "shards": len(done),
        "samples": sum(found.samples for found in done),
        "built": sum(found.built for found in done),
        "inventory": inventory.summary(),
        "damaged": damaged,
        "elsewhere": {found.shard: found.elsewhere for found in done if found.elsewhere},
    }
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        _show(summary, inventory)
    return 1 if damaged else 0


def _index(url: str, crc: bool) -> _Indexed:
    """What is known of a shard after its index has been built, unless an up-to-date one is there."""
    beside = file = tar_index.index_path(url)
    shown = cache.shown(url)
    try:
        version = cache.stat(url)
        index = tar_index.find_index(url, version)
        if built := index is None or (crc and not index.info.has_crc):
            index = tar_index.build(cache.local_tar(url, version), version, crc)
    except (ValueError, OSError) as error:
        return _Indexed(shown, Inventory(), [("", str(error))])
    assert index is not None
    if built or not (cache.is_remote(url) or beside.exists()):
        file = _save(index, url, version)
    elsewhere = "" if file == beside else str(file)
    return _Indexed(shown, index.inventory, index.damaged, len(index), built, elsewhere)


def _save(index: TarIndex, url: str, version: cache.Stat) -> Path:
    """Keep an index beside its shard, or in the cache folder where that is read-only."""
    beside = tar_index.index_path(url)
    # The system lets root write to a folder without any right to write; who took the rights away meant it.
    if not cache.is_remote(url) and beside.parent.stat().st_mode & 0o222:
        try:
            index.save(beside)
            return beside
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
    file = cache.cached_name(url, version, ".index.npz")
    index.save(file)
    (cache.folder() / INDEXED).touch()  # what was made of the earlier one is made anew
    return file


def _show(summary: dict[str, Any], inventory: Inventory) -> None:
    built, shards = summary["built"], summary["shards"]
    others = ", the rest up to date" * (built < shards)
    print(f"{summary['samples']:,} samples in {shards:,} shards; {built:,} indexes built{others}")
    show_lines(inventory)
    if summary["elsewhere"]:
        print(f"  {len(summary['elsewhere']):,} indexes are in {cache.folder()}: they cannot lie beside their shards")
    for shard, reasons in summary["damaged"].items():
        for key, reason in reasons:
            print(f"  damaged: {shard}: {key + ': ' if key else ''}{reason}")
