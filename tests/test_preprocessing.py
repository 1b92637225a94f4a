"""How an image becomes patches: never more tokens than allowed, aspect kept, and the same pixels by every way in."""

import io

import numpy as np
import pytest
import torch
import yaml
from helpers import noise, tiny_encoder
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

from indiclip import patches
from indiclip.commands.config_samples import build_config
from indiclip.datasets.base import SampleDataset
from indiclip.evals.models.embedder import EncoderEmbedder
from indiclip.images import EncodedImage, UnreadableSample, to_rgb
from indiclip.loading.collate import collate
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source
from indiclip.loading.transforms import Transform
from indiclip.preprocessing import Preprocessing, resize

PATCH_SIZES, BUDGETS = (4, 7, 8, 14, 16, 32), (1, 2, 16, 49, 256, 1024)


def random_sizes(number, seed):
    """(height, width, patch size, budget) with sides from 1 to 8,000, small ones as often as large ones."""
    rng = np.random.default_rng(seed)
    for height, width in np.exp(rng.uniform(0, np.log(8000), (number, 2))).astype(int).tolist():
        yield height, width, int(rng.choice(PATCH_SIZES)), int(rng.choice(BUDGETS))


def test_the_token_budget_is_never_exceeded():
    for height, width, patch, budget in random_sizes(4000, seed=0):
        new_height, new_width = Preprocessing(patch).fit_hw(height, width, budget)
        assert new_height % patch == new_width % patch == 0
        assert 1 <= (new_height // patch) * (new_width // patch) <= budget
        assert new_height < height + patch
        assert new_width < width + patch


def test_the_aspect_is_kept_within_a_patch():
    for height, width, patch, budget in random_sizes(4000, seed=1):
        new = Preprocessing(patch).fit_hw(height, width, budget)
        (long, short), (new_long, new_short) = sorted((height, width))[::-1], new if height >= width else new[::-1]
        if new_short > patch:  # one patch is the least there is, whatever the aspect
            assert abs(new_short - new_long / long * short) <= patch


def test_an_image_within_the_budget_keeps_its_size():
    assert Preprocessing(16).fit_hw(224, 160, 140) == (224, 160)
    assert Preprocessing(16).fit_hw(224, 160, 139) < (224, 160)
    assert Preprocessing(16).fit_hw(225, 160, 256) == (240, 160)  # up to whole patches, never cut off


def test_a_canvas_is_filled_in_one_direction_at_least():
    for height, width, patch, budget in random_sizes(2000, seed=2):
        canvas = (patch * (1 + budget % 17), patch * (1 + budget % 5))
        rows, columns = Preprocessing(patch, canvas).fit_hw(height, width, 1)
        assert rows % patch == columns % patch == 0
        assert patch <= rows <= canvas[0]
        assert patch <= columns <= canvas[1]
        assert rows == canvas[0] or columns == canvas[1]
    assert Preprocessing(16, (224, 224)).fit_hw(100, 50, 1) == (224, 112)


def test_a_batch_of_mixed_sizes_is_padded_to_its_longest():
    rng = np.random.default_rng(1)
    sizes = [(40, 40), (100, 30), (8, 8), (300, 600)]
    originals = [rng.integers(1, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    images = Preprocessing(8).batch(originals, max_tokens=20)
    numbers = [height * width // 64 for height, width in images["sizes_hw"]]
    assert images["valid_BN"].sum(1).tolist() == numbers
    assert images["patches_BNP"].shape == (4, max(numbers), 192)
    assert images["patches_BNP"].dtype == torch.uint8
    for i, (number, (height, width)) in enumerate(zip(numbers, images["sizes_hw"], strict=True)):
        assert images["valid_BN"][i, :number].all()
        assert images["patches_BNP"][i, number:].sum() == 0
        cells = [tuple(cell) for cell in images["coords_BN2"][i, :number].tolist()]
        assert cells == [(row, column) for row in range(height // 8) for column in range(width // 8)]
        assert images["scale"][i] == (height / sizes[i][0], width / sizes[i][1])
        alone = Preprocessing(8).batch([originals[i]], max_tokens=20)
        assert torch.equal(alone["patches_BNP"][0], images["patches_BNP"][i, :number])


def test_every_kind_of_image_gives_the_same_patches():
    array = np.random.default_rng(2).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [array, Image.fromarray(array), tensor, tensor / 255, (tensor / 255).double(), array[:, ::-1][:, ::-1]]
    images = Preprocessing(8).batch(kinds, max_tokens=6)
    assert all(torch.equal(images["patches_BNP"][0], cells) for cells in images["patches_BNP"])


def test_transparent_pixels_are_white_as_in_training():
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert (Preprocessing(8).batch([clear], 1)["patches_BNP"] == 255).all()


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((8, 8), np.uint8), r"image 1: found ndarray uint8 \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"image 1: found ndarray uint8 \(8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.float32), r"image 1: found ndarray float32 \(8, 8, 3\)"),
        (torch.full((3, 8, 8), 1.5), r"image 1: found Tensor torch\.float32 \(3, 8, 8\)"),
        (torch.full((3, 8, 8), torch.nan), r"image 1: found Tensor torch\.float32"),
        (None, r"image 1: found NoneType"),
    ],
)
def test_no_image_is_named_by_its_position(image, found):
    with pytest.raises(ValueError, match=found + ".*; expected a path, a PIL image, a uint8 array"):
        Preprocessing(8).batch([np.zeros((8, 8, 3), np.uint8), image], 4)
    with pytest.raises(ValueError, match="images: the list is empty"):
        Preprocessing(8).batch([], 4)


@pytest.mark.parametrize("image", [np.zeros((0, 8, 3), np.uint8), Image.new("RGB", (8, 0)), torch.zeros(3, 8, 0)])
def test_an_image_without_pixels_is_named(image):
    with pytest.raises(ValueError, match=r"image 0: found .*0"):
        Preprocessing(8).batch([image], 4)


def encoded(image, kind="JPEG", orientation=1, **options):
    """An image as the bytes of a file."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, kind, **({"exif": exif} if orientation > 1 else {}), **options)
    return buffer.getvalue()


def files():
    """Kinds of image files, 150 x 210 pixels: textured, so that every decoder and every turn shows."""
    blocks = Image.fromarray(noise(15, 21)).resize((210, 150), Image.Resampling.BICUBIC)
    fine = Image.blend(blocks, Image.fromarray(noise(150, 210, 1)), 0.2)
    clear = fine.copy()
    clear.putalpha(Image.fromarray(noise(150, 210, 2)[..., 0]))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    deep = Image.fromarray(noise(150, 210, 3)[..., 0].astype(np.uint16) * 257 - 9)
    yield "jpeg", encoded(fine, quality=90)
    yield "jpeg progressive", encoded(fine, quality=75, progressive=True, subsampling=0)
    yield "jpeg grey", encoded(fine.convert("L"))
    yield "jpeg cmyk", encoded(fine.convert("CMYK"))
    yield from ((f"jpeg turned {turn}", encoded(fine, orientation=turn)) for turn in range(2, 9))
    yield "jpeg cmyk turned", encoded(fine.convert("CMYK"), orientation=8)
    yield "jpeg turned by xmp", encoded(fine, xmp=xmp)
    yield "png alpha", encoded(clear, "PNG")
    yield "png turned", encoded(clear, "PNG", orientation=5)
    yield "png 16 bits", encoded(deep, "PNG")
    yield "png 16 bits turned", encoded(deep, "PNG", orientation=6)
    yield "png palette", encoded(fine.quantize(32), "PNG", transparency=3)
    yield "png black and white", encoded(fine.convert("1"), "PNG")
    yield "webp", encoded(fine, "WEBP", quality=80)
    yield "webp alpha turned", encoded(clear, "WEBP", orientation=7)


FILES = dict(files())
BACKBONES = {  # what a backbone asks for, most patches in it
    "native": (Preprocessing(8), 1024),
    "bicubic": (Preprocessing(8, interpolation="bicubic"), 1024),
    "canvas": (Preprocessing(8, (64, 48)), 48),
    "bicubic canvas": (Preprocessing(8, (248, 160), "bicubic"), 620),
}


def embedder(preprocessing, most):
    encoder = tiny_encoder()
    for name, value in zip(preprocessing._fields, preprocessing, strict=True):
        setattr(encoder.backbone, name, value)
    encoder.backbone.max_tokens = most
    return EncoderEmbedder(encoder, "ours")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kind", FILES)
def test_every_way_in_gives_the_same_pixels(kind, backbone, tmp_path):
    data, (preprocessing, most) = FILES[kind], BACKBONES[backbone]
    file = tmp_path / "image.of-any-name"
    file.write_bytes(data)
    image, ours = EncodedImage(data, "k"), embedder(preprocessing, most)
    pil = Image.open(io.BytesIO(data))
    upright = np.asarray(to_rgb(ImageOps.exif_transpose(pil)))  # the oracle of what is shown
    assert image.upright_hw == upright.shape[:2]
    for view in ours.views(["native"] if preprocessing.canvas_hw else ["native", "100", "17"]):
        size = preprocessing.fit_hw(*upright.shape[:2], view.tokens)
        whole = torch.from_numpy(upright.copy()).permute(2, 0, 1)
        expected, _ = patches.patchify(resize(whole, size, preprocessing.interpolation), 8)
        scored = collate([Transform(view.tokens)({"image": image, "key": "k"}, preprocessing, None)])["images"]
        benchmark = ours.collate([ours.prepare(image, view)])
        same = [file, str(file), data, image, pil, upright, torch.from_numpy(upright.copy()).permute(2, 0, 1)]
        embedded = ours.encoder.backbone.preprocessing.batch(same, view.tokens)
        for one in (scored, benchmark, embedded):
            assert all(torch.equal(cells, expected) for cells in one["patches_BNP"])
            assert {*one["sizes_hw"]} == {size}
            assert {*one["scale"]} == {(size[0] / upright.shape[0], size[1] / upright.shape[1])}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_square_views_stretch_the_whole_decoded_image(backbone):
    preprocessing, most = BACKBONES[backbone]
    ours, data = embedder(preprocessing, most), FILES["jpeg turned 6"]
    (view,) = ours.views(["native-square"])
    whole = TF.pil_to_tensor(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    found = ours.prepare(EncodedImage(data, "k"), view)
    assert found["size_hw"] == (preprocessing.canvas_hw or (128, 128))
    mode = TF.InterpolationMode(preprocessing.interpolation)
    expected = TF.resize(whole, list(found["size_hw"]), mode, antialias=True)
    assert torch.equal(found["patches"][0], patches.patchify(expected, 8)[0])


def test_only_training_decodes_a_jpeg_smaller_than_it_is():
    image = EncodedImage(FILES["jpeg"], "k")
    decode, asked = image.decode, []
    image.decode = lambda min_hw=(0, 0): asked.append(min_hw) or decode(min_hw)
    for seed in (None, 3):
        Transform(16)({"image": image, "key": "k"}, Preprocessing(8), seed)
    assert asked[0] == (0, 0)
    assert asked[1] > (0, 0)


@pytest.mark.parametrize("max_tokens", [49, 196])
def test_bicubic_pixels_are_pils_within_a_grey_level(data_root, max_tokens):
    """Which the preprocessing of CLIP's models (timm, OpenCLIP) makes."""
    for file in sorted((data_root / "coco").rglob("*.jpg"))[:12]:
        photo = Image.open(file).convert("RGB")
        height, width = Preprocessing(16).fit_hw(photo.height, photo.width, max_tokens)
        found = resize(TF.pil_to_tensor(photo), (height, width), "bicubic").permute(1, 2, 0).numpy()
        expected = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC))
        difference = abs(found.astype(int) - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


class Photos(SampleDataset):
    """JPEGs, to be decoded late."""

    def __len__(self):
        return 3

    def key(self, index):
        return str(index)

    def __getitem__(self, index):
        return {"image": EncodedImage(FILES["jpeg"], str(index)), "key": str(index), "caption": "a photo"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_interpolation_reaches_loader_processes(num_workers):
    found = {}
    for interpolation in ("bilinear", "bicubic"):
        source = Source("t", Photos(), 3, max_tokens=40)
        data = MultiTaskData(
            [source], [source], num_workers=num_workers, patch_size=8, interpolation=interpolation, steps_per_epoch=1
        )
        expected = Preprocessing(8, None, interpolation).batch([FILES["jpeg"]], 40)["patches_BNP"][0]
        held_out, training = (next(iter(loader()))["t"] for loader in (data.val_dataloader, data.train_dataloader))
        found[interpolation] = [batch["images"]["patches_BNP"] for batch in (held_out, training)]
        assert all(torch.equal(cells, expected) for cells in found[interpolation][0])
    for bilinear, bicubic in zip(*found.values(), strict=True):
        assert (bilinear != bicubic).any()


def test_the_command_hands_the_backbones_interpolation_to_the_data(tmp_path):
    from experiments import config

    init_args = {"name": "test_vit", "options": {"depth": 1}}
    for given, expected in (({}, "bicubic"), ({"interpolation": "bilinear"}, "bilinear")):
        backbone = {"class_path": "indiclip.backbone.NaFlexViT", "init_args": init_args | given}
        file = tmp_path / "experiment.yaml"
        file.write_text(yaml.safe_dump(config(model__encoder__backbone=backbone)))
        model, data = build_config(["--config", str(file)])
        assert data.preprocessing == model.encoder.backbone.preprocessing
        assert data.preprocessing == Preprocessing(16, None, expected)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(FILES["jpeg"][:900])
    (tmp_path / "notes.jpg").write_bytes(b"hello")
    encoder = tiny_encoder()
    with pytest.raises(FileNotFoundError, match=r"image 0: '.*phot\.jpg' is no file; nearest is 'photo\.jpg'"):
        encoder.embed_image(tmp_path / "phot.jpg")
    with pytest.raises(FileNotFoundError, match="image 1: '.*' is no file"):
        encoder.embed_image([noise(8, 8), str(tmp_path)])
    with pytest.raises(UnreadableSample, match=r"photo\.jpg: damaged JPEG"):
        encoder.embed_image(str(tmp_path / "photo.jpg"))
    for end in range(4, 900, 40):  # where a header breaks off, libraries say a number alone
        with pytest.raises(UnreadableSample, match="image 0: damaged JPEG: .*[a-z]{4}"):
            encoder.embed_image(FILES["jpeg"][:end])
    with pytest.raises(UnreadableSample, match=r"notes\.jpg: expected the bytes of a JPEG, PNG or WebP"):
        encoder.embed_image(tmp_path / "notes.jpg")
    with pytest.raises(UnreadableSample, match="image 0: expected the bytes of"):
        encoder.embed_image(b"hello")
