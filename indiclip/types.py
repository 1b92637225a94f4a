"""What travels between data, backbone and heads.

Shape letters used in the whole project:
    B images, N patches (tokens) of the longest image in the batch, P numbers in a patch (patch_size ** 2 * 3),
    D token width, K class and register tokens, H W rows and columns of patches, E embedding length, T text tokens, or
    tokens of all images or texts without padding.
"""

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict, cast, get_type_hints

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_LANGUAGE_CODE = re.compile(r"[A-Za-z0-9-]{1,35}")  # any in use (BCP-47: RFC 5646, section 4.4.1)


class Field(NamedTuple):
    """How a field of a sample moves with its image, and how it is packed into a batch.

    Kinds, what they hold, and what resizing, cropping, mirroring and turning upright do to them:
        image: The picture, or what is said of its frame; `Transform` reads it.
        boxes: float (M, 4), pixels. Move along; clipped by a crop, and removed by one that shows nothing of them. Those
            that are turned become the upright boxes around them.
        points: float (M, 2), pixels. Move along; removed by a crop that does not show them.
        areas: float (M,), square pixels. Grow and shrink with the image; a turn or a crop changes nothing.
        masks: (M, height, width). Move along; nearest neighbour.
        map: (height, width), a number per pixel. Moves along; nearest neighbour or `bilinear`, which has NaN where an
            augmentation shows what was not in the image.
        rows: (M, ...), numbers that stay as they are, such as the class of each box.
        scalar: A whole number of the whole image.
        text: Words, or anything else that stays on the host.

    In a batch, `text` is a list over the images (None where an image has none), `scalar` an int64 tensor (B,) with -1
    for none, and all others are `Rows`.

    Args:
        kind: See above.
        of: The field of boxes or points that it belongs to, row by row: what a crop removes goes from all of them.
        into: The field whose rows its numbers point to (rows of `of` go with those); they are numbered anew where rows
            are removed, and through the whole batch.
        bilinear: How a map is resized.
        embedded: Words for the text tower, which in training are tokenised where they are read: a list of them is
            `Texts` then.
    """

    kind: Literal["image", "boxes", "points", "areas", "masks", "map", "rows", "scalar", "text"]
    of: str = ""
    into: str = ""
    bilinear: bool = False
    embedded: bool = False


Text = Annotated[str, Field("text")]
Scalar = Annotated[int, Field("scalar")]
OfBox = Annotated[Any, Field("rows", of="boxes_xyxy")]
OfSurfacePoint = Annotated[Any, Field("rows", of="dp_points_xy")]


class Sample(TypedDict, total=False):
    """One example as a dataset gives it: NumPy arrays and plain values; only `image` and `key` must be there.

    Coordinates are absolute pixels of `image` as stored; boxes are (x1, y1, x2, y2) with x2, y2 exclusive. This is the
    table of all fields: a task with another kind of truth adds its line here.
    """

    # uint8 (height, width, 3), RGB; or an `EncodedImage`, which is decoded as large as it is needed
    image: Annotated[Any, Field("image")]
    annotated_upright: Annotated[bool, Field("image")]  # coordinates are of the image turned as its EXIF says
    key: Text  # unique in its dataset, stable between runs
    file_name: Text  # of the image, where an annotation file says it and the key is another
    random_seed: Text  # int, of this sample in this step, whatever rank it is on; `loading` gives it in training
    # Of an image that is mixed with another: int, its partner among the samples of this rank's batch; and float, how
    # much of the image, 0 to 1, is its own. `loading` gives them where a source has `mix`.
    mix_partner: Text
    mix_share: Text
    caption: Annotated[str, Field("text", embedded=True)]
    language: Text  # of `caption`: a BCP-47 code such as hi or hi-Latn
    # language ("" where it is unknown) -> texts; `indiclip.datasets.languages` draws one of them for `caption`
    captions: Annotated[dict[str, list[str]], Field("text")]
    label: Scalar  # class of the whole image, -1 where there is none
    boxes_xyxy: Annotated[Any, Field("boxes")]  # float32 (M, 4)
    classes: OfBox  # int64 (M,)
    crowd: OfBox  # bool (M,): the box covers a crowd, not one object
    # float (M,): pixels of the object itself, of which a box has more; 0 where they are unknown
    area: Annotated[Any, Field("areas", of="boxes_xyxy")]
    masks: Annotated[Any, Field("masks", of="boxes_xyxy")]  # uint8 (M, height, width)
    points_xy: Annotated[Any, Field("points")]  # float32 (K, 2): one per object of the class that `count_class` names
    count_class: Text
    count_label: Scalar
    depth: Annotated[Any, Field("map", bilinear=True)]  # float32 (height, width): distance from the viewer
    # DensePose: Q annotated people and S annotated points of all of them.
    dp_boxes_xyxy: Annotated[Any, Field("boxes")]  # float32 (Q, 4)
    dp_masks: Annotated[Any, Field("masks", of="dp_boxes_xyxy")]  # uint8 (Q, height, width): 1 on the body
    dp_points_xy: Annotated[Any, Field("points")]  # float32 (S, 2)
    dp_person: Annotated[Any, Field("rows", of="dp_points_xy", into="dp_boxes_xyxy")]  # int64 (S,): which person
    dp_part: OfSurfacePoint  # int64 (S,): 1..24
    dp_uv: OfSurfacePoint  # float32 (S, 2) in [0, 1]
    # Distillation: embeddings, of any norm, of T teachers, those that are shorter than the longest with zeros behind.
    teacher_image: Annotated[Any, Field("rows")]  # float16 (T, E): of this augmentation of the image
    teacher_text: Annotated[Any, Field("rows")]  # float16 (T, E): of `caption`, or of the caption in a given language
    teacher_scale: Annotated[Any, Field("rows")]  # float32 (T,): the factor on the cosines that each was trained with


FIELDS: dict[str, Field] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Sample, include_extras=True).items()
}


class Images(TypedDict):
    """A batch of images of any size, as patches padded to the longest (NaFlex)."""

    patches_BNP: Tensor  # uint8 0..255; row, column, channel order inside a patch
    coords_BN2: Tensor  # int64 (row, column) of each patch
    valid_BN: Tensor  # bool, False on padding
    # Plain numbers stay on the host, so that reading them never waits for the GPU.
    sizes_hw: list[tuple[int, int]]  # the resized image in pixels
    scale: list[tuple[float, float]]  # resized / original (height, width)
    num_patches: list[int]  # valid ones; fewer than the size has where some were dropped


class Quarantined(NamedTuple):
    """A sample that cannot be read."""

    task: str
    key: str  # the sample's
    shard: str  # the shard or file that it lies in
    reason: str


class Rows:
    """A field of a batch: its rows, image after image, packed on the host and moved to the device at once.

    A map has one row per image that has it. Masks and maps are padded with zeros to the largest of the batch.

    Attributes:
        values: (R, ...).
        image_R: int64, the image that each row is of.
        counts: Rows of each image; on the host, as all that follows.
        known: Whether each image has the field. Where it has not, but other fields of the same list, its rows are
            zeros.
        on_host: `values` before they were moved.
    """

    def __init__(self, values: Tensor, image_R: Tensor, counts: list[int], known: list[bool]) -> None:
        self.values, self.image_R, self.counts, self.known = values, image_R, counts, known
        self.on_host = values

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Rows":
        """On the device, without waiting for it; back on the host it waits, so that nobody reads too early."""
        away = torch.device(device).type != "cpu"
        values, image_R = (part.to(device, non_blocking=away) for part in (self.values, self.image_R))
        moved = Rows(values, image_R, self.counts, self.known)
        moved.on_host = self.on_host
        return moved

    def pin_memory(self) -> "Rows":
        return Rows(self.values.pin_memory(), self.image_R.pin_memory(), self.counts, self.known)

    @property
    def index_BM(self) -> Tensor:
        """The row numbers of each image on the device; R where an image has fewer than the most."""
        numbers_R = torch.arange(sum(self.counts))
        of_images = [*torch.split(numbers_R, self.counts)]
        index_BM = pad_sequence(of_images, batch_first=True, padding_value=len(numbers_R))
        return index_BM.to(self.values.device, non_blocking=True)

    def part(self, first: int, last: int) -> "Rows":
        """Those of the images from `first` to before `last`."""
        begin, count = sum(self.counts[:first]), sum(self.counts[first:last])
        rows = slice(begin, begin + count)
        part = Rows(self.values[rows], self.image_R[rows] - first, self.counts[first:last], self.known[first:last])
        part.on_host = self.on_host[rows]
        return part

    def rows_of(self, image: int) -> slice:
        """Where an image's rows lie."""
        first = sum(self.counts[:image])
        return slice(first, first + self.counts[image])


class Texts:
    """Texts with the token ids of each; not a list, which on its way to the device would be gone through item by item.

    Attributes:
        strings: The texts.
        token_ids: As the tokenizer's `encode` gives them.
    """

    def __init__(self, strings: Sequence[str], token_ids: Sequence[list[int]]) -> None:
        self.strings, self.token_ids = strings, token_ids

    def __len__(self) -> int:
        return len(self.strings)

    def __iter__(self) -> Iterator[str]:
        return iter(self.strings)

    def __getitem__(self, place: Any) -> Any:
        found = self.strings[place]
        return Texts(found, self.token_ids[place]) if isinstance(place, slice) else found


class Step(dict[str, "Batch"]):
    """The batches of a step, by task. Moves itself: only what holds tensors is looked at, not the lists beside them.

    Attributes:
        idle_tasks: Those that are to have no batch in this step, see `indiclip.loading.source.Source`.
    """

    idle_tasks: frozenset[str] = frozenset()

    def to(self, device: torch.device | str) -> "Step":
        """On the device; from pinned memory without waiting for it."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> "Step":
        return self._each(lambda value: value.pin_memory())

    def _each(self, move: Callable[[Any], Any]) -> "Step":
        """A copy whose tensors were moved."""

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(part) for name, part in value.items()}
            return move(value) if isinstance(value, Tensor | Rows) else value

        step = Step({task: moved(batch) for task, batch in self.items()})
        step.idle_tasks = self.idle_tasks
        return step


class Origin:
    """Where the samples of a batch come from.

    Not a tuple or dataclass, because those are gone through item by item on the way to the device.

    Attributes:
        task: Whose batch it is.
        source: The name of the one source it is from, where the task has several held-out ones; else empty.
        classes: The names of the classes that `label` and `classes` number; empty where there are none.
        category_ids: What the source's file calls each of them; empty where it has no numbers for them.
        in_turn: Whether the samples of a step are dealt to the ranks in turn. Else ranks take blocks of them, and which
            places these have is not the same on any number of ranks.
    """

    def __init__(
        self,
        task: str,
        source: str = "",
        classes: Sequence[str] = (),
        category_ids: Sequence[int] = (),
        in_turn: bool = True,
    ) -> None:
        self.task, self.source, self.classes, self.category_ids = task, source, classes, category_ids
        self.in_turn = in_turn


class Batch(TypedDict):
    """The examples of one task in one step. A TypedDict, because `pin_memory` leaves dataclasses untouched.

    Of held-out samples all may be unreadable: then `keys` is empty, and there are no `images` and `targets`.
    """

    images: NotRequired[Images]
    # name of a `View` -> its images, as many of each sample, sample after sample
    views: NotRequired[dict[str, Images]]
    targets: NotRequired[dict[str, Any]]  # the fields of Sample in resized pixels, see `Field`
    keys: list[str]
    origin: NotRequired[Origin]
    quarantined: NotRequired[list[Quarantined]]  # found unreadable while the step was put together


def class_names(batch: Batch) -> Sequence[str]:
    """Of the batch's source; empty where they are unknown."""
    return batch["origin"].classes if "origin" in batch else ()


def language_code(language: str | None) -> str:
    """A language's code; "" where it is unknown or is no code."""
    return language if language and _LANGUAGE_CODE.fullmatch(language) else ""


def caption_languages(batch: Batch) -> list[str]:
    """The code of the language of each image's `caption`."""
    return [language_code(language) for language in batch["targets"].get("language", [None] * len(batch["keys"]))]


def random_seeds(batch: Batch) -> list[int]:
    """Of each sample, on whatever rank and in whatever micro-batch it is; its key's where the loader gave none."""
    drawn = batch["targets"].get("random_seed") or [None] * len(batch["keys"])
    return [zlib.crc32(key.encode()) if seed is None else seed for key, seed in zip(batch["keys"], drawn, strict=True)]


def in_float32(tensor: Tensor) -> Tensor:
    """As float32, where half precision would be off; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def on_device(numbers: Any, device: torch.device) -> Tensor:
    """Plain numbers as a tensor, without waiting for the device, as `torch.tensor(numbers, device=device)` does."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def moved(numbers: np.ndarray, device: torch.device) -> Tensor:
    """As `on_device`, of an array, whose type stays."""
    return torch.from_numpy(numbers).to(device, non_blocking=True)


def targets_of(batch: Batch, image: int) -> dict[str, Any]:
    """The targets of one image, as its sample had them; without those that it has not."""
    found: dict[str, Any] = {}
    height, width = batch["images"]["sizes_hw"][image]
    for name, value in batch["targets"].items():
        if not isinstance(value, Rows):
            found[name] = value[image]
        elif value.known[image]:
            field, rows = FIELDS[name], value.values[value.rows_of(image)]
            if field.kind in ("masks", "map"):
                rows = rows[:, :height, :width]
            if field.into:
                rows = rows - batch["targets"][field.into].rows_of(image).start
            found[name] = rows[0] if field.kind == "map" else rows
    return {name: value for name, value in found.items() if value is not None}


def images_of(images: Images, first: int, last: int) -> Images:
    """Those from `first` to before `last`, padded to the longest of these."""
    num_patches = images["num_patches"][first:last]
    longest = max(num_patches)
    return Images(
        patches_BNP=images["patches_BNP"][first:last, :longest],
        coords_BN2=images["coords_BN2"][first:last, :longest],
        valid_BN=images["valid_BN"][first:last, :longest],
        sizes_hw=images["sizes_hw"][first:last],
        scale=images["scale"][first:last],
        num_patches=num_patches,
    )


def part_of(batch: Batch, first: int, last: int) -> Batch:
    """The images from `first` to before `last`, patches padded to the longest of these."""
    part: dict[str, Any] = {**batch, "keys": batch["keys"][first:last]}
    part["images"] = images_of(batch["images"], first, last)
    if "views" in batch:
        counts = {name: len(images["num_patches"]) // len(batch["keys"]) for name, images in batch["views"].items()}
        part["views"] = {
            name: images_of(images, first * counts[name], last * counts[name])
            for name, images in batch["views"].items()
        }
    targets = batch["targets"]
    part["targets"] = {
        name: value.part(first, last) if isinstance(value, Rows) else value[first:last]
        for name, value in targets.items()
    }
    for name, value in part["targets"].items():
        if into := FIELDS[name].into:
            value.values = value.values - sum(targets[into].counts[:first])
    return cast(Batch, part)


@dataclass
class Features:
    """What a backbone makes of `Images`.

    Attributes:
        tokens: One vector per patch: (B, N, D); or (T, D), image after image without padding, where `rows_T` is given.
        coords_BN2: int64 (row, column) of each token.
        valid_BN: False on padding; None where every token of the batch is valid.
        grid_hw: Rows and columns of the largest image of the batch (on the host, so that no GPU is waited for).
        stride: Image pixels between neighbouring tokens.
        prefix_BKD: Class and register tokens, in this order; None where the backbone has none.
        rows_T: int64, which of the B * N places each of `tokens` has that come without padding.
        after: Those behind the blocks of the backbone that were asked for, by number.
    """

    tokens: Tensor
    coords_BN2: Tensor
    valid_BN: Tensor | None
    grid_hw: tuple[int, int]
    stride: int
    prefix_BKD: Tensor | None = None
    rows_T: Tensor | None = None
    after: dict[int, "Features"] = field(default_factory=dict)

    @property
    def tokens_BND(self) -> Tensor:
        """One vector per patch, with padding: zeros where they came without."""
        if self.rows_T is None:
            return self.tokens
        B, N, _ = self.coords_BN2.shape
        return spread(self.tokens, self.rows_T, B * N).reshape(B, N, -1)

    def map(self) -> tuple[Tensor, Tensor]:
        """Lay the tokens out as an image for convolutional heads.

        Returns:
            `(map_BDHW, mask_BHW)`: zeros and False where an image has no patch. H and W are the largest of the
            batch.
        """
        B, N, _ = self.coords_BN2.shape
        H, W = self.grid_hw
        if self.valid_BN is None and N == H * W:  # every image fills the grid, row by row
            tokens_BND = self.tokens_BND
            mask_BHW = torch.ones(len(tokens_BND), H, W, dtype=torch.bool, device=tokens_BND.device)
            return tokens_BND.transpose(1, 2).reshape(len(tokens_BND), -1, H, W), mask_BHW
        image_B1 = torch.arange(B, device=self.coords_BN2.device)[:, None]
        cell_BN = (image_B1 * H + self.coords_BN2[..., 0]) * W + self.coords_BN2[..., 1]
        if self.valid_BN is not None:  # padding goes to a cell that is cut off below
            cell_BN = torch.where(self.valid_BN, cell_BN, B * H * W)
        cell_T = cell_BN.flatten() if self.rows_T is None else cell_BN.flatten()[self.rows_T]
        map_LD = spread(self.tokens.flatten(0, -2), cell_T, B * H * W + 1)[:-1]
        mask_L = torch.zeros(B * H * W + 1, dtype=torch.bool, device=cell_T.device).index_fill(0, cell_T, True)[:-1]
        return map_LD.reshape(B, H, W, -1).permute(0, 3, 1, 2), mask_L.reshape(B, H, W)


def spread(x_TD: Tensor, rows_T: Tensor, number: int) -> Tensor:
    """(T, D) -> (number, D): each vector at its row, zeros elsewhere."""
    return x_TD.new_zeros(number, x_TD.shape[-1]).index_copy(0, rows_T, x_TD)
