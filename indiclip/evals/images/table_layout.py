"""Items in a table: a row for each image, or several rows with more of one image's cells."""

from pathlib import Path

import numpy as np

from indiclip.datasets.captions import CaptionColumns
from indiclip.datasets.table_reader import Table
from indiclip.evals.images.items import FileImages, Images, Items, TableImages, by_language
from indiclip.evals.images.reading import Reading
from indiclip.evals.images.splits import is_split


def read_table(reading: Reading, file: Path) -> Items:
    """The items of a table.

    Raises:
        FileNotFoundError: Images are missing.
        ValueError: A column is missing, or a row does not fit the card; names the line.
    """
    card = reading.card
    table = Table(file, image_column="file")
    has_images = any(protocol.embeds_images for protocol in card.protocols)
    if has_images:
        names, embedded = table.images("file", file.parent)
    else:
        names, embedded = [f"{file.name}:{row + 1}" for row in table.kept], None
    required = sorted(card.required_fields - {"captions"})
    columns = {name: table.names(table.place(name)) for name in required}
    of_images = ("file", "split") if has_images else ()
    used = {table.place(name) for name in (*of_images, *required) if name in table.header}
    captions = None
    if "captions" in card.required_fields:
        captions = CaptionColumns(table, table.caption_columns(), "en")
        used |= captions.places

    has_splits = has_images and "split" in table.header
    is_train = _read_splits(reading, table) if has_splits else np.zeros(len(names), bool)
    for row in table.kept:
        if not names[row]:
            table.leave_out(row, "without an image", "no image in 'file'")
        elif captions and not required and captions.is_empty(row):
            table.leave_out(row, "without a caption", f"{names[row]!r} has no caption", always=True)
    labels = _read_labels(reading, table, columns["class"]) if "class" in required else np.full(len(names), -1)

    rows_of = table.rows_by_image(names)
    _check_rows(table, rows_of, is_train, "class" in required)
    first_of = {name: rows[0] for name, rows in rows_of.items()}
    firsts = list(first_of.values())
    files = list(first_of) if has_images else []
    images: Images = TableImages(embedded, first_of) if embedded else FileImages.named_in(file, files)
    items = Items(card, images, list(first_of), labels[firsts], is_train=is_train[firsts])
    for name in card.required_fields - {"captions", "class"}:
        items.columns[name] = [[columns[name][row] for row in rows] for rows in rows_of.values()]
    if captions:
        items.captions = by_language([captions.of_rows(rows) for rows in rows_of.values()])
        reading.notes += table.inventory.left_out_lines(str(file))
    reading.notes += table.count_columns(used).left_out_lines(str(file))
    return items


def _read_splits(reading: Reading, table: Table) -> np.ndarray:
    """Whether each row is for training, bool. Rows of splits that are not used are left out."""
    column = table.names(table.place("split"))
    for row, split in enumerate(column):
        if not is_split(split):
            raise ValueError(f"{table.where(row)}: the split {split!r}; expected train, val or test")
    splits = reading.splits(sorted(set(column)), str(table.file))
    for row, split in enumerate(column):
        if split not in splits:
            table.leave_out(row, f"of the split {split}", "it is not scored", always=True)
    return np.array([splits.get(split, False) for split in column])


def _read_labels(reading: Reading, table: Table, names: list[str]) -> np.ndarray:
    """The class of each row, int64. Rows of other classes than the card's are left out."""
    labels = np.full(len(names), -1, dtype=np.int64)
    for row in table.kept:
        labels[row] = reading.label(names[row], table.where(row))
        if labels[row] < 0:
            table.leave_out(row, "of a class that is not on the card", names[row], always=True)
    return labels


def _check_rows(table: Table, rows_of: dict[str, list[int]], is_train: np.ndarray, once: bool) -> None:
    """Raise a `ValueError` for an image of several rows where each has `once`, or where they are of several splits."""
    for name, (first, *others) in rows_of.items():
        if others and once:
            found = f"{name!r} is duplicated, as {table.where(first)} has it"
            raise ValueError(f"{table.where(others[0])}: {found}; expected one class for each image")
        for row in others:
            if is_train[row] != is_train[first]:
                raise ValueError(f"{table.where(row)}: {name!r} is of another split in an earlier row; expected one")
