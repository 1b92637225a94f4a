"""Hashes of images and captions, and the search for near duplicates, against all pairs."""

import io
import unicodedata

import numpy as np
import pytest
from PIL import Image

from indiclip.data.images import EncodedImage
from indiclip.data.mela import draw_scene
from indiclip.evals import contamination
from indiclip.evals.contamination import UNHASHABLE, caption_hash, image_hash, near_duplicates


def _distance(one, other):
    return (int(one) ^ int(other)).bit_count()
