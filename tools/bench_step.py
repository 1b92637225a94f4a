"""One training step of ours beside the peer's, in the same run.

    python tools/bench_step.py                # CPU
    python tools/bench_step.py --device cuda --batch 256

1. A contrastive step (tokenizing, forward, loss, backward, AdamW) beside open_clip_torch's CLIP with the same image
   tower, text tower, tokenizer, images and captions; once with a BPE tokenizer, once byte by byte.
2. Our contrastive step on 196 patches beside 49 (a smaller image) and 98 (half of them dropped).
3. The quickstart's four-task step beside the sum of its tasks alone.

Alternates ours and theirs, pair by pair, and prints medians; needs the extra `test`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.loss import ClipLoss
from torch import nn

from heads.contrastive import Contrastive
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.generated.mela import Mela
from indiclip.head import computed
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.preprocessing import Preprocessing
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer, FastTokenizer, Tokenizer

WIDTH, DEPTH, HEADS, PATCH, PIXELS = 192, 6, 3, 8, 96
TEXT_WIDTH, TEXT_DEPTH, TEXT_HEADS, EMBED = 192, 4, 3, 256
CONTEXT = 77  # OpenCLIP's; every caption is padded to it there
Step = Callable[[], None]


def paired(steps: dict[str, Step], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each step, all of them once a round, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def our_contrastive_step(batch: dict[str, Any], tokenizer: Tokenizer, device: str) -> tuple[Step, int]:
    """Our encoder with a text tower of OpenCLIP's shape."""
    architecture = {
        "model_type": "clip_text_model", "hidden_size": TEXT_WIDTH, "num_hidden_layers": TEXT_DEPTH,
        "num_attention_heads": TEXT_HEADS, "intermediate_size": 4 * TEXT_WIDTH, "max_position_embeddings": CONTEXT,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    text = TextTower(tokenizer, architecture)
    encoder = Encoder(NaFlexViT(width=WIDTH, depth=DEPTH, num_heads=HEADS, patch_size=PATCH), text, EMBED, [])
    head = Contrastive(loss="softmax")
    head.bind(encoder)
    module = nn.ModuleList([encoder, head]).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    images = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch["images"].items()}
    batch = {**batch, "images": images}

    def step() -> None:
        optimizer.zero_grad()
        computed(head.loss(encoder.features(images), batch, encoder)).terms["loss"].backward()
        optimizer.step()

    return step, sum(p.numel() for p in module.parameters())


def open_clip_step(pixels: torch.Tensor, captions: list[str], tokenizer: Tokenizer, device: str) -> tuple[Step, int]:
    """OpenCLIP's CLIP of the same shape; its training script's loss and optimizer."""
    vision = {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH, "image_size": PIXELS}
    text = {"context_length": CONTEXT, "vocab_size": tokenizer.vocab_size, "width": TEXT_WIDTH}
    text |= {"heads": TEXT_HEADS, "layers": TEXT_DEPTH}
    model = open_clip.CLIP(EMBED, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)).to(device)
    loss = ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # faster than the peer's script, as ours
    pixels = pixels.to(device)

    def step() -> None:
        optimizer.zero_grad()
        ids = torch.zeros(len(captions), CONTEXT, dtype=torch.long)
        for i, row in enumerate(tokenizer.encode(captions)):
            ids[i, : len(row)] = torch.tensor(row)
        image, caption, scale = model(pixels, ids.to(device))
        loss(image, caption, scale).backward()
        optimizer.step()

    return step, sum(p.numel() for p in model.parameters())


def contrastive(batch_size: int, tokenizer: Tokenizer, rounds: int, device: str) -> None:
    """Print samples/s of both."""
    torch.manual_seed(0)
    scenes = Mela(batch_size, PIXELS, "single", languages=["en"], seed=0)
    source = Source("contrastive", scenes, batch_size, max_tokens=(PIXELS // PATCH) ** 2)
    batch: Any = Steps([source], 0, Preprocessing(PATCH), train=False)[0]["contrastive"]
    batch["targets"].pop("label")  # the peer knows no labels
    pixels = torch.stack([torch.from_numpy(scenes[i]["image"]).permute(2, 0, 1) for i in range(batch_size)])
    captions = [scenes[i]["captions"]["en"][0] for i in range(batch_size)]
    ours, our_size = our_contrastive_step(batch, tokenizer, device)
    theirs, their_size = open_clip_step((pixels / 255 - 0.5) / 0.5, captions, tokenizer, device)
    times = paired({"ours": ours, "open_clip": theirs}, rounds, device)
    lengths = [len(row) for row in tokenizer.encode(captions)]
    print(
        f"contrastive step, {batch_size} pairs, {PIXELS} px, {type(tokenizer).__name__}: {len(set(captions))} distinct "
        f"captions of {statistics.mean(lengths):.0f} tokens, the longest {max(lengths)}"
    )
    for name, size in (("ours", our_size), ("open_clip", their_size)):
        print(f"  {name:10} {batch_size / times[name]:8.1f} samples/s   {size / 1e6:.2f} M parameters")
    print(f"  ratio      {times['open_clip'] / times['ours']:8.2f}x")


def few_tokens(batch_size: int, tokenizer: Tokenizer, rounds: int, device: str) -> None:
    """Print our step on all patches of an image, on those of a smaller one, and on half of them."""
    scenes = Mela(batch_size, 14 * PATCH, "single", languages=["en"], seed=0)
    budgets: dict[str, dict[str, Any]] = {"196": {}, "49": {"max_tokens": 49}, "196, half dropped": {"drop": 0.5}}
    steps = {}
    for name, budget in budgets.items():
        torch.manual_seed(0)
        source = Source("contrastive", scenes, batch_size, **{"max_tokens": 196} | budget)
        batch: Any = Steps([source], 0, Preprocessing(PATCH), train=True)[0]["contrastive"]
        steps[name], _ = our_contrastive_step(batch, tokenizer, device)
    times = paired(steps, rounds, device)
    print(f"contrastive step, {batch_size} pairs, patches of an image:")
    for name, seconds in times.items():
        print(f"  {name:18} {1e3 * seconds:7.0f} ms   {times['196'] / seconds:5.2f}x")


def four_tasks(rounds: int, device: str) -> None:
    """Print the quickstart's step beside its tasks alone."""
    from jsonargparse import ArgumentParser

    from indiclip.config_files import find_config, read_config
    from indiclip.loading.data_module import MultiTaskData
    from indiclip.module import MultiTask

    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_class_arguments(MultiTask, "model")
    parser.add_class_arguments(MultiTaskData, "data")
    parser.add_argument("--trainer", type=dict)
    config = parser.parse_object(read_config(find_config("quickstart")))
    parts = parser.instantiate(config)
    module, data = parts.model.to(device), parts.data
    data.preprocessing = module.encoder.backbone.preprocessing
    module.log = module.log_dict = lambda *_, **__: None
    batches = module.transfer_batch_to_device(data.steps(data.train, train=True)[0], torch.device(device), 0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    heads = dict(module.heads)

    def step_of(names: list[str]) -> Step:
        def step() -> None:
            module.heads = nn.ModuleDict({name: heads[name] for name in names})
            optimizer.zero_grad()
            module.training_step(batches, 0).backward()
            optimizer.step()

        return step

    times = paired({"together": step_of(list(heads)), **{name: step_of([name]) for name in heads}}, rounds, device)
    alone = sum(seconds for name, seconds in times.items() if name != "together")
    print("quickstart's step, ms: " + ", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in times.items()))
    print(f"  together / sum of the tasks alone: {times['together'] / alone:.2f}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, open_clip {open_clip.__version__}, {torch.get_num_threads()} threads")
    bpe = FastTokenizer(str(Path(__file__).parent.parent / "conf" / "tokenizers" / "mela.json"), CONTEXT)
    for tokenizer in (bpe, ByteTokenizer(CONTEXT)):
        for batch_size in arguments.batch:
            contrastive(batch_size, tokenizer, arguments.rounds, arguments.device)
    few_tokens(arguments.batch[-1], bpe, arguments.rounds, arguments.device)
    four_tasks(arguments.rounds, arguments.device)


if __name__ == "__main__":
    main()
