"""What runs of conf/pictograms.yaml find among the held-out pictograms, in each language, and what it loses to English.

    python tools/bench_pictograms.py --data $INDICLIP_DATA runs/pictograms runs/pictograms-bytes

The held-out fifth is the page's own (`Split` with its default fraction and seed), given to the benchmark as a card of
the user's: a retrieval card with a table of captions. Intervals are 95%, of a bootstrap over the pictures; the gap is
English less the language, of the same pictures, drawn together.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from indiclip.datasets.captions import CaptionTable
from indiclip.datasets.split import Split
from indiclip.evals.bench import run_bench
from indiclip.evals.find import find_bench
from indiclip.evals.models.embedder import load_embedder
from indiclip.evals.protocols.protocol import Options
from indiclip.evals.results import Score

METRIC = "image_to_text_r5"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="folder with emoji_multilingual/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        card = write_held_out(args.data / "emoji_multilingual", Path(scratch))
        bench = find_bench(scratch, [str(card)])
        tables = []
        for run in args.runs:
            result = run_bench(load_embedder(run), bench, Options())
            assert result is not None
            tables.append({(s.language, s.metric): s for s in result.scores if s.length == result.lengths[-1]})
    print("| language | " + " | ".join(f"{run}: recall@5 | gap to English" for run in args.runs) + " |")
    print("|---|" + "---|---|" * len(args.runs))
    for language in dict.fromkeys(language for language, _ in tables[0]):
        cells = [
            f"{shown(table[language, METRIC])} | {shown(table.get((language, f'parity_{METRIC}')))}" for table in tables
        ]
        print(f"| {language} | " + " | ".join(cells) + " |")


def write_held_out(data: Path, folder: Path) -> Path:
    """The held-out pictograms as a retrieval card's folder; returns the card."""
    held_out = Split(CaptionTable(str(data / "images"), str(data / "names.tsv")), "val")
    captions = {held_out.key(i): held_out.captions(i) for i in range(len(held_out))}
    languages = list(next(iter(captions.values())))
    images = folder / "pictograms"
    images.mkdir()
    for key in captions:
        (images / key).symlink_to((data / "images" / key).resolve())
    rows = [["file", *languages]]
    for key, of_image in captions.items():
        rows.append([key, *("".join(of_image.get(language, [])) for language in languages)])
    (images / "captions.tsv").write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    card = folder / "pictograms.yaml"
    card.write_text("title: Held-out pictograms\ntask: retrieval\n", encoding="utf-8")
    return card


def shown(score: Score | None) -> str:
    if score is None or score.low is None or score.high is None:
        return ""
    return f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"


if __name__ == "__main__":
    main()
