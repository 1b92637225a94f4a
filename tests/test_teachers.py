"""Caches of teachers that a run makes: by which of its processes, and where."""

import copy
import errno
import json
import os
import re
import shutil
from pathlib import Path

import experiments
import pytest
import yaml
from experiments import config
from processes import as_ranks

from indiclip.generated.mela import Mela
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.overrides import SourceOverride
from indiclip.loading.source import Source
from indiclip.loading.teacher_options import MakeTeachers, TeacherCache
from indiclip.training import teachers
from indiclip.training.cli import run
from indiclip.training.teachers import place_caches

TEACHERS = {"make": {"models": ["initial"], "views": 2}}


def tree(size):
    found = config(trainer__max_steps=2, trainer__devices=2, trainer__strategy="ddp")
    del found["data"]["val"]
    crop = {"class_path": "torchvision.transforms.v2.RandomResizedCrop", "init_args": {"size": [size, size]}}
    found["data"]["overrides"] = [{"task": "contrastive", "augment": [crop], "teachers": TEACHERS}]
    found["model"]["heads"] += [{"class_path": "heads.distillation.Distillation", "init_args": {"task": "contrastive"}}]
    return found


def fit(folder, tree, apart=False):
    """On two ranks, which see the same files or none of each other's."""
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(tree))
    places = [folder / f"node-{rank}" if apart else folder for rank in range(2)]

    def work():
        place = places[int(os.environ["RANK"])]
        place.mkdir(exist_ok=True)
        os.chdir(place)
        return run(["fit", "--config", str(file), "--runs", "runs"])

    done = as_ranks(work, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return places[0] / "runs", done


def made(run_folder):
    return json.loads((run_folder / "teachers" / "teachers.json").read_text())


@pytest.mark.parametrize("apart", [False, True], ids=["one file system", "two"])
def test_no_process_waits_for_a_cache_that_it_cannot_see(apart, tmp_path):
    """Nor takes that of an older run of the same name for its own."""
    runs, _ = fit(tmp_path, tree(24), apart)
    first = made(runs / "experiment")
    runs, done = fit(tmp_path, tree(16), apart)
    second = made(runs / "experiment-2")
    assert first["digest"] != second["digest"]
    assert "teachers initial: 2 views of 12 samples" in done.stdout


def test_what_is_soon_checked_comes_before_a_cache_is_made(tmp_path, capsys):
    """A cache may take hours."""
    wrong = tree(16)
    wrong["trainer"]["devices"] = 1
    wrong["data"]["val"] = [wrong["data"]["train"][0] | {"task": "contrastve"}]
    assert experiments.fit(tmp_path, wrong) == 2
    said = capsys.readouterr()
    assert "data.val[0].task: no head reads 'contrastve'; nearest is 'contrastive'" in said.err
    assert "teachers: initial embed" not in said.out


def test_a_head_without_teachers_is_told_before_a_cache_is_made(tmp_path, capsys):
    """The cache is another task's."""
    wrong = tree(16)
    wrong["trainer"] |= {"devices": 1, "strategy": "auto"}
    wrong["data"]["overrides"][0]["task"] = "other"
    wrong["data"]["train"].append(wrong["data"]["train"][0] | {"task": "other"})
    head = {"class_path": "heads.contrastive.Contrastive", "init_args": {"task": "other", "name": "other"}}
    wrong["model"]["heads"].append(head)
    assert experiments.fit(tmp_path, wrong) == 2
    said = capsys.readouterr()
    expected = "data.overrides with `task: contrastive` and `teachers`, or .* runs beside, heads.distillation.teacher"
    assert re.search(rf"data.train\[0\].teachers: found none, and heads.distillation .* {expected}", said.err)
    assert "teachers: initial embed" not in said.out


def test_a_damaged_cache_of_a_run_is_made_anew(tmp_path, capsys):
    """Where the page says in which folder, a second run finds that of the first."""
    found = tree(16)
    found["trainer"] |= {"devices": 1, "strategy": "auto", "max_steps": 1}
    found["data"]["overrides"][0]["teachers"] = {"make": TEACHERS["make"] | {"folder": str(tmp_path / "cache")}}
    assert experiments.fit(tmp_path, found) == 0
    part = tmp_path / "cache" / "teachers-00000.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-100])
    with pytest.warns(UserWarning, match=f"{part}: found .* bytes; expected .* bytes; it is made anew"):
        assert experiments.fit(tmp_path, found) == 0
    assert part.read_bytes() == whole
    assert not (tmp_path / "runs" / "experiment-2" / "teachers").exists()
    capsys.readouterr()
    assert experiments.fit(tmp_path, found) == 0
    assert "teachers: initial embed" not in capsys.readouterr().out


def test_each_cache_of_a_run_has_a_folder_of_its_own(tmp_path):
    """One for both sources of a task, by an override, and those of a run that goes on are found again."""
    for begun in (None, tmp_path):
        makes = [TeacherCache(make=MakeTeachers(["runs/larger"])) for _ in range(2)]
        sources = [Source(task, Mela(num_scenes=4), 4) for task in ("a", "a", "b")]
        overrides = [SourceOverride(task, teachers=cache) for task, cache in zip("ab", makes, strict=True)]
        data = MultiTaskData([*sources, Source("c", Mela(num_scenes=4), 4)], overrides=overrides)
        place_caches(data, tmp_path, begun)
        folders = [source.teachers and source.teachers.folder for source in data.train]
        assert folders == [str(tmp_path / name) for name in ("teachers", "teachers", "teachers-2")] + [None]


def test_a_cache_that_is_gone_is_made_in_the_branchs_own_folder(tmp_path):
    """Neither through a link to where it was, nor of an encoder that is not kept, wherever its folder is."""

    def place(models, begun, folder=None):
        cache = TeacherCache(make=MakeTeachers(models, folder=folder))
        place_caches(MultiTaskData([Source("a", Mela(num_scenes=4), 4, teachers=cache)]), tmp_path, begun)
        return Path(cache.folder)

    link = tmp_path / "teachers"
    (tmp_path / "stem" / "teachers").mkdir(parents=True)  # without the record of a whole one
    (tmp_path / "stem" / "config.yaml").touch()
    (tmp_path / "scratch").mkdir()
    for stem in ("gone", "stem/teachers"):
        link.symlink_to(stem)
        assert place(["runs/larger"], tmp_path) == link
        assert not link.is_symlink()
    link.symlink_to("scratch")  # as a user wants it
    assert place(["runs/larger"], tmp_path) == link
    assert link.readlink() == Path("scratch")
    link.unlink()
    link.symlink_to("gone")
    for folder, missing in ((None, "gone"), (str(tmp_path / "elsewhere"), "elsewhere")):
        with pytest.raises(ValueError, match=f"{tmp_path / missing}: holds no whole cache of teachers, and initial"):
            place(["runs/larger", "initial"], tmp_path, folder)


def test_where_no_link_can_be_made_the_user_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(teachers, "_is_done", lambda folder: True)
    cache = TeacherCache(make=MakeTeachers(["runs/larger"]))
    data = MultiTaskData([Source("a", Mela(num_scenes=4), 4, teachers=cache)])
    with pytest.warns(UserWarning, match="branch/teachers: no link to .*stem/teachers, .* Operation not permitted"):
        place_caches(data, tmp_path / "branch", tmp_path / "stem")


def test_a_branch_under_another_name_has_the_cache_of_its_run(tmp_path, capsys):
    """The teacher was the initial encoder, which began with weights that the branch does not read again."""
    found = tree(16)
    found["trainer"] |= {"devices": 1, "strategy": "auto", "max_steps": 1}
    found["data"]["overrides"][0]["teachers"] = TEACHERS
    first = copy.deepcopy(found)
    del first["data"]["overrides"], first["model"]["heads"][1:]
    assert experiments.fit(tmp_path, first, "--name", "pretrained") == 0
    found["model"]["encoder"]["init_from"] = [{"weights": str(tmp_path / "runs" / "pretrained")}]
    assert experiments.fit(tmp_path, found, "--name", "stem") == 0
    last = str(tmp_path / "runs" / "stem" / "checkpoints" / "last.ckpt")
    flags = ["--name", "branch", "--ckpt_path", last, "--trainer.max_steps", "2"]
    capsys.readouterr()
    assert experiments.fit(tmp_path, found, *flags) == 0, capsys.readouterr().err
    assert "teachers: initial embed" not in capsys.readouterr().out
    assert (tmp_path / "runs" / "branch" / "teachers").resolve() == tmp_path / "runs" / "stem" / "teachers"
    (tmp_path / "runs").rename(tmp_path / "moved")
    flags = ["--runs", str(tmp_path / "moved"), "--name", "branch", "--ckpt_path", "last", "--trainer.max_steps", "3"]
    assert experiments.fit(tmp_path, found, *flags) == 0, capsys.readouterr().err
    assert "teachers: initial embed" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "moved" / "stem" / "teachers")
    assert experiments.fit(tmp_path, found, *flags[:-1], "4") == 2
    stem = tmp_path / "moved" / "stem" / "teachers"
    assert f"{stem}: holds no whole cache of teachers, and initial in teachers.make" in capsys.readouterr().err
