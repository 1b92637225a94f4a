"""Other libraries are silent while we count, and afterwards as before."""

import contextlib

import pytest
from transformers.utils import logging

from indiclip.quiet import quiet_transformers


@pytest.mark.parametrize("set_progress", [logging.enable_progress_bar, logging.disable_progress_bar])
def test_transformers_is_silent_inside_and_as_before_afterwards(set_progress):
    found = []
    set_progress()
    for inside in (False, True, False):
        with quiet_transformers() if inside else contextlib.nullcontext():
            found.append((logging.get_verbosity(), logging.is_progress_bar_enabled()))
    logging.enable_progress_bar()
    assert found[0] == found[2] != found[1] == (logging.ERROR, False)
