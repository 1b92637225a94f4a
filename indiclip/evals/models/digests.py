"""What tells two embedders apart: sums over their weights, over what they make of a picture, and over their tokens."""

import zlib

import numpy as np
from torch import Tensor, nn

from indiclip.evals.models.embedder import Embedder, View
from indiclip.pretrained.weights import crc32_of

# What tokenizers differ in: scripts, capitals, digits, punctuation, composed letters, joiners, an emoji.
_PLAIN_TEXT = (
    "Three Kites, 25 lamps & a cafe\u0301! तीन पतंग और २५ दीये। ক্ষুদ্র প্রদীপ ૨૫ દીવા ਪਤੰਗ ପତଙ୍ଗ பட்டம் గాలిపటం ಗಾಳಿಪಟ "
    "പട്ടം\u200d සරුංගලය پتنگ، چراغ ꯃꯩꯔꯥ ᱫᱤᱭᱟ \U0001fa81"
)


def crc32_of_weights(model: Embedder) -> str:
    """Of all weights and buffers, by name."""
    crc = 0
    for module in vars(model).values():
        crc = crc32_of(module.state_dict(), crc) if isinstance(module, nn.Module) else crc
    return f"{crc:08x}"


def crc32_of_prepared(model: Embedder, view: View) -> str:
    """Of a picture of one colour, which every machine resizes alike: size, place and range of what the model gets."""
    picture = np.full((61, 97, 3), (20, 110, 230), np.uint8)
    batch, crc = model.collate([model.prepare(picture, view)]), 0
    for tensor in batch.values() if isinstance(batch, dict) else [batch]:
        if isinstance(tensor, Tensor):
            rounded = np.round(tensor.double().numpy(), 3) + 0.0  # no -0
            crc = zlib.crc32(rounded.tobytes(), zlib.crc32(str(rounded.shape).encode(), crc))
    return f"{crc:08x}"


def crc32_of_token_ids(model: Embedder) -> str:
    """Of a text in many scripts, and of one that is cut: a tokenizer may be edited while the weights stay."""
    crc = 0
    for name, tensor in sorted(model.tokenize([_PLAIN_TEXT, 100 * _PLAIN_TEXT]).items()):
        ids = tensor.cpu().long().numpy()
        crc = zlib.crc32(ids.tobytes(), zlib.crc32(f"{name} {ids.shape}".encode(), crc))
    return f"{crc:08x}"
