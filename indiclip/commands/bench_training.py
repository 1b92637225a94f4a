"""What `indiclip bench --training` names: anything that `indiclip embed` reads, texts alone, or a config."""

import argparse
from pathlib import Path

from indiclip.commands.embed_sources import Sources, open_sources
from indiclip.evals.overlap import Example

_CONFIGS = (".yaml", ".yml")


class TrainingData:
    """Every image or text that a model was trained on, with all its captions.

    Args:
        words: Shards, folders, tables, COCO files, texts (.txt, or a table without a column `file`), and configs, whose
            `data.train` is meant.

    Attributes:
        generated: The sources of configs that are left out: of what is drawn, however long, nothing is photographed.

    Raises:
        FileNotFoundError: One is missing.
        ValueError: Another kind of file, or one without samples.
    """

    def __init__(self, words: list[str]) -> None:
        files = [word for word in words if Path(word).suffix not in _CONFIGS]
        sources = list(open_sources(_words(files)).sources if files else [])
        for word in words:
            if word not in files:
                sources += open_sources(_words(["data.train"], [word])).sources
        self.generated = [source.name for source in sources if source.is_generated]
        if len(self.generated) == len(sources):
            found = f"{', '.join(words)}: all of data.train is generated"
            raise ValueError(f"{found}, and is not looked at: no photograph can be among it; expected files")
        self._sources = Sources([source for source in sources if not source.is_generated])

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> Example:
        source, place = self._sources.at(index)
        if source.has_images:
            example = source.read(place)
            image, captions = example.image, example.captions
        else:
            image, captions = None, source.captions(place)
        return image, [text for texts in captions.values() for text in texts]


def _words(sources: list[str], config: list[str] | None = None) -> argparse.Namespace:
    """As `indiclip embed` would be given them."""
    return argparse.Namespace(
        sources=sources,
        config=config,
        what="all",
        images=None,
        captions=None,
        image_column="file",
        caption_column="",
        on_bad_row="error",
    )
