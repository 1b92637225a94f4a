"""Depth: targets cell by cell, what padding and unknown truths change, and that it learns from generated scenes."""

import math

import numpy as np
import pytest
import torch
from helpers import batch_images, packed, step_losses, tiny_encoder
from test_head import NoWaits, moved, on_fake_gpu
from torch._subclasses import FakeTensorMode

from heads.depth import Depth
from indiclip.generated.mela import Mela
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.module import MultiTask
from indiclip.preprocessing import Preprocessing
from indiclip.types import Batch, targets_of

SIZES = [(40, 24), (16, 48), (32, 32)]


def batch_of(depths: list[np.ndarray | None]) -> Batch:
    images = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(SIZES)]
    # As `collate` gets a map: one row for the image.
    rows = [None if depth is None else torch.from_numpy(depth)[None] for depth in depths]
    return Batch(images=batch_images(images, 8, 64), targets=packed({"depth": rows}), keys=["a", "b", "c"])


def depth_head(encoder, **options) -> Depth:
    torch.manual_seed(1)
    head = Depth(**{"channels": 8, "num_layers": 1, **options})
    head.bind(encoder)
    return head


def depths(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random(size, dtype=np.float32) for size in SIZES]


@pytest.mark.parametrize("upsample", [1, 2, 4])
def test_loss_and_metric_are_those_of_each_cell_centre(upsample):
    """Oracle: loops over images and cells. A centre lies in the pixel that begins at or before it."""
    encoder = tiny_encoder()
    head, truth = depth_head(encoder, upsample=upsample), depths()
    truth[1] = None
    batch, cell = batch_of(truth), 8 // upsample
    features = encoder.features(batch["images"])
    predictions = head.predict(features, batch, encoder)
    found, expected = [], []
    for prediction, depth_HW, (height, width) in zip(predictions, truth, SIZES, strict=True):
        assert prediction["depth"].shape == (height // cell, width // cell)
        if depth_HW is not None:
            found += prediction["depth"].double().flatten().tolist()
            centres = [np.arange(size // cell) * cell + cell // 2 for size in (height, width)]
            expected += depth_HW[np.ix_(*centres)].astype(np.float64).flatten().tolist()
    errors = np.array(found) - np.array(expected)
    terms, _ = step_losses(head.loss(features, batch, encoder))
    assert terms["l1"].item() == pytest.approx(np.abs(errors).mean(), rel=1e-5)
    head.update_metric(predictions, features, batch)
    numbers = {name: value.item() for name, value in head.metric.compute().items()}
    assert numbers == {
        "mae": pytest.approx(np.abs(errors).mean(), rel=1e-5),
        "rmse": pytest.approx(math.sqrt((errors**2).mean()), rel=1e-5),
        "r2": pytest.approx(1 - (errors**2).sum() / np.var(expected) / len(expected), rel=1e-4),
    }


def test_sums_are_in_float32_whatever_the_weights_type():
    """Lightning converts a model with all that it holds; in bfloat16, 256 + 1 is 256."""
    module = MultiTask(tiny_encoder(), [Depth()]).to(torch.bfloat16)
    module.on_validation_epoch_start()
    batch = batch_of(depths())
    module.validation_step({"depth": batch}, 0)
    assert module._scores._filled["depth"]["mae"].sum_abs_error.dtype == torch.float32


def test_an_image_does_not_depend_on_the_others():
    encoder = tiny_encoder()
    head = depth_head(encoder, num_layers=2)
    together, alone = batch_of(depths()), batch_of(depths())
    whole = head.predict(encoder.features(together["images"]), together, encoder)
    image = np.random.default_rng(1).integers(0, 256, (*SIZES[1], 3), dtype=np.uint8)
    alone = Batch(images=batch_images([image], 8, 64), targets={}, keys=["b"])  # and no truth is needed to predict
    one = head.predict(encoder.features(alone["images"]), alone, encoder)
    torch.testing.assert_close(whole[1]["depth"], one[0]["depth"], atol=1e-5, rtol=0)


def test_every_parameter_has_a_gradient_where_no_depth_is_known():
    encoder = tiny_encoder()
    head = depth_head(encoder)
    batch = batch_of([None, None, depths()[2]])
    batch["targets"]["depth"].known[2] = False
    terms, _ = step_losses(head.loss(encoder.features(batch["images"]), batch, encoder))
    terms["l1"].backward()
    assert terms["l1"] == 0
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_samples_without_depth_are_named():
    encoder = tiny_encoder()
    head, batch = depth_head(encoder), batch_of(depths()) | {"targets": {}}
    with pytest.raises(ValueError, match=r"heads\.depth: .* has no depth"):
        head.loss(encoder.features(batch["images"]), batch, encoder)
    with pytest.raises(ValueError, match=r"heads\.depth\.upsample: found 0; expected 1 or more"):
        Depth(upsample=0)


def test_what_an_augmentation_did_not_know_counts_as_nothing():
    encoder, truth = tiny_encoder(), depths()
    head = depth_head(encoder, upsample=1)
    for values_HW in truth:
        values_HW[:, 8:] = np.nan  # all cells but the first column's
    batch = batch_of(truth)
    features = encoder.features(batch["images"])
    term = head.loss(features, batch, encoder).terms["l1"]
    cells = [(i, row) for i, (height, _) in enumerate(SIZES) for row in range(height // 8)]
    found = head(features)
    errors = [abs(found[i, row, 0].item() - truth[i][8 * row + 4, 4]) for i, row in cells]
    assert term.total.item() / term.number.item() == pytest.approx(np.mean(errors), rel=1e-5)
    term.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_a_step_never_waits_for_the_device():
    encoder, batch = tiny_encoder(), batch_of(depths())
    head = depth_head(encoder)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in (encoder, head):
            on_fake_gpu(mode, module)
        with NoWaits():
            batch = moved(batch, "cuda")
            terms, _ = step_losses(head.loss(encoder.features(batch["images"]), batch, encoder))
    assert terms["l1"].device.type == "cuda"


@pytest.mark.slow
def test_it_learns_the_paint_order_of_scenes():
    """In a hundred steps it explains a good part of the depth of scenes that it has not seen."""
    source = Source("depth", Mela(64, 48, people=0.0, depth=True, seed=3), 16, max_tokens=36)
    held_out = Source("depth", Mela(32, 48, people=0.0, depth=True, seed=4), 32, max_tokens=36)
    steps, unseen = (
        Steps([source], 0, Preprocessing(8), train=True),
        Steps([held_out], 0, Preprocessing(8), train=False),
    )
    encoder = tiny_encoder()
    head = depth_head(encoder, channels=32)
    optimizer = torch.optim.AdamW([*encoder.backbone.parameters(), *head.parameters()], lr=3e-3)
    for number in range(100):
        batch = steps[number]["depth"]
        terms, _ = step_losses(head.loss(encoder.features(batch["images"]), batch, encoder))
        optimizer.zero_grad()
        terms["l1"].backward()
        optimizer.step()
    batch = unseen[0]["depth"]
    with torch.no_grad():
        features = encoder.features(batch["images"])
        predictions = head.predict(features, batch, encoder)
    head.update_metric(predictions, features, batch)
    assert head.metric.compute()["r2"] > 0.2
    panels, _ = head.visualize(np.zeros((48, 48, 3), np.uint8), predictions[0], targets_of(batch, 0))
    assert [panel.title.partition(":")[0] for panel in panels] == ["image", "model", "truth"]
    assert {panel.image_HW3.shape for panel in panels} == {(48, 48, 3)}
