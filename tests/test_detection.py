"""heads/detection.py, on features made by hand: torchvision's FCOS and pycocotools are the oracles."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import features_of, packed, step_losses
from processes import on_ranks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision import ops
from torchvision.models.detection import FCOS

from heads.detection import Detection, DetectionMetric, matches_at_half
from indiclip.encoder import Encoder
from indiclip.ratios import over_all_ranks
from indiclip.tasks.fcos import FCOSOutputs, assign, fcos_losses, giou_loss, make_locations
from indiclip.types import Batch, Features, Origin, targets_of

WIDTH = 16


def head_for(stride: int = 8, num_classes: int | None = 3, **options: Any) -> Detection:
    torch.manual_seed(0)
    head = Detection(num_classes, **({"out_channels": 16, "num_convs": 1} | options))
    head.bind(encoder_with(stride))
    return head


def encoder_with(stride: int = 8) -> Encoder:
    return cast(Encoder, SimpleNamespace(backbone=SimpleNamespace(width=WIDTH, stride=stride)))


def batch_of(
    sizes_hw: list[tuple[int, int]],
    boxes: list[list[list[float]]],
    classes: list[list[int]],
    crowd: list[list[bool]] | None = None,
    scale: list[tuple[float, float]] | None = None,
) -> Batch:
    lists: dict[str, list[Any]] = {
        "boxes_xyxy": [torch.tensor(rows, dtype=torch.float32).reshape(-1, 4) for rows in boxes],
        "classes": [torch.tensor(rows, dtype=torch.long) for rows in classes],
    }
    if crowd is not None:
        lists["crowd"] = [torch.tensor(rows, dtype=torch.bool) for rows in crowd]
    targets = packed(lists)
    images = {"sizes_hw": sizes_hw, "scale": scale or [(1.0, 1.0)] * len(sizes_hw)}
    return cast(Batch, {"images": images, "targets": targets, "keys": [str(i) for i in range(len(sizes_hw))]})


def random_boxes(rng: np.random.Generator, count: int, height: int, width: int) -> Tensor:
    corners = rng.random((count, 2, 2)) * [width, height]
    boxes_M4 = np.concatenate([corners.min(1), corners.max(1) + 1], 1).clip(0, [width, height] * 2)
    return torch.from_numpy(boxes_M4).float()


def random_outputs(cells: int, classes: int) -> FCOSOutputs:
    return FCOSOutputs(
        logits_BAC=torch.randn(2, cells, classes),
        ltrb_BA4=torch.rand(2, cells, 4) * 4 + 0.1,
        centerness_BA=torch.randn(2, cells),
        valid_BA=torch.ones(2, cells, dtype=torch.bool),
    )


def assign_one(locations, boxes_M4: Tensor, classes_M: Tensor, crowd_M: Tensor, radius: float) -> list[Tensor]:
    """For a batch of one image."""
    index_1M = torch.arange(len(boxes_M4))[None]
    return [part[0] for part in assign(locations, boxes_M4, classes_M, crowd_M, index_1M, radius)]


class Torchvision(FCOS):
    """torchvision's FCOS without the network; it keeps which box it matched to which anchor."""

    def __init__(self, num_classes: int, **options: Any) -> None:
        backbone = nn.Module()
        backbone.out_channels = 32
        super().__init__(backbone, num_classes, **options)
        inner = self.head.compute_loss

        def keeping(targets, outputs, anchors, matched):
            self.matched = matched
            return inner(targets, outputs, anchors, matched)

        self.head.compute_loss = keeping


SIZES, STRIDES = [(24, 32), (12, 16), (6, 8)], [4.0, 8.0, 16.0]


def as_anchors(locations) -> Tensor:
    half_A1 = locations.strides_A[:, None] / 2
    return torch.cat([locations.centres_A2 - half_A1, locations.centres_A2 + half_A1], 1)


def test_assignment_and_losses_are_torchvisions() -> None:
    """Same cells for the same boxes, and the same three losses, without padding and crowds."""
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    locations = make_locations(SIZES, STRIDES, 8.0, torch.device("cpu"))
    outputs = random_outputs(len(locations.strides_A), 5)
    targets = [
        {"boxes": random_boxes(rng, m, 96, 128), "labels": torch.from_numpy(rng.integers(0, 5, m))} for m in (9, 4)
    ]
    oracle = Torchvision(5)
    expected = oracle.compute_loss(
        targets,
        {
            "cls_logits": outputs.logits_BAC,
            "bbox_regression": outputs.ltrb_BA4,
            "bbox_ctrness": outputs.centerness_BA[..., None],
        },
        [as_anchors(locations)] * 2,
        [rows * columns for rows, columns in SIZES],
    )
    none = [torch.zeros(len(target["labels"]), dtype=torch.bool) for target in targets]
    boxes = packed({"boxes_xyxy": [target["boxes"] for target in targets]})["boxes_xyxy"]
    labels_R = torch.cat([target["labels"] for target in targets])
    assigned = assign(locations, boxes.values, labels_R, torch.cat(none), boxes.index_BM, 1.5)
    for classes_A, ltrb_A4, ignored_A, target, matched_A in zip(*assigned, targets, oracle.matched, strict=True):
        assert (matched_A >= 0).sum() > 20
        torch.testing.assert_close(classes_A, torch.where(matched_A < 0, -1, target["labels"][matched_A]))
        positive_A = classes_A >= 0
        torch.testing.assert_close(
            locations.boxes(ltrb_A4)[positive_A], target["boxes"][matched_A][positive_A], rtol=0, atol=1e-4
        )
        assert not ignored_A.any()
    losses = over_all_ranks(fcos_losses(outputs, *assigned))
    names = {"classification": "classification", "box": "bbox_regression", "centerness": "bbox_ctrness"}
    for ours, theirs in names.items():
        torch.testing.assert_close(losses[ours], expected[theirs], rtol=1e-5, atol=1e-6)


def test_the_box_loss_is_torchvisions_to_the_bit() -> None:
    torch.manual_seed(1)
    ltrb_BA4, gt_BA4 = (torch.rand(2, 500, 4) * 8 + 0.01 for _ in range(2))
    gt_BA4[:, :9] = ltrb_BA4[:, :9]
    found, gradients = [], []
    sign_4 = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    for loss in (giou_loss, lambda a, b: ops.generalized_box_iou_loss(a * sign_4, b * sign_4)):
        inputs = ltrb_BA4.clone().requires_grad_()
        found.append(loss(inputs, gt_BA4))
        (found[-1] * torch.linspace(0.1, 3, 500)).sum().backward()
        gradients.append(inputs.grad)
    assert torch.equal(*found)
    assert torch.equal(*gradients)


def test_detections_are_torchvisions() -> None:
    torch.manual_seed(4)
    head = head_for(num_classes=5, topk=10_000, nms_thresh=0.5)
    locations = make_locations(SIZES, STRIDES, 8.0, torch.device("cpu"))
    outputs = random_outputs(len(locations.strides_A), 5)
    head.forward = lambda features: (outputs, locations)  # type: ignore[method-assign]
    batch = batch_of([(96, 128), (90, 70)], [[], []], [[], []])
    found = head.predict(cast(Features, None), batch, encoder_with())

    oracle = Torchvision(5, score_thresh=head.score_thresh, nms_thresh=0.5, topk_candidates=10_000)
    counts = [rows * columns for rows, columns in SIZES]
    outputs = {
        "cls_logits": list(outputs.logits_BAC.split(counts, 1)),
        "bbox_regression": list(outputs.ltrb_BA4.split(counts, 1)),
        "bbox_ctrness": list(outputs.centerness_BA[..., None].split(counts, 1)),
    }
    anchors = [list(as_anchors(locations).split(counts))] * 2
    for ours, theirs in zip(found, oracle.postprocess_detections(outputs, anchors, [(96, 128), (90, 70)]), strict=True):
        assert len(ours["scores"]) == 100
        torch.testing.assert_close(ours["scores"], theirs["scores"])
        torch.testing.assert_close(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["boxes_xyxy"], theirs["boxes"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("stride", [7, 8, 14, 28])
def test_decoding_inverts_the_targets(stride: int) -> None:
    """The regression that a head is asked for, decoded, is the ground truth; strides need not be whole."""
    rng = np.random.default_rng(stride)
    head = head_for(stride)
    _, locations = head(features_of([torch.randn(9, 13, WIDTH)], stride))
    height, width = 9 * stride, 13 * stride
    assert torch.equal(locations.strides_A.unique(), torch.tensor([stride / 2, stride, stride * 2]))
    torch.testing.assert_close(locations.centres_A2[0], torch.tensor([stride / 4, stride / 4]))
    boxes_M4 = random_boxes(rng, 12, height, width)
    classes_M = torch.arange(12)
    classes_A, ltrb_A4, _ = assign_one(locations, boxes_M4, classes_M, torch.zeros(12, dtype=torch.bool), 1.5)
    positive_A = classes_A >= 0
    assert len(classes_A[positive_A].unique()) >= 6
    torch.testing.assert_close(
        locations.boxes(ltrb_A4)[positive_A], boxes_M4[classes_A[positive_A]], rtol=0, atol=1e-4 * stride
    )


def test_cells_of_every_scale_cover_an_odd_map() -> None:
    """13 x 9 patches at half the scale are 7 x 5 cells, of which the last reach over the edge."""
    head = head_for(scales=[1.0, 0.5, 0.25])
    outputs, locations = head(features_of([torch.randn(13, 9, WIDTH)]))
    assert outputs.logits_BAC.shape == (1, 13 * 9 + 7 * 5 + 4 * 3, 3)
    torch.testing.assert_close(locations.centres_A2[13 * 9 : 13 * 9 + 5, 0], torch.tensor([8.0, 24, 40, 56, 72]))
    torch.testing.assert_close(locations.centres_A2[13 * 9 : 13 * 9 + 35 : 5, 1], torch.arange(7) * 16.0 + 8)


def test_no_size_of_box_falls_between_two_scales() -> None:
    """Every square around a cell's centre is answered for by exactly one scale (torchvision drops the borders)."""
    locations = make_locations([(32, 32), (16, 16), (8, 8)], [4.0, 8.0, 16.0], 4.0, torch.device("cpu"))
    for half in (3.0, 13.9, 14.0, 14.1, 15.9, 16.0, 16.1, 31.9, 32.0, 33.0, 60.0):
        box_14 = torch.tensor([[64 - half, 64 - half, 64 + half, 64 + half]])
        centre_A = (locations.centres_A2 - 64).abs().amax(1) / locations.strides_A  # the cells that touch the centre
        furthest_A = half + (locations.centres_A2 - 64).abs().amax(1)
        classes_A, _, _ = assign_one(locations, box_14, torch.tensor([0]), torch.tensor([False]), 0.6)
        inside_A = (centre_A < 0.6) & (locations.ltrb(box_14[:, None])[0].amin(1) > 0)
        least_A, most_A = (locations.reach_A2 * locations.strides_A[:, None]).unbind(1)
        torch.testing.assert_close(classes_A >= 0, inside_A & (furthest_A > least_A) & (furthest_A <= most_A))
        assert (classes_A >= 0).any()


def test_the_smaller_of_two_boxes_wins_even_by_little() -> None:
    """torchvision compares 1e8 - area in float32, which cannot tell 100 from 103 square pixels apart."""
    locations = make_locations([(8, 8)], [8.0], 8.0, torch.device("cpu"))
    boxes_M4 = torch.tensor([[15.0, 15.0, 25.3, 25.0], [15.0, 15.0, 25.0, 25.0]])
    classes_A, _, _ = assign_one(locations, boxes_M4, torch.tensor([0, 1]), torch.tensor([False, False]), 1.5)
    assert classes_A[2 * 8 + 2] == 1


CASES = {
    "objects": ([[[8, 8, 40, 40]], [[0, 0, 20, 30], [30, 10, 60, 44]]], [[1], [0, 2]], [[False], [False, False]]),
    "one image without": ([[[8, 8, 40, 40]], []], [[1], []], [[False], []]),
    "no objects": ([[], []], [[], []], [[], []]),
    "all crowd": ([[[0, 0, 104, 72]], [[0, 0, 64, 64]]], [[1], [2]], [[True], [True]]),
}


@pytest.mark.parametrize("scales", [[2.0, 1.0, 0.5], [1.0]])
@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str, scales: list[float]) -> None:
    head = head_for(scales=scales)
    features = features_of([torch.randn(9, 13, WIDTH), torch.randn(8, 8, WIDTH)])
    losses = step_losses(head.loss(features, batch_of([(72, 104), (64, 64)], *CASES[case]), encoder_with())).terms
    assert set(losses) == {"classification", "box", "centerness"}
    assert all(torch.isfinite(loss) and loss >= 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert not [name for name, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    has_box = case in ("objects", "one image without")
    assert (losses["box"] > 0) == has_box
    assert bool(head.towers.ltrb.weight.grad.any()) == has_box


def test_a_crowd_is_neither_object_nor_background() -> None:
    """A crowd over the whole image leaves nothing to learn; over a part, the rest is background as before."""
    head = head_for()
    features = features_of([torch.randn(8, 8, WIDTH)])

    def classification(boxes: list[list[float]], crowd: list[bool]) -> Tensor:
        batch = batch_of([(64, 64)], [boxes], [[0] * len(boxes)], [crowd])
        return step_losses(head.loss(features, batch, encoder_with())).terms["classification"]

    whole, empty = classification([[0, 0, 64, 64]], [True]), classification([], [])
    left, right = classification([[0, 0, 32, 64]], [True]), classification([[32, 0, 64, 64]], [True])
    assert whole == 0
    assert empty > 0
    torch.testing.assert_close(left + right, empty)
    # An object inside the crowd is still an object.
    both = classification([[0, 0, 64, 64], [8, 8, 40, 40]], [True, False])
    assert both > 0


def test_what_lies_beside_an_image_does_not_matter() -> None:
    """The same loss and detections for an image alone and beside a larger one, at odd sizes."""
    torch.manual_seed(5)
    head = head_for(scales=[2.0, 1.0, 0.5, 0.25], score_thresh=0.0, topk=100_000).eval()
    for parameter in head.towers.parameters():
        nn.init.normal_(parameter, std=0.2)
    maps = [torch.randn(13, 9, WIDTH), torch.randn(11, 20, WIDTH)]
    sizes = [(104, 72), (88, 160)]
    boxes = [[[3.0, 5.0, 50.0, 60.0]], [[20.0, 10.0, 150.0, 80.0], [0.0, 60.0, 30.0, 88.0]]]
    classes = [[1], [0, 2]]
    crowd = [[False], [False, False]]
    both, batch = features_of(maps), batch_of(sizes, boxes, classes, crowd)
    alone = [
        (features_of([maps[i]]), batch_of(sizes[i : i + 1], boxes[i : i + 1], classes[i : i + 1], crowd[i : i + 1]))
        for i in range(2)
    ]
    positives = []
    for features, one in alone:
        _, locations = head(features)
        target = targets_of(one, 0)
        classes_A, _, _ = assign_one(locations, target["boxes_xyxy"], target["classes"], target["crowd"], 1.5)
        positives.append(int((classes_A >= 0).sum()))
    assert min(positives) > 0
    together = step_losses(head.loss(both, batch, encoder_with())).terms
    apart = [step_losses(head.loss(features, one, encoder_with())).terms for features, one in alone]
    for name, value in together.items():
        mean = sum(p * losses[name] for p, losses in zip(positives, apart, strict=True)) / sum(positives)
        torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-5)
    for found, (features, one) in zip(head.predict(both, batch, encoder_with()), alone, strict=True):
        (expected,) = head.predict(features, one, encoder_with())
        assert len(found["scores"]) == len(expected["scores"]) == 100
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["boxes_xyxy"], expected["boxes_xyxy"], rtol=1e-4, atol=1e-3)


def test_detections_lie_inside_their_image() -> None:
    head = head_for(score_thresh=0.0, topk=100_000, detections_per_image=100_000, nms_thresh=1.0)
    nn.init.constant_(head.towers.ltrb.bias, 3.0)  # boxes of 40 strides
    features = features_of([torch.randn(5, 3, WIDTH), torch.randn(9, 12, WIDTH)])
    for found, (height, width) in zip(
        head.predict(features, batch_of([(40, 24), (72, 96)], [[], []], [[], []]), encoder_with()),
        [(40, 24), (72, 96)],
        strict=True,
    ):
        cells = sum(-(-height // stride) * -(-width // stride) for stride in (4, 8, 16))
        assert len(found["scores"]) == cells * 3  # padding has no detection, whatever its score
        assert found["boxes_xyxy"].min() >= 0
        assert (found["boxes_xyxy"] <= torch.tensor([width, height, width, height])).all()


def test_low_precision_features_give_exact_boxes() -> None:
    """bfloat16 keeps 8 bits: a coordinate of 1,000 would be off by 4 pixels."""
    head = head_for().bfloat16()
    features = features_of([torch.randn(8, 8, WIDTH)])
    features.tokens = features.tokens.bfloat16()
    outputs, _ = head(features)
    assert {outputs.logits_BAC.dtype, outputs.ltrb_BA4.dtype, outputs.centerness_BA.dtype} == {torch.float32}


def test_learns_two_rectangles() -> None:
    """From fixed features that tell the cells apart, to an average precision (IoU 0.5) of 1."""
    torch.manual_seed(0)
    head = head_for(out_channels=32)
    features = features_of([torch.randn(8, 8, WIDTH), torch.randn(8, 8, WIDTH)])
    boxes = [[[6.0, 10.0, 34.0, 52.0]], [[30.0, 4.0, 62.0, 30.0], [4.0, 36.0, 40.0, 60.0]]]
    batch = batch_of([(64, 64)] * 2, boxes, [[0], [1, 2]])
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    head.update_metric(head.predict(features, batch, encoder_with()), features, batch)
    assert head.metric.compute()["ap50"] < 0.5
    head.metric.reset()
    for _ in range(80):
        optimizer.zero_grad()
        sum(step_losses(head.loss(features, batch, encoder_with())).terms.values()).backward()
        optimizer.step()
    head.update_metric(head.predict(features, batch, encoder_with()), features, batch)
    assert head.metric.compute()["ap50"] > 0.99
    assert head.metric.compute()["ap75"] > 0.99


def hand_made(seed: int, images: int) -> tuple[Batch, list[dict[str, Tensor]]]:
    """Truths and detections of images that were resized by factors of their own; areas off the buckets' borders."""
    rng = np.random.default_rng(seed)
    boxes, classes, crowd, scale, predictions = [], [], [], [], []
    for _ in range(images):
        m = int(rng.integers(0, 8))
        truth = (random_boxes(rng, m, 200, 300) + torch.tensor([0.0, 0.0, 3.0, 3.0])).round(decimals=1)
        moved = truth[rng.random(m) < 0.8] + torch.from_numpy(rng.normal(0, 4, 4)).float()
        found = torch.cat([moved, random_boxes(rng, 5, 200, 300)])
        found[:, 2:] = torch.maximum(found[:, 2:], found[:, :2] + 2)
        factor = (float(rng.choice([0.5, 1.0, 0.8])), float(rng.choice([0.5, 1.0, 1.25])))
        wide = torch.tensor([factor[1], factor[0]] * 2)
        boxes.append((truth * wide).tolist())
        classes.append(rng.integers(0, 3, m).tolist())
        crowd.append((rng.random(m) < 0.15).tolist())
        scale.append(factor)
        labels = torch.from_numpy(rng.integers(0, 3, len(found)))
        labels[: min(len(moved), m)] = torch.tensor(classes[-1][: len(moved)], dtype=torch.long)[: min(len(moved), m)]
        scores = torch.from_numpy(rng.random(len(found))).float()  # no ties, which the backends order differently
        predictions.append({"boxes_xyxy": found * wide, "scores": scores, "labels": labels})
    return batch_of([(400, 400)] * images, boxes, classes, crowd, scale), predictions


def pycocotools(batch: Batch, predictions: list[dict[str, Tensor]]) -> list[float]:
    """The reference's 12 numbers, in original pixels."""
    rows: list[dict[str, Any]] = []
    results = []
    for i, (prediction, (height, width)) in enumerate(zip(predictions, batch["images"]["scale"], strict=True)):
        wide = torch.tensor([width, height] * 2)
        target = targets_of(batch, i)
        for j, box in enumerate((target["boxes_xyxy"] / wide).tolist()):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            row = {"id": len(rows) + 1, "image_id": i, "bbox": xywh, "area": xywh[2] * xywh[3]}
            category, crowd = int(target["classes"][j]), int(target["crowd"][j])
            rows.append(row | {"category_id": category, "iscrowd": crowd})
        for box, score, label in zip(
            (prediction["boxes_xyxy"] / wide).tolist(),
            prediction["scores"].tolist(),
            prediction["labels"].tolist(),
            strict=True,
        ):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": i, "category_id": label, "bbox": xywh, "score": score})
    coco = COCO()
    images = [{"id": i, "height": 500, "width": 500} for i in range(len(predictions))]
    coco.dataset = {"info": {}, "images": images, "annotations": rows, "categories": [{"id": i} for i in range(3)]}
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


NAMES = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
NAMES += ["ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_metric_is_cocos(seed: int) -> None:
    head = head_for()
    batch, predictions = hand_made(seed, 40)
    head.update_metric(predictions, None, batch)
    numbers = head.metric.compute()
    assert sorted(numbers) == sorted(NAMES)
    for name, expected in zip(NAMES, pycocotools(batch, predictions), strict=True):
        assert 0 < expected < 1
        assert float(numbers[name]) == pytest.approx(expected, abs=1e-5), name


def test_the_metric_leaves_out_what_has_no_object() -> None:
    head = head_for()
    batch = batch_of([(64, 64)], [[[0, 0, 20, 20]]], [[1]])
    head.update_metric(
        [{"boxes_xyxy": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}], None, batch
    )
    numbers = head.metric.compute()
    assert "ap_small" in numbers
    assert "ap_large" not in numbers
    assert all(0 <= value <= 1 for value in numbers.values())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.skipif(sys.platform != "linux", reason="forks, because three fresh processes import for half a minute")
def test_ranks_with_unequal_shares_agree_on_the_metric(tmp_path) -> None:
    """Nine images, three and none are the twelve."""
    batch, predictions = hand_made(0, 12)

    def numbers(rank: int) -> dict[str, float]:
        metric = DetectionMetric()
        for i in (range(0, 9), range(9, 12), range(0))[rank]:
            target = tuple(targets_of(batch, i)[name] for name in ("boxes_xyxy", "classes", "crowd"))
            metric.update(predictions[i], target, batch["images"]["scale"][i])
        return {name: float(value) for name, value in metric.compute().items()}

    outputs = on_ranks(3, numbers, tmp_path)
    head = head_for()
    head.update_metric(predictions, None, batch)
    expected = {name: float(value) for name, value in head.metric.compute().items()}
    assert outputs[0] == outputs[1] == outputs[2] == pytest.approx(expected, abs=1e-6)


def test_a_detection_finds_an_object_once() -> None:
    gt_M4 = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    boxes_K4 = torch.tensor([[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 25], [50, 50, 60, 60.0]])
    # The second finds the first object again, the third has the wrong class, the fourth an IoU of just 0.5.
    matches = matches_at_half(boxes_K4, torch.tensor([0, 0, 0, 1, 1]), gt_M4, torch.tensor([0, 1]))
    assert matches == [0, -1, -1, 1, -1]


def test_the_picture_shows_both_and_counts() -> None:
    head = head_for()
    prediction = {
        # A hit, a false one, one that is too uncertain, and a second guess at the first place.
        "boxes_xyxy": torch.tensor([[4.0, 4, 24, 24], [30, 30, 40, 40], [0, 0, 9, 9], [4, 5, 24, 25]]),
        "scores": torch.tensor([0.9, 0.6, 0.1, 0.5]),
        "labels": torch.tensor([1, 0, 0, 2]),
    }
    target = {
        "boxes_xyxy": torch.tensor([[4.0, 4.0, 24.0, 23.0], [30.0, 4.0, 44.0, 20.0], [2.0, 30.0, 9.0, 40.0]]),
        "classes": torch.tensor([1, 2, 1]),
        "class_names": ["diya", "kite", "matka"],
    }
    (model, truth), lines = head.visualize(np.full((48, 64, 3), 90, np.uint8), prediction, target)
    assert [model.title, truth.title] == ["model", "truth"]
    assert lines[0].text.startswith("1 of 3 found, 1 wrong ")
    assert min(model.image_HW3.shape[:2]) >= 320
    # Labels stand at the boxes' corners, in pixels of the enlarged image.
    zoom = model.image_HW3.shape[0] / 48
    assert model.labels == [(30 * zoom, 30 * zoom, "diya 0.60 ✗"), (4 * zoom, 4 * zoom, "kite 0.90")]
    assert [said for _, _, said in truth.labels] == ["kite ✗", "matka ✗", "kite"]
    for panel in (model, truth):
        colours = {tuple(pixel) for pixel in panel.image_HW3.reshape(-1, 3).tolist()}
        assert {(25, 211, 197), (255, 154, 61)} <= colours


def test_number_of_classes_must_be_the_datasets() -> None:
    head = head_for(num_classes=3)
    with pytest.raises(ValueError, match=r"heads\.detection\.num_classes: found 3, expected 2"):
        head.check({"data.train[0]": SimpleNamespace(classes=["diya", "kite"])}, {})
    head.check({"data.train[0]": SimpleNamespace(classes=["diya", "kite", "matka"])}, {})
    batch = batch_of([(64, 64)], [[]], [[]]) | {"origin": Origin("detection", classes=["diya", "kite"])}
    with pytest.raises(ValueError, match=r"heads\.detection\.num_classes: found 3, expected 2"):
        head.loss(features_of([torch.randn(8, 8, WIDTH)]), batch, encoder_with())  # without the command's check


def test_classes_must_be_the_same_in_all_sources() -> None:
    first, other = SimpleNamespace(classes=["diya", "kite"]), SimpleNamespace(classes=["kite", "diya"])
    with pytest.raises(ValueError, match=r"data\.val\[0\]: the sources of task 'detection' .* class 0 is 'diya' and"):
        head_for(num_classes=2).check({"data.train[0]": first}, {"data.val[0]": other})


def test_a_head_may_detect_some_of_the_classes() -> None:
    """Its losses, scores and pictures are those of a head for a dataset without the others."""
    boxes = [[[6.0, 10.0, 34.0, 52.0], [30.0, 4.0, 62.0, 30.0]], [[4.0, 36.0, 40.0, 60.0]]]
    crowd = [[False, True], [False]]
    batch = batch_of([(64, 64)] * 2, boxes, [[2, 0], [1]], crowd)
    batch["origin"] = Origin("detection", classes=["diya", "kite", "matka"])
    kept = batch_of([(64, 64)] * 2, [boxes[0], []], [[0, 1], []], [crowd[0], []])
    features = features_of([torch.randn(8, 8, WIDTH), torch.randn(8, 8, WIDTH)])
    some = head_for(num_classes=None, classes=["matka", "diya"], name="some")
    all_of_them = head_for(num_classes=2)
    all_of_them.load_state_dict(some.state_dict())
    assert some.name == "some"
    terms = step_losses(some.loss(features, batch, encoder_with())).terms
    for name, value in step_losses(all_of_them.loss(features, kept, encoder_with())).terms.items():
        torch.testing.assert_close(terms[name], value, rtol=0, atol=0)
    prediction = {"boxes_xyxy": torch.tensor(boxes[0][:1]), "scores": torch.ones(1), "labels": torch.tensor([0])}
    nothing = {name: value[:0] for name, value in prediction.items()}
    some.update_metric([prediction, nothing], features, batch)
    assert some.metric.compute()["ap50"] == 1
    names = batch["origin"].classes
    (_, truth), lines = some.visualize(
        np.zeros((64, 64, 3), np.uint8), prediction, targets_of(batch, 0) | {"class_names": names}
    )
    assert lines[0].text.startswith("1 of 1 found, 0 wrong")
    assert [said for _, _, said in truth.labels] == ["matka"]
    with pytest.raises(ValueError, match=r"heads\.some\.classes: 'matka' is none of the 1 classes"):
        some.check({"data.train[0]": SimpleNamespace(classes=["diya"])}, {})
    with pytest.raises(ValueError, match=r"heads\.detection: give one of num_classes and classes"):
        Detection()


@pytest.mark.parametrize("scales", [[], [3.0], [1.0, 2.0], [1.0, 0.25]])
def test_scales_must_halve(scales: list[float]) -> None:
    with pytest.raises(ValueError, match=r"heads\.detection\.scales"):
        Detection(3, scales=scales)


def test_a_sample_without_boxes_is_named() -> None:
    head = head_for()
    batch = batch_of([(64, 64)], [[]], [[]])
    batch["targets"]["boxes_xyxy"].known = [False]
    with pytest.raises(ValueError, match=r"heads\.detection: sample '0'"):
        head.loss(features_of([torch.randn(8, 8, WIDTH)]), batch, encoder_with())
