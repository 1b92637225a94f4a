"""What scoring costs beside encoding: all protocols on 10,000 images of 32 px, for encoders of several sizes.

    python tools/bench_india.py --data $INDICLIP_DATA --languages en hi hi-Latn --protocols few_shot

The images are CIFAR-10's test images, the weights random. A second look at the same embeddings in every language, at
every length, with intervals, kNN and linear probe costs the same whatever the encoder. After the last encoder stand the
seconds of each protocol; the first one's hold the ranks that others ask for again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.evals.bench import run_bench
from indiclip.evals.card_scorer import CardScorer
from indiclip.evals.find import find_bench
from indiclip.evals.models.embedder import EncoderEmbedder
from indiclip.evals.protocols.protocol import Options, Protocol
from indiclip.evals.results import Score
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer

# Width, depth, heads, patch size.
ENCODERS = {
    "192 wide, 4 blocks, patch 8": (192, 4, 3, 8),
    "ViT-S/4": (384, 12, 6, 4),
    "ViT-B/8": (768, 12, 12, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/")
    parser.add_argument("--languages", nargs="+", default=["en", "hi", "hi-Latn"])
    parser.add_argument("--protocols", nargs="+", default=[], help="besides the card's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "cifar10"
        folder.mkdir()
        for file in (*sorted((args.data / "cifar10").glob("test-*")), args.data / "cifar10" / "classes.txt"):
            (folder / file.name).symlink_to(file.resolve())
        bench = find_bench(scratch, ["cifar10"], protocols=args.protocols)
        protocols = bench.items[0].card.protocols
        seconds_of = dict.fromkeys((protocol.name for protocol in protocols), 0.0)
        for protocol in protocols:
            time_runs(protocol, seconds_of)
        print(f"{'encoder':<34}{'images':>9}{'prompts':>9}{'scores':>9}{'scores / images':>17}   seconds")
        for name, shape in ENCODERS.items():
            embedder = EncoderEmbedder(encoder(*shape).to(args.device), name)
            seconds_of |= dict.fromkeys(seconds_of, 0.0)
            result = run_bench(embedder, bench, Options(languages=args.languages), batch_size=256)
            assert result is not None
            seconds = result.about["seconds"]
            share = seconds["scores"] / seconds["images"]
            print(f"{name:<34}" + "".join(f"{seconds[part]:>9.2f}" for part in ("images", "texts", "scores")), end="")
            print(f"{share:>16.1%}")
    print(*(f"{name} {seconds:.2f}" for name, seconds in seconds_of.items()), sep=", ")


def time_runs(protocol: Protocol, seconds_of: dict[str, float]) -> None:
    """Adds what each run of a protocol takes to its seconds."""
    run = protocol.run

    def timed(scorer: CardScorer) -> Iterator[Score]:
        begin = time.perf_counter()
        yield from list(run(scorer))
        seconds_of[protocol.name] += time.perf_counter() - begin

    protocol.run = timed  # type: ignore[method-assign]


def encoder(width: int, depth: int, num_heads: int, patch_size: int) -> Encoder:
    torch.manual_seed(0)
    backbone = NaFlexViT(width=width, depth=depth, num_heads=num_heads, patch_size=patch_size, max_tokens=64)
    text = {"model_type": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = TextTower(ByteTokenizer(192), text | {"intermediate_size": 256})
    return Encoder(backbone, tower, embed_dim=256, lengths=[64, 128], pool="mean", batch_norm=True)


if __name__ == "__main__":
    main()
