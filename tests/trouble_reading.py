"""A dataset in which one sample brings trouble, for tests in this process and in others (three seconds to import)."""

import ctypes
import gc
import multiprocessing
import os
import signal
import time

import numpy as np
import torch
from torch.utils.data import Dataset

from indiclip.datasets.base import SampleDataset
from indiclip.generated.mela import Mela
from indiclip.loading.workers import StepLoader, Workers, reading
from indiclip.webdataset.shards import Shards


class Troubles(Mela):
    """Twenty-four scenes, of which number 5 does what `kind` says. `mela-0-5` is its key.

    Args:
        kind: `wait`: sleeps until the file `flag` is there; `stuck`: reads from a pipe that stays empty, in C code
            that holds the GIL; `killed`: SIGKILL to the process that reads; `error`: a KeyError; `collect`: collects
            garbage; `fine`: nothing. `killed` and `collect` in workers only.
        flag: A file; while it is there nothing happens.
    """

    def __init__(self, kind: str, flag: str = "/nowhere") -> None:
        super().__init__(24, 32, "single")
        self.kind, self.flag = kind, flag

    def __getitem__(self, index):
        if index == 5 and not os.path.exists(self.flag):  # noqa: PTH110
            self.bring()
        return super().__getitem__(index)

    def bring(self):
        if self.kind == "wait":
            while not os.path.exists(self.flag):  # noqa: PTH110
                time.sleep(0.05)
        if self.kind == "stuck":
            ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
        if self.kind == "error":
            raise KeyError("captoin")
        if multiprocessing.parent_process() is None:
            return  # the command reads a sample itself before it starts any worker
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "collect":
            gc.collect()


class Own(SampleDataset):
    """A dataset as users write it, without a key in its samples; `kind` says what is wrong with them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self):
        return 4

    def key(self, index):
        return f"own-{index}"

    def __getitem__(self, index):
        if self.kind == "none":
            return None
        if self.kind == "error":
            raise KeyError("captoin")
        sample = {"image": np.full((32, 32, 3), 20 * index, np.uint8), "caption": f"grey {index}"}
        wrong = {
            "fine": {},
            "tensor": {"image": torch.zeros(3, 32, 32)},
            "text": {"caption": 5},
            "texts": {"captions": {"en": "grey"}},
            "list": {"captions": ["grey"]},
        }
        return sample | wrong[self.kind]


class Keys(Dataset):
    """Reads the samples of another dataset as a step does, and gives their keys."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        with reading("c", self.samples, index):
            return self.samples[index]["key"]


def loader(samples, num_workers=2):
    """A key at a time; of two workers the second reads number 5."""
    group = Workers("train", num_workers)
    return StepLoader(Keys(samples), batch_size=None, num_workers=num_workers, worker_init_fn=group)


class Broken(Shards):
    """The second of its samples raises what no dataset should."""

    def __getitem__(self, index):
        if index == 1:
            raise KeyError("captoin")
        return super().__getitem__(index)
