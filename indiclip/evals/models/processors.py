"""Whether the image processor and the tokenizer of a transformers folder are those of its model."""

import warnings
from typing import Any

import numpy as np
from PIL import Image

_NO_LIMIT = 1_000_000  # of a tokenizer that states none, which transformers calls 1e30
_FEWER = 0.99  # of the model's tokens; embeddings are padded to round numbers
_LEGACY_EOS = 2


def check_processor(name: str, config: Any, processor: Any) -> None:
    """Raise ValueError where they cannot go together, and warn where they seem not to.

    Args:
        name: Of the model, for messages.
        config: Its configuration.
        processor: What `AutoProcessor` made of the folder.
    """
    _check_images(name, config.vision_config, processor.image_processor)
    _check_texts(name, config.text_config, processor.tokenizer)


def _check_images(name: str, config: Any, images: Any) -> None:
    given = images(images=[Image.fromarray(np.zeros((32, 48, 3), np.uint8))], return_tensors="pt")["pixel_values"]
    if not hasattr(config, "image_size"):  # SigLIP 2 of any size: patches, of which each is a row
        if given.shape[-1] != 3 * config.patch_size**2:
            side = round((given.shape[-1] / 3) ** 0.5)
            expected = f"{config.patch_size}, vision_config.patch_size of its model"
            raise ValueError(f"{name}: its image processor: found patches of {side} pixels; expected {expected}")
        return
    size, (height, width) = config.image_size, given.shape[-2:]
    if (height, width) != (size, size):
        expected = f"{size}x{size}, vision_config.image_size of its model"
        raise ValueError(f"{name}: its image processor: found {width}x{height} pixels; expected {expected}")


def _check_texts(name: str, config: Any, tokenizer: Any) -> None:
    roles = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    ids = [getattr(tokenizer, role, None) for role in roles]
    tokens = max(tokenizer.vocab_size, *(number + 1 for number in ids if number is not None))
    known = f"{config.vocab_size:,}, text_config.vocab_size of its model"
    if tokens > config.vocab_size:
        raise ValueError(f"{name}: its tokenizer: found {tokens:,} tokens; expected at most {known}")
    if len(tokenizer) < _FEWER * config.vocab_size:
        warnings.warn(f"{name}: its tokenizer has {len(tokenizer):,} tokens, not {known}", stacklevel=5)
    # CLIP takes the vector at the end's token for the text's; its first configs say 2 and mean the largest id.
    end = config.eos_token_id
    if config.model_type == "metaclip_2_text_model" or (config.model_type == "clip_text_model" and end != _LEGACY_EOS):
        row = tokenizer("a")["input_ids"]
        if end not in row:
            expected = f"{end}, text_config.eos_token_id of its model"
            raise ValueError(f"{name}: its tokenizer: found {row[-1]} at the end of a text; expected {expected}")
    longest, read = tokenizer.model_max_length, config.max_position_embeddings
    if longest < _NO_LIMIT and longest != read:
        said = f"its tokenizer is made for texts of {longest} tokens, and its model reads {read}, at which they are cut"
        warnings.warn(f"{name}: {said}", stacklevel=5)
