"""Other libraries are silent while we count, and afterwards as before."""

import contextlib
import warnings

import pytest
from transformers.utils import logging

from indiclip.quiet import OfThisProcess, leave_warnings_to_first_process, quiet_transformers


@pytest.mark.parametrize("set_progress", [logging.enable_progress_bar, logging.disable_progress_bar])
def test_transformers_is_silent_inside_and_as_before_afterwards(set_progress):
    found = []
    set_progress()
    for inside in (False, True, False):
        with quiet_transformers() if inside else contextlib.nullcontext():
            found.append((logging.get_verbosity(), logging.is_progress_bar_enabled()))
    logging.enable_progress_bar()
    assert found[0] == found[2] != found[1] == (logging.ERROR, False)


def test_a_process_behind_the_first_warns_of_its_own_alone():
    with warnings.catch_warnings(record=True) as found:
        leave_warnings_to_first_process()
        warnings.warn("model.warmup_steps: found 50 of 2 steps", stacklevel=1)
        warnings.warn("nn.functional.all_reduce is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("data: shard 3 is gone", OfThisProcess, stacklevel=1)
    assert [str(warning.message) for warning in found] == ["data: shard 3 is gone"]
