"""heads/densepose.py: windows read where they should, losses and metric by hand, learning on generated people."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import packed, step_losses
from torch import Tensor, nn

from heads.densepose import DensePose, jitter
from indiclip.generated.mela import Mela
from indiclip.loading.collate import collate
from indiclip.loading.transforms import Transform
from indiclip.preprocessing import Preprocessing
from indiclip.ratios import over_all_ranks
from indiclip.tasks.surface_charts import NUM_PARTS, Charts, People, chart_losses, paste, read_at
from indiclip.tasks.surface_metric import KAPPA, SurfaceMetric, average_precision
from indiclip.types import Batch, Features, targets_of

STRIDE, SMALL = 8, {"roi_size": 14, "channels": 32, "num_convs": 1}


def make_head(width: int, **options: Any) -> DensePose:
    torch.manual_seed(0)
    head = DensePose(**options)
    head.bind(SimpleNamespace(backbone=SimpleNamespace(width=width)))
    return head


def features_of(batch: Batch) -> Features:
    """The patches' own pixels as tokens: enough to learn from, and nothing between the pixels and the head."""
    images = batch["images"]
    grid_hw = tuple(max(side // STRIDE for side in sides) for sides in zip(*images["sizes_hw"], strict=True))
    full = bool(images["valid_BN"].all())
    valid_BN = None if full else images["valid_BN"]
    return Features(images["patches_BNP"] / 255 - 0.5, images["coords_BN2"], valid_BN, grid_hw, STRIDE)


def mela_batch(sizes_hw: list[tuple[int, int]], seed: int = 3, people: float = 1.0) -> Batch:
    transform = Transform(max_tokens=256)
    sources = [Mela(len(sizes_hw), list(size), people=people, seed=seed) for size in sizes_hw]
    return collate([transform(source[i], Preprocessing(STRIDE), None) for i, source in enumerate(sources)])


def hand_batch(targets: dict[str, list[Any]], size: int = 32) -> Batch:
    """Images of noise, one per entry of each list."""
    count = len(next(iter(targets.values())))
    noise = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    batch = collate([Transform()({"image": image, "key": "x"}, Preprocessing(STRIDE), None) for image in noise])
    return batch | {"targets": packed(targets), "keys": [str(i) for i in range(count)]}


def coordinate_head(size: int) -> tuple[DensePose, Features]:
    """A head without anything learned, whose U and V at every place are the x and y (as parts of the image's size)
    that its windows read there, and features for it.
    """
    head = make_head(3, roi_size=14, channels=2, num_convs=1, upscale=4)
    head.norm, head.convs = nn.Identity(), nn.ModuleList()
    offset_4 = (torch.arange(4) + 0.5) / 4 - 0.5  # of a cell of the fine map from its token's middle, in tokens
    bilinear_4 = torch.tensor([0.25, 0.75, 0.75, 0.25])
    first_u = 2 + NUM_PARTS + 1
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.fine.weight[0, 0], head.fine.weight[1, 1] = 1.0, 1.0
        head.fine.weight[2, 0], head.fine.weight[2, 1] = (
            offset_4[None, :] * STRIDE / size,
            offset_4[:, None] * STRIDE / size,
        )
        head.charts.weight[0, first_u : first_u + NUM_PARTS + 1] = torch.outer(bilinear_4, bilinear_4)
        head.charts.weight[1, first_u + NUM_PARTS + 1 :] = torch.outer(bilinear_4, bilinear_4)
        head.charts.bias[1] = 1.0  # everything is on the person
    side = size // STRIDE
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    coords_BN2 = torch.stack([rows, columns], -1).reshape(1, -1, 2)
    middle_BN2 = (coords_BN2 + 0.5) * STRIDE / size
    tokens_BN3 = torch.cat([middle_BN2.flip(-1), torch.ones_like(middle_BN2[..., :1])], -1)
    return head, Features(tokens_BN3, coords_BN2, None, (side, side), STRIDE)


class TestGeometry:
    def test_points_read_their_own_position(self) -> None:
        """Image -> tokens -> fine map -> window -> charts -> point: nothing on the way is half a cell off."""
        size = 96
        head, features = coordinate_head(size)
        boxes_Q4 = torch.tensor([[10.3, 20.7, 61.1, 83.9], [40.0, 8.0, 60.0, 88.0]])
        place_S2 = 0.1 + 0.8 * torch.rand(200, 2, generator=torch.Generator().manual_seed(1))  # not in the outer cells
        person_S = torch.arange(200) % 2
        sides_S2 = boxes_Q4[person_S, 2:] - boxes_Q4[person_S, :2]
        xy_S2 = boxes_Q4[person_S, :2] + place_S2 * sides_S2
        targets = {
            "dp_boxes_xyxy": [boxes_Q4],
            "dp_points_xy": [xy_S2],
            "dp_person": [person_S],
            "dp_part": [torch.randint(1, 25, (200,))],
            "dp_uv": [xy_S2 / size],
        }
        people = People.of(packed(targets), boxes_Q4, torch.full((2, 2), size), 28)
        charts = head(features, boxes_Q4, torch.zeros(2, dtype=torch.long))
        for value_SK, axis in (
            (read_at(charts.u, people.person_S, people.xy_S2), 0),
            (read_at(charts.v, people.person_S, people.xy_S2), 1),
        ):
            own_S = value_SK.gather(1, people.part_S[:, None])[:, 0] * size
            torch.testing.assert_close(own_S, xy_S2[:, axis], atol=2e-3, rtol=0)  # pixels
        losses = over_all_ranks(chart_losses(charts, people))
        assert losses["u"] < 1e-9
        assert losses["v"] < 1e-9

    def test_predictions_pasted_into_the_image_lie_where_they_were_read(self) -> None:
        size = 96
        head, features = coordinate_head(size)
        box = torch.tensor([[16.0, 8.0, 72.0, 92.0]])
        (prediction,) = head.surfaces(features, [box])
        assert prediction["uv"].shape == (1, 2, 56, 56)
        part_HW, uv_HW2 = paste(prediction, (size, size))
        assert int((part_HW > 0).sum()) == 56 * 84
        assert bool((part_HW[8:92, 16:72] > 0).all())
        inner = slice(8 + 8, 92 - 8), slice(16 + 8, 72 - 8)
        columns = (torch.arange(size) + 0.5)[inner[1]].expand(68, -1)
        rows = (torch.arange(size) + 0.5)[inner[0], None].expand(-1, 40)
        assert (uv_HW2[inner][..., 0] * size - columns).abs().max() <= 0.5 * 56 / 56 + 1e-3  # half a cell, in pixels
        assert (uv_HW2[inner][..., 1] * size - rows).abs().max() <= 0.5 * 84 / 56 + 1e-3

    def test_of_overlapping_people_the_higher_score_is_on_top(self) -> None:
        first, second = hand_prediction(5, (0.1, 0.1), 0.9), hand_prediction(7, (0.2, 0.2), 0.8)
        second["boxes_xyxy"] = second["boxes_xyxy"] + 4
        both = {name: torch.cat([first[name], second[name]]) for name in first}
        part_HW, uv_HW2 = paste(both, (12, 12))
        assert part_HW[:8, :8].unique().tolist() == [5]
        assert part_HW[8:, 8:].unique().tolist() == [7]
        assert uv_HW2[7, 7].tolist() == pytest.approx([0.1, 0.1])
        assert part_HW[0, 9] == 0

    def test_mask_targets_are_the_mask_in_the_window(self) -> None:
        mask = torch.zeros(1, 32, 32, dtype=torch.uint8)
        mask[0, 8:17, 4:13] = 1  # the third row's and column's centres are at 18 and 14
        box = torch.tensor([[4.0, 8.0, 20.0, 24.0]])
        people = People.of(packed({"dp_boxes_xyxy": [box], "dp_masks": [mask]}), box, torch.tensor([[32, 32]]), 4)
        assert people.coarse_Rhw.tolist() == [[[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]]

    def test_jitter_keeps_the_overlap_and_depends_on_the_number_alone(self) -> None:
        box = torch.tensor([[30.0, 20.0, 60.0, 80.0]])
        size = torch.tensor([[96, 96]])
        many = [jitter(box, size, 0.08, torch.tensor([2**32 - number])) for number in range(1, 501)]
        assert torch.equal(many[6], jitter(box.repeat(2, 1), size, 0.08, torch.tensor([5, 2**32 - 7]))[1:])
        moved_N4 = torch.cat(many)
        low, high = torch.maximum(moved_N4[:, :2], box[:, :2]), torch.minimum(moved_N4[:, 2:], box[:, 2:])
        both = (high - low).prod(1)
        either = (moved_N4[:, 2:] - moved_N4[:, :2]).prod(1) + 30 * 60 - both
        assert (both / either).min() > 0.7
        share_N4 = (moved_N4 - box) / torch.tensor([30.0, 60.0, 30.0, 60.0]) / 0.08
        assert share_N4.abs().max() < 1.0001
        assert share_N4.min(0).values.max() < -0.95  # all of the range is used
        assert share_N4.max(0).values.min() > 0.95
        assert share_N4.mean(0).abs().max() < 0.05

    def test_jitter_beyond_the_guarantee_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"heads\.densepose\.box_jitter: found 0\.2; expected 0 to 0\.08"):
            DensePose(box_jitter=0.2)


def loop_losses(charts: Charts, people: People) -> dict[str, float]:
    """The four losses in plain loops over points and cells."""

    def at(maps: Tensor, r: int, channel: int, x: float, y: float) -> float:
        h, w = maps.shape[-2:]
        total = 0.0
        for row in range(h):
            for column in range(w):
                weight_y = max(0.0, 1 - abs(min(max(y * h - 0.5, 0), h - 1) - row))
                weight_x = max(0.0, 1 - abs(min(max(x * w - 0.5, 0), w - 1) - column))
                total += weight_x * weight_y * float(maps[r, channel, row, column])
        return total

    sums = {"coarse": 0.0, "part": 0.0, "u": 0.0, "v": 0.0}
    cells = points = 0
    for r, y, x in np.ndindex(*people.coarse_Rhw.shape):
        target = int(people.coarse_Rhw[r, y, x])
        if target >= 0:
            logits = charts.coarse_logits[r, :, y, x].tolist()
            sums["coarse"] += math.log(sum(map(math.exp, logits))) - logits[target]
            cells += 1
    for r, (x, y), part, uv in zip(
        people.person_S.tolist(), people.xy_S2.tolist(), people.part_S.tolist(), people.uv_S2.tolist(), strict=True
    ):
        if not (0 <= x <= 1 and 0 <= y <= 1):
            continue
        points += 1
        logits = [at(charts.part_logits, r, k, x, y) for k in range(NUM_PARTS + 1)]
        sums["part"] += math.log(sum(map(math.exp, logits))) - logits[part]
        for name, maps, truth in (("u", charts.u, uv[0]), ("v", charts.v, uv[1])):
            gap = abs(at(maps, r, part, x, y) - truth)
            sums[name] += 0.5 * gap**2 if gap < 1 else gap - 0.5
    return {name: value / (cells if name == "coarse" else points) for name, value in sums.items()}


class TestCharts:
    def test_decoded_by_hand(self) -> None:
        """One window of two cells: part 3 on the person, and part 4 with a strong part 0 off the person."""
        coarse = torch.tensor([[0.0, 1.0], [math.log(3), 0.0]]).reshape(1, 2, 1, 2)  # person with 3/4, 1/(1 + e)
        part, u, v = torch.zeros(3, 1, 25, 1, 2)
        part[0, 3, 0, 0], part[0, 4, 0, 1], part[0, 0] = 1.0, 1.0, 9.0
        u[0, 3], v[0, 3], u[0, 4] = 0.25, 1.5, 0.5
        scores, mask_probs, parts, uv = Charts(coarse, part, u, v).decode()
        torch.testing.assert_close(mask_probs, torch.tensor([[[0.75, 1 / (1 + math.e)]]]))
        assert scores.tolist() == pytest.approx([0.75])
        assert parts.tolist() == [[[3, 0]]]
        assert uv.tolist() == [[[[0.25, 0.0]], [[1.0, 0.0]]]]

    def test_points_stay_with_their_person(self) -> None:
        """Three people in the first image, the last without points, none in the second, one in the third."""
        boxes = [
            torch.tensor([[0.0, 0, 10, 10], [10, 0, 30, 20], [0, 0, 9, 9]]),
            torch.zeros(0, 4),
            torch.tensor([[5.0, 5, 15, 9]]),
        ]
        targets = {
            "dp_boxes_xyxy": boxes,
            "dp_points_xy": [torch.tensor([[20.0, 5.0], [1.0, 2.0]]), None, torch.tensor([[10.0, 6.0]])],
            "dp_person": [torch.tensor([1, 0]), None, torch.tensor([0])],
            "dp_part": [torch.tensor([1, 2]), None, torch.tensor([3])],
            "dp_uv": [torch.zeros(2, 2), None, torch.zeros(1, 2)],
        }
        people = People.of(packed(targets), torch.cat(boxes), torch.full((4, 2), 32), 4)
        assert people.person_S.tolist() == [1, 0, 3]
        assert people.part_S.tolist() == [1, 2, 3]
        torch.testing.assert_close(people.xy_S2, torch.tensor([[0.5, 0.25], [0.1, 0.2], [0.5, 0.25]]))


class TestLosses:
    def test_against_plain_loops(self) -> None:
        """Two windows of 4x6 cells; a point in a corner, one outside of its window, a window without a mask."""
        torch.manual_seed(2)
        charts = Charts.split(2 * torch.randn(2, 2 + 75, 4, 6), 2)
        people = People(
            coarse_Rhw=torch.stack([torch.randint(0, 2, (4, 6)), torch.full((4, 6), -1)]),
            person_S=torch.tensor([0, 1, 1, 0, 1]),
            xy_S2=torch.tensor([[0.31, 0.77], [0.01, 0.99], [0.5, 0.5], [1.02, 0.5], [0.93, 0.2]]),
            part_S=torch.tensor([1, 24, 7, 9, 12]),
            uv_S2=torch.rand(5, 2),
        )
        losses = over_all_ranks(chart_losses(charts, people))
        expected = loop_losses(charts, people)
        assert {name: float(value) for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)

    def test_undecided_maps_by_hand(self) -> None:
        """Zero logits: ln 2 for the mask, ln 25 for the part; U 0 where 0.6 is true: 0.6 ** 2 / 2."""
        charts = Charts.split(torch.zeros(1, 77, 4, 4), 2)
        people = People(torch.ones(1, 4, 4).long(), torch.tensor([0]), torch.tensor([[0.4, 0.4]]),
                        torch.tensor([3]), torch.tensor([[0.6, 0.0]]))  # fmt: skip
        losses = {name: float(value) for name, value in over_all_ranks(chart_losses(charts, people)).items()}
        assert losses == pytest.approx({"coarse": math.log(2), "part": math.log(25), "u": 0.18, "v": 0.0}, abs=1e-6)

    def test_weights_scale_the_losses(self) -> None:
        batch = mela_batch([(96, 96)])
        features = features_of(batch)
        plain, weighted = (
            step_losses(
                make_head(192, coarse_weight=a, part_weight=b, uv_weight=c, **SMALL).loss(features, batch, None)
            ).terms
            for a, b, c in ((1, 1, 1), (5, 2, 3))
        )
        for name, factor in {"coarse": 5, "part": 2, "u": 3, "v": 3}.items():
            assert float(weighted[name].detach()) == pytest.approx(factor * float(plain[name].detach()))

    def test_only_the_annotated_parts_u_and_v_learn(self) -> None:
        charts = Charts.split(torch.zeros(1, 77, 4, 4, requires_grad=True), 2)
        charts.u.retain_grad()
        people = People(torch.ones(1, 4, 4).long(), torch.tensor([0]), torch.tensor([[0.4, 0.4]]),
                        torch.tensor([3]), torch.tensor([[0.6, 0.0]]))  # fmt: skip
        sum(over_all_ranks(chart_losses(charts, people)).values()).backward()
        assert charts.u.grad is not None
        assert charts.u.grad.abs().sum((0, 2, 3)).nonzero().flatten().tolist() == [3]


def people_targets(kind: str) -> dict[str, list[Any]]:
    box, mask = torch.tensor([[4.0, 4.0, 20.0, 28.0]]), torch.ones(1, 32, 32, dtype=torch.uint8)
    points = {
        "dp_points_xy": torch.tensor([[10.0, 10.0], [12.0, 20.0]]),
        "dp_person": torch.tensor([0, 0]),
        "dp_part": torch.tensor([1, 7]),
        "dp_uv": torch.rand(2, 2),
    }
    no_points = {name: value[:0] for name, value in points.items()}
    no_boxes = {"dp_boxes_xyxy": torch.zeros(0, 4)}
    nobody = {**no_boxes, "dp_masks": torch.zeros(0, 32, 32, dtype=torch.uint8), **no_points}
    images = {
        "people": [{"dp_boxes_xyxy": box, "dp_masks": mask, **points}, nobody],
        "no points": [{"dp_boxes_xyxy": box, "dp_masks": mask}, {"dp_boxes_xyxy": box, "dp_masks": mask, **no_points}],
        "no masks": [{"dp_boxes_xyxy": box, **points}, no_boxes],
        "masks of one": [{"dp_boxes_xyxy": box, "dp_masks": mask}, {"dp_boxes_xyxy": box, **points}],
        "boxes alone": [{"dp_boxes_xyxy": box}, no_boxes],
        "nobody": [nobody, nobody],
        "a box outside": [{"dp_boxes_xyxy": torch.tensor([[40.0, 0, 40, 9]]), "dp_masks": mask, **points}, no_boxes],
    }[kind]
    names = ("dp_boxes_xyxy", "dp_masks", *points)
    return {name: [image.get(name) for image in images] for name in names}


KINDS = ["people", "no points", "no masks", "masks of one", "boxes alone", "nobody", "a box outside"]


class TestAnyBatch:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("options", [{}, {"coarse_classes": 15, "box_jitter": 0.05}])
    def test_finite_losses_and_a_gradient_for_every_parameter(self, kind: str, options: dict[str, Any]) -> None:
        batch = hand_batch(people_targets(kind))
        head = make_head(192, **SMALL, **options)
        features = features_of(batch)
        features.tokens_BND.requires_grad_()
        losses = step_losses(head.loss(features, batch, None)).terms
        assert set(losses) == {"coarse", "part", "u", "v"}
        sum(losses.values()).backward()
        assert all(torch.isfinite(value) for value in losses.values())
        without = [name for name, p in head.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert not without
        assert features.tokens_BND.grad is not None
        has_truth = kind not in ("boxes alone", "nobody")
        assert any(bool(p.grad.any()) for p in head.parameters()) == has_truth

    @pytest.mark.parametrize("kind", KINDS)
    def test_predictions_metric_and_picture(self, kind: str) -> None:
        batch = hand_batch(people_targets(kind))
        head = make_head(192, **SMALL)
        with torch.no_grad():
            predictions = head.predict(features_of(batch), batch, None)
        head.update_metric(predictions, None, batch)
        assert all(torch.isfinite(value) for value in head.metric.compute().values())
        for i, prediction in enumerate(predictions):
            count = len(prediction["boxes_xyxy"])
            assert prediction["part"].shape == prediction["mask_probs"].shape == (count, 56, 56)
            target = targets_of(batch, i)
            panels, (line,) = head.visualize(np.zeros((32, 32, 3), np.uint8), prediction, target)
            assert {panel.image_HW3.shape for panel in panels} == {(320, 320, 3)}
            annotated = len(target.get("dp_part", ())) > 0
            titles = ["model: body parts", "truth: annotated points"]
            assert [panel.title for panel in panels] == titles[: 1 + annotated]
            assert line.text.startswith("1 person" if count == 1 else f"{count} people")

    def test_neighbours_in_the_batch_change_nothing(self) -> None:
        """Images of three aspects, padded to a common map, against each by itself. People touch the borders too."""
        sizes = [(96, 64), (48, 128), (96, 96)]
        batch = mela_batch(sizes)
        boxes = batch["targets"]["dp_boxes_xyxy"]
        for i, (height, width) in enumerate(sizes):
            boxes.values[boxes.rows_of(i).start] = torch.tensor([width - 30.0, height - 40.0, width, height])
        head = make_head(192, **SMALL)
        nn.init.normal_(head.charts.weight, std=0.2)
        for value in (head.position_CHW, head.fine.bias):
            nn.init.normal_(value)
        transform = Transform(max_tokens=256)
        with torch.no_grad():
            charts = head(features_of(batch), boxes.values, boxes.image_R)
            together = torch.cat([charts.coarse_logits, charts.part_logits, charts.u, charts.v], 1)
            for i, size in enumerate(sizes):
                alone = collate([transform(Mela(3, list(size), people=1.0, seed=3)[i], Preprocessing(STRIDE), None)])
                rows = boxes.rows_of(i)
                charts = head(features_of(alone), boxes.values[rows], torch.zeros(boxes.counts[i], dtype=torch.long))
                own = torch.cat([charts.coarse_logits, charts.part_logits, charts.u, charts.v], 1)
                assert own.std() > 0.1  # there is something to compare
                torch.testing.assert_close(together[rows], own, atol=1e-4, rtol=1e-4)


def hand_prediction(part: int, uv: tuple[float, float], score: float, on: Tensor | None = None) -> dict[str, Tensor]:
    """One person in the box (0, 0, 8, 8) with the same part, U and V at all 4x4 cells (where `on`)."""
    on = torch.ones(4, 4) if on is None else on
    return {
        "boxes_xyxy": torch.tensor([[0.0, 0.0, 8.0, 8.0]]),
        "scores": torch.tensor([score]),
        "mask_probs": on[None],
        "part": (part * on).to(torch.uint8)[None],
        "uv": (torch.tensor(uv)[:, None, None] * on)[None],
    }


def hand_target(parts: list[int], uv: tuple[float, float]) -> dict[str, Tensor]:
    """Points of one person in the upper left quarter of the box, whose mask is its left half."""
    count = len(parts)
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, :, :4] = 1
    return {
        "dp_masks": mask,
        "dp_points_xy": torch.full((count, 2), 1.5),
        "dp_person": torch.zeros(count, dtype=torch.int64),
        "dp_part": torch.tensor(parts),
        "dp_uv": torch.tensor(uv).expand(count, 2),
    }

    def test_an_image_without_boxes_is_named(self) -> None:
        batch = hand_batch({"dp_boxes_xyxy": [torch.zeros(0, 4), None]})
        with pytest.raises(ValueError, match=r"heads\.densepose: sample '1' .* has no dp_boxes_xyxy"):
            make_head(192, **SMALL).loss(features_of(batch), batch, None)

    def test_a_person_without_a_mask_has_no_part_in_the_mask_loss(self) -> None:
        batch = hand_batch(people_targets("masks of one"))
        boxes = batch["targets"]["dp_boxes_xyxy"]
        people = People.of(batch["targets"], boxes.values, torch.full((2, 2), 32), 4)
        assert people.coarse_Rhw[0].unique().tolist() == [1]
        assert people.coarse_Rhw[1].unique().tolist() == [-1]


class TestMetric:
    def test_by_hand(self) -> None:
        """First person: 3 of 4 points right, 0.3 + 0.4 i away: d = 0.5. Second: all right and exact, and half as much
        body as claimed.
        """
        metric = SurfaceMetric()
        metric.update(hand_prediction(5, (0.5, 0.6), 0.9), hand_target([5, 5, 5, 6], (0.2, 0.2)))
        left = torch.zeros(4, 4)
        left[:, :2] = 1
        metric.update(hand_prediction(7, (0.1, 0.2), 0.8, left), hand_target([7, 7], (0.1, 0.2)))
        found = {name: float(value) for name, value in metric.compute().items()}
        first_gps = 0.75 * math.exp(-0.25 / (2 * 0.255**2))
        assert first_gps < 0.5  # so at every threshold one of two is right, the one ranked second:
        # precision 1/2 at recalls 0 to 0.5, 51 of 101; 0 above.
        expected = {"part_accuracy": 5 / 6, "uv_error": 0.3, "mask_iou": 0.75}
        expected |= dict.fromkeys(("uv_gps", "uv_gps_50", "uv_gps_75"), 0.5 * 51 / 101)
        assert found == pytest.approx(expected, rel=1e-5)

    def test_a_point_off_the_predicted_person_is_wrong(self) -> None:
        metric = SurfaceMetric()
        metric.update(hand_prediction(5, (0.2, 0.2), 0.9, torch.zeros(4, 4)), hand_target([5], (0.2, 0.2)))
        found = metric.compute()
        assert float(found["part_accuracy"]) == 0
        assert float(found["uv_error"]) == 1
        assert float(found["mask_iou"]) == 0

    def test_similarity_thresholds(self) -> None:
        """One person; its similarity is put just above and below 0.75 through d = kappa sqrt(-2 ln s)."""
        for similarity, expected in ((0.76, 1.0), (0.74, 0.0)):
            metric = SurfaceMetric()
            distance = KAPPA * math.sqrt(-2 * math.log(similarity))
            metric.update(hand_prediction(5, (0.2 + distance, 0.2), 0.9), hand_target([5], (0.2, 0.2)))
            found = metric.compute()
            assert float(found["uv_gps_75"]) == expected
            assert float(found["uv_gps"]) == pytest.approx(0.6 if expected else 0.5)  # of 0.50, 0.55, ...

    def test_a_wrong_part_counts_nothing_however_near_its_u_and_v(self) -> None:
        """Three of four points right and exact, one wrong with the same U and V: similarity 0.75."""
        metric = SurfaceMetric()
        metric.update(hand_prediction(5, (0.2, 0.2), 0.9), hand_target([5, 5, 5, 6], (0.2, 0.2)))
        found = metric.compute()
        assert float(found["uv_gps_75"]) == 1
        assert float(found["uv_gps"]) == pytest.approx(0.6)  # 0.50 to 0.75 of the ten thresholds

    def test_average_precision_against_numpy(self) -> None:
        rng = np.random.default_rng(5)
        thresholds = np.arange(50, 100, 5) / 100
        for count in (1, 2, 7, 100, 101, 333):
            similarity, scores = rng.random(count).astype(np.float32), rng.random(count).astype(np.float32)
            ours = average_precision(*map(torch.from_numpy, (similarity, scores)), torch.from_numpy(thresholds))
            order = np.argsort(-scores)
            for threshold, found in zip(thresholds, ours.tolist(), strict=True):
                right = similarity[order] >= threshold
                curve = [(right[:n].sum() / count, right[:n].mean()) for n in range(1, count + 1)]
                levels = [max((p for r, p in curve if r >= level - 1e-9), default=0) for level in np.arange(101) / 100]
                assert found == pytest.approx(np.mean(levels), abs=1e-6)

    def test_of_two_halves_merged_is_that_of_the_whole(self) -> None:
        batch = mela_batch([(96, 96)] * 4)
        head = make_head(192, **SMALL)
        nn.init.normal_(head.charts.weight, std=0.5)
        with torch.no_grad():
            predictions = head.predict(features_of(batch), batch, None)
        targets = [targets_of(batch, i) for i in range(4)]
        whole, first, second = SurfaceMetric(), SurfaceMetric(), SurfaceMetric()
        for i, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
            prediction["scores"] = torch.rand(len(prediction["scores"]))
            whole.update(prediction, target)
            (first if i < 1 else second).update(prediction, target)
        assert float(whole.compute()["part_accuracy"]) > 0
        first.rows += second.rows
        for name, value in whole.compute().items():
            torch.testing.assert_close(first.compute()[name], value)


class TestLearning:
    def test_two_generated_people_are_learnt(self) -> None:
        """On people who were seen, part, place on it and mask are found; before training they are not."""
        sample = Mela(8, 96, people=1.0, seed=11)
        first = next(i for i in range(8) if len(sample[i]["dp_boxes_xyxy"]) >= 2)
        batch = collate([Transform()(sample[first], Preprocessing(STRIDE), None)])
        head = make_head(192, roi_size=14, channels=48, num_convs=1)
        features = features_of(batch)

        def scores() -> dict[str, float]:
            head.metric.reset()
            with torch.no_grad():
                head.update_metric(head.predict(features, batch, None), features, batch)
            return {name: float(value) for name, value in head.metric.compute().items()}

        before = scores()
        optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
        for _ in range(120):
            optimizer.zero_grad()
            sum(step_losses(head.loss(features, batch, None)).terms.values()).backward()
            optimizer.step()
        after = scores()
        assert before["part_accuracy"] < 0.2
        assert after["part_accuracy"] > 0.8
        assert after["mask_iou"] > 0.8
        assert after["uv_error"] < 0.12
        assert after["uv_gps_50"] > 0.9

    def test_jitter_is_of_the_sample_in_this_step(self) -> None:
        batch = mela_batch([(96, 96), (96, 96)])
        features = features_of(batch)
        head = make_head(192, box_jitter=0.08, **SMALL)

        def loss(*seeds: int) -> float:
            batch["targets"]["random_seed"] = [*seeds]
            return float(step_losses(head.loss(features, batch, None)).terms["coarse"].detach())

        assert loss(1, 2) == loss(1, 2)
        assert len({loss(1, 2), loss(2, 1), loss(1, 3)}) == 3
