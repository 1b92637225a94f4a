"""To ONNX: both towers as files for ONNX Runtime, whose batch, height, width and length of text are free.

The pixels that go in are uint8, as an image decoder gives them; their mean and deviation are inside the file.

Shape letters: see `indiclip.types`.
"""

import base64
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as RustTokenizer
from torch import Tensor

from indiclip.backbone import NaFlexViT
from indiclip.datasets.tables import decode_text, existing, is_text, text_lines
from indiclip.encoder import Encoder
from indiclip.export import target
from indiclip.export.onnx_graphs import ClassGraph, ImageGraph, TextGraph, positions_as_trained
from indiclip.export.parity import TEXTS, noise, own_grid
from indiclip.export.target import Loss, Reloaded
from indiclip.export.to_timm import as_pixels
from indiclip.export.tokenizer_files import rust_tokenizer, tokenizer_losses
from indiclip.text import TextTower
from indiclip.tokenizers import SentencePieceTokenizer
from indiclip.types import Images

_FREE: Any = torch.export.Dim.DYNAMIC
_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
# What stands in <> is filled in below, `{out}` by the card.
_USAGE = """\
import numpy as np, onnxruntime
from PIL import Image
image = onnxruntime.InferenceSession("{out}/image.onnx")
pixels = np.asarray(Image.open("photo.jpg").convert("RGB").resize((<width>, <height>))).transpose(2, 0, 1)[None]
(image_embedding,) = image.run(None, {{"pixels": pixels}})  # uint8 (batch, 3, height, width)
<tokenizer>
text = onnxruntime.InferenceSession("{out}/text.onnx")
(text_embedding,) = text.run(None, {{one.name: tokens[one.name] for one in text.get_inputs()}})
print(image_embedding @ text_embedding.T)  # cosines"""
_TOKENIZERS = {
    "tokenizer.json": """\
from tokenizers import Tokenizer
read = Tokenizer.from_file("{out}/tokenizer.json").encode_batch(["a kite", "a drum"])
ids, mask = (np.array([getattr(one, name) for one in read]) for name in ("ids", "attention_mask"))
tokens = {{"input_ids": ids, "attention_mask": mask}}""",
    "spiece.model": """\
from transformers import SiglipTokenizer
tokenizer = SiglipTokenizer("{out}/spiece.model")
tokens = tokenizer(["a kite", "a drum"], padding="max_length", max_length=<context>, return_tensors="np")""",
}


class Target(target.Target):
    """See the module.

    Args:
        classes: A text file with a class in each line: `classes.onnx` gives their cosines and probabilities.
        templates: A text file with a prompt in each line, in which `{}` stands for the name.
        int8: Also write files of 8-bit weights, and measure what they lose.
    """

    library_name = "onnx"
    bound = 1e-5
    libraries = _LIBRARIES

    def __init__(self, classes: Path | None = None, templates: Path | None = None, int8: bool = False) -> None:
        if templates and not classes:
            raise ValueError("--templates: needs --classes, whose names stand in them")
        self._classes = _lines(classes, "--classes") if classes else []
        self._templates = _lines(templates, "--templates") if templates else ["{}"]
        if no_place := [line for line in self._templates if "{}" not in line]:
            raise ValueError(f"{templates}: found {no_place[0]!r}; expected a prompt with {{}} for the name of a class")
        self._int8 = int8
        self._class_CE = torch.zeros(0)

    def check(self, encoder: Encoder) -> list[Loss]:
        losses = []
        if isinstance(encoder.backbone, NaFlexViT) and not encoder.backbone.vit.embeds.is_linear:
            losses.append(Loss("backbone.options.embed_proj_type: found conv; expected linear"))
        return losses + tokenizer_losses(encoder.text.tokenizer)

    def write(self, encoder: Encoder, folder: Path, place: Path) -> None:
        _require_libraries()
        p = encoder.backbone.patch_size
        H, W = own_grid(encoder)
        free = encoder.backbone.canvas_hw is None
        # Sizes of an example must be none of the model's own, or they are taken for constants.
        grid = (H + 1, W + 2) if free else (H, W)
        pixels = torch.zeros(2, 3, grid[0] * p, grid[1] * p, dtype=torch.uint8)
        sizes = {0: _FREE, 2: _FREE, 3: _FREE} if free else {0: _FREE}
        with positions_as_trained(encoder.backbone):
            _export(
                ImageGraph(encoder), {"pixels": pixels}, {"pixels": sizes}, ["image_embedding"], folder / "image.onnx"
            )
            if self._classes:
                self._class_CE = encoder.embed_classes(self._classes, self._templates)
                graph = ClassGraph(encoder, self._class_CE, encoder.logit_factor)
                outputs = ["cosines", "probabilities"]
                _export(graph, {"pixels": pixels}, {"pixels": sizes}, outputs, folder / "classes.onnx")
                folder.joinpath("classes.txt").write_text("\n".join(self._classes) + "\n", "utf-8")
        self._write_text(encoder, folder)
        if self._int8:
            for file in sorted(folder.glob("*.onnx")):
                _quantise(file)
        usage = _USAGE.replace("<tokenizer>", _TOKENIZERS[_write_tokenizer(encoder.text, folder)])
        for name, number in {"height": H * p, "width": W * p, "context": encoder.text.tokenizer.context_length}.items():
            usage = usage.replace(f"<{name}>", str(number))
        self.usage = usage

    def _write_text(self, encoder: Encoder, folder: Path) -> None:
        ids_BT, valid_BT = encoder.text.padded(encoder.text.tokenizer.encode(["a kite in the wind", "a drum"]))
        tokens = {"input_ids": ids_BT, "attention_mask": valid_BT.long()}
        sizes = {0: _FREE} if encoder.text.pad == "context" else {0: _FREE, 1: _FREE}
        _export(TextGraph(encoder), tokens, dict.fromkeys(tokens, sizes), ["text_embedding"], folder / "text.onnx")

    def reload(self, encoder: Encoder, folder: Path) -> Reloaded:
        encode = _tokenizer(encoder.text, folder)

        def image(images: Images) -> dict[str, Tensor]:
            found = _of_images(folder / "image.onnx", images)
            return found | _of_images(folder / "classes.onnx", images) if self._classes else found

        def text(texts: list[str]) -> Tensor:
            text_BE: Tensor = _session(folder / "text.onnx")(encode(texts))["text_embedding"]
            return text_BE

        def ours(images: Images) -> dict[str, Tensor]:
            return self._ours(encoder, images)

        reloaded = Reloaded(image, text, ours=ours, notes=_notes(encoder))
        if self._int8:
            losses = self._int8_losses(encoder, folder, encode)
            reloaded.measured["int8"] = losses | {"images": "noise"}
            for side, loss in losses.items():
                reloaded.notes.append(f"{side}.int8.onnx: smallest cosine {loss['cosine']:.4f} to the full one")
        return reloaded

    def _ours(self, encoder: Encoder, images: Images) -> dict[str, Tensor]:
        """What the files are to give for images."""
        embedding_BE = encoder.embed_image(images)
        if not self._classes:
            return {"image_embedding": embedding_BE}
        cosines_BC = embedding_BE @ self._class_CE.T
        probabilities_BC = (encoder.logit_factor * cosines_BC).softmax(1)
        return {"image_embedding": embedding_BE, "cosines": cosines_BC, "probabilities": probabilities_BC}

    def _int8_losses(self, encoder: Encoder, folder: Path, encode: Any) -> dict[str, dict[str, float]]:
        """File -> how far its 8-bit weights are from the encoder."""
        images = noise([own_grid(encoder)] * 8, encoder.backbone.patch_size)
        own = self._ours(encoder, images)
        image_BE = _of_images(folder / "image.int8.onnx", images)["image_embedding"]
        text_BE = _session(folder / "text.int8.onnx")(encode(TEXTS))["text_embedding"]
        losses = {"image": _loss(own["image_embedding"], image_BE), "text": _loss(encoder.embed_text(TEXTS), text_BE)}
        if self._classes:
            cosines_BC = _of_images(folder / "classes.int8.onnx", images)["cosines"]
            losses["classes"] = _loss(own["cosines"], cosines_BC)
        return losses


def _require_libraries() -> None:
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise ValueError(f"--to onnx: {', '.join(missing)} is not installed; pip install 'indiclip[onnx]'")


def _export(
    graph: torch.nn.Module,
    inputs: dict[str, Tensor],
    free: dict[str, dict[int, Any]],
    outputs: list[str],
    file: Path,
) -> None:
    """Write a graph. Weights of more than 2 GB lie in a file of their own beside it."""
    program: Any = torch.onnx.export(
        graph.eval(),
        kwargs=inputs,
        dynamo=True,
        dynamic_shapes=free,
        input_names=[*inputs],
        output_names=outputs,
        verbose=False,
    )
    program.save(file)


def _quantise(file: Path) -> None:
    """Write the file of 8-bit weights beside it: `image.int8.onnx`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(file, file.with_suffix(".int8.onnx"), weight_type=QuantType.QUInt8, per_channel=True)


def _session(file: Path) -> Any:
    """What runs a file on the CPU: tensors by name -> tensors by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    read = {one.name for one in session.get_inputs()}
    given = [one.name for one in session.get_outputs()]

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: value.numpy() for name, value in inputs.items() if name in read}
        return dict(zip(given, map(torch.from_numpy, session.run(None, arrays)), strict=True))

    return run


def _of_images(file: Path, images: Images) -> dict[str, Tensor]:
    """What a file gives for images, by name."""
    run = _session(file)
    found = [run({"pixels": pixels}) for pixels in _whole_images(images)]
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}


def _whole_images(images: Images) -> list[Tensor]:
    """uint8 pixels: one batch where all have one size, else image by image."""
    if len(set(images["sizes_hw"])) == 1:
        return [as_pixels(images["patches_BNP"], images)]
    found = []
    for i, size_hw in enumerate(images["sizes_hw"]):
        one = images | {"sizes_hw": [size_hw]}
        patches_1NP = images["patches_BNP"][i : i + 1, images["valid_BN"][i]]
        found.append(as_pixels(patches_1NP, one))  # type: ignore[arg-type]
    return found


def _write_tokenizer(text: TextTower, folder: Path) -> str:
    """The name of what it wrote."""
    if isinstance(text.tokenizer, SentencePieceTokenizer):
        proto = base64.b64decode(text.tokenizer.to_config()["serialized"])
        folder.joinpath("spiece.model").write_bytes(proto)
        return "spiece.model"
    rust, pad_token = rust_tokenizer(text.tokenizer)
    length = text.tokenizer.context_length
    rust.enable_truncation(length)
    fill = {"pad_id": text.tokenizer.pad_id, "pad_token": pad_token}
    rust.enable_padding(**fill, length=length if text.pad == "context" else None)  # type: ignore[arg-type]
    rust.save(str(folder / "tokenizer.json"))
    return "tokenizer.json"


def _tokenizer(text: TextTower, folder: Path) -> Any:
    """Strings -> inputs of the text's file, by the tokenizer of the folder."""
    if (file := folder / "tokenizer.json").is_file():
        rust = RustTokenizer.from_file(str(file))

        def encode(texts: list[str]) -> dict[str, Tensor]:
            read = rust.encode_batch(texts)
            ids_BT, mask_BT = (torch.tensor([getattr(one, name) for one in read]) for name in ("ids", "attention_mask"))
            return {"input_ids": ids_BT, "attention_mask": mask_BT}

        return encode
    import transformers

    tokenizer: Any = transformers.SiglipTokenizer(str(folder / "spiece.model"))
    length = text.tokenizer.context_length

    def encode_siglip(texts: list[str]) -> dict[str, Tensor]:
        whole = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        ids_BT = tokenizer(texts, **whole)["input_ids"]
        return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}

    return encode_siglip


def _lines(file: Path, option: str) -> list[str]:
    """Raises FileNotFoundError or ValueError, for one that is missing, empty or no text."""
    text = decode_text(existing(str(file)).read_bytes(), f"{option} {file}")
    lines = [line.strip() for line in text_lines(text) if is_text(line)]
    if not lines:
        raise ValueError(f"{option} {file}: is empty; expected a name or prompt in each line")
    return lines


def _notes(encoder: Encoder) -> list[str]:
    backbone = encoder.backbone
    p = backbone.patch_size
    if backbone.canvas_hw is not None:
        size = f"{backbone.canvas_hw[0]} x {backbone.canvas_hw[1]} pixels"
        return [f"pixels are uint8 (batch, 3, height, width), RGB, of {size}: images are resized to fill them"]
    return [
        f"pixels are uint8 (batch, 3, height, width), RGB, of any height and width that {p} divides; "
        "a batch has one size, images of several go one by one"
    ]


def _loss(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    cosines_B = F.cosine_similarity(ours.double(), theirs.double(), dim=-1)
    difference = float((ours - theirs).abs().max())
    return {"difference": difference, "cosine": float(cosines_B.min()), "mean_cosine": float(cosines_B.mean())}
