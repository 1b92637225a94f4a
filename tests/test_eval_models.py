"""The benchmark's view of our own models, and which model a `--model` is."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURE, noise, tiny_encoder
from PIL import Image

from indiclip.encoder import Encoder
from indiclip.evals.models.embedder import TEXT_CHUNK, EncoderEmbedder, View, load_embedder
from indiclip.images import EncodedImage
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return EncodedImage(buffer.getvalue(), "k")


def turned(image, orientation):
    """A PNG that says it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, exif=exif)


def fixed_size_encoder():
    torch.manual_seed(0)
    backbone = TimmBackbone("convnext_atto", (32, 64), options={"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]})
    return Encoder(backbone, TextTower(ByteTokenizer(), ARCHITECTURE), 16, (8,))


def embed(embedder, images, view="native"):
    (view,) = embedder.views([view])
    return embedder.embed_images(embedder.collate([embedder.prepare(image, view) for image in images]))


def save(encoder, file):
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"encoder": encoder.to_config(), "state_dict": state}, file)


@pytest.mark.parametrize("make", [tiny_encoder, fixed_size_encoder])
def test_images_of_any_kind_give_what_the_encoder_gives(make):
    encoder = make().eval()
    grey, deep = Image.fromarray(noise(20, 30)).convert("L"), Image.fromarray(np.full((9, 9), 40_000, np.uint16))
    transparent = Image.fromarray(np.dstack([noise(31, 17), np.full((31, 17), 99, np.uint8)]))
    line, high = noise(1, 40), Image.fromarray(noise(70, 200))
    images = [encoded(grey), encoded(deep), encoded(transparent), line, encoded(high)]
    with torch.no_grad():
        expected = encoder.embed_image([grey, deep, transparent, line, high])
    found = embed(EncoderEmbedder(encoder, "x"), images)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert found.dtype == torch.float32


def test_a_photo_is_turned_as_its_exif_says():
    embedder, picture = EncoderEmbedder(tiny_encoder(), "x"), Image.fromarray(noise(24, 48))
    lying = picture.transpose(Image.Transpose.ROTATE_90)  # orientation 6 asks for a quarter turn clockwise
    torch.testing.assert_close(embed(embedder, [turned(lying, 6)]), embed(embedder, [np.asarray(picture)]))
    assert not torch.allclose(embed(embedder, [turned(lying, 1)]), embed(embedder, [np.asarray(picture)]))


def test_views_have_their_number_of_patches():
    embedder = EncoderEmbedder(tiny_encoder(), "x")  # patches of 8
    names = ["native", "16", "16-square", "native-square", "20-square"]
    views = embedder.views(names)
    assert views[:3] == [View("native", 256, "kept"), View("16", 16, "kept"), View("16-square", 16, "square")]
    sizes = [embedder.prepare(noise(320, 640), view)["size_hw"] for view in views]
    assert sizes[2:] == [(32, 32), (128, 128), (32, 32)]  # 20 patches make no square, 16 do
    for size, budget in zip(sizes[:2], (256, 16), strict=True):
        assert size[0] * size[1] / 64 == pytest.approx(budget, rel=0.25)
        assert size[1] / size[0] == pytest.approx(2, rel=0.2)
    small = [embedder.prepare(noise(8, 16), view)["size_hw"] for view in views[:3]]
    assert small == [(8, 16), (8, 16), (32, 32)]  # only a square view enlarges
    prepared = embedder.prepare(noise(8, 16), views[0])
    assert prepared["patches"][0].dtype == torch.uint8


def test_a_square_view_is_the_stretched_picture():
    embedder, picture = EncoderEmbedder(tiny_encoder(), "x"), noise(40, 90)
    stretched = torch.nn.functional.interpolate(
        torch.from_numpy(picture).permute(2, 0, 1)[None], (32, 32), mode="bilinear", antialias=True
    )
    view = embedder.views(["16-square"])[0]
    patches_NP, _ = embedder.prepare(picture, view)["patches"]
    cells = patches_NP.reshape(4, 4, 8, 8, 3).permute(4, 0, 2, 1, 3).reshape(3, 32, 32)
    assert (cells.int() - stretched[0].int()).abs().max() <= 1


def test_a_backbone_of_one_size_fills_its_canvas():
    embedder = EncoderEmbedder(fixed_size_encoder(), "atto")
    native, square = embedder.views(["native", "native-square"])
    assert embedder.prepare(noise(64, 64), native)["size_hw"] == (32, 32)
    assert embedder.prepare(noise(64, 64), square)["size_hw"] == (32, 64)
    with pytest.raises(ValueError, match=re.escape("atto: has no view '64'; expected native, native-square")):
        embedder.views(["native", "64"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("big", "x: has no view 'big'; expected native, native-square, or a number of patches such as 64"),
        ("0", "has no view '0'"),
        ("5000", "view '5000' is more than the 1024 patches of its backbone"),
    ],
)
def test_a_view_that_the_model_does_not_have_is_said(name, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        EncoderEmbedder(tiny_encoder(), "x").views([name])


@pytest.mark.parametrize("embeds", ["embed_images", "embed_texts"])
def test_a_training_encoder_is_left_as_it_was(embeds):
    encoder = tiny_encoder(batch_norm=True).train()
    encoder.backbone.eval()  # a frozen part
    before = {name: module.training for name, module in encoder.named_modules()}
    statistics = copy.deepcopy(encoder.state_dict())
    embedder = EncoderEmbedder(encoder, "live")
    images = embedder.collate([embedder.prepare(noise(16, 16, i), embedder.views(["native"])[0]) for i in range(3)])
    given = {"embed_images": images, "embed_texts": ["kite", "drum", "diya"]}[embeds]
    found = getattr(embedder, embeds)(given)
    assert {name: module.training for name, module in encoder.named_modules()} == before
    torch.testing.assert_close(encoder.state_dict(), statistics)  # batch norm has learned nothing
    assert not found.requires_grad
    encoder.eval()
    torch.testing.assert_close(getattr(embedder, embeds)(given), found)
    loss = encoder.train().embed_image(images).sum() + encoder.embed_text(["kite", "drum"]).sum()
    loss.backward()  # nothing that was kept from the evaluation stands in the way


def test_the_mode_comes_back_after_an_error():
    encoder = tiny_encoder().train()
    with pytest.raises(ValueError, match="surrogate|'utf-8'"):
        EncoderEmbedder(encoder, "x").embed_texts(["\ud800"])
    assert all(module.training for module in encoder.modules())


def test_each_distinct_text_is_read_once_in_chunks_of_one_size():
    encoder, rows = tiny_encoder(), []
    encoder.text.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    embedder = EncoderEmbedder(encoder, "x")
    texts = [str(number % 300) for number in range(700)]
    found = embedder.embed_texts(texts)
    assert rows == [TEXT_CHUNK, 300 - TEXT_CHUNK]
    torch.testing.assert_close(found[300:600], found[:300], atol=0, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(found[[0, 299, 650]], encoder.eval().embed_text(["0", "299", "50"]))
    assert embedder.embed_texts([]).shape == (0, 64)


def test_lengths_are_the_trained_ones_or_those_asked_for():
    encoder = tiny_encoder()
    assert EncoderEmbedder(encoder, "x").lengths == [16, 32, 64]
    assert EncoderEmbedder(encoder, "x", lengths=[8]).lengths == [8, 64]
    assert embed(EncoderEmbedder(encoder, "x", lengths=[8]), [noise(9, 9)]).shape == (1, 64)
    for wrong in (65, 0, "64", 64.0, True):
        with pytest.raises(ValueError, match=f"lengths: found {wrong!r}; expected a whole number from 1 to 64"):
            EncoderEmbedder(encoder, "x", lengths=[wrong])


def test_float32_is_kept_under_the_autocast_of_a_training_run():
    embedder = EncoderEmbedder(tiny_encoder(), "x")
    exact = embed(embedder, [noise(30, 30)])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(embed(embedder, [noise(30, 30)]), exact, atol=0, rtol=0)
    rough = embed(EncoderEmbedder(embedder.encoder, "x", precision="bf16"), [noise(30, 30)])
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05  # bf16 keeps 8 bits
    with pytest.raises(ValueError, match="precision: found 'int8'; expected one of fp32, bf16, fp16"):
        EncoderEmbedder(embedder.encoder, "x", precision="int8")


def test_a_copy_for_a_loader_process_prepares_and_holds_no_weights():
    embedder = EncoderEmbedder(tiny_encoder(), "x")
    view = embedder.views(["native"])[0]
    sent = pickle.dumps(embedder)
    assert len(sent) < 2000
    there = pickle.loads(sent)
    batch = there.collate([there.prepare(noise(20, 30), view)])
    torch.testing.assert_close(embedder.embed_images(batch), embed(embedder, [noise(20, 30)]))


@pytest.mark.parametrize("what", ["run", "run/checkpoints/last.ckpt"])
def test_a_run_or_a_checkpoint_is_ours(tmp_path, what):
    encoder = tiny_encoder()
    save(encoder, tmp_path / "run" / "checkpoints" / "last.ckpt")
    embedder = load_embedder(str(tmp_path / what))
    assert embedder.name == str(tmp_path / what)
    assert embedder.lengths == [16, 32, 64]
    torch.testing.assert_close(embed(embedder, [noise(9, 30)]), embed(EncoderEmbedder(encoder, "x"), [noise(9, 30)]))


def test_what_is_no_model_is_said(tmp_path):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "weights.safetensors").touch()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{}")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "checkpoints" / "1.ckpt").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "parity.json").write_text('{"to": "onnx"}')
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector" / "config.json").write_text('{"format": "indiclip-torchvision"}')
    wrong = {
        tmp_path / "runs": (FileNotFoundError, f"holds no checkpoint .*; runs in it are {tmp_path}/runs/a$"),
        tmp_path / "out": (ValueError, "out: is an export to onnx, which is not read back; expected the run"),
        tmp_path / "detector": (ValueError, "detector: is an export to torchvision, which is not read back"),
        f"{tmp_path}/list:ema": (FileNotFoundError, "list:ema: no such run, .*nearest is '.*/list'"),
        tmp_path / "quikstart": (FileNotFoundError, f"no such run, .*nearest is '{tmp_path}/quickstart'"),
        tmp_path / "quickstart": (FileNotFoundError, "holds no checkpoint"),
        tmp_path / "x.ckpt": (FileNotFoundError, "no such run or checkpoint"),
        tmp_path / "weights.safetensors": (ValueError, "weights alone name no architecture; .*open_clip:ARCHITECTURE:"),
        tmp_path / "odd": (ValueError, "odd/config.json: found neither transformers' `model_type` nor timm's"),
        tmp_path / "list": (ValueError, "list/config.json: found a list, expected an object"),
        "vit_tiny_patch16_224": (FileNotFoundError, "nearest is 'timm:vit_tiny_patch16_224'"),
        "google/siglip-base-x": (FileNotFoundError, "if it is on the hub, transformers:hf-hub:google/siglip-base-x"),
        "openclip:ViT-B-32": (ValueError, "no library 'openclip'; nearest is 'open_clip'; expected one of open_clip,"),
        "hf-hub:google/siglip": (ValueError, "which library is to download it.*transformers:hf-hub:google/siglip"),
    }
    for model, (kind, words) in wrong.items():
        with pytest.raises(kind, match=words):
            load_embedder(str(model))
    with pytest.raises(ValueError, match="precision: found 'int8'"):
        load_embedder("timm:vit_tiny_patch16_224", precision="int8")
    for device in ("meta:x", "cude"):
        with pytest.raises(ValueError, match=f"device: '{device}' is not available here [^,]*(, [^,]*){{0,2}}$"):
            load_embedder("timm:vit_tiny_patch16_224", device)
