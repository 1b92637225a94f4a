"""Checkpoints in folders: whole or not there at a kill, safe to read, and one file on demand."""

import os
import pickle
import shutil
import signal
import subprocess

import pytest
import torch
from test_sharding import fitted, largest_difference, sharded, ten_steps, weights

import indiclip
from indiclip.cli import main
from indiclip.pretrained.sharded import read_sharded
from indiclip.training.fault_tolerance.manifest import newest_good, what_is_wrong

pytestmark = pytest.mark.slow
CHECKPOINTS = "indiclip.training.fault_tolerance.checkpoints.Checkpoints"


def twelve_steps(kill=None):
    """A checkpoint after every third."""
    tree = ten_steps(sharded(1, 2))
    tree["data"]["val"] = []
    tree["trainer"] |= {"max_steps": 12}
    tree["trainer"]["callbacks"] = [{"class_path": CHECKPOINTS, "init_args": {"every_n_train_steps": 3}}]
    if kill:
        tree["trainer"]["callbacks"].append({"class_path": "trouble.Kill", "init_args": kill})
    return tree


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that nobody killed."""
    done, folder = fitted(tmp_path_factory.mktemp("whole"), twelve_steps(), 2)
    assert done.returncode == 0, done.stderr
    return folder


def test_three_kills_lose_nothing(run, tmp_path):
    at = tmp_path / "runs" / "experiment" / "checkpoints"
    content = {"last.ckpt", "manifest.json"}

    def killed(rank, **kill):
        done, _ = fitted(tmp_path, twelve_steps(kill | {"rank": rank}), 2, "--ckpt_path", "last")
        assert done.statuses[rank] == -signal.SIGKILL, done.stderr
        assert done.statuses[1 - rank] not in (0, -signal.SIGKILL)
        assert all(what_is_wrong(file) is None for file in at.glob("*.ckpt"))
        assert (at / "last.ckpt" / "meta.pt").is_file()
        return done.stdout

    # In the middle of writing the second checkpoint, on the rank that does not list it.
    killed(1, step=5, function="write", call=3)
    assert {file.name for file in at.iterdir()} == {*content, "3.ckpt", ".6.ckpt.part"}
    # All ranks have written it, and it is listed, but not in its place.
    assert "3.ckpt: step 3, saved" in killed(0, step=5, function="put")
    assert {file.name for file in at.iterdir()} == {*content, "3.ckpt", ".6.ckpt.part"}
    assert "6.ckpt" in (at / "manifest.json").read_text()
    # It is in its place; the one before is to be removed.
    assert "3.ckpt: step 3, saved" in killed(0, step=5, function="remove", call=2)
    assert {file.name for file in at.iterdir()} == {*content, "3.ckpt", "6.ckpt"}

    done, folder = fitted(tmp_path, twelve_steps(), 2, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    assert "6.ckpt: step 6, saved" in done.stdout
    assert largest_difference(weights(run), weights(folder)) == 0
    assert newest_good(at)[0] == at / "12.ckpt"
    assert not list(at.glob(".*.part"))


def test_a_folder_is_proven_by_every_file_in_it(run, tmp_path):
    """Also by a tool that is not ours, and whatever is cut, changed or gone."""
    folder = shutil.copytree(run / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    whole = folder / "12.ckpt"
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    checked = subprocess.run(command, cwd=whole, capture_output=True, text=True)
    assert checked.returncode == 0
    names = {line.split(":")[0] for line in checked.stdout.splitlines()}
    assert names == {"__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt"}
    assert what_is_wrong(whole) is None
    for name in sorted(names):
        content = (whole / name).read_bytes()
        for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), None):
            (whole / name).unlink() if damaged is None else (whole / name).write_bytes(damaged)
            assert what_is_wrong(whole).startswith("torn: ")
            assert newest_good(folder)[0] != whole
        (whole / name).write_bytes(content)
    assert newest_good(folder)[0] == whole


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("what", ["code", "bytes", "path", "class"])
def test_a_folder_that_would_run_code_is_refused(what, run, tmp_path, monkeypatch):
    """torch unpickles `.metadata`, and entries of it that are no tensors; it opens whatever file they name."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(run / "checkpoints" / "12.ckpt", tmp_path / "x.ckpt")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    if what == "code":
        metadata.planner_data = Evil()
    elif what == "class":
        metadata.planner_data = subprocess.Popen
    elif what == "bytes":
        metadata.state_dict_metadata[name] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    else:
        place = next(iter(metadata.storage_data.values()))
        place.relative_path = "../" + place.relative_path
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="reading that can run code|outside of the folder") as caught:
        indiclip.load(folder)
    assert "x.ckpt/.metadata" in str(caught.value)
    assert not (tmp_path / "evil").exists()


def test_what_is_missing_or_cut_is_one_line(run, tmp_path):
    for name in ("__1_0.distcp", ".metadata", "meta.pt"):
        folder = shutil.copytree(run / "checkpoints" / "12.ckpt", tmp_path / f"{name}.ckpt")
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
        with pytest.raises(ValueError, match="^[^\n]*$") as caught:
            indiclip.load(folder)
        assert str(folder) in str(caught.value)


def test_the_encoder_is_read_from_run_folder_and_checkpoint(run):
    loaded = [indiclip.load(path) for path in (run, run / "checkpoints" / "last.ckpt")]
    saved = read_sharded(run / "checkpoints" / "12.ckpt")["state_dict"]
    for encoder in loaded:
        assert "step 12" in encoder.initialised[0]
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, saved[f"encoder.{name}"])


def test_one_command_makes_a_file_from_which_one_process_goes_on(run, tmp_path, capsys):
    out = tmp_path / "whole.ckpt"
    assert main(["export", str(run), "--to", "checkpoint", str(out)]) == 0
    assert f"{out}: {run / 'checkpoints' / '12.ckpt'}, step 12, in one file" in capsys.readouterr().out
    made, expected = torch.load(out, weights_only=True), read_sharded(run / "checkpoints" / "12.ckpt")
    assert made.keys() == expected.keys()
    for name, tensor in made["state_dict"].items():
        assert torch.equal(tensor, expected["state_dict"][name])
    assert main(["export", str(run), "--to", "checkpoint", str(out)]) == 2
    assert main(["export", str(out), "--to", "checkpoint", str(tmp_path / "again.ckpt")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    ends = {}
    for name, path in {"file": out, "folder": run / "checkpoints" / "12.ckpt"}.items():
        tree = twelve_steps()
        tree["trainer"] |= {"max_steps": 14, "strategy": "auto"}
        words = ["--ckpt_path", str(path), "--name", name, "--override", "true"]
        done, folder = fitted(tmp_path, tree, 1, *words)
        assert done.returncode == 0, done.stderr
        ends[name] = weights(folder.parent / name)
    assert largest_difference(*ends.values()) == 0


def test_a_failed_save_ends_all_ranks_and_keeps_the_one_before(tmp_path):
    """The disk gives back other bytes on the second rank, when it saves for the second time."""
    tree = twelve_steps()
    tree["trainer"]["callbacks"].append({"class_path": "trouble.BadDisk", "init_args": {"step": 5, "rank": 1}})
    done, folder = fitted(tmp_path, tree, 2)
    assert done.statuses == [1, 0]
    at = folder / "checkpoints"
    lines = [line for line in done.stderr.splitlines() if line.startswith("indiclip: ")]
    assert len(lines) == 1
    assert f"{at / '6.ckpt'}: not saved: the disk gave back other bytes" in lines[0]
    assert f"the last good one is {at / '3.ckpt'}" in lines[0]
    assert (at / "last.ckpt").resolve() == at / "3.ckpt"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_under_one_rank_ends_all_in_one_line(rank, tmp_path):
    """Half-way through that rank's file of the second checkpoint; nothing of it stays where there is no room."""
    tree = twelve_steps()
    tree["trainer"]["callbacks"].append({"class_path": "trouble.FullDisk", "init_args": {"step": 4, "rank": rank}})
    done, folder = fitted(tmp_path, tree, 2)
    assert done.statuses == [1, 0], done.stderr  # see AgreedStop
    at = folder / "checkpoints"
    lines = [line for line in done.stderr.splitlines() if line.startswith("indiclip: ")]
    assert lines == [f"indiclip: {at / '6.ckpt'}: not saved: File too large; the last good one is {at / '3.ckpt'}"]
    assert "Traceback" not in done.stderr
    assert {file.name for file in at.iterdir()} == {"3.ckpt", "last.ckpt", "manifest.json"}
    assert newest_good(at)[:2] == (at / "3.ckpt", 3)
