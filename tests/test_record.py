"""The record of a run: its history, and what it says of quarantined samples."""

import json
import subprocess
import sys

import lightning as L
from helpers import tiny_encoder

from heads.contrastive import Contrastive
from indiclip import json_lines
from indiclip.datasets.base import SampleDataset
from indiclip.generated.mela import Mela
from indiclip.images import UnreadableSample
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source
from indiclip.module import MultiTask
from indiclip.training.callbacks import TaskGradients
from indiclip.training.fault_tolerance.step_sync import StepSync
from indiclip.training.record import RunRecord, read_history


class SomeBroken(SampleDataset):
    """Every fourth sample is unreadable."""

    def __len__(self):
        return 16

    def key(self, index):
        return f"shard/{index:04}<b>"

    def __getitem__(self, index):
        if index % 4 == 0:
            raise UnreadableSample(f"shard/{index:04}<b>", "truncated JPEG")
        return Mela(16, 32, "single")[index]


def test_a_run_with_corrupt_images_goes_on_counts_and_lists_them(tmp_path):
    source = Source("contrastive", SomeBroken(), 4, max_tokens=16)
    module = MultiTask(tiny_encoder(), [Contrastive()], warmup_steps=1)
    logger = L.pytorch.loggers.TensorBoardLogger(str(tmp_path), name="run", version="")
    trainer = L.Trainer(
        accelerator="cpu", max_steps=8, logger=logger, log_every_n_steps=2,
        callbacks=[StepSync(), RunRecord(pictures=2)], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    data = MultiTaskData([source], [source], num_workers=1, steps_per_epoch=4, patch_size=8)
    trainer.fit(module, datamodule=data)
    folder = tmp_path / "run"
    rows = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert json.loads((folder / "metrics.json").read_text())["quarantined"] == len(rows)
    assert len(rows) == 4  # once each, though two passes and two validations met them
    assert {row["key"] for row in rows} == {f"shard/{index:04}<b>" for index in (0, 4, 8, 12)}
    report = (folder / "report.html").read_text()
    assert f"{len(rows):,} unreadable samples are in quarantine" in report
    assert "shard/0004&lt;b&gt;" in report
    assert "shard/0004<b>" not in report
    history = read_history(folder)
    assert [row["step"] for row in history if "train/loss" in row] == [2, 4, 6, 8]
    assert [row["step"] for row in history if "val/contrastive/image_to_text_r1" in row] == [4, 8]


def test_a_torn_line_is_left_out_and_swallows_no_other(tmp_path):
    file = tmp_path / "history.jsonl"
    json_lines.append(file, [{"step": 1}, {"step": 2, "key": "a\u2028b"}])
    with file.open("a") as opened:
        opened.write('{"step": 3, "sec')  # a kill
    assert json_lines.read(file) == [{"step": 1}, {"step": 2, "key": "a\u2028b"}]
    json_lines.append(file, [{"step": 3}])
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2, 3]
    json_lines.rewrite(file, [{"step": 1}])
    assert file.read_text() == '{"step": 1}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_rows_are_added_whole_or_not_at_all(tmp_path):
    code = (
        "import resource, signal, sys; from pathlib import Path; from indiclip import json_lines\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30, 30))\n"
        "json_lines.append(Path(sys.argv[1]), [{'step': 1}])\n"
        "json_lines.append(Path(sys.argv[1]), [{'step': 2, 'more': 'x' * 40}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True)
    assert f"File too large: '{tmp_path / 'a'}'" in done.stderr
    assert (tmp_path / "a").read_text() == '{"step": 1}\n'


def test_history_has_each_step_once_and_task_gradients_where_measured(tmp_path):
    """Rows at every second step, gradients at every third."""
    source = Source("contrastive", Mela(16, 32, "single"), 4, max_tokens=16)
    logger = L.pytorch.loggers.TensorBoardLogger(str(tmp_path), name="run", version="")
    trainer = L.Trainer(
        accelerator="cpu", max_steps=6, logger=logger, log_every_n_steps=2,
        callbacks=[RunRecord(pictures=1), TaskGradients(every_n_steps=3)], enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
    )  # fmt: skip
    data = MultiTaskData([source], [], steps_per_epoch=6, patch_size=8)
    trainer.fit(MultiTask(tiny_encoder(), [Contrastive()], warmup_steps=1), datamodule=data)
    history = read_history(tmp_path / "run")
    assert [row["step"] for row in history if "train/loss" in row] == [2, 4, 6]
    assert [row["step"] for row in history if "train/contrastive/backbone_grad_norm" in row] == [0, 3]
