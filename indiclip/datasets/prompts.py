"""Captions for images that have a class and no text: prompts around the class's name."""

from collections.abc import Mapping, Sequence

import numpy as np

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.languages import declared_language
from indiclip.datasets.subset import Subset
from indiclip.types import Sample


class ClassPrompts(Subset):
    """A dataset whose images with a class have prompts of its name as captions, so that they train beside pairs.

    An image's prompts take turns from epoch to epoch, as all captions do, see `indiclip.datasets.languages`. In the
    contrastive losses images and texts of one class are positives of each other, and so are equal texts: a batch of
    sources with labels, with captions and with both has one target (UniCL, arXiv:2204.03610).

    Args:
        dataset: Images with `label`; those without one stay as they are.
        templates: Language (`en`, `hi`; "" where it is unknown) -> prompts, in which `{}` stands for the class's name.
        names: Language -> the classes' names in it, in the order of the dataset's `classes`; those are taken for a
            language that is not there.
        replace: Leave out the captions that a labelled image has, of which only its label is then known. Otherwise
            prompts are there for images without captions alone.

    Raises:
        ValueError: A template without `{}`, a name too few or too many, or a dataset without classes.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        templates: Mapping[str, Sequence[str]],
        names: Mapping[str, Sequence[str]] | None = None,
        replace: bool = False,
    ) -> None:
        super().__init__(dataset, np.arange(len(dataset)))
        names = names or {}
        if not dataset.classes and not names:
            raise ValueError(
                f"dataset: {type(dataset).__name__} names no classes; expected `classes` of it, or `names`"
            )
        if not templates or not all(templates.values()):
            raise ValueError(f"templates: found {dict(templates)}; expected a prompt or more for each language")
        self.replace = replace
        self._prompts: dict[str, list[list[str]]] = {}  # language -> of each class
        for language, prompts in templates.items():
            own = list(names.get(language, dataset.classes))
            if len(own) != len(dataset.classes or own):
                raise ValueError(
                    f"names.{language}: found {len(own)}; expected one for each of the {len(dataset.classes)}"
                )
            for prompt in prompts:
                if "{}" not in prompt:
                    raise ValueError(
                        f"templates.{language}: found {prompt!r}; expected a {{}} for the class's name in it"
                    )
            tag = declared_language(language)
            self._prompts[tag] = [[prompt.replace("{}", name) for prompt in prompts] for name in own]

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        label = sample.get("label", -1)
        if label < 0 or not (self.replace or _is_bare(sample)):
            return sample
        prompted: Sample = {**sample, "captions": self._of_class(label)}
        for name in ("caption", "language"):
            prompted.pop(name, None)  # type: ignore[misc]
        return prompted

    def captions(self, index: int) -> dict[str, list[str]]:
        """See `SampleDataset`. Those of prompts where the labels are known without reading."""
        own = self.dataset.captions(index)
        if self.labels is None or self.labels[index] < 0 or (own and not self.replace):
            return own
        return self._of_class(int(self.labels[index]))

    def _of_class(self, label: int) -> dict[str, list[str]]:
        return {language: prompts[label] for language, prompts in self._prompts.items()}


def _is_bare(sample: Sample) -> bool:
    return not sample.get("captions") and sample.get("caption") is None
