"""`indiclip predict`: what every head finds in every image, as JSON. Nothing here knows a task."""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from PIL import Image, ImageDraw
from rich.console import Console

from indiclip import json_lines
from indiclip.distributed import gathered
from indiclip.head import Head, Prediction
from indiclip.masking import mask
from indiclip.module import Batches, MultiTask
from indiclip.names import check_range
from indiclip.patches import unpatchify
from indiclip.presentation import Frame, Panel
from indiclip.training.fault_tolerance.ranks import folder_of
from indiclip.training.record import print_listed
from indiclip.types import Batch, Origin, class_names, targets_of

_UNSAFE = re.compile(r"[^\w.-]")  # in a file's name
_LONGEST = 120  # bytes of a key in a file's name, of the 255 that file systems allow
_COCO_ID = re.compile("0|[1-9][0-9]{0,17}")


class _Written(NamedTuple):
    """An image that was written."""

    place: tuple[int, int, int]  # step, rank, number in the batch: the order of the data
    key: str
    file: str  # in `predictions`
    file_name: str | None
    size_hw: tuple[int, int]
    heads: list[str]  # those that gave `detections`


class PredictionWriter(Callback):
    """Writes `predictions/` into the run's folder, and keeps of each image only its name and size.

    - `images/TASK/KEY.json`: an image, with its `key`, `file_name` (where the source says it), `width`, `height` and
      `heads`: what each head says of it, see `Head.to_json`.
    - `images/TASK.json`: all images of a task and the classes of its source, in the form of a COCO file without
      annotations: `images` with `id`, `key`, `file` (of the above), `file_name`, `width`, `height`; and `categories`.
    - `HEAD.json`, of heads with `detections`: COCO's results, so that
      `COCO("images/TASK.json").loadRes("HEAD.json")` reads them. Where the source is a COCO file, the ids of images and
      categories are its own; else images are numbered from 1 in their order, and categories in that of the classes.

    Where a task has several held-out sources, these are `images/TASK/SOURCE/KEY.json`, `images/TASK/SOURCE.json` and
    `HEAD.SOURCE.json`. In names of files, all of a key but letters, digits, `_`, `-` and `.` becomes `_`, and a hash of
    the key stands behind it.

    Coordinates are pixels of the original image, upright: turned as its EXIF orientation asks, as the model saw it and
    as `width` and `height` say. COCO's own annotations of a photo that is stored lying are in the frame of the stored
    file, so that such photos cannot be compared with them.

    What an earlier `predict` wrote is removed. Unreadable samples are listed in `quarantine.jsonl`.

    Args:
        pictures: Of so many images, for each head and source, the picture that its `visualize` draws is written beside
            the JSON, as `KEY.HEAD.jpg`; its words are in the JSON, under `picture`.
    """

    def __init__(self, pictures: int = 0) -> None:
        check_range({"--pictures": pictures})
        self.pictures = pictures

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = folder_of(trainer) / "predictions"
        self._written: dict[str, list[_Written]] = {}  # key of the batch, a task or task/source -> its images
        self._origins: dict[str, Origin] = {}
        self._pictures_left: dict[str, int] = {}
        more = trainer.global_rank < self.pictures % trainer.world_size
        self._pictures_of_rank = self.pictures // trainer.world_size + more
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            if (self._folder / "images").exists():
                shutil.rmtree(self._folder / "images")
            for file in (*self._folder.glob("*.json"), *self._folder.glob("*.pt")):
                file.unlink()
        trainer.strategy.barrier()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, list[Prediction]],
        batch: Batches,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, MultiTask)
        for task, part in batch.items():
            origin = part.get("origin", Origin(task))
            suffix = f"/{origin.source}" if origin.source else ""
            heads = [head for head in pl_module.each_head() if head.task == origin.task]
            of_heads = {head: move_data_to_device(outputs.get(head.name + suffix, []), "cpu") for head in heads}
            self._origins.setdefault(task, origin)
            for i in range(len(part["keys"])):
                found = {head: predictions[i] for head, predictions in of_heads.items()}
                place = (batch_idx, trainer.global_rank, i)
                self._written.setdefault(task, []).append(self._write_image(task, part, i, found, place))

    def _write_image(
        self, task: str, batch: Batch, image: int, predictions: dict[Head, Prediction], place: tuple[int, int, int]
    ) -> _Written:
        key, frame = batch["keys"][image], Frame.of(batch, image)
        names = batch["targets"].get("file_name")
        stem = self._folder / "images" / Path(*map(safe_name, task.split("/", 1))) / safe_name(key)
        stem.parent.mkdir(parents=True, exist_ok=True)
        heads: dict[str, Any] = {}
        for head, prediction in predictions.items():
            heads[head.name] = head.to_json(prediction, frame)
            left = self._pictures_left.setdefault(f"{task} {head.name}", self._pictures_of_rank)
            if left > 0:
                self._pictures_left[f"{task} {head.name}"] = left - 1
                file = stem.with_name(f"{stem.name}.{head.name}.jpg")
                words = _write_picture(file, head, prediction, batch, image)
                if words is not None:
                    heads[head.name]["picture"] = {"file": file.name, "words": words}
        height, width = frame.size_hw
        file = stem.with_name(f"{stem.name}.json")
        file_name = names[image] if names else None
        content = {"key": key} | ({"file_name": file_name} if file_name else {}) | {"width": width, "height": height}
        json_lines.write_whole(file, _encoded(content | {"heads": heads}))
        with_detections = [name for name, found in heads.items() if "detections" in found]
        return _Written(place, key, str(file.relative_to(self._folder)), file_name, (height, width), with_detections)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        of_ranks = gathered((self._written, self._origins))  # once all have written theirs
        if not trainer.is_global_zero:
            return
        origins = {task: origin for _, own in of_ranks for task, origin in own.items()}
        count = 0
        for task, origin in origins.items():
            rows = sorted(row for written, _ in of_ranks for row in written.get(task, []))
            rows = list({row.key: row for row in rows}.values())  # each image once, however ranks shared them
            self._write_coco(task, origin, rows)
            count += len(rows)
        Console().print(f"predictions of {count:,} images [bold]{self._folder}[/]", soft_wrap=True)
        print_listed("unreadable samples", self._folder / "quarantine.jsonl")

    def _write_coco(self, task: str, origin: Origin, rows: list[_Written]) -> None:
        """The list of a task's images, and the results of each head that found objects in them."""
        image_ids = _image_ids([row.key for row in rows])
        ids = origin.category_ids or range(1, len(origin.classes) + 1)
        id_of = dict(zip(origin.classes, ids, strict=True))
        for head in sorted({name for row in rows for name in row.heads}):
            file = self._folder / ".".join([head, *[safe_name(origin.source)] * bool(origin.source), "json"])
            with json_lines.open_whole(file) as opened:
                for number, result in enumerate(self._results(head, rows, image_ids, id_of)):
                    opened.write((b",\n" if number else b"[\n") + json.dumps(result).encode())
                opened.write(b"\n]\n" if opened.tell() else b"[]\n")
        images = [
            {"id": image_id, "key": row.key, "file": row.file, "file_name": row.file_name or row.key}
            | {"width": row.size_hw[1], "height": row.size_hw[0]}
            for image_id, row in zip(image_ids, rows, strict=True)
        ]
        categories = [{"id": number, "name": name} for name, number in id_of.items()]
        file = self._folder / "images" / Path(*map(safe_name, task.split("/", 1)))
        content = {"images": images, "annotations": [], "categories": categories}
        json_lines.write_whole(file.with_name(f"{file.name}.json"), _encoded(content))

    def _results(
        self, head: str, rows: list[_Written], image_ids: Sequence[int], id_of: dict[str, int]
    ) -> Iterator[dict[str, Any]]:
        """COCO's results, read from the images' files. A class that the source does not name gets the next number."""
        for image_id, row in zip(image_ids, rows, strict=True):
            content = json.loads((self._folder / row.file).read_bytes())
            for found in content["heads"][head].get("detections", []):
                category_id = id_of.setdefault(found["class"], max(id_of.values(), default=0) + 1)
                yield {"image_id": image_id, "category_id": category_id} | {n: found[n] for n in ("bbox", "score")}


def safe_name(key: str) -> str:
    """The name of a file for a key: any text, slashes and what is no UTF-8 too. Different keys have different names."""
    name = _UNSAFE.sub("_", key.encode(errors="replace").decode()).lstrip(".")
    if name != key or not name or len(name.encode()) > _LONGEST:
        short = name.encode()[:_LONGEST].decode(errors="ignore")
        name = f"{short}-{hashlib.sha256(key.encode(errors='surrogatepass')).hexdigest()[:12]}"
    return name


def _image_ids(keys: list[str]) -> Sequence[int]:
    """The keys as numbers, where they are a COCO file's ids; else 1, 2, ..."""
    return [int(key) for key in keys] if all(map(_COCO_ID.fullmatch, keys)) else range(1, len(keys) + 1)


def _write_picture(file: Path, head: Head, prediction: Prediction, batch: Batch, image: int) -> str | None:
    """Draw what a head found; returns the words below it, None where it draws nothing."""
    target = move_data_to_device(targets_of(batch, image), "cpu") | {"class_names": class_names(batch)}
    picture = head.visualize(unpatchify(batch["images"], image), prediction, target)
    if picture is None:
        return None
    pixels, said = picture
    panels = [Panel(pixels)] if isinstance(pixels, np.ndarray) else pixels
    content = io.BytesIO()
    _side_by_side(panels).save(content, "JPEG", quality=90)
    json_lines.write_whole(file, content.getbuffer())
    return said if isinstance(said, str) else "\n".join(f"{line.mark} {line.text}".strip() for line in said)


def _side_by_side(panels: Sequence[Panel]) -> Image.Image:
    """The panels as one picture. Labels in letters that Pillow's own font lacks are in the JSON only."""
    gap = 8
    width = sum(panel.image_HW3.shape[1] + gap for panel in panels) - gap
    picture = Image.new("RGB", (width, max(panel.image_HW3.shape[0] for panel in panels)), "white")
    draw, left = ImageDraw.Draw(picture), 0
    for panel in panels:
        picture.paste(Image.fromarray(panel.image_HW3), (left, 0))
        for x, y, label in panel.labels:
            said = label.encode("latin-1", "ignore").decode("latin-1").strip()
            if len(said) >= len(label) - 2:  # but for a mark at its end
                place = (left + x, max(y - 12, 0))
                draw.rectangle(draw.textbbox(place, said), fill="black")
                draw.text(place, said, fill="white")
        left += panel.image_HW3.shape[1] + gap
    return picture


def _encoded(content: dict[str, Any]) -> bytes:
    """JSON without secrets, in UTF-8: a key that is none is written with escapes."""
    try:
        return (mask(json.dumps(content, ensure_ascii=False)) + "\n").encode()
    except UnicodeEncodeError:
        return (mask(json.dumps(content)) + "\n").encode()
