"""What the parts of a data set are called: `test` is scored, or `val` where there is none; `train` teaches probes."""

import re

KINDS = {  # name in small letters -> `train`, `val` or `test`
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
}


def is_split(name: str) -> bool:
    """Whether a folder or value is called by a split."""
    return name.lower() in KINDS


def split_of(name: str) -> str:
    """The split that stands in a file's name, such as `train-0000` or `cifar10_test.tar`; nothing where none does."""
    return next((word for word in re.findall("[a-z]+", name.lower()) if word in KINDS), "")
