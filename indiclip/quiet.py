"""Without what other libraries print in every process, or while we count and measure the same."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
