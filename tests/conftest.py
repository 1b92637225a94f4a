"""What the tests share."""

import atexit
import gc
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a forked process would wait for threads it has not

# First, as in `indiclip fit`: typing keeps one order of Union[int, float], by which jsonargparse reads a config's 1.
import lightning.pytorch  # noqa: F401
import numpy as np
import pytest
import torch
from foreign_models import folders, spiece  # noqa: F401
from layout_files import card  # noqa: F401
from PIL import Image

# Autograd starts its threads with the first backward pass: now none, but one where it comes after tensors on fake
# devices, and then no process that a test forks could go backward.
torch.zeros((), requires_grad=True).backward()

# The libraries' million objects stay until the end; the garbage collector need not search them in each test.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need one."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the real data; tests that need it are skipped where it is absent."""
    root = Path(os.environ.get("INDICLIP_DATA") or Path(__file__).parents[2] / "shared" / "data").resolve()
    if not root.is_dir():
        pytest.skip(f"no real data at {root} (set INDICLIP_DATA)")
    return root


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked shards go to a folder of this test run."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["INDICLIP_CACHE"] = str(folder)
    return folder


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """Makes smooth pictures, which JPEG keeps within a few grey levels: (height, width, seed) -> uint8 RGB."""

    def make(height: int, width: int, seed: int = 0) -> np.ndarray:
        corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR))

    return make


@pytest.fixture(scope="session")
def requires_fonts() -> None:
    """For tests that draw words: they are skipped, with what to install, where fonts or shaping are missing."""
    from indiclip.generated.fonts import MissingFonts
    from indiclip.generated.lettering import SCRIPTS, Lettering

    try:
        for part in ("train", "test"):
            Lettering(1, part, list(SCRIPTS))
    except MissingFonts as missing:
        pytest.skip(str(missing))
