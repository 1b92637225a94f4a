"""Numbers of clusters, for `clusters` of a source in training, from a folder that `indiclip embed` has written.

    indiclip embed 'shards/train-*.tar' --model MODEL --out embeddings
    python tools/cluster_embeddings.py embeddings --clusters 50000 --out clusters.npy --device cuda

Spherical k-means over some of the rows, clusters whose centres are near each other made one, every sample put into
the nearest: as DynamiCS (arXiv 2604.27932) makes its clusters of DINOv2 embeddings, with the same defaults. There is
an int32 for each sample, in their order; one without an embedding, as it could not be read, is in cluster 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pyarrow import parquet
from rich.progress import track
from torch import Tensor

from indiclip.datasets.tables import existing, load_json

_CHUNK = 8192  # rows compared with all centres at a time
_PER_CLUSTER = 256  # rows for each cluster that k-means sees, as FAISS has it


def count_samples(folder: Path) -> int:
    """Of the source that was embedded.

    Raises:
        ValueError: No finished folder of one source.
    """
    record = load_json(existing(str(folder)) / "embed.json", ["sources"])
    if len(record["sources"]) != 1 or not record.get("done"):
        found = f"{len(record['sources'])} sources" if record.get("done") else "an unfinished one"
        raise ValueError(f"{folder}: found {found}; expected the finished embeddings of one source")
    return int(record["sources"][0]["samples"])


def read_parts(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The vectors of each part and the numbers of their samples."""
    for file in sorted(folder.glob("embeddings-*.npy")):
        keys = folder / file.name.replace("embeddings", "keys").replace(".npy", ".parquet")
        rows = parquet.read_table(keys, columns=["row"])["row"].to_numpy()
        yield np.load(file, mmap_mode="r"), rows


def unit(vectors: np.ndarray, device: str) -> Tensor:
    """As unit-length float32 rows; those of int8 are scaled."""
    return F.normalize(torch.from_numpy(np.array(vectors, dtype=np.float32)).to(device), dim=1)


def nearest(rows_NE: Tensor, centres_CE: Tensor) -> Tensor:
    """The centre with the largest cosine to each row."""
    return torch.cat([(part @ centres_CE.T).argmax(1) for part in rows_NE.split(_CHUNK)])


def k_means(rows_NE: Tensor, num_clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Unit-length centres (C, E) by Lloyd's iterations; an empty one begins again at a row."""
    chosen = torch.randperm(len(rows_NE), generator=generator)[:num_clusters]
    centres_CE = rows_NE[chosen.to(rows_NE.device)].clone()
    for _ in track(range(iterations), description="k-means", transient=True):
        cluster_N = nearest(rows_NE, centres_CE)
        sums_CE = torch.zeros_like(centres_CE).index_add_(0, cluster_N, rows_NE)
        empty = (cluster_N.bincount(minlength=num_clusters) == 0).nonzero()[:, 0]
        again = torch.randint(len(rows_NE), (len(empty),), generator=generator).to(rows_NE.device)
        sums_CE[empty] = rows_NE[again]
        centres_CE = F.normalize(sums_CE, dim=1)
    return centres_CE


def merge(centres_CE: Tensor, sizes_C: Tensor, cosine: float) -> Tensor:
    """The largest centre first, those that are not nearer than a cosine to one that stays."""
    order = sizes_C.argsort(descending=True).tolist()
    kept_KE, count = torch.zeros_like(centres_CE), 0
    for number in order:
        if not count or float((kept_KE[:count] @ centres_CE[number]).max()) <= cosine:
            kept_KE[count] = centres_CE[number]
            count += 1
    return kept_KE[:count]


def cluster(folder: Path, num_clusters: int, cosine: float, iterations: int, device: str, seed: int) -> np.ndarray:
    """The cluster of each sample of the source, int32."""
    generator = torch.Generator().manual_seed(seed)
    total = count_samples(folder)
    share = min(1.0, _PER_CLUSTER * num_clusters / total)
    rng = np.random.default_rng(seed)
    some = [unit(vectors[rng.random(len(vectors)) < share], device) for vectors, _ in read_parts(folder)]
    rows_NE = torch.cat(some)
    if len(rows_NE) < num_clusters:
        raise ValueError(f"--clusters: found {num_clusters}; expected at most {len(rows_NE)}, the embeddings")
    centres_CE = k_means(rows_NE, num_clusters, iterations, generator)
    sizes_C = nearest(rows_NE, centres_CE).bincount(minlength=num_clusters)
    centres_CE = merge(centres_CE, sizes_C, cosine)
    numbers = np.zeros(total, np.int32)
    for vectors, rows in read_parts(folder):
        numbers[rows] = nearest(unit(vectors, device), centres_CE).cpu().numpy()
    return numbers


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of indiclip embed")
    parser.add_argument("--clusters", type=int, default=50_000, help="of k-means (default: 50,000)")
    parser.add_argument("--merge", type=float, default=0.7, help="cosine of centres that are made one (default: 0.7)")
    parser.add_argument("--iterations", type=int, default=10, help="of k-means (default: 10)")
    parser.add_argument("--out", type=Path, required=True, help="a .npy file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args(argv)
    try:
        numbers = cluster(words.folder, words.clusters, words.merge, words.iterations, words.device, words.seed)
    except (ValueError, OSError) as error:
        print(f"cluster_embeddings: {error}", file=sys.stderr)
        return 2
    np.save(words.out, numbers)
    sizes = np.sort(np.bincount(numbers))[::-1]
    print(f"{len(sizes)} clusters of {len(numbers)} samples; the largest have {', '.join(map(str, sizes[:5]))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
