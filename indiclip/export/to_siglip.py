"""To transformers' SigLIP of one image size. Its vision tower is LLaVA's, too."""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor

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
from indiclip.export.target import Loss, Reloaded, stretching_note
from indiclip.export.tokenizer_files import pad_losses, tokenizer_losses, transformers_tokenizer
from indiclip.patches import unpatchify
from indiclip.types import Images


class Target(target.Target):
    """See the module."""

    library_name = "transformers"
    bound = 1e-5
    libraries = ("transformers",)
    usage = """\
from transformers import pipeline
classify = pipeline("zero-shot-image-classification", model="{out}")
print(classify("photo.jpg", candidate_labels=["a kite", "a drum"]))
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained("{out}"), AutoProcessor.from_pretrained("{out}")"""

    def check(self, encoder: Encoder) -> list[Loss]:
        tokenizer = encoder.text.tokenizer
        losses = vision_losses(encoder) + text_losses(encoder)
        return losses + tokenizer_losses(tokenizer) + pad_losses(tokenizer)

    def write(self, encoder: Encoder, folder: Path, place: Path) -> None:
        side = own_grid(encoder)[0] * encoder.backbone.patch_size
        mean, std = list(encoder.backbone.mean), list(encoder.backbone.std)
        config = transformers.SiglipConfig(
            text_config=text_config(encoder), vision_config=vision_config(encoder) | {"image_size": side}
        )
        images = transformers.SiglipImageProcessor(
            size={"height": side, "width": side},
            image_mean=mean,
            image_std=std,
            resample=Image.Resampling[encoder.backbone.interpolation.upper()],
        )
        made: Any = transformers.SiglipProcessor
        processor = made(images, transformers_tokenizer(encoder.text, folder))
        write_model(encoder, folder, config, processor, conv=True)

    def reload(self, encoder: Encoder, folder: Path) -> Reloaded:
        theirs: Any = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).eval()
        reader: Any = transformers.AutoProcessor
        processor = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        H, W = own_grid(encoder)
        own_hw = (H * encoder.backbone.patch_size, W * encoder.backbone.patch_size)

        def image(images: Images) -> dict[str, Tensor]:
            pictures = [Image.fromarray(unpatchify(images, i)) for i in range(len(images["sizes_hw"]))]
            height, width = images["sizes_hw"][0]
            size = {"size": {"height": height, "width": width}}
            seen = processor(images=pictures, return_tensors="pt", **size)
            resampled = (height, width) != own_hw
            pooled = theirs.get_image_features(**seen, interpolate_pos_encoding=resampled).pooler_output
            return {"embedding": F.normalize(pooled, dim=-1)}

        cannot = {"mixed sizes, padded": "a batch of SigLIP has one size; siglip2 takes any"}
        if not _reads_positions(encoder):
            why = "SigLIP resamples positions by bicubic interpolation, the run otherwise: use its own size"
            cannot |= dict.fromkeys(("smaller", "larger", "not square"), why)
        notes = [*logit_notes(encoder), stretching_note(*own_hw)]
        return Reloaded(image, text_embedder(theirs, processor.tokenizer), cannot, notes=notes)


def _reads_positions(encoder: Encoder) -> bool:
    """Whether SigLIP's `interpolate_pos_encoding` is how the run reads positions at other sizes."""
    embeds: Any = encoder.backbone.vit.embeds  # type: ignore[union-attr]
    smooth = embeds.pos_embed_antialias and not embeds.pos_embed_use_grid_sample
    other = smooth or embeds.pos_embed_align_corners or embeds.pos_embed_ar_preserving
    return embeds.pos_embed_interp_mode == "bicubic" and not other
