"""`indiclip bench --model`: every kind of external model in one command, and folders that do not fit together."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import transformers
from export_runs import runs  # noqa: F401
from foreign_models import letter_tokenizer
from safetensors.torch import save_file
from test_bench_faults import write_card
from test_bench_photographs import photographs
from test_external_models import OPEN_CLIP, architecture  # noqa: F401

from indiclip.cli import main
from indiclip.commands import bench_run
from indiclip.evals.models import external_loading

open_clip = pytest.importorskip("open_clip")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_card("mine.yaml")
    return photographs(tmp_path / "photos")


def bench(model, *more):
    words = ["--images", "photos", "--cards", "mine.yaml", "--resamples", "9", "--out", "out", "--device", "cpu"]
    return main(["bench", "--model", model, *words, *more])


def protocols():
    return {score["protocol"] for score in json.loads(Path("out/metrics.json").read_text())["scores"]}


@pytest.mark.parametrize("kind", ["clip", "metaclip_2", "siglip", "siglip2"])
@pytest.mark.parametrize("prefix", ["", "transformers:"])
def test_a_transformers_folder(photos, folders, capsys, prefix, kind):
    assert bench(prefix + folders[kind]) == 0
    assert protocols() == {"zero_shot", "wording", "knn", "linear_probe"}
    assert capsys.readouterr().err.count("indiclip bench:") == 0


def test_open_clip(photos, architecture, capsys):  # noqa: F811
    assert bench(f"open_clip:{architecture}") == 0
    assert "indiclip bench: open_clip:ViT-Mini: no weights were named; they are random" in capsys.readouterr().err
    assert json.loads(Path("out/metrics.json").read_text())["model"] == "open_clip:ViT-Mini (random weights)"
    folder = Path("folder")
    folder.mkdir()
    save_file(open_clip.create_model(architecture).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    for model in ("folder", "open_clip:folder", f"open_clip:{architecture}:folder/open_clip_model.safetensors"):
        assert bench(model) == 0
    assert protocols() == {"zero_shot", "wording", "knn", "linear_probe"}


def test_timm_has_its_probes_only(photos, capsys):
    assert bench("timm:test_vit") == 0
    assert protocols() == {"knn", "linear_probe"}
    timm.models.save_for_hf(timm.create_model("test_vit"), "folder", safe_serialization=True)
    assert bench("folder") == bench("timm:folder", "--protocols", "few_shot") == 0
    assert protocols() == {"knn", "linear_probe", "few_shot"}
    save_file(timm.create_model("test_vit").state_dict(), "weights.safetensors")
    capsys.readouterr()
    assert bench("weights.safetensors") == 2
    assert "or timm:ARCHITECTURE:weights.safetensors" in capsys.readouterr().err
    assert bench("timm:test_vit:weights.safetensors") == 0  # as that advises
    assert bench("timm:test_vit", "--no_probes") == 2
    assert "the model embeds no texts, and no probe was asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "target"),
    [("clip", "open_clip"), *(("portable", target) for target in ("open_clip", "siglip", "siglip2", "timm"))],
)
def test_our_exports(photos, runs, capsys, run, target):  # noqa: F811
    assert main(["export", runs[run], "--to", target, "exported"]) == 0
    assert bench("exported") == 0
    assert ("zero_shot" in protocols()) == (target != "timm")


def edit(file, **changes):
    content = json.loads(Path(file).read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        inner = content
        for name in path:
            inner = inner[name]
        inner[last] = value
    Path(file).write_text(json.dumps(content))


def images_of(size):
    return lambda folder: edit(
        folder / "processor_config.json", image_processor__size=size, image_processor__crop_size=size
    )


def patches_of(size):
    return lambda folder: edit(folder / "processor_config.json", image_processor__patch_size=size)


def larger_tokenizer(folder):
    letter_tokenizer(transformers.Siglip2Tokenizer).save_pretrained(folder)


def other_end(folder):
    edit(folder / "config.json", text_config__eos_token_id=77)


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("clip", images_of({"height": 48, "width": 48}), "image processor: found 48x48 pixels; expected 32x32, "),
        ("siglip", images_of({"height": 48, "width": 48}), "image processor: found 48x48 pixels; expected 32x32, "),
        ("siglip2", patches_of(8), "image processor: found patches of 8 pixels; expected 16, vision_config.patch_size"),
        ("clip", other_end, "tokenizer: found 513 at the end of a text; expected 77, text_config.eos_token_id of its"),
        ("siglip", larger_tokenizer, "tokenizer: found 357 tokens; expected at most"),
    ],
)  # fmt: skip
def test_a_folder_of_two_models_is_a_line_before_anything_is_scored(
    photos, folders, tmp_path, capsys, monkeypatch, kind, change, said
):
    shutil.copytree(folders[kind], "mixed")
    change(tmp_path / "mixed")
    monkeypatch.setattr(bench_run, "run_bench", None)
    assert bench("mixed") == 2
    error = capsys.readouterr().err
    assert said in error
    assert sum(line.startswith("indiclip bench") for line in error.splitlines()) == 1


def test_a_tokenizer_of_another_length_is_warned_of(photos, folders, capsys):
    shutil.copytree(folders["siglip"], "mixed")
    edit("mixed/tokenizer_config.json", model_max_length=9)
    assert bench("mixed") == 0
    assert "its tokenizer is made for texts of 9 tokens, and its model reads 16" in capsys.readouterr().err


def test_preprocessing_that_does_not_fit_is_a_line_of_every_library(photos, capsys, monkeypatch):
    create = external_loading.create_transform
    monkeypatch.setattr(
        external_loading, "create_transform", lambda **config: create(**config | {"input_size": (3, 96, 96)})
    )
    assert bench("timm:vit_tiny_patch16_224") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "its preprocessing or tokenizer does not fit its weights (AssertionError: Input height (96)" in line


def sentence_transformers(folder, *kinds):
    Path(folder).mkdir()
    names = [f"{number}_{kind}" * (kind != "Transformer") for number, kind in enumerate(kinds)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    Path(folder, "modules.json").write_text(json.dumps(modules))


def test_a_sentence_transformers_folder_names_the_model_in_it(photos, folders, capsys):
    sentence_transformers("st", "CLIPModel")
    shutil.copytree(folders["clip"], "st/0_CLIPModel")
    for name in ("st", "transformers:st"):
        assert bench(name) == 2
        assert "st: is a sentence-transformers folder; expected the model in it, " in (said := capsys.readouterr().err)
    assert bench(said.split()[-1]) == bench("st/0_CLIPModel") == 0  # as that advises


def test_a_sentence_transformers_folder_of_text_only(photos, capsys):
    sentence_transformers("st", "Transformer", "Pooling")
    Path("st/config.json").write_text('{"model_type": "bert"}')
    Path("st/1_Pooling").mkdir()
    Path("st/1_Pooling/config.json").write_text('{"word_embedding_dimension": 384}')
    for name in ("st", "transformers:st", "st/1_Pooling"):
        assert bench(name) == 2
        assert "st: is a sentence-transformers model of text only (Transformer, Pooling)" in capsys.readouterr().err
