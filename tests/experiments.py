"""A small experiment's config, and the command that runs it."""

import json
from pathlib import Path

import yaml

from indiclip.training.cli import run

ROOT = Path(__file__).parent.parent
ENCODER = {
    "backbone": {
        "class_path": "indiclip.backbone.NaFlexViT",
        "init_args": {"width": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "max_tokens": 64},
    },
    "text": {
        "tokenizer": {"class_path": "indiclip.tokenizers.ByteTokenizer"},
        "architecture": {
            "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 64,
        },
    },
    "embed_dim": 32,
    "lengths": [16],
}  # fmt: skip


def config(**changes):
    """A two-step experiment; `changes` are dotted keys with `__` for the dot, and their values."""
    mela = {
        "class_path": "indiclip.generated.mela.Mela",
        "init_args": {"num_scenes": 12, "size": 32, "layout": "single"},
    }
    source = {"task": "contrastive", "dataset": mela, "batch_size": 4, "max_tokens": 16}
    tree = {
        "model": {"encoder": ENCODER, "heads": [{"class_path": "heads.contrastive.Contrastive"}]},
        "data": {"train": [source], "val": [source], "steps_per_epoch": 2},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "log_every_n_steps": 1},
    }
    tree = json.loads(json.dumps(tree))
    for key, value in changes.items():
        put(tree, key, value)
    return tree


def put(tree, key, value):
    """Set what stands at a dotted key with `__` for the dot."""
    *path, last = [int(part) if part.isdigit() else part for part in key.split("__")]
    for part in path:
        tree = tree[part]
    tree[last] = value


def fit(folder, tree, *flags):
    """Run the command on a config in this process, into `runs/experiment` of the folder. Returns its exit status."""
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(tree))
    return run(["fit", "--config", str(file), "--runs", str(folder / "runs"), *flags])


def learnt(values):
    """The numbers of a run that another one may have too: none of its speed."""
    return {name: value for name, value in values.items() if name != "seconds" and not name.startswith("throughput/")}
