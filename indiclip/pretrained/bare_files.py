"""Files of weights alone, for an encoder whose architecture is given: whose names they are is told by the names."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import naflexvit
from torch import Tensor

from indiclip.names import shorten
from indiclip.pretrained.open_clip_images import head_tensors, resnet_tensors
from indiclip.pretrained.open_clip_images import transformer_tensors as image_tensors
from indiclip.pretrained.open_clip_texts import hf_tensors
from indiclip.pretrained.open_clip_texts import transformer_tensors as text_tensors
from indiclip.pretrained.transformers_images import tensors_by_timm
from indiclip.pretrained.transformers_texts import LEFT_OUT, tower_tensors
from indiclip.pretrained.weights import PARTS, Weights, of_part, read_tensors, state_dict

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_OURS = re.compile(r"(backbone\.(vit|net)|text\.model)\.")
_TIMM = re.compile(r"(patch_embed|blocks|stages|stem|layer[1-4]|layers\.\d+\.blocks|conv_stem|conv1|embeds|norm_pre)\.")
_TEXT = re.compile(r".*(word_embeddings|token_embedding|embed_tokens|wte)\.|(.*\.)?shared\.weight")
_CLASSIFIERS = ("head.", "fc.", "classifier.", "head_dist.")
_LOGITS = ("logit_scale", "logit_bias")
_OF_OPENAI = ("input_resolution", "context_length", "vocab_size")
_UNKNOWN = "it names no activations, epsilons or heads: these are the configuration's"


@dataclass
class BareFile(Weights):
    """Tensors by their library's names; `for_encoder` gives ours.

    Args:
        library: Whose names: `indiclip`, `open_clip`, `transformers`, `timm` (an image tower), `text` (transformers').
    """

    library: str = ""

    @property
    def parts(self) -> list[str]:
        if self.library == "indiclip":
            return super().parts
        if self.library == "timm":
            return ["image"]
        if self.library == "text":
            projects = any(re.match(r"(text_model\.)?(head|text_projection)\.", name) for name in self.tensors)
            return ["text", "projections"] if projects else ["text"]
        logits = [part for part in ("logit_scale",) if part in self.tensors]
        return ["image", "text", "projections", *logits]

    def for_encoder(self, encoder: Any, parts: Collection[str] = PARTS) -> Weights:
        """The tensors of these parts by the encoder's names.

        Raises:
            ValueError: They are not those of its towers.
        """
        convert = {"timm": _of_timm, "text": _of_text, "open_clip": _of_open_clip, "transformers": _of_dual}
        tensors = dict(self.tensors)
        if self.library in ("open_clip", "transformers"):  # the other tower need not fit
            tensors = {name: tensor for name, tensor in tensors.items() if {_side(name), "projections"} & {*parts}}
        found = Weights(self.origin, {}, tensors, [*self.unused], [*self.ignored], [*self.notes, _UNKNOWN])
        if self.library in convert:
            try:
                convert[self.library](found, encoder)
            except (KeyError, AttributeError) as error:
                raise ValueError(
                    f"model.encoder.init_from: {self.origin}: has {self.library}'s names, but not the tensors of the "
                    f"encoder's towers: {shorten(error.args[0])}"
                ) from error
        return found


def read_bare_file(file: Path, origin: str) -> BareFile:
    """A `.safetensors`, or a file of `torch.save` that holds tensors and plain values alone.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged, holds other objects, or has names that nobody knows.
    """
    tensors = state_dict(read_tensors(file))
    if any(name.startswith("encoder.backbone.") for name in tensors):  # one of our modules
        heads = [name for name in tensors if not name.startswith("encoder.")]
        ours = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
        return BareFile(origin, {}, ours, ignored=heads, library="indiclip")
    library = _library(tensors, origin)
    known = [name for part in PARTS for name in of_part(part, tensors)]
    unused = [name for name in tensors if library == "indiclip" and name not in known]
    return BareFile(origin, {}, tensors, unused, library=library)


def _library(tensors: dict[str, Tensor], origin: str) -> str:
    names = list(tensors)
    for pattern, library in {_OURS: "indiclip", re.compile("visual\\."): "open_clip"}.items():
        if any(pattern.match(name) for name in names):
            return library
    if any(name.startswith("vision_model.") for name in names) and any(
        name.startswith("text_model.") for name in names
    ):
        return "transformers"
    if any(_TEXT.match(name) for name in names):
        return "text"
    if any(_TIMM.match(name) for name in names):
        return "timm"
    found = ", ".join(names[:3]) or "no tensors"
    raise ValueError(f"{origin}: found {found}; expected names of ours, timm, OpenCLIP or transformers")


def _side(name: str) -> str:
    """Of which part a dual encoder's tensor is, by OpenCLIP's or transformers' name; both sides have projections."""
    if name in _LOGITS:
        return "logit_scale"
    return "image" if name.startswith(("visual.", "vision_model.", "visual_projection.")) else "text"


def _of_timm(found: Weights, encoder: Any) -> None:
    found.tensors, left = _image(found.tensors, encoder)
    found.ignored += left


def _image(tensors: dict[str, Tensor], encoder: Any) -> tuple[dict[str, Tensor], list[str]]:
    """timm's names for the encoder's backbone, and the classifier's."""
    backbone = encoder.backbone
    where = "vit" if hasattr(backbone, "vit") else "net"
    net = getattr(backbone, where)
    if where == "vit":
        tensors = naflexvit.checkpoint_filter_fn(tensors, net)
    own = net.state_dict()
    left = [name for name in tensors if name not in own and name.startswith(_CLASSIFIERS)]
    return {f"backbone.{where}.{name}": tensor for name, tensor in tensors.items() if name not in left}, left


def _of_text(found: Weights, encoder: Any) -> None:
    found.tensors, others = tower_tensors(encoder.text.model, found.tensors)
    for name in others:
        (found.ignored if LEFT_OUT.match(name) else found.unused).append(name)


def _of_open_clip(found: Weights, encoder: Any) -> None:
    tensors, of_text = found.tensors, {}
    image = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    found.ignored += [name for name in tensors if name in _OF_OPENAI]
    for name, tensor in tensors.items():
        if not name.startswith("visual.") and name not in (*_OF_OPENAI, *_LOGITS):
            of_text[name.removeprefix("text.")] = tensor
    if "class_embedding" in image:
        moved = image_tensors(image, None, hasattr(encoder.backbone.vit.fc_norm, "weight"))
    elif "attnpool.positional_embedding" in image:
        moved = resnet_tensors(image, encoder.backbone.net)
    else:
        trunk = {name.removeprefix("trunk."): t for name, t in image.items() if name.startswith("trunk.")}
        moved, classifier = _image(trunk, encoder)
        moved |= head_tensors(image)
        # Without a projection of its own the trunk's classifier is one.
        moved |= {f"image_projection.{name.rpartition('.')[2]}": trunk[name] for name in classifier}
    is_own = any(name.startswith("token_embedding.") for name in of_text)
    moved |= text_tensors(of_text) if is_own else hf_tensors(of_text)
    found.tensors = moved | {name: tensors[name] for name in _LOGITS if name in tensors}


def _of_dual(found: Weights, encoder: Any) -> None:
    tensors = found.tensors
    image = {n.removeprefix("vision_model."): t for n, t in tensors.items() if n.startswith("vision_model.")}
    moved = {f"backbone.vit.{name}": tensor for name, tensor in (tensors_by_timm(image) if image else {}).items()}
    words = {name: tensor for name, tensor in tensors.items() if name.startswith("text_")}
    text, others = tower_tensors(encoder.text.model, words)
    found.unused += others
    if "visual_projection.weight" in tensors:
        moved["image_projection.weight"] = tensors["visual_projection.weight"]
    found.tensors = moved | text | {name: tensors[name] for name in _LOGITS if name in tensors}
