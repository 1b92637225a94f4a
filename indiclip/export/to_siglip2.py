"""To transformers' SigLIP 2 of any image size ("NaFlex")."""

from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.export import target
from indiclip.export.parity import own_grid
from indiclip.export.siglip_towers import (
    logit_notes,
    text_config,
    text_embedder,
    text_losses,
    vision_config,
    vision_losses,
    write_model,
)
from indiclip.export.target import Loss, Reloaded
from indiclip.export.tokenizer_files import gemma_losses, gemma_tokenizer
from indiclip.patches import unpatchify
from indiclip.types import Images

_PATCH_SIZE = 16  # of transformers' processor, whatever the folder says
_MOST_PATCHES = 256
_POSITIONS = {
    "pos_embed_interp_mode": "bilinear",
    "pos_embed_use_grid_sample": False,
    "pos_embed_antialias": True,
    "pos_embed_align_corners": False,
    "pos_embed_ar_preserving": False,
}


class Target(target.Target):
    """See the module."""

    library_name = "transformers"
    bound = 1e-5
    libraries = ("transformers",)
    usage = """\
import torch
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained("{out}"), AutoProcessor.from_pretrained("{out}")
inputs = processor(images=[image], text=["a kite", "a drum"], return_tensors="pt")  # of PIL images of any size
print(torch.softmax(model(**inputs).logits_per_image, -1))"""

    def check(self, encoder: Encoder) -> list[Loss]:
        losses = vision_losses(encoder)
        if not losses:
            embeds: Any = encoder.backbone.vit.embeds  # type: ignore[union-attr]
            for name, theirs in _POSITIONS.items():
                if (found := getattr(embeds, name)) != theirs:
                    losses.append(Loss(f"backbone.options.{name}: found {found}; SigLIP 2 has {theirs}", True))
        if isinstance(encoder.backbone, NaFlexViT) and encoder.backbone.patch_size != _PATCH_SIZE:
            found = encoder.backbone.patch_size
            losses.append(Loss(f"backbone.patch_size: found {found}; SigLIP 2's processor cuts {_PATCH_SIZE}"))
        return losses + text_losses(encoder) + gemma_losses(encoder.text.tokenizer)

    def write(self, encoder: Encoder, folder: Path, place: Path) -> None:
        mean, std = list(encoder.backbone.mean), list(encoder.backbone.std)
        config = transformers.Siglip2Config(
            text_config=text_config(encoder),
            vision_config=vision_config(encoder) | {"num_patches": prod(own_grid(encoder))},
        )
        most = min(_MOST_PATCHES, encoder.backbone.max_tokens)
        images = transformers.Siglip2ImageProcessor(
            patch_size=_PATCH_SIZE,
            max_num_patches=most,
            image_mean=mean,
            image_std=std,
            resample=Image.Resampling[encoder.backbone.interpolation.upper()],
        )
        made: Any = transformers.Siglip2Processor
        processor = made(images, gemma_tokenizer(encoder.text))
        write_model(encoder, folder, config, processor, conv=False)

    def reload(self, encoder: Encoder, folder: Path) -> Reloaded:
        theirs: Any = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).eval()
        reader: Any = transformers.AutoProcessor
        processor = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

        def image(images: Images) -> dict[str, Tensor]:
            seen = []
            for i, size_hw in enumerate(images["sizes_hw"]):  # one by one: the processor would enlarge the smaller ones
                picture = Image.fromarray(unpatchify(images, i))
                most = prod(side // _PATCH_SIZE for side in size_hw)
                seen.append(processor(images=[picture], max_num_patches=most, return_tensors="pt"))
            batch = {
                name: pad_sequence([one[name][0] for one in seen], batch_first=True)
                for name in ("pixel_values", "pixel_attention_mask")
            }
            shapes = torch.cat([one["spatial_shapes"] for one in seen])
            pooled = theirs.get_image_features(**batch, spatial_shapes=shapes).pooler_output
            return {"embedding": F.normalize(pooled, dim=-1)}

        most = processor.image_processor.max_num_patches
        enlarged = f"its processor enlarges smaller images, too, to {most} patches; the run reads those as they are"
        return Reloaded(image, text_embedder(theirs, processor.tokenizer), notes=[*logit_notes(encoder), enlarged])
