"""A patch keeps its place when others are dropped: towers give what they give where a mask hides the others."""

import pytest
import torch
from helpers import batch_images, noise
from timm.models.naflexvit import NaFlexEmbeds
from torch import Tensor

from indiclip.backbone import NaFlexViT

KINDS = {
    "table": {},
    "bilinear table": {"pos_embed_interp_mode": "bilinear"},
    "table that keeps its proportions": {"pos_embed_ar_preserving": True},
    "class token": {"class_token": True, "reg_tokens": 1},
}
OTHERS = {
    "table of whole grids": {"pos_embed_use_grid_sample": False},
    "factorized": {"pos_embed": "factorized"},
    "rope": {"rope_type": "axial", "pos_embed": "none"},
    "mixed rope": {"rope_type": "mixed", "pos_embed": "none"},
}
KEEP = torch.zeros(2, 48, dtype=torch.bool)
KEEP[0, :24], KEEP[1, ::2] = True, True


def tower_of(options):
    torch.manual_seed(0)
    return NaFlexViT(width=32, depth=2, num_heads=2, patch_size=8, options=options).eval()


def whole_and_kept():
    """Of images of two shapes; all but the first three rows of one are gone, and every other patch of the other."""
    images = batch_images([noise(48, 64, 0), noise(64, 48, 1)], 8, 64)
    kept = {
        name: torch.stack([value[i][KEEP[i]] for i in range(2)]) if isinstance(value, Tensor) else value
        for name, value in images.items()
    }
    return images, kept | {"num_patches": [24, 24]}


@pytest.mark.parametrize("kind", KINDS)
def test_kept_patches_are_those_of_a_mask(kind):
    tower, (images, kept) = tower_of(KINDS[kind]), whole_and_kept()
    assert tower.reads_parts
    with torch.no_grad():
        whole = tower.vit.forward_features(tower.normalise(images), images["coords_BN2"], KEEP)["patches"]
        found = tower(kept).tokens_BND
    expected = [whole[i, tower.vit.num_prefix_tokens :][KEEP[i]] for i in range(2)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
def test_towers_that_know_whole_grids_alone_refuse_parts(kind):
    tower, (images, kept) = tower_of(OTHERS[kind]), whole_and_kept()
    assert not tower.reads_parts
    tower(images)
    with pytest.raises(ValueError, match="found images with dropped patches"):
        tower(kept)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_tables_are_read_as_timm_reads_them(mode, align_corners):
    """Against timm's own method, which samples a grid; gradients too."""
    options = {"pos_embed_interp_mode": mode, "pos_embed_align_corners": align_corners, "pos_embed_grid_size": (5, 7)}
    ours = tower_of(options).vit.embeds
    coords = whole_and_kept()[0]["coords_BN2"]
    slopes = torch.randn(2, 48, 32)
    found = []
    for kind in (type(ours), NaFlexEmbeds):
        x, ours.pos_embed.grad = torch.zeros(2, 48, 32), None
        kind._apply_learned_naflex_pos_embed_grid_sample(ours, x, coords)
        (x * slopes).sum().backward()
        found.append((x.detach(), ours.pos_embed.grad))
    assert type(ours) is not NaFlexEmbeds
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
