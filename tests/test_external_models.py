"""Other people's models: the embeddings of their libraries' documented use, from local files that are not unpickled."""

import io
import json
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from foreign_models import TOWER, letter_tokenizer, save
from helpers import noise
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from indiclip.evals.models.digests import crc32_of_token_ids
from indiclip.evals.models.embedder import TEXT_CHUNK, load_embedder
from indiclip.images import EncodedImage, to_rgb
from indiclip.pretrained.model_names import library_of

open_clip = pytest.importorskip("open_clip")
TEXTS = ["a photo of a kite", "मसाला डोसा", "a photo of a kite", "", "x" * 400]
EXACT = {"atol": 1e-6, "rtol": 0}


OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def architecture(tmp_path_factory):
    """A tiny one among OpenCLIP's."""
    file = tmp_path_factory.mktemp("open_clip") / "ViT-Mini.json"
    file.write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(file)
    return "ViT-Mini"


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def some_files():
    """Bytes of pictures of every kind."""
    photo, exif = Image.fromarray(noise(60, 90)), Image.Exif()
    exif[0x0112] = 6
    return [
        encoded(photo, "JPEG", quality=90),
        encoded(photo, "JPEG", exif=exif),
        encoded(photo, exif=exif),
        encoded(photo.convert("L"), "JPEG"),
        encoded(Image.fromarray(np.dstack([noise(31, 17), noise(31, 17, 1)[..., :1]]))),
        encoded(Image.fromarray(np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30))),
        encoded(Image.fromarray(noise(1, 40))),
        encoded(Image.fromarray(noise(40, 1))),
        encoded(Image.fromarray(noise(3, 3))),
    ]


def as_users_open(data):
    return to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


def embed(embedder, images, view="native"):
    (view,) = embedder.views([view])
    return embedder.embed_images(embedder.collate([embedder.prepare(image, view) for image in images]))


def check(embedder, images_BE, texts_BE=None):
    """The embeddings of `some_files` and TEXTS are these."""
    found = embed(embedder, [EncodedImage(data, "k") for data in some_files()])
    torch.testing.assert_close(found, F.normalize(images_BE, dim=-1), **EXACT)
    assert embedder.lengths == [images_BE.shape[1]]
    distances = torch.cdist(found, found) + torch.eye(len(found))
    assert distances.min() > 1e-3  # so equality says something
    if texts_BE is not None:
        assert embedder.embeds_text
        texts = embedder.embed_texts(TEXTS)
        torch.testing.assert_close(texts, F.normalize(texts_BE, dim=-1), **EXACT)
        assert embedder.embed_texts([]).shape == (0, images_BE.shape[1])


@pytest.mark.parametrize("kind", ["clip", "metaclip_2", "siglip", "siglip2"])
@torch.no_grad()
def test_transformers_embeddings_are_those_of_its_documented_use(folders, kind):
    model = transformers.AutoModel.from_pretrained(folders[kind]).eval()
    processor = transformers.AutoProcessor.from_pretrained(folders[kind])
    images = [as_users_open(data) for data in some_files()]
    pixels = processor(images=images, return_tensors="pt")
    # https://huggingface.co/docs/transformers/model_doc/siglip and .../clip
    padding = {"padding": "max_length", "max_length": 16} if "siglip" in kind else {"padding": True}
    tokens = processor(text=TEXTS, truncation=True, return_tensors="pt", **padding)
    expected = model.get_image_features(**pixels), model.get_text_features(**tokens)
    check(load_embedder(folders[kind]), *(features.pooler_output for features in expected))


@pytest.mark.parametrize("library", ["open_clip", "clip", "siglip2"])
def test_an_edited_tokenizer_is_told_from_the_original(library, folders, architecture, monkeypatch):
    """By what `embed` records of a model: the ids of a text in many scripts."""
    name = f"open_clip:{architecture}" if library == "open_clip" else folders[library]
    model, again = load_embedder(name), load_embedder(name)
    assert crc32_of_token_ids(model) == crc32_of_token_ids(again)
    where = (again._tokenizer, "context_length") if library == "open_clip" else (again, "_context_length")
    monkeypatch.setattr(*where, 6)
    assert again.tokenize(["kite"])["input_ids"].shape == (1, 6)
    assert crc32_of_token_ids(model) != crc32_of_token_ids(again)


@torch.no_grad()
def test_siglip2_has_views_of_any_number_of_patches(folders):
    embedder, images = (
        load_embedder(folders["siglip2"]),
        [Image.fromarray(noise(60, 90)), Image.fromarray(noise(90, 20))],
    )
    processor = transformers.AutoProcessor.from_pretrained(folders["siglip2"])
    pixels = processor(images=images, max_num_patches=30, return_tensors="pt")
    expected = transformers.AutoModel.from_pretrained(folders["siglip2"]).eval().get_image_features(**pixels)
    found = embed(embedder, [np.asarray(image) for image in images], "30")
    torch.testing.assert_close(found, F.normalize(expected.pooler_output, dim=-1), **EXACT)
    with pytest.raises(ValueError, match="has no view '30-square'; expected native, or a number of patches"):
        embedder.views(["30-square"])
    with pytest.raises(ValueError, match="has no view '30'; expected native, its own preprocessing"):
        load_embedder(folders["siglip"]).views(["native", "30"])


@torch.no_grad()
def test_siglip2_of_one_size_reads_lower_case_as_it_was_trained(tmp_path):
    # As google/siglip2-base-patch16-224: SigLIP's model type and Gemma's tokenizer.
    tokenizer = letter_tokenizer(transformers.GemmaTokenizer)
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config=TOWER | {"image_size": 32, "patch_size": 8})
    images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    folder = save(tmp_path, config, transformers.SiglipProcessor(images, tokenizer))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    # https://huggingface.co/docs/transformers/model_doc/siglip2, "Notes"
    tokens = processor(text="taj mahal", padding="max_length", max_length=16, return_tensors="pt")
    expected = transformers.AutoModel.from_pretrained(folder).eval().get_text_features(**tokens).pooler_output
    found = load_embedder(folder).embed_texts(["Taj Mahal"])
    torch.testing.assert_close(found, F.normalize(expected, dim=-1), **EXACT)


def test_weights_in_half_precision_are_computed_with_in_single(folders, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(folders["clip"], folder)
    transformers.AutoModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    found = embed(load_embedder(str(folder)), [noise(40, 40)])
    torch.testing.assert_close(found, embed(load_embedder(folders["clip"]), [noise(40, 40)]), atol=1e-3, rtol=0)


def remove(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("visual_projection.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def of_type(model_type):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))

    return change


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (
            remove("tokenizer.json"),
            FileNotFoundError,
            "found no tokenizer; expected tokenizer.json, or vocab.json",
        ),
        (remove("processor_config.json"), FileNotFoundError, "found no image processor; expected preprocessor_config"),
        (remove("model.safetensors"), FileNotFoundError, "found no weights; expected model.safetensors"),
        (pickled, FileNotFoundError, "found pytorch_model.bin; expected model.safetensors"),
        (without_a_tensor, ValueError, "the weights lack 1 of the model's tensors, such as visual_projection.weight"),
        (of_type("bert"), ValueError, "config.json: model_type: found 'bert'.*; expected one of clip, siglip, siglip2"),
        (of_type("siglib"), ValueError, "model_type: found 'siglib'; nearest is 'siglip'"),
    ],
)
def test_a_folder_that_lacks_something_is_said(folders, tmp_path, change, kind, words):
    shutil.copytree(folders["clip"], tmp_path / "broken")
    change(tmp_path / "broken")
    with pytest.raises(kind, match=words):
        load_embedder(str(tmp_path / "broken"))


@torch.no_grad()
def test_open_clip_embeddings_are_those_of_its_documented_use(architecture, tmp_path):
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(architecture)
    model.eval()
    tokenizer = open_clip.get_tokenizer(architecture)
    pixels = torch.stack([preprocess(as_users_open(data)) for data in some_files()])
    expected = model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(TEXTS), normalize=True)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pt")
    for file in ("w.safetensors", "w.pt"):
        check(load_embedder(f"open_clip:{architecture}:{tmp_path / file}"), *expected)
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(tmp_path / "w.safetensors", folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    check(load_embedder(str(folder)), *expected)
    check(load_embedder(f"open_clip:{folder}"), *expected)


def test_an_open_clip_folder_keeps_its_preprocessing(architecture, tmp_path):
    config = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.create_model(architecture).state_dict(), tmp_path / "open_clip_model.safetensors")
    embedder = load_embedder(str(tmp_path))
    assert float(embedder.prepare(np.full((9, 30, 3), 255, np.uint8), embedder.views(["native"])[0]).min()) == 1


def test_weights_of_an_open_clip_architecture_get_the_preprocessing_they_were_published_with(
    architecture, tmp_path, monkeypatch
):
    published = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli")
    assert published["mean"] == (0.5, 0.5, 0.5)  # and not CLIP's, which OpenCLIP takes for a file
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, architecture, {"webli": published})
    save_file(open_clip.create_model(architecture).state_dict(), tmp_path / "w.safetensors")
    embedder = load_embedder(f"open_clip:{architecture}:{tmp_path / 'w.safetensors'}")
    assert float(embedder.prepare(np.full((9, 30, 3), 255, np.uint8), embedder.views(["native"])[0]).min()) == 1


def test_open_clip_random_weights_are_said(architecture):
    with pytest.warns(UserWarning, match="open_clip:ViT-Mini: no weights were named; they are random"):
        embedder = load_embedder("open_clip:ViT-Mini", lengths=[8])
    assert embedder.lengths == [8, 24]
    assert embedder.name == "open_clip:ViT-Mini (random weights)"  # in every table
    with pytest.raises(ValueError, match=r"open_clip:ViT-Mini \(random weights\): has no view '64'"):
        embedder.views(["64"])


def test_weights_that_open_clip_cannot_fetch_are_not_made_up(monkeypatch):
    """It logs a warning and goes on with random ones."""

    def fetch(name, *args, **options):
        raise OSError("no network")

    monkeypatch.setattr(open_clip.factory, "_get_hf_config", lambda *args, **options: {"model_cfg": dict(OPEN_CLIP)})
    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", fetch)
    with pytest.raises(ValueError, match="OpenCLIP cannot load it .*Required pretrained weights"):
        load_embedder("open_clip:hf-hub:org/name")


def test_wrong_open_clip_names_are_said(architecture, tmp_path, folders):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    (tmp_path / "tokens").mkdir()
    config = {"model_cfg": OPEN_CLIP | {"text_cfg": OPEN_CLIP["text_cfg"] | {"hf_tokenizer_name": "timm/x"}}}
    (tmp_path / "tokens" / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "tokens" / "open_clip_model.safetensors").touch()
    wrong = {
        "open_clip:ViT-B-33": (ValueError, "OpenCLIP has no 'ViT-B-33'; nearest is 'ViT-B-32'"),
        "open_clip:": (ValueError, "open_clip:: which model of open_clip?"),
        "open_clip:ViT-B-32:openai": (
            ValueError,
            "openai is on the hub; open_clip:ViT-B-32:hf-hub:openai downloads it",
        ),
        "open_clip:ViT-B-32:hf-hub:opnai": (ValueError, "no weights 'opnai' of ViT-B-32; nearest is 'openai'"),
        f"open_clip:ViT-Mini:{tmp_path}/w.pt": (FileNotFoundError, "no such file of weights"),
        f"open_clip:{tmp_path}": (FileNotFoundError, "open_clip_config.json: no such file"),
        f"{tmp_path}/empty": (FileNotFoundError, "found no weights; expected open_clip_model.safetensors"),
        f"{tmp_path}/tokens": (FileNotFoundError, "found no tokenizer"),
        f"transformers:{tmp_path}/no": (FileNotFoundError, "no such folder; transformers:hf-hub:.*/no downloads it"),
    }
    for model, (kind, words) in wrong.items():
        with pytest.raises(kind, match=words):
            load_embedder(model)


@pytest.mark.filterwarnings("ignore:open_clip.*random")
def test_a_tokenizer_that_would_be_downloaded_is_said(monkeypatch):
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *args, **options: (None, None, None))
    with pytest.raises(ValueError, match="it needs timm/ViT-B-16-SigLIP of the hub, not in the local cache"):
        load_embedder("open_clip:ViT-B-16-SigLIP")


@pytest.mark.filterwarnings("ignore:open_clip.*random")
def test_openclip_cannot_let_transformers_ask_whether_to_run_code(monkeypatch, tmp_path):
    """OpenCLIP reads the text tower that its configuration names like this."""
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(code))
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")

    def create(*_, **options):
        return transformers.AutoConfig.from_pretrained(tmp_path)

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    with pytest.raises(ValueError, match=r"OpenCLIP cannot load it \(ValueError: Loading this model requires"):
        load_embedder("open_clip:ViT-B-32")
    assert asked == []


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("was unpickled",))


@pytest.mark.parametrize("model", ["open_clip:ViT-Mini:{file}", "timm:test_vit:{file}", "{ours}"])
def test_pickled_code_is_not_run(architecture, tmp_path, model):
    file, ours = tmp_path / "w.pt", tmp_path / "x.ckpt"
    torch.save({"state_dict": Malicious()}, file)
    ours.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ValueError, match="cannot load it|not a readable checkpoint"):
        load_embedder(model.format(file=file, ours=ours))


def test_a_folder_of_two_libraries_has_to_be_told_apart(folders, tmp_path):
    shutil.copytree(folders["clip"], tmp_path / "both")
    (tmp_path / "both" / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    with pytest.raises(ValueError, match="files of open_clip and transformers; expected open_clip:.*both or "):
        load_embedder(str(tmp_path / "both"))
    assert library_of(f"transformers:{tmp_path / 'both'}") == ("transformers", str(tmp_path / "both"))
    assert load_embedder(f"transformers:{tmp_path / 'both'}").lengths == [24]


@pytest.mark.filterwarnings("ignore:.*random")
def test_an_architecture_that_is_also_a_folder_has_to_be_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path / "test_vit", safe_serialization=True)
    with pytest.raises(ValueError, match="is a folder here and an architecture; expected timm:./test_vit"):
        load_embedder("timm:test_vit")
    picture = noise(9, 9)
    folder, architecture = (embed(load_embedder(f"timm:{what}"), [picture]) for what in ("./test_vit", "test_vit:"))
    torch.testing.assert_close(embed(load_embedder("test_vit"), [picture]), folder)
    assert not torch.allclose(folder, architecture)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@torch.no_grad()
def test_timm_embeddings_are_those_of_its_documented_use(tmp_path, name):
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=7).eval()
    model = timm.create_model(name, num_classes=0).eval()
    model.load_state_dict(whole.state_dict(), strict=False)
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    expected = model(torch.stack([transform(as_users_open(data)) for data in some_files()]))
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")  # with a classifier of its own
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    timm.models.save_for_hf(whole, tmp_path / "folder", model_config={"num_classes": 7}, safe_serialization=True)
    for what in (f"{name}:{tmp_path}/whole.safetensors", f"{name}:{tmp_path}/bare.pt", str(tmp_path / "folder")):
        check(load_embedder(f"timm:{what}"), expected)
    embedder = load_embedder(str(tmp_path / "folder"))
    assert not embedder.embeds_text
    with pytest.raises(ValueError, match="an image model of timm embeds no text"):
        embedder.tokenize(TEXTS)
    with pytest.raises(ValueError, match="an image model of timm embeds no text"):
        embedder.embed_texts(["kite"])


def test_wrong_timm_names_are_said(tmp_path):
    tensors = timm.create_model("test_vit").state_dict()
    del tensors["norm.weight"]
    save_file(tensors, tmp_path / "w.safetensors")
    wrong = {
        "timm:vit_tiny_patch16_22": (ValueError, "timm has no 'vit_tiny_patch16_22'; nearest is 'vit_tiny_patch16_224"),
        f"timm:test_vit:{tmp_path}/v.safetensors": (
            FileNotFoundError,
            "no such file .*nearest is 'w.safetensors'",
        ),
        f"timm:test_vit:{tmp_path}/w.safetensors": (ValueError, "timm cannot load it .*Missing key.*norm.weight"),
    }
    for model, (kind, words) in wrong.items():
        with pytest.raises(kind, match=words):
            load_embedder(model)


@pytest.mark.parametrize(
    ("model", "library"),
    [
        ("open_clip:hf-hub:org/name", "open_clip"),
        ("open_clip:ViT-B-32:hf-hub:openai", "open_clip"),
        ("timm:hf-hub:org/name", "timm"),
        ("transformers:hf-hub:org/name", "transformers"),
    ],
)
def test_only_the_hub_prefix_lets_a_library_use_the_network(monkeypatch, model, library):
    from huggingface_hub import constants

    class Asked(Exception):
        pass

    def ask(*args, **options):
        raise Asked(f"{args} {options} offline={constants.HF_HUB_OFFLINE}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(open_clip, "create_model_and_transforms", ask)
    monkeypatch.setattr(timm, "create_model", ask)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", ask)
    with pytest.raises(ValueError, match=r"(org/name|openai).*offline=False") as raised:
        load_embedder(model)
    assert isinstance(raised.value.__cause__, Asked)
    assert not constants.HF_HUB_OFFLINE


def test_a_line_of_pixels_does_not_fill_the_memory(folders):
    line = np.zeros((1, 50_000, 3), np.uint8)
    line[:, ::2] = 255
    for kind in ("clip", "siglip", "siglip2"):
        embedder = load_embedder(folders[kind])
        assert embed(embedder, [line, line.swapaxes(0, 1)]).isfinite().all(), kind


def test_texts_are_read_once_in_chunks_of_one_size(folders):
    embedder, rows = load_embedder(folders["clip"]), []
    embedder.model.text_model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = embedder.embed_texts([str(number % 300) for number in range(600)])
    assert rows == [TEXT_CHUNK, 300 - TEXT_CHUNK]
    torch.testing.assert_close(found[:300], found[300:], atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:.*random")
def test_a_copy_for_a_loader_process_prepares_and_holds_no_weights(folders, architecture):
    for model in (folders["clip"], folders["siglip2"], "open_clip:ViT-Mini", "timm:test_vit"):
        embedder = load_embedder(model)
        there = pickle.loads(pickle.dumps(embedder))
        assert not hasattr(there, "model")
        (view,) = there.views(["native"])
        batch = there.collate([there.prepare(noise(20, 30), view)])
        torch.testing.assert_close(embedder.embed_images(batch), embed(embedder, [noise(20, 30)]))


def test_reduced_precision_gives_float32_unit_vectors(folders):
    exact = load_embedder(folders["clip"])
    rough = load_embedder(folders["clip"], precision="bf16")
    for mine, theirs in [
        (embed(rough, [noise(9, 9)]), embed(exact, [noise(9, 9)])),
        (rough.embed_texts(["kite"]), exact.embed_texts(["kite"])),
    ]:
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.norm(dim=1), torch.ones(1))
        assert 0 < (mine - theirs).abs().max() < 0.1


def test_a_missing_open_clip_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=re.escape("needs OpenCLIP: pip install open_clip_torch")):
        load_embedder("open_clip:ViT-B-32")
