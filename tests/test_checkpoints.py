"""Checkpoints: whole or not there, whatever is killed, full or torn; and a pickle in one never runs."""

import errno
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from indiclip.training.fault_tolerance import manifest
from indiclip.training.fault_tolerance.checkpoints import DurableCheckpointIO, NotSaved, foreign
from indiclip.training.fault_tolerance.manifest import newest_good, unlisted, what_is_wrong


def content(step, size=1000):
    weights, loops = {"w": torch.full((size,), float(step))}, {"a": [1, (2, None)]}
    return {"pytorch-lightning_version": "2.6.6", "global_step": step, "state_dict": weights, "loops": loops}


def save(folder, step, name=None):
    path = folder / (name or f"{step}.ckpt")
    DurableCheckpointIO().save_checkpoint(content(step), path)
    return path


def test_what_is_saved_is_loaded_and_listed_with_its_hash(tmp_path):
    path = save(tmp_path / "new" / "folder", 7)
    loaded = DurableCheckpointIO().load_checkpoint(path)
    assert loaded["global_step"] == 7
    assert torch.equal(loaded["state_dict"]["w"], content(7)["state_dict"]["w"])
    assert {file.name for file in path.parent.iterdir()} == {"7.ckpt", "manifest.json"}
    (row,) = json.loads((path.parent / "manifest.json").read_text())["files"]
    told = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    saved = row.pop("saved")
    assert row == {"name": "7.ckpt", "sha256": told, "size": path.stat().st_size, "step": 7}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", saved)


class Stop(BaseException):
    """A kill: nothing catches it."""


def killed_before(call_number, folder, step, name, monkeypatch):
    """Save, and be killed before that call of those which touch the disk. Returns whether the save came to its end."""
    calls = []

    def counted(function):
        def call(*args, **options):
            if len(calls) == call_number:
                raise Stop
            calls.append(function)
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, attribute in (
            (os, "fsync"), (Path, "replace"), (Path, "open"), (torch, "save"), (manifest, "sha256"), (json, "dump"),
            (Path, "unlink"), (Path, "mkdir"),
        ):  # fmt: skip
            patch.setattr(owner, attribute, counted(getattr(owner, attribute)))
        try:
            save(folder, step, name)
        except Stop:
            return False
    return True


@pytest.mark.parametrize("name", ["0.ckpt", "1.ckpt"])
def test_a_kill_between_any_two_calls_leaves_a_good_checkpoint(tmp_path, monkeypatch, name):
    """Of a new file and of one that replaces another; the step found is that of the file's content."""
    finished = False
    for call_number in range(100):
        folder = tmp_path / str(call_number)
        save(folder, 0, "0.ckpt")
        finished = killed_before(call_number, folder, 1, name, monkeypatch)
        good, step, passed_over = newest_good(folder)
        assert torch.load(good, weights_only=True)["global_step"] == step
        assert step in ((1,) if finished else (0, 1))
        assert passed_over == []  # nothing torn lies under a checkpoint's name
        save(folder, 2)
        assert not list(folder.glob(".*"))  # the rest of the killed save is gone
        assert newest_good(folder)[:2] == (folder / "2.ckpt", 2)
        if finished:
            break
    assert finished
    assert call_number > 10


def test_any_number_of_kills_at_the_worst_moment_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    """The list names what was about to replace the file, each time another; what is there is listed still."""
    save(tmp_path, 0, "x.ckpt")
    for step in range(1, 8):
        with monkeypatch.context() as patch:
            replace = Path.replace

            def kill(self, target, replace=replace):
                if Path(target).name == "x.ckpt":
                    raise Stop
                return replace(self, target)

            patch.setattr(Path, "replace", kill)
            with pytest.raises(Stop):
                save(tmp_path, step, "x.ckpt")
        assert newest_good(tmp_path) == (tmp_path / "x.ckpt", 0, [])
    save(tmp_path, 8, "x.ckpt")
    assert newest_good(tmp_path) == (tmp_path / "x.ckpt", 8, [])
    assert len(json.loads((tmp_path / "manifest.json").read_text())["files"]) == 1


def test_newest_is_what_was_saved_last_not_the_highest_step(tmp_path):
    """A run that was taken back to an earlier step goes on from there."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    save(tmp_path, 2)
    assert newest_good(tmp_path)[:2] == (tmp_path / "2.ckpt", 2)
    (tmp_path / "2.ckpt").unlink()
    assert newest_good(tmp_path) == (tmp_path / "3.ckpt", 3, [])


def test_torn_and_changed_files_are_passed_over_and_said(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "3.ckpt").write_bytes((tmp_path / "3.ckpt").read_bytes()[:-100])
    damaged = bytearray((tmp_path / "4.ckpt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "4.ckpt").write_bytes(damaged)
    good, step, passed_over = newest_good(tmp_path)
    assert (good, step) == (tmp_path / "2.ckpt", 2)
    size = (tmp_path / "2.ckpt").stat().st_size
    assert passed_over == [
        "4.ckpt: torn: another SHA-256 than was written",
        f"3.ckpt: torn: {size - 100:,} bytes, {size:,} were written",
    ]
    (tmp_path / "last.ckpt").symlink_to("4.ckpt")
    assert what_is_wrong(tmp_path / "last.ckpt") == "torn: another SHA-256 than was written"
    assert what_is_wrong(tmp_path / "2.ckpt") is None


def test_what_is_not_listed_is_not_taken_for_whole(tmp_path):
    assert newest_good(tmp_path / "nowhere") == (None, 0, [])
    torch.save(content(5), tmp_path / "5.ckpt")
    assert newest_good(tmp_path) == (None, 0, [])
    assert unlisted(tmp_path) == ["5.ckpt"]
    assert what_is_wrong(tmp_path / "5.ckpt") is None  # but may be named: it may come from elsewhere
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: not a list of checkpoints; name one by --ckpt_path"):
        newest_good(tmp_path)
    save(tmp_path, 6)
    assert newest_good(tmp_path)[:2] == (tmp_path / "6.ckpt", 6)


def test_a_disk_without_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    match = (
        r"2\.ckpt: not saved: it needs 1,\d{3},\d{3} bytes and the disk has 5,000 left; the last good one is .*1\.ckpt"
    )
    with pytest.raises(NotSaved, match=match) as caught:
        save(tmp_path, 2)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_file_size_limit_keeps_the_last_good_one(tmp_path):
    """The write fails half-way, as on a disk that another process fills."""
    save(tmp_path, 1)
    content = {"global_step": 2, "state_dict": {"w": torch.zeros(100_000)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match=r"2\.ckpt: not saved: File too large; the last good one is"):
            DurableCheckpointIO().save_checkpoint(content, tmp_path / "2.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name for file in tmp_path.iterdir()} == {"1.ckpt", "manifest.json"}
    assert newest_good(tmp_path)[:2] == (tmp_path / "1.ckpt", 1)


def test_a_full_disk_at_the_list_keeps_the_last_good_one(tmp_path, monkeypatch):
    """The checkpoint itself still found room."""
    save(tmp_path, 1)

    flush, flushed = os.fsync, []

    def full(descriptor):
        flushed.append(descriptor)
        if len(flushed) == 2:  # the first is the checkpoint's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotSaved, match=r"2\.ckpt: not saved: No space left on device; the last good one is .*1\.ckpt"):
        save(tmp_path, 2)
    assert {file.name for file in tmp_path.iterdir()} == {"1.ckpt", "manifest.json"}
    assert newest_good(tmp_path)[:2] == (tmp_path / "1.ckpt", 1)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotSaved, match=r"1\.ckpt: not saved: (File exists|Not a directory); there is no earlier one"):
        save(tmp_path / "file", 1)


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(manifest, "sha256", lambda file: "0" * 64)
    with pytest.raises(NotSaved, match=r"2\.ckpt: not saved: the disk gave back other bytes than were written"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert newest_good(tmp_path)[1] == 1


class Pair(NamedTuple):
    first: int
    second: int


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"hyper_parameters": {"data": {"root": Path("x")}}}, "hyper_parameters.data.root is a pathlib"),
        ({"a": [1, {"b": nn.ReLU()}]}, r"a\[1\]\.b is a torch\.nn\.modules\.activation\.ReLU"),
        ({"a": pytest}, "a is a builtins.module"),
        ({"a": defaultdict(int)}, "a is a collections.defaultdict"),
        ({"a": [Pair(1, 2)]}, r"a\[0\] is a test_checkpoints.Pair"),
        ({"a": {Path("x"): 1}}, "a key of a is a pathlib"),
        ({"a": torch.ones(2).as_subclass(Tagged)}, "a is a test_checkpoints.Tagged"),
    ],
)
def test_only_tensors_and_plain_values_are_saved(tmp_path, value, where):
    with pytest.raises(NotSaved, match=rf"x\.ckpt: {where}.*; a checkpoint may hold tensors and plain values only"):
        DurableCheckpointIO().save_checkpoint(value, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []
    assert not list(foreign(content(1)))


def test_everything_that_is_let_through_can_be_read_again(tmp_path):
    ordered = OrderedDict(a=nn.Parameter(torch.ones(2)), b=torch.Size([3]))
    values = [ordered, {1, "2"}, (1.5, 2j, None, True), b"x", torch.float16, torch.device("cpu"), {(1, "a"): 10**30}]
    assert not list(foreign(values))
    DurableCheckpointIO().save_checkpoint(content(1) | {"values": values}, tmp_path / "x.ckpt")
    assert DurableCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")["values"][1:] == values[1:]


def test_a_pickle_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "canary",)

    torch.save({"state_dict": Trap()}, tmp_path / "trap.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.ckpt", "plain.ckpt"):
        for weights_only in (True, False, None):
            with pytest.raises(ValueError, match="not a readable checkpoint"):
                DurableCheckpointIO().load_checkpoint(tmp_path / name, weights_only=weights_only)
    assert not (tmp_path / "canary").exists()
