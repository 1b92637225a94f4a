"""Without what every process of a run would print, or other libraries while we count and measure."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OfThisProcess(UserWarning):
    """A warning of what this process of a run has met, such as a sample. What others warn of, all of them meet."""


def leave_warnings_to_first_process() -> None:
    """From now on this process, which is another one, warns of what is its own alone."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=OfThisProcess)


def quiet_torchao() -> None:
    """Without torch's warnings of torchao, which transformers imports wherever it is installed."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings and progress bars; both are afterwards as before."""
    from transformers.utils import logging

    own: Any = logging
    level, shows_progress = own.get_verbosity(), own.is_progress_bar_enabled()
    own.set_verbosity_error()
    own.disable_progress_bar()
    try:
        yield
    finally:
        own.set_verbosity(level)
        if shows_progress:
            own.enable_progress_bar()
