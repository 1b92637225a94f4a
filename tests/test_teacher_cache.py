"""Caches of teachers: what training replays is, to the bit, what the teachers were given, whatever happens."""

import json
import os
import re
import shutil
import signal
from importlib.metadata import version

import numpy as np
import pytest
import torch
import yaml
from experiments import config, fit
from helpers import ARCHITECTURE, tiny_encoder
from processes import as_ranks, in_processes
from torchvision.transforms import v2

from indiclip import json_lines
from indiclip.backbone import NaFlexViT
from indiclip.cli import main
from indiclip.datasets.base import fingerprint
from indiclip.datasets.split import Split
from indiclip.encoder import Encoder
from indiclip.evals.models.view_batches import load_teachers
from indiclip.evals.models.view_embedder import ViewEmbedder
from indiclip.generated.mela import Mela
from indiclip.images import UnreadableSample
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.loading.teacher_cache import CachedViews
from indiclip.loading.teacher_options import TeacherCache
from indiclip.loading.teacher_parts import Part, part_file
from indiclip.loading.teacher_record import digest_of
from indiclip.loading.workers import explain
from indiclip.preprocessing import Preprocessing
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer
from indiclip.types import part_of

VIEWS = 3
AUGMENT = [v2.RandomResizedCrop([24, 24], scale=(0.3, 0.8)), v2.RandomHorizontalFlip(), v2.ColorJitter(0.5)]


class Scenes(Mela):
    """Twelve scenes with two captions each; the fifth cannot be read."""

    def __init__(self, seed=0):
        super().__init__(num_scenes=12, size=32, layout="single", languages=["en", "hi"], seed=seed)

    def __getitem__(self, index):
        if index == 4:
            raise UnreadableSample(self.key(index), "torn")
        return super().__getitem__(index)


def source(folder=None, dataset=None, augment=AUGMENT, **options):
    teachers = folder and TeacherCache(str(folder), **options)
    return Source("contrastive", dataset or Scenes(), 4, max_tokens=9, augment=augment, teachers=teachers)


def save(encoder, file):
    state = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    state["heads.contrastive.criterion.logit_scale"] = torch.tensor([3.0])
    torch.save({"encoder": encoder.to_config(), "state_dict": state}, file)
    return str(file)


@pytest.fixture(scope="module")
def encoders():
    """Of two patch sizes and lengths, and neither the student's."""
    torch.manual_seed(1)
    other = NaFlexViT(width=32, depth=1, num_heads=2, patch_size=4)
    return [tiny_encoder(0).eval(), Encoder(other, TextTower(ByteTokenizer(), ARCHITECTURE), 48, (16,)).eval()]


@pytest.fixture(scope="module")
def files(encoders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return [save(encoder, folder / f"{number}.ckpt") for number, encoder in enumerate(encoders)]


def make(folder, files, of=None, part_size=5, **options):
    """A cache in three parts."""
    sources = {"data.train[0]": of or source()}
    job = ViewEmbedder(folder, sources, load_teachers(files, "cpu"), VIEWS, part_size=part_size, **options)
    job.begin()
    job.write(job.missing())
    return job.finish({})


@pytest.fixture(scope="module")
def cache(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "teachers"
    make(folder, files)
    return folder


def steps(of, rank=0, world=1):
    return Steps([of], 7, Preprocessing(8), True, rank, world)


def augmented(dataset, index, seed):
    """A picture through torchvision alone."""
    torch.manual_seed(seed)
    image = torch.from_numpy(Mela.__getitem__(dataset, index)["image"]).permute(2, 0, 1)
    return v2.Compose(AUGMENT)(image)


def unit(x):
    return torch.nn.functional.normalize(x.float(), dim=-1)


def test_training_replays_the_pixels_that_the_teachers_were_given(cache, encoders):
    """Against torchvision's transforms from the stored seeds, and each teacher's own `embed_image`, `embed_text`."""
    dataset, seen = Scenes(), set()
    parts = [Part(part_file(cache, number)) for number in range(3)]
    places = {dataset.key(index): index for index in range(12)}
    for step in range(4):
        batch = steps(source(cache))[step]["contrastive"]
        targets = batch["targets"]
        taught = [targets[name].values.unflatten(0, (4, 2)) for name in ("teacher_image", "teacher_text")]
        assert targets["teacher_scale"].values == pytest.approx(np.exp(3.0))
        for row, key in enumerate(batch["keys"]):
            index = places[key]
            pictures = [augmented(dataset, index, int(seed)) for seed in parts[index // 5]["seeds"][index % 5]]
            patches = batch["images"]["patches_BNP"][row]
            own = [torch.equal(Preprocessing(8).cut(one, (24, 24))["patches"][0], patches) for one in pictures]
            assert sum(own) == 1
            view = own.index(True)
            seen.add((index, view))
            for number, encoder in enumerate(encoders):
                length = encoder.embed_dim
                with torch.no_grad():
                    image_E = encoder.embed_image(pictures[view])[0]
                    text_E = encoder.embed_text(targets["caption"][row])[0]
                for found, expected in zip(taught, (image_E, text_E), strict=True):
                    torch.testing.assert_close(unit(found[row, number, :length]), expected, atol=1e-3, rtol=0)
                    assert not found[row, number, length:].any()
    assert len({view for _, view in seen}) == VIEWS
    assert len({index for index, _ in seen}) == 11


def test_int8_takes_half_the_bytes_and_loses_little(cache, files, tmp_path):
    record = make(tmp_path / "int8", files, dtype="int8")
    wide = json.loads((cache / "teachers.json").read_text())
    lengths = 64 + 48
    assert [one["summary"]["of_them_for_images"] for one in (wide, record)] == [VIEWS * lengths * 2, VIEWS * lengths]
    total = sum(file.stat().st_size for file in (tmp_path / "int8").glob("*.safetensors"))
    assert record["summary"]["bytes_per_sample"] == pytest.approx(total / 12, abs=0.1)
    batches = [steps(source(folder))[0]["contrastive"] for folder in (cache, tmp_path / "int8")]
    first, second = (unit(batch["targets"]["teacher_image"].values) for batch in batches)
    assert 1e-6 < 1 - (first * second).sum(-1).min() < 1e-3
    assert record["summary"]["largest_cosine_loss"] < 1e-3


def test_ranks_micro_batches_and_workers_see_the_same(cache):
    whole = steps(source(cache))[1]["contrastive"]
    names = ("teacher_image", "teacher_text", "teacher_scale")
    for rank in range(2):
        part = steps(source(cache), rank, 2)[1]["contrastive"]
        own = part_of(whole, 2, 4)
        for name in names:
            rows = whole["targets"][name].values.unflatten(0, (4, 2))
            assert torch.equal(part["targets"][name].values.unflatten(0, (2, 2)), rows[rank::2])
            assert torch.equal(own["targets"][name].values.unflatten(0, (2, 2)), rows[2:])
        assert torch.equal(part["images"]["patches_BNP"], whole["images"]["patches_BNP"][rank::2])
    loader = torch.utils.data.DataLoader(steps(source(cache)), batch_size=None, num_workers=1)
    again = [step["contrastive"] for _, step in zip(range(2), loader, strict=False)][1]
    assert all(torch.equal(again["targets"][name].values, whole["targets"][name].values) for name in names)


def test_another_sample_stands_in_with_its_own_teachers(cache, encoders):
    """The fifth scene cannot be read: the sixth comes in its place, with the sixth's embeddings."""
    (lost,) = [json.loads(line) for line in (cache / "quarantine.jsonl").read_text().splitlines()]
    assert (lost["row"], lost["reason"]) == (4, "torn")
    of = steps(source(cache))
    plan = of.plans["contrastive"]
    step, ref = next((s, ref) for s in range(9) for ref in plan.batch(s) if ref.index == 4)
    sample = of.read("contrastive", ref, step)
    assert sample["key"] == Scenes().key(5)
    with torch.no_grad():
        text_E = encoders[0].embed_text(sample["caption"])[0]
    torch.testing.assert_close(unit(sample["teacher_text"][0, :64]), text_E, atol=1e-3, rtol=0)


def test_a_teacher_of_english_teaches_every_language(cache, encoders):
    batch = steps(source(cache, texts="en"))[0]["contrastive"]
    places = {Scenes().key(index): index for index in range(12)}
    assert {*batch["targets"]["language"]} == {"en", "hi"}
    for row, key in enumerate(batch["keys"]):
        (english,) = Mela.__getitem__(Scenes(), places[key])["captions"]["en"]
        with torch.no_grad():
            text_E = encoders[0].embed_text(english)[0]
        found = batch["targets"]["teacher_text"].values[2 * row, :64]
        torch.testing.assert_close(unit(found), text_E, atol=1e-3, rtol=0)


def test_a_part_of_a_dataset_has_a_cache_of_its_own(files, tmp_path):
    def half():
        return Split(Scenes(), "train", fraction=0.5)

    make(tmp_path / "half", files[:1], source(dataset=half()))
    batch = steps(source(tmp_path / "half", half()))[0]["contrastive"]
    assert {*batch["keys"]} <= {half().key(index) for index in range(len(half()))}
    with pytest.raises(ValueError, match=r"is of other samples: data.train\[0\], \d+ samples"):
        steps(source(tmp_path / "half"))[0]


def changed(folder, cache, **entries):
    """A cache with another record over the same parts."""
    folder.mkdir()
    for file in cache.iterdir():
        (folder / file.name).symlink_to(file)
    record = json.loads((cache / "teachers.json").read_text()) | entries
    (folder / "teachers.json").unlink()
    (folder / "teachers.json").write_text(json.dumps(record))
    return folder


class Changed(Scenes):
    """As a list of as many other images would be whose files are numbered alike: some samples are others.

    Those that are compared before training are 0, 3, 7 and 11.
    """

    def __init__(self, *places, image=0, captions=None):
        super().__init__()
        self.places, self.flip, self.words = places, image, captions

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index not in self.places:
            return sample
        return sample | {"image": sample["image"] ^ self.flip, "captions": sample["captions"] | (self.words or {})}


def repainted(*places):
    return Changed(*(places or range(12)), image=1)


def renamed(*places):
    return Changed(*(places or range(12)), captions={"en": ["another"], "hi": ["दूसरा"]})


def test_what_does_not_fit_is_refused(cache, tmp_path):
    """Each in one line that names the option."""

    def refused(words, folder=cache, kind=ValueError, **options):
        with pytest.raises(kind, match=words) as found:
            steps(source(folder, **options))[0]
        assert "teachers" in str(found.value)
        assert "\n" not in str(found.value)

    refused(r"is of other samples: data.train\[0\], 12 samples \(", dataset=Scenes(seed=3))
    other = [v2.RandomResizedCrop([24, 24], scale=(0.4, 0.8)), *AUGMENT[1:]]
    refused(r"another augmentation than the source's: \[0\].scale: '\(0.3, 0.8\)' -> '\(0.4, 0.8\)'", augment=other)
    refused("is not the one that the teachers were given", dataset=repainted())
    refused("is of other captions: .* has '(another|दूसरा)'", dataset=renamed())
    refused("is not complete; the same `indiclip embed` goes on", changed(tmp_path / "part", cache, done=False))
    refused("is no folder; nearest is 'part'; expected", tmp_path / "parts", FileNotFoundError)
    refused("holds no teachers.json; expected", tmp_path, FileNotFoundError)
    of = source(cache)
    views = CachedViews(of.teachers, of.dataset, of.transform, "data.train[0]")
    with pytest.raises(ValueError, match="is of other samples: 'x' is not at its place there"):
        views.seed(3, "x", 0)
    with pytest.raises(ValueError, match="so that 3 views would be the same picture"):
        make(tmp_path / "plain", [], source(augment=[]))


def first_error(dataset, cache, **options):
    """What the first of 20 steps says that does not fit the cache, of a cache that is opened before."""
    of = source(cache, dataset, **options)
    of.open_teachers("data.train[0]")
    read, lost = steps(of), set()
    try:
        for number in range(20):
            lost |= {one.key for one in read[number]["contrastive"]["quarantined"]}
    except ValueError as error:
        return explain(error), lost | {one.key for one in read.unreadable()}
    return None, lost


def test_every_replayed_picture_is_compared(cache):
    """Images under the same keys of which those that are looked at before training agree: it ends where one does not,
    and puts none aside.
    """
    assert fingerprint(repainted(1, 8)) == fingerprint(Scenes())
    line, lost = first_error(repainted(1, 8), cache)
    assert re.search(
        r"data.train\[0\].teachers.folder: .*: the augmented picture of '(.*)', view \d, is not the one .* its CRC-32 "
        r"is [0-9a-f]{8}; expected [0-9a-f]{8}\. .* other images or .* libraries; make it anew .* same_pixels: false",
        line,
    )
    assert re.search("'(.*?)', view", line)[1] in {Scenes().key(1), Scenes().key(8)}
    assert "\n" not in line
    assert lost <= {Scenes().key(4)}  # which cannot be read


def test_a_picture_that_differs_is_said_once_where_it_may(cache):
    with pytest.warns(UserWarning, match="is not the one that the teachers were given") as found:
        assert first_error(repainted(1, 2, 6, 8, 9), cache, same_pixels=False)[0] is None
    assert len(found) == 1


def test_libraries_that_are_others_are_named(cache, tmp_path):
    older = changed(tmp_path / "older", cache, versions={"torchvision": "0.1", "torch": version("torch"), "x": "1"})
    line, _ = first_error(repainted(1, 8), older)
    assert f"other versions of the libraries (torchvision 0.1, here {version('torchvision')}); make" in line


def test_captions_that_the_teachers_were_not_given_are_refused(cache):
    """Before training in the samples that are looked at, later in each; but those that `texts: en` does not read."""
    with pytest.raises(ValueError, match=r"is of other captions: .* has 'another'.* make it anew"):
        first_error(renamed(7), cache)
    line, _ = first_error(renamed(1), cache)
    assert f"{Scenes().key(1)!r} has " in line
    assert first_error(Changed(*range(12), captions={"hi": ["दूसरा"]}), cache, texts="en")[0] is None


def test_the_digest_is_that_of_images_and_captions_too(files, tmp_path):
    """Of one list of keys; a teacher's name is none of it."""
    found = [
        make(tmp_path / name, files[:1], source(dataset=dataset))["digest"]
        for name, dataset in {"as": Scenes(), "image": repainted(6), "captions": renamed(6)}.items()
    ]
    assert len({*found}) == 3
    copy = shutil.copy(files[0], tmp_path / "other name.ckpt")
    assert make(tmp_path / "again", [str(copy)])["digest"] == found[0]


def test_a_killed_command_goes_on_and_other_words_are_refused(files, tmp_path, capsys):
    """SIGKILL while the second part is written; the parts are those of a run that was not killed."""
    tree = config()
    tree["data"]["train"][0]["augment"] = [
        {"class_path": "torchvision.transforms.v2.RandomResizedCrop", "init_args": {"size": [16, 16]}}
    ]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    words = ["embed", "data.train[0]", "--config", str(tmp_path / "x.yaml"), "--views", "2"]
    words += ["--part_size", "5", "--device", "cpu"]
    models = [word for file in files for word in ("--model", file)]

    def killed():
        write = json_lines.write_whole

        def torn(file, data):
            if file.name == "teachers-00001.safetensors":
                file.with_name(f".{file.name}.part").write_bytes(data[:100])
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, data)

        json_lines.write_whole = torn
        return main([*words, *models, "--out", str(tmp_path / "killed")])

    assert in_processes([killed], tmp_path).statuses == [-signal.SIGKILL]
    assert (tmp_path / "killed" / "teachers-00000.safetensors").is_file()
    assert not (tmp_path / "killed" / "teachers-00001.safetensors").exists()
    done = in_processes([lambda: main([*words, *models, "--out", str(tmp_path / "killed")])], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on: 1 of 3 parts are there" in done.stdout
    assert "fp16, " in done.stdout
    assert f"{2 * (64 + 48) * 2:,} for its images" in done.stdout
    done = as_ranks(lambda: main([*words, *models, "--out", str(tmp_path / "whole")]), tmp_path)
    assert done.returncode == 0, done.stderr
    for file in sorted((tmp_path / "whole").glob("teachers*")):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes(), file.name
    assert not list((tmp_path / "killed").glob(".*.part"))
    part = tmp_path / "whole" / "teachers-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-2000])
    assert main([*words, *models, "--out", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr()
    assert re.search(f"{part}: found [\\d,]+ bytes; expected [\\d,]+ bytes; it is made anew", said.err)
    assert "going on: 2 of 3 parts are there" in said.out
    assert part.read_bytes() == (tmp_path / "killed" / part.name).read_bytes()
    assert main([*words, *models, "--out", str(tmp_path / "x.yaml")]) == 2
    assert "x.yaml: a file is in the way; expected a folder" in capsys.readouterr().err
    assert main([*words, *models, "--dtype", "fp32", "--out", str(tmp_path / "whole")]) == 2
    assert "--dtype: found fp32; expected fp16 or int8 with --views" in capsys.readouterr().err
    assert main([*words, "--model", files[1], "--model", files[0], "--out", str(tmp_path / "whole")]) == 2
    assert "holds embeddings of another teacher" in capsys.readouterr().err
    assert main([*words, *models, "--views", "3", "--out", str(tmp_path / "whole")]) == 2
    assert "was begun otherwise: views: 2 -> 3" in capsys.readouterr().err
    assert main([*words, "--model", "timm:vit_tiny_patch16_224", "--out", str(tmp_path / "y")]) == 2
    assert "embeds no text" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_cache(cache, tmp_path, capsys, monkeypatch):
    """Its checkpoints know the digest of the cache."""
    tree = config(trainer__max_steps=2)
    del tree["data"]["val"]
    crop = {"class_path": "torchvision.transforms.v2.RandomResizedCrop", "init_args": {"size": [16, 16]}}
    teachers = {"make": {"models": ["initial"], "views": 2}}
    tree["data"]["overrides"] = [{"task": "contrastive", "augment": [crop], "teachers": teachers}]
    tree["model"]["heads"] += [{"class_path": "heads.distillation.Distillation", "init_args": {"task": "contrastive"}}]
    assert fit(tmp_path, tree) == 0
    out = capsys.readouterr().out
    assert "data.train[0]: teachers initial: 2 views of 12 samples, fp16" in out
    folder = tmp_path / "runs" / "experiment"
    record = json.loads((folder / "teachers" / "teachers.json").read_text())
    other = record | {"views": 1}  # as of a cache with fewer views of the same parts
    (folder / "teachers" / "teachers.json").write_text(json.dumps(other | {"digest": digest_of(other)}))
    tree["trainer"]["max_steps"] = 3
    assert fit(tmp_path, tree, "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")) == 2
    assert f"the run was begun with the cache {record['digest']}" in capsys.readouterr().err
