"""Where a source's teachers are, and how a run makes a cache of them: what a config says under `teachers`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from indiclip.datasets.languages import language_tag
from indiclip.loading.teacher_record import RECORD
from indiclip.names import check_choice, check_whole, nearest_beside

DType = Literal["fp16", "int8"]


@dataclass
class MakeTeachers:
    """How a run makes its cache where there is none, as `indiclip embed --views` would. For small ones: each process of
    the run makes its own.

    Args:
        models: As of `indiclip embed --model`: a run, a checkpoint, open_clip:..., each a teacher. `initial` is the
            run's own encoder before its first step: of use where that is pretrained and is not to forget.
        views: Augmentations of each image.
        dtype: Of the embeddings: `fp16` or `int8`.
        device: Where the teachers compute.
        folder: Where the cache is made, or found whole; None is `teachers` in the run's folder.
    """

    models: list[str]
    views: int = 4
    dtype: DType = "fp16"
    device: str = "auto"
    folder: str | None = None

    def __post_init__(self) -> None:
        check_whole({"data: teachers.make.views": self.views})
        check_choice("data: teachers.make.dtype", self.dtype, ("fp16", "int8"))
        if not self.models:
            raise ValueError("data: teachers.make.models: the list is empty; expected a teacher")


@dataclass
class TeacherCache:
    """Where a source's teachers are.

    In each step a sample's image is augmented as one of its cached views was, drawn anew: the picture that is resized
    for the student is, to the bit, the one that the teachers were given: each is compared, and the run ends where one
    is not. The source's `augment` must be that of the cache, and is done before the image is resized, see `Transform`.

    Args:
        folder: Of `indiclip embed --views`. It must be there: whoever stacks a page with a `make`, and names a folder,
            does not mean another one to be made there. None is that of `make`.
        texts: Which caption the teachers' text embedding is of: `own`, the one that the student gets, or a language's
            code: then it is of the image's caption in that language, whatever language the student gets. A teacher that
            knows English alone teaches all languages so.
        make: How to make a cache; without effect beside `folder`.
        same_pixels: False warns once, and goes on, where a replayed picture is not the one that the teachers were
            given, as on a machine whose libraries round otherwise.
    """

    folder: str | None = None
    texts: str = "own"
    make: MakeTeachers | None = None
    same_pixels: bool = True

    def __post_init__(self) -> None:
        if self.folder is None and self.make is None:
            raise ValueError("data: teachers.folder: found none; expected that of `indiclip embed --views`, or make")
        if self.folder is not None:
            self.make = None
        elif self.make is not None:
            self.folder = self.make.folder
        if self.texts != "own" and (tag := language_tag(self.texts)) != self.texts:
            expected = f"the code {tag}" if tag else "own, or a language's code such as en or hi-Latn"
            raise ValueError(f"data: teachers.texts: found {self.texts!r}; expected {expected}")

    @property
    def path(self) -> Path:
        """The folder, once it is known."""
        assert self.folder is not None
        return Path(self.folder).expanduser()

    def check_folder(self, key: str) -> None:
        """Raise FileNotFoundError where a cache that nothing makes is not there.

        Args:
            key: Of the source in the YAML.
        """
        if self.make is None and not (self.path / RECORD).is_file():
            found = "holds no " + RECORD if self.path.is_dir() else f"is no folder{nearest_beside(self.path)}"
            raise FileNotFoundError(
                f"{key}.teachers.folder: {self.path} {found}; expected the folder of `indiclip embed --views` (to make "
                "one there, leave folder out and name it as teachers.make.folder)"
            )
