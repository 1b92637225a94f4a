"""IndiCLIP trains vision encoders that understand India and the world."""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from indiclip.checkpoint import load
    from indiclip.training.profiler import Profiler

__version__ = _version("indiclip")
__all__ = ["Profiler", "__version__", "load"]


def __getattr__(name: str) -> object:
    # Lazy, so that `indiclip --version` does not wait for torch.
    if name == "load":
        from indiclip.quiet import quiet_torchao

        quiet_torchao()
        from indiclip.checkpoint import load

        return load
    if name == "Profiler":
        from indiclip.training.profiler import Profiler

        return Profiler
    raise AttributeError(f"module 'indiclip' has no attribute {name!r}")
