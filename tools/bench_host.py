"""What a step costs beside its arithmetic: host time, operators, and memory by `model.micro_batches`.

    OMP_NUM_THREADS=1 python tools/bench_host.py

1. Milliseconds of the training process for 1,024 captioned samples: tokenising and Lightning's walk through the lists
   of a batch, as it was, beside a step whose captions were tokenised by a worker and which moves itself.
2. Operators that are no views in the quickstart's step with 64 scenes (forward, losses, backward, AdamW).
3. Seconds and peak bytes kept for the backward pass of a contrastive step in 1 to 8 micro-batches.
"""

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from indiclip.config_files import find_config, read_config
from indiclip.generated.mela import Mela
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.module import MultiTask
from indiclip.preprocessing import Preprocessing
from indiclip.tokenizers import FastTokenizer


class Operators(TorchDispatchMode):
    """Counts operators that compute: a view shares its input's memory."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(value.alias_info for value in function._schema.returns)
        return function(*args, **(kwargs or {}))


def milliseconds(work: Callable[[], Any], rounds: int = 7) -> float:
    """Median of some rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def host() -> None:
    """Print the training process's own time."""
    tokenizer = FastTokenizer(str(find_config("quickstart").parent / "tokenizers" / "mela.json"), 64)
    source = Source("contrastive", Mela(1024, 32, "single", languages=["en", "hi", "ta"]), 1024, max_tokens=16)
    step = Steps([source], 0, Preprocessing(8), train=True, encode=tokenizer.encode)[0]
    captions = list(step["contrastive"]["targets"]["caption"])
    plain = {"contrastive": {**step["contrastive"], "targets": {"caption": captions}}}
    device = torch.device("cpu")
    print(
        f"1,024 samples, ms of the training process: tokenising {milliseconds(lambda: tokenizer.encode(captions)):.1f} "
        f"-> 0, moving {milliseconds(lambda: move_data_to_device(plain, device)):.1f} -> "
        f"{milliseconds(lambda: move_data_to_device(step, device)):.2f}"
    )


def quickstart() -> tuple[MultiTask, MultiTaskData]:
    """Its model and data, outside of a Trainer."""
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_class_arguments(MultiTask, "model")
    parser.add_class_arguments(MultiTaskData, "data")
    parser.add_argument("--trainer", type=dict)
    parts = parser.instantiate(parser.parse_object(read_config(find_config("quickstart"))))
    module, data = parts.model, parts.data
    data.preprocessing, data.encode = module.encoder.backbone.preprocessing, module.encoder.text.tokenizer.encode
    module.log = module.log_dict = lambda *_, **__: None
    return module, data


def operators() -> None:
    """Print how many a step of 64 scenes has."""
    module, data = quickstart()
    for source in data.train:
        source.batch_size = 64
    step = data.steps(data.train, train=True)[0]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    module.training_step(step, 0).backward()
    optimizer.step()
    with Operators() as operators:
        module.training_step(step, 0).backward()
        optimizer.step()
    sizes = ", ".join(f"{len(batch['keys'])} of {task}" for task, batch in step.items())
    print(f"operators of the quickstart's step ({sizes}): {operators.count:,}")


def kept_bytes(work: Callable[[], Any]) -> int:
    """Peak bytes that autograd keeps for a backward pass, each storage once."""
    alive: dict[int, int] = {}
    peak = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal peak
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in alive:
            alive[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, alive.pop, storage.data_ptr(), None)
        peak = max(peak, sum(alive.values()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return peak


def micro_batches() -> None:
    """Print time and memory of a step in parts."""
    module, data = quickstart()
    module.heads = torch.nn.ModuleDict({"contrastive": module.heads["contrastive"]})
    data.train = [source for source in data.train if source.task == "contrastive"]
    for source in data.train:
        source.batch_size = 256
    step = data.steps(data.train, train=True)[0]
    module._seed = lambda *_: None
    module._trainer = argparse.Namespace(precision_plugin=None, callbacks=[])
    for number in (1, 2, 4, 8):
        module.micro_batches = number

        def work() -> None:
            module.zero_grad()
            module.training_step(step, 0).backward()

        kept, seconds = kept_bytes(work), milliseconds(work, 3) / 1e3
        print(
            f"256 pairs in {number} micro-batch(es): {seconds:.2f} s, {kept / 2**20:.0f} MiB kept for the backward pass"
        )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    host()
    operators()
    micro_batches()
