"""No file that is broken in some way crashes a reader, or loses rows, images or boxes without a word."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import fuzz_readers

_FILES = 500  # over all readers; `tools/fuzz_readers.py` runs as many as one has time for


@pytest.mark.parametrize("name", fuzz_readers.READERS)
def test_used_and_left_out_is_all_or_one_line_says_why_not(name):
    counts = fuzz_readers.run(name, -(-_FILES // len(fuzz_readers.READERS)))
    assert counts["used"]  # where a value that is not used has changed
