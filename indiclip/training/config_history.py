"""What a run was configured with: `config.yaml` is the newest config that made a step, `config-<step>.yaml` are those
before, each by the last step that it made; and what a run that goes on may change.

The rule. What makes up a training step (data and the samples that its files hold, seed, encoder, heads)
stays, or `--override` says that it may change. The optimizer's values, which take effect at once, and how long, how
fast and where a run trains may change. Every change is listed at the start.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from indiclip import __version__, json_lines
from indiclip.config_files import read_config
from indiclip.datasets.base import fingerprint
from indiclip.loading.source import keyed
from indiclip.masking import mask
from indiclip.names import differences
from indiclip.training.fault_tolerance.ranks import folder_of
from indiclip.training.portable_config import PortableConfig

_RULE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
_DEFAULT_OPTIMIZER = {"class_path": "torch.optim.AdamW"}
_OVERRIDE = "--override true trains on with the new ones"
_OTHER_HEADS = "a run goes on with its own heads; a new one may begin with its encoder (model.encoder.init_from)"
_FOUND = "train_samples"  # in a checkpoint; what heads read beside is there too
_HEADER = f"# indiclip=={__version__}\n"


class ConfigHistory(SaveConfigCallback):
    """Saves the config after the first step that it made, and in checkpoints what it found to train on.

    Args:
        parser: Of the command.
        config: As it was parsed.
        portable: The config for the run's folder.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, portable: PortableConfig) -> None:
        super().__init__(parser, config)
        self.portable = portable
        self._began: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = folder_of(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.portable.copy_files()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_FOUND] = _found(trainer, pl_module)
        if self._began is not None and trainer.global_step > self._began:
            self._keep(trainer)  # a run that is stopped in its first step has not come to `on_train_batch_end`

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the samples, and weights that heads read, which may be others under the same config.

        Raises:
            ValueError: They are not those of the checkpoint's run, and `override` is not set.
        """
        now = _found(trainer, pl_module)
        of_heads = {name: kept for name, kept in now.items() if name.startswith("heads.")}  # which older ones lack
        lines = [line for _, line in differences(of_heads | checkpoint.get(_FOUND, now), now)]
        if lines and not self.config["override"]:
            raise ValueError(f"--ckpt_path: its run read other data: {'; '.join(lines)}; {_OVERRIDE}")
        if lines and trainer.is_global_zero:
            print("changed since the checkpoint:", *lines, sep="\n  ")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._keep(trainer)

    def _keep(self, trainer: Trainer) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        file, before = self._folder / "config.yaml", self._folder / f"config-{self._began}.yaml"
        saved = (_HEADER + yaml.safe_dump(self.portable.tree, sort_keys=False, allow_unicode=True)).encode()
        if file.is_file() and self._began and not before.exists():  # else it made no step that counts
            kept = file.read_bytes()
            if kept == saved:
                return
            json_lines.write_whole(before, kept)  # a copy, so that at a kill or on a full disk `file` is there
        json_lines.write_whole(file, saved)


def plain(parser: LightningArgumentParser, config: Any) -> Any:
    """The config as mappings, lists and values, without what is of one start only."""
    kept = config.clone()
    for key in _RULE["of_this_start"]:
        if key in kept:
            kept[key] = parser.get_default(key)
    return yaml.safe_load(parser.dump(kept, skip_none=False, skip_validation=True))  # parsed a moment ago


def check_changes(parser: LightningArgumentParser, config: Any) -> list[str]:
    """Compare the config of a run that goes on with that of the checkpoint's run.

    Returns:
        A line for each value that has changed; none where the checkpoint lies in no run's folder.

    Raises:
        ValueError: A value that makes up a training step has changed, and `override` is not set.
    """
    folder = Path(config["ckpt_path"]).resolve().parent.parent
    file = folder / "config.yaml"
    if not file.is_file():
        return []
    try:
        was = parser.parse_object(read_config(file))
    except Exception as error:
        raise ValueError(f"{file}: not a config of this version, so nothing can be compared: {error}") from error
    # Both as that run's folder would hold them, so that another way to write is no change.
    old, new = (PortableConfig(plain(parser, tree), None, folder).tree for tree in (was, config))
    before, now = ((tree["model"]["optimizer"] or _DEFAULT_OPTIMIZER)["class_path"] for tree in (old, new))
    if before != now:
        raise ValueError(f"model.optimizer: {now} cannot go on from the moments of {before}")
    changes = [(key, line) for key, line in differences(old, new) if not _is_under(key, _RULE["of_this_start"])]
    lines = [mask(line) for _, line in changes]
    refused = [key for key, _ in changes if _is_under(key, _RULE["step"]) and not _takes_effect(key)]
    if refused and not config["override"]:
        heads = [[head["class_path"] for head in tree["model"]["heads"]] for tree in (old, new)]
        advice = _OVERRIDE if heads[0] == heads[1] else _OTHER_HEADS
        raise ValueError(
            f"--ckpt_path: {file} has other values of what makes up a training step ({', '.join(refused[:3])}"
            f"{', ...' if len(refused) > 3 else ''}): {'; '.join(lines)}; {advice}"
        )
    return lines


def _found(trainer: Trainer, module: Any) -> dict[str, dict[str, int]]:
    """The samples that each source trains on, and what heads read beside them, see `fingerprint` of both."""
    sources = keyed("data.train", trainer.datamodule.train)  # type: ignore[attr-defined]
    found = {name: fingerprint(source.dataset) for name, source in sources.items()}
    return found | {f"heads.{head.name}": kept for head in module.each_head() if (kept := head.fingerprint())}


def _takes_effect(key: str) -> bool:
    """At once, in a list at any place of it."""
    return _is_under(key, _RULE["not_of_step"]) or _is_under(re.sub(r"\[\d+\]", "", key), _RULE["not_of_step"])


def _is_under(key: str, paths: Iterable[str]) -> bool:
    return any(key == path or key.startswith((f"{path}.", f"{path}[")) for path in paths)
