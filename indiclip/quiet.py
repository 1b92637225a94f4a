"""What other libraries print while we count and measure the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
