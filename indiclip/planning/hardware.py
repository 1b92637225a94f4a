"""What accelerators can do, from `hardware.yaml`, and days of one in days of another."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from indiclip.names import check_choice

Strategy = Literal["ddp", "fsdp", "hsdp"]  # how ranks share the weights: each has all, all share, a node's share
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
_FILE = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class Device:
    """One accelerator; see `hardware.yaml` for the sources.

    Attributes:
        tflops: Dense peak rates by data type, TFLOPS.
        sparse: Those with 2:4 sparsity.
        hbm_gb: Memory in GB (1e9 bytes).
        hbm_gbs: Its bandwidth in GB/s.
        nvlink_gbs: To the other devices of the node, GB/s in one direction.
        nic_gbs: To other nodes, GB/s in one direction.
        cuda_names: What `torch.cuda.get_device_name` gives of the boards with these peak rates.
    """

    name: str
    tflops: dict[str, float]
    hbm_gb: float
    hbm_gbs: float
    sources: dict[str, str]
    sparse: dict[str, float] = field(default_factory=dict)
    nvlink_gbs: float = 0
    nic_gbs: float = 0
    cuda_names: list[str] = field(default_factory=list)

    def peak(self, dtype: str) -> float:
        """FLOPS at a data type.

        Raises:
            ValueError: It has none.
        """
        if dtype not in self.tflops:
            raise ValueError(f"trainer.precision: {self.name} has no {dtype}; it has {', '.join(self.tflops)}")
        return self.tflops[dtype] * 1e12


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """All of `hardware.yaml`."""
    content: dict[str, Any] = yaml.safe_load(_FILE.read_text("utf-8"))
    return content


def devices(trainable: bool = False) -> list[str]:
    """Names of the devices; with `trainable` those that a run of ours can be planned for."""
    return [name for name, of in table()["devices"].items() if not trainable or "nvlink_gbs" in of]


def device(name: str, flag: str = "--gpu", valid: list[str] | None = None) -> Device:
    """A device by its name.

    Raises:
        ValueError: There is none of that name; says the nearest.
    """
    check_choice(flag, name.lower(), valid or devices())
    return Device(**table()["devices"][name.lower()])


def installed(cuda_name: str) -> Device | None:
    """The device that CUDA's driver calls so; None where it is not in the table."""
    return next((of for of in map(device, devices()) if cuda_name in of.cuda_names), None)


def default(name: str) -> tuple[float, str]:
    """An assumed number, such as `mfu`, and its source."""
    return table()[name]["default"], table()[name]["source"]


def convert(days: float, source: str, target: str) -> dict[str, float]:
    """Device-days that make as many FLOPs at the same share of the peak.

    Args:
        days: Of the source, at its dense bf16 peak.
        source: Name of a device.
        target: Another.

    Returns:
        Kind of the target's peak, such as `bf16` and `bf16, sparse` -> days.

    Raises:
        ValueError: An unknown device, or days that are not above 0.
    """
    if not days > 0:
        raise ValueError(f"--convert: found {days:g} days; expected more than 0")
    of, to = device(source, "--convert"), device(target, "--convert")
    peaks = dict(to.tflops) | {f"{kind}, sparse": rate for kind, rate in to.sparse.items()}
    work = days * of.tflops["bf16"]
    return {kind: work / rate for kind, rate in peaks.items() if "8" in kind or "bf16" in kind}
