"""Small models and batches for tests."""

import gc
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.loading import workers
from indiclip.loading.collate import pack
from indiclip.preprocessing import Preprocessing
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer
from indiclip.types import Batch, Features, Images

ARCHITECTURE = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def tiny_encoder(seed: int = 0, embed_dim: int = 64, lengths: tuple[int, ...] = (16, 32), **options: Any) -> Encoder:
    """Patch 8, width 32, one block."""
    torch.manual_seed(seed)
    backbone = NaFlexViT(width=32, depth=1, num_heads=2, patch_size=8)
    return Encoder(backbone, TextTower(ByteTokenizer(), ARCHITECTURE), embed_dim, lengths, **options)


def batch_images(
    images: list[Any], patch_size: int, max_tokens: int, canvas_hw: tuple[int, int] | None = None
) -> Images:
    """What a backbone of this patch size gets of images."""
    return Preprocessing(patch_size, canvas_hw).batch(images, max_tokens)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A uint8 picture of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def only_caption(sample: dict[str, Any]) -> str:
    """The text of a sample that has one in one language."""
    ((text,),) = sample["captions"].values()
    return str(text)


def caption_batch(captions: list[str], labels: list[int] | None = None, side: int = 24) -> Batch:
    """A contrastive batch of noise."""
    images = batch_images([noise(side, side, i) for i in range(len(captions))], 8, 64)
    targets = packed({"caption": captions} | ({"label": labels} if labels else {}))
    return Batch(images=images, targets=targets, keys=[str(i) for i in range(len(captions))])


def features_of(maps_HWD: list[Tensor], stride: int = 8) -> Features:
    """Token maps of any sizes as one padded batch, shuffled; the padding holds numbers that must not matter."""
    grid_hw = (max(m.shape[0] for m in maps_HWD), max(m.shape[1] for m in maps_HWD))
    full = all(m.shape[:2] == grid_hw for m in maps_HWD)
    B, N, D = len(maps_HWD), max(m.shape[0] * m.shape[1] for m in maps_HWD), maps_HWD[0].shape[-1]
    tokens_BND, coords_BN2 = torch.full((B, N, D), 7.0), torch.zeros(B, N, 2, dtype=torch.long)
    valid_BN = torch.zeros(B, N, dtype=torch.bool)
    for i, map_HWD in enumerate(maps_HWD):
        rows, columns, _ = map_HWD.shape
        order = torch.arange(rows * columns) if full else torch.randperm(rows * columns)  # maps alike need no places
        tokens_BND[i, : len(order)] = map_HWD.reshape(-1, D)[order]
        coords_BN2[i, : len(order)] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[order]
        valid_BN[i, : len(order)] = True
    return Features(tokens_BND, coords_BN2, None if full else valid_BN, grid_hw, stride)


def packed(lists: dict[str, list[Any]]) -> dict[str, Any]:
    """Targets of a batch from lists over its images, None where an image has none."""
    count = len(next(iter(lists.values())))
    return pack([{name: of[i] for name, of in lists.items() if of[i] is not None} for i in range(count)])


def on_ranks(world: int, function: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `function(rank)` gives in each of `world` processes of one gloo group (forked: no imports to wait for)."""

    def work(rank: int, queue: Any) -> None:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        address = f"file://{folder}/meet"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
        queue.put((rank, function(rank)))
        torch.distributed.destroy_process_group()

    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=work, args=(rank, queue)) for rank in range(world)]
    for process in processes:
        process.start()
    answers = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    return [answers[rank] for rank in range(world)]


def forked(work: Callable[[], int], folder: Path, variables: dict[str, str]) -> int:
    """The id of a process of its own session that exits with what `work` gives: no imports to wait for.

    What it writes is added to `out` and `err` of the folder.
    """
    process = os.fork()
    if process:
        return process
    status = 1
    gc.freeze()  # an old loader, were it collected here, would end the workers of the parent
    workers._all.clear()
    try:
        os.setsid()
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        os.environ.update(variables)
        torch.set_num_threads(1)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def waited(processes: list[int], seconds: float = 240.0) -> list[int]:
    """The statuses of forked processes, as `subprocess` gives them; those that take too long are killed."""
    statuses: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(statuses) < len(processes):
        for process in set(processes) - statuses.keys():
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                statuses[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.killpg(process, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[process] for process in processes]


def in_processes(work: Callable[[], int], folder: Path, variables: list[dict[str, str]]) -> CompletedProcess[str]:
    """What forked processes did together, one for each of `variables`: the first one's status; `args` are their ids."""
    output = Path(tempfile.mkdtemp(prefix="output", dir=folder))
    processes = [forked(work, output, own) for own in variables]
    first, *_ = waited(processes)
    out, error = ((output / name).read_text() for name in ("out", "err"))
    return CompletedProcess(processes, first, out, error)


def as_ranks(work: Callable[[], int], folder: Path, world: int = 2) -> CompletedProcess[str]:
    """As `in_processes`, with what torchrun tells the processes of one machine."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    names = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_RUN_ID": "none"}
    names |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "MASTER_PORT": str(port)}
    return in_processes(work, folder, [names | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)])
