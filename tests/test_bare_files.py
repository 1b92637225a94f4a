"""Files of weights alone, and bad input of every library: one line each."""

import errno
import json
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import indiclip
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.pretrained import hub
from indiclip.pretrained.build import build
from indiclip.pretrained.init_from import InitFrom
from indiclip.pretrained.read import read_weights
from indiclip.timm_backbone import TimmBackbone

VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2}
TEXT_CFG = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": TEXT_CFG,
}


def random_file(model, file, **extra):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()} | extra
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return tensors


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    random_file(model, folder / "open_clip_model.safetensors")
    return folder


def given(folder):
    """An encoder of a folder's architecture, as a configuration names it."""
    return build(read_weights(str(folder)).config, "x")


@pytest.mark.parametrize("wrapper", ["", "_orig_mod.module.", "state_dict"])
def test_a_file_by_open_clip_s_names(open_clip_folder, tmp_path, wrapper):
    tensors = load_file(open_clip_folder / "open_clip_model.safetensors")
    if wrapper == "state_dict":
        torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "x.pt")
    else:
        torch.save({f"{wrapper}{name}": tensor for name, tensor in tensors.items()}, tmp_path / "x.pt")
    encoder = Encoder(**given(open_clip_folder), init_from=[InitFrom(str(tmp_path / "x.pt"))])
    for name, tensor in indiclip.load(open_clip_folder).state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)
    (line,) = encoder.initialised
    assert "these are the configuration's" in line
    assert encoder.initial_logits == {"logit_scale": float(tensors["logit_scale"])}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_file_by_transformers_names(folders, kind):
    file = f"{folders[kind]}/model.safetensors"
    encoder = Encoder(**given(folders[kind]), init_from=[InitFrom(file)])
    for name, tensor in indiclip.load(folders[kind]).state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
@pytest.mark.parametrize("part", ["image", "text"])
def test_one_tower_of_a_dual_file_whatever_the_other_is(folders, open_clip_folder, kind, part):
    folder = str(open_clip_folder if kind == "open_clip" else folders[kind])
    file = next(str(file) for file in Path(folder).glob("*.safetensors"))
    own = {name: value for name, value in given(folder).items() if not name.endswith("_projection")}
    if part == "image":
        own |= {"text": given_text(), "text_pool": "mean"}
    else:
        own |= {"backbone": TimmBackbone("test_convnext", (64, 64)), "pool": "mean"}
    encoder = Encoder(**own, init_from=[InitFrom(file, [part])])
    expected = indiclip.load(folder).state_dict()
    prefix = {"image": "backbone.", "text": "text."}[part]
    found = [name for name in encoder.state_dict() if name.startswith(prefix)]
    assert found
    assert all(torch.equal(encoder.state_dict()[name], expected[name]) for name in found)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_an_image_tower_by_timm_s_names(tmp_path, name):
    tensors = random_file(timm.create_model(name), tmp_path / "x.safetensors")
    is_vit = name == "test_vit"
    backbone = NaFlexViT(name=name) if is_vit else TimmBackbone(name, (160, 160))
    text = given_text()
    encoder = Encoder(backbone, text, 24, [24], pool="tower", init_from=[InitFrom(str(tmp_path / "x.safetensors"))])
    own = encoder.state_dict()
    assert "2 left out (head." in encoder.initialised[0]
    where, block = ("vit", "blocks.0.mlp.fc1.weight") if is_vit else ("net", "stages.0.blocks.0.mlp.fc1.weight")
    assert torch.equal(own[f"backbone.{where}.{block}"], tensors[block])


def given_text():
    from helpers import ARCHITECTURE

    from indiclip.text import TextTower
    from indiclip.tokenizers import ByteTokenizer

    return TextTower(ByteTokenizer(), ARCHITECTURE)


def test_a_text_tower_by_transformers_names_and_our_own(tmp_path):
    config = transformers.BertConfig(
        **{k: v for k, v in given_text().model.config.to_dict().items() if k != "model_type"}
    )
    tensors = random_file(transformers.BertForMaskedLM(config), tmp_path / "bert.pt")
    backbone = NaFlexViT(width=32, depth=1, num_heads=2, patch_size=8)
    initial = [InitFrom(str(tmp_path / "bert.pt"), allow=["text_pool.*"])]
    encoder = Encoder(backbone, given_text(), 24, [24], init_from=initial)
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(encoder.state_dict()[f"text.model.{name}"], tensors[f"bert.{name}"])
    ours = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    save_file(ours | {"heads.counting.weight": torch.ones(3)}, tmp_path / "ours.safetensors")
    again = Encoder(backbone, given_text(), 24, [24], init_from=[InitFrom(str(tmp_path / "ours.safetensors"))])
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in encoder.state_dict().items())


class Evil:
    def __reduce__(self):
        return print, ("run",)


def damaged(source, target, change):
    """A copy of a folder whose file of weights is changed."""
    shutil.copytree(source, target)
    (file,) = (file for file in target.glob("*.safetensors"))
    change(file)
    return target


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def spoil(file):
    tensors = load_file(file)
    next(tensor for tensor in tensors.values() if tensor.ndim == 2)[0, 0] = torch.nan
    save_file(tensors, file)


def quantise(file):
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(("mlp.c_fc.weight", "mlp.fc1.weight")))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, file)


def halve(file):
    save_file(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()},
        file,
    )


def drop(file):
    tensors = load_file(file)
    del tensors[next(name for name in tensors if name.endswith("mlp.c_fc.weight") or name.endswith("mlp.fc1.weight"))]
    save_file(tensors, file)


def grow(file):
    save_file(load_file(file) | {"visual.extra": torch.ones(1), "extra.weight": torch.ones(1)}, file)


def pickled(file):
    target = file.with_suffix(".bin")
    target.write_bytes(pickle.dumps({"weight": Evil()}))
    file.unlink()


@pytest.mark.parametrize("kind", ["open_clip", "clip"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, "no readable safetensors file"),
        (spoil, "values that are not finite"),
        (quantise, "found torch.int8; expected torch.float32"),
        (drop, "1 tensors stay initial|tensors stay initial"),
        (grow, "tensors are unused: .*extra"),
        (pickled, "not a readable checkpoint|expected model.safetensors"),
    ],
)
def test_damaged_folders_are_one_line(request, folders, tmp_path, kind, change, words):
    source = request.getfixturevalue("open_clip_folder") if kind == "open_clip" else folders[kind]
    folder = damaged(source, tmp_path / "model", change)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        indiclip.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_half_precision_is_read_as_single_with_a_word(open_clip_folder, tmp_path):
    weights = read_weights(str(damaged(open_clip_folder, tmp_path / "half", halve)))
    assert {tensor.dtype for tensor in weights.tensors.values()} == {torch.float32}
    assert "float16 read as float32" in weights.notes


def config_with(folder, file=None, **changes):
    file = folder / file if file else next(folder.glob("*config.json"))
    said = json.loads(file.read_text())
    node = said.get("model_cfg", said)
    for key, value in changes.items():
        *path, last = key.split("__")
        inner = node
        for part in path:
            inner = inner[part]
        inner[last] = value
    file.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_cfg__embed_cls": True}, "text_cfg.embed_cls: found True; no tower of ours computes that"),
        ({"multimodal_cfg": {"layers": 3}}, "multimodal_cfg: found"),
        ({"vision_cfg__attentional_pool": True}, "vision_cfg.attentional_pool: found True"),
        ({"vision_cfg__pool_typ": "avg"}, "vision_cfg.pool_typ: found 'avg'.* nearest is 'pool_type'"),
        ({"vision_cfg__layers": [1, 1, 1, 1]}, "vision_cfg.layers: found"),
        ({"vision_cfg__width": 48}, r"found shape .*, expected .*, the encoder's"),
        ({"text_cfg__pool_type": "eos"}, "pools the token 2, and the tokenizer ends a text with 49407"),
        ({"text_cfg__tokenizer_kwargs": {"reduction_mask": "simple"}}, "tokenizer_kwargs: found 'reduction_mask'"),
        ({"text_cfg__hf_model_name": "nobody/nothing"}, "nobody/nothing of the hub.*hf download .*text/config.json"),
        ({"text_cfg__hf_tokenizer_name": "nobody/nothing"}, "found no tokenizer; expected tokenizer.json"),
    ],
)
def test_an_open_clip_that_we_cannot_follow_is_one_line(open_clip_folder, tmp_path, changes, words):
    shutil.copytree(open_clip_folder, tmp_path / "model")
    config_with(tmp_path / "model", **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        indiclip.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"model_type": "clipp"}, "has no 'clipp'; nearest is 'clip'.*written by"),
        ("config.json", {"model_type": ["clip"]}, "has no \\['clip'\\]"),
        ("config.json", {"model_type": "dinat"}, "model_type: found 'dinat'; expected one of clip, .* or a text model"),
        ("config.json", {"vision_config__num_channels": 1}, "num_channels: found 1; expected 3"),
        ("config.json", {"vision_config__layer_norm_eps": "small"}, "cannot read it .*'layer_norm_eps' expected float"),
        ("tokenizer.json", {"added_tokens": 3}, "cannot read it"),
        ("processor_config.json", {"image_processor__image_mean": None}, "cannot read it"),
        ("processor_config.json", {"image_processor__do_rescale": False}, "multiplies pixels by 1; expected 1/255"),
    ],
)
def test_a_transformers_folder_that_we_cannot_follow_is_one_line(folders, tmp_path, file, changes, words):
    shutil.copytree(folders["clip"], tmp_path / "model")
    config_with(tmp_path / "model", file, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        indiclip.load(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_pixels_that_are_not_normalised(folders, tmp_path):
    shutil.copytree(folders["clip"], tmp_path / "model")
    config_with(tmp_path / "model", "processor_config.json", image_processor__do_normalize=False)
    backbone = indiclip.load(tmp_path / "model").backbone
    assert (backbone.mean, backbone.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("name", ["transformers:hf-hub:nobody/nothing", "open_clip:hf-hub:nobody/nothing"])
def test_a_hub_name_without_a_network_says_what_to_bring(monkeypatch, tmp_path, name):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"hf download nobody/nothing --local-dir FOLDER.*\.safetensors.*bring"):
        read_weights(name)


def test_why_the_hub_gives_nothing_is_said(monkeypatch):
    def fails(error):
        def download(*_, **__):
            raise error

        monkeypatch.setattr(hub, "snapshot_download", download)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fails(OSError("Access to nobody/nothing is restricted.\nRequest it on its page."))
    with pytest.raises(FileNotFoundError, match=r"\(OSError: Access to nobody/nothing is restricted\.\); where there"):
        read_weights("transformers:hf-hub:nobody/nothing")
    fails(OSError(errno.ENOSPC, "No space left on device", "/cache/model.safetensors"))
    with pytest.raises((OSError, ValueError), match="No space left on device") as caught:
        read_weights("transformers:hf-hub:nobody/nothing")
    assert "bring FOLDER" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["pt", "bin"])
def test_pickles_and_unclear_names_are_one_line(tmp_path, suffix):
    file = tmp_path / f"x.{suffix}"
    file.write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(ValueError, match=f"x.{suffix}: not a readable checkpoint"):
        read_weights(str(file))
    torch.save({"weight": torch.ones(2), "bias": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="found weight, bias; expected names of ours, timm, OpenCLIP or transformers"):
        read_weights(str(file))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with pytest.raises(ValueError, match="TorchScript program; save its state_dict"):
        read_weights(str(file))


def test_a_bare_file_is_no_model_of_its_own(tmp_path):
    random_file(timm.create_model("test_vit"), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="weights alone name no architecture"):
        indiclip.load(tmp_path / "x.safetensors")


def test_openai_s_weights_ask_for_their_activation(open_clip_folder, tmp_path):
    shutil.copytree(open_clip_folder, tmp_path / "model")
    file = tmp_path / "model" / "open_clip_model.safetensors"
    extra = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    save_file({name: tensor.half() for name, tensor in load_file(file).items()} | extra, file)
    with pytest.raises(ValueError, match="OpenAI's weights need quick_gelu"):
        indiclip.load(tmp_path / "model")
    config_with(tmp_path / "model", quick_gelu=True)
    weights = read_weights(str(tmp_path / "model"))
    assert (weights.unused, sorted(weights.ignored)) == ([], sorted(extra))
    indiclip.load(tmp_path / "model")
