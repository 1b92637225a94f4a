"""Start, resume and memory with very many samples in shards: the index of 1e8 real rows, or of 1e9 in sparse files; and
which shards the nodes read.

    python tools/bench_index.py rows --samples 100_000_000 [--processes 8] [--folder FOLDER]
    python tools/bench_index.py sparse --samples 1_000_000_000
    python tools/bench_index.py nodes

`rows` writes an index beside each of many sparse tars (of the same rows), makes the one of all of them, and starts
processes that share it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from indiclip.datasets.inventory import Inventory
from indiclip.loading.grouped_sampler import GroupedSampler, block
from indiclip.loading.sampler import BatchSpec, SourceInfo, SourceSampler
from indiclip.webdataset import cache, index_set, tar_index
from indiclip.webdataset.sample_columns import KINDS, SampleColumns, pack_keys
from indiclip.webdataset.tar_index import ShardInfo, TarIndex

PER_SHARD = 10_000
BLOCKS = 70  # of 512 bytes: a sample of 35 kB
# A process that starts, resumes at a step, and says what it took, when all have done so.
PROCESS = """
import json, sys, time
start = time.perf_counter()
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.preprocessing import Preprocessing
from indiclip.webdataset import index_set
from indiclip.webdataset.shards import Shards
imported = time.perf_counter()
def memory():
    rows = open("/proc/self/smaps_rollup").read().splitlines()[1:]
    kib = {row.split()[0][:-1]: int(row.split()[1]) for row in rows}
    return {"rss": kib["Rss"], "private": kib["Private_Dirty"] + kib["Private_Clean"], "pss": kib["Pss"]}
before = memory()
shards = Shards(sys.argv[1])
opened = time.perf_counter()
source = Source("t", shards, batch_size=32768, max_tokens=196, shard_groups=16)
steps = Steps([source], 0, Preprocessing(16), True, int(sys.argv[2]), 128)
for step in (0, int(1.7 * len(steps))):
    for ref in steps.plans["t"].batch(step, steps.rank, 128):
        shards._index.extent(shards._shard(ref.index), ref.index)
ready = time.perf_counter()
if sys.argv[3] == "rows":
    from indiclip.datasets.base import fingerprint
    fingerprint(shards)
print(json.dumps({"samples": len(shards), "import": imported - start, "open": opened - imported,
                  "first and resumed step": ready - opened, "1,000 keys": time.perf_counter() - ready,
                  "before": before, "after": memory()}), flush=True)
sys.stdin.read()
"""


def start_processes(name: str, urls: list[str], processes: int) -> None:
    """Print what processes that start together, as the ranks of a machine do, took and hold."""
    shards = f"{urls[0].removesuffix('000000.tar')}{{000000..{len(urls) - 1:06}}}.tar"
    command = [sys.executable, "-c", PROCESS, shards]
    started = [
        subprocess.Popen([*command, str(rank), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank in range(processes)
    ]
    said = [json.loads(process.stdout.readline()) for process in started if process.stdout]
    for process in started:
        process.communicate("")
    print(f"{name}: {said[0]['samples']:,} samples in {len(urls):,} shards, {processes} processes")
    for what in ("import", "open", "first and resumed step", "1,000 keys"):
        print(f"  {what:24} {max(one[what] for one in said):6.2f} s in the slowest")
    for kind in ("rss", "private", "pss"):
        grown = [(one["after"][kind] - one["before"][kind]) / 1024 for one in said]
        print(f"  {kind:24} {max(grown):6.0f} MiB more than after the imports, {grown[-1]:6.0f} in the last")


def size_of_set() -> int:
    """Bytes of the newest index of many shards, as `ls` shows them."""
    newest = max(cache.folder().glob("set-*"), key=lambda folder: folder.stat().st_mtime)
    return sum(file.stat().st_size for file in newest.iterdir())


def write_rows(folder: Path, samples: int) -> list[str]:
    """Sparse tars with an index beside each, of keys of nine digits of which a third is lacking, and sizes."""
    rng, urls = np.random.default_rng(0), []
    numbers = np.sort(rng.choice(PER_SHARD * 3 // 2, PER_SHARD, replace=False))
    columns = SampleColumns(
        np.arange(PER_SHARD, dtype=np.uint32) * BLOCKS,
        rng.integers(200, 2000, (PER_SHARD, 2), np.int16),
        np.empty(0, np.int16),
        np.empty(0, np.uint32),
        **pack_keys([f"{number:09}" for number in numbers.tolist()]),
        apart=np.empty(0, KINDS["apart"]),
    )
    inventory = Inventory()
    inventory.present["samples"] = inventory.used["samples"] = PER_SHARD
    for shard in range(samples // PER_SHARD):
        url = str(folder / f"{shard:06}.tar")
        Path(url).touch()
        os.truncate(url, PER_SHARD * BLOCKS * 512)
        info = ShardInfo(cache.stat(url), cache.fingerprint(Path(url)), False, PER_SHARD * BLOCKS * 512)
        TarIndex(columns, info, inventory, []).save(tar_index.index_path(url))
        urls.append(url)
    return urls


def write_sparse(folder: Path, samples: int) -> list[str]:
    """Empty tars, and the index of all of them with as many samples as they would hold, whose columns are sparse."""
    shards = samples // PER_SHARD
    urls = [str(folder / f"{shard:06}.tar") for shard in range(shards)]
    for url in urls:
        Path(url).touch()
    time.sleep(2.1)  # until their times of change are not just now
    target = cache.folder() / index_set._name(urls)
    target.mkdir()
    block = pack_keys([f"{i:09}" for i in range(PER_SHARD)])
    lists = len(block["key_firsts"])
    firsts = (np.arange(shards)[:, None] * PER_SHARD + block["key_firsts"]).reshape(-1)
    info = json.dumps(ShardInfo(cache.Stat(1, "1"), "1:00000000", False, 2**30).to_json()).encode()
    whole = {
        "key_firsts": firsts,
        "key_ends": np.arange(1, shards * lists + 1) * (len(block["key_data"]) // lists),
        "starts": np.arange(shards + 1) * PER_SHARD,
        "ends": np.full(shards, 2**30),
        "has_crc": np.zeros(shards, bool),
        "shard_data": np.frombuffer(info * shards, np.uint8),
        "shard_ends": np.arange(1, shards + 1) * len(info),
    }
    sparse = {"blocks": 4 * samples, "sizes_hw": 4 * samples, "key_data": shards * len(block["key_data"])}
    for name in index_set._KINDS:
        whole.get(name, np.empty(0)).tofile(target / name)
        os.truncate(target / name, sparse.get(name, (target / name).stat().st_size))
    inventory = Inventory()
    inventory.present["samples"] = inventory.used["samples"] = samples
    sizes = {name: (target / name).stat().st_size for name in index_set._KINDS}
    about = {"version": 1, "bytes": sizes, "narrow_labels": True, "max_label": -1}
    text = json.dumps(about | {"inventory": inventory.summary(), "damaged": []})
    (target / "about.json").write_text(f"{index_set._digest(text)}\n{text}")
    return urls


def bench_nodes() -> None:
    """Shards that the node with the most of them reads in an epoch, of 1e8 samples in 10,000 shards, 8 ranks a node."""
    samples, shards = 32_768, 10**8 // PER_SHARD
    starts = np.arange(0, 10**8 + 1, PER_SHARD)
    for groups in (1, 16, 128):
        seen = {nodes: np.zeros((nodes, shards), bool) for nodes in (1, 2, 4, 15, 16)}
        info = SourceInfo(10**8, starts, groups=groups)
        grouped = GroupedSampler(info, samples, (0, 0), 16) if groups > 1 else None
        whole = SourceSampler(info, BatchSpec(samples), (0, 0), 16)
        for number in range(10**8 // samples):
            indices = grouped.batch(number, 0, samples)[0] if grouped else whole.batch(number)[0]
            for nodes, seen_NS in seen.items():
                for node in range(nodes):
                    begin, end = block(samples, 0, node, nodes)
                    dealt = np.arange(samples) % (8 * nodes) // 8 == node
                    seen_NS[node, (indices[begin:end] if grouped else indices[dealt]) // PER_SHARD] = True
        for nodes, seen_NS in seen.items():
            share = seen_NS.mean(1).max()
            print(f"shard_groups {groups:4}, {nodes:3} nodes: a node reads {share:7.2%} of the shards", flush=True)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["rows", "sparse", "nodes"])
    parser.add_argument("--samples", type=int, default=10**8)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where the files are written (default: the temporary folder)")
    arguments = parser.parse_args()
    if arguments.part == "nodes":
        return bench_nodes()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        os.environ["INDICLIP_CACHE"] = f"{place}/cache"
        begin = time.perf_counter()
        if arguments.part == "rows":
            urls = write_rows(Path(place), arguments.samples)
            print(f"indexes of the shards written in {time.perf_counter() - begin:.0f} s")
            time.sleep(2.1)  # until their times of change are not just now
            begin = time.perf_counter()
            index_set.index_set(urls)
            print(f"one index made of them, once for a machine, in {time.perf_counter() - begin:.1f} s")
        else:
            urls = write_sparse(Path(place), arguments.samples)
        print(f"{size_of_set() / arguments.samples:.2f} bytes a sample")
        for processes in (1, arguments.processes):
            start_processes(arguments.part, urls, processes)


if __name__ == "__main__":
    main()
