"""heads/counting.py, on features made by hand and a tiny text tower."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import batch_images, features_of, noise, packed, step_losses, tiny_encoder
from processes import on_ranks

from heads.counting import Counting, CountMetric, CountQueries, count_losses, heat_map
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.ratios import over_all_ranks
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer
from indiclip.types import Batch, Features, Origin, part_of

WIDTH = 32
BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    backbone = NaFlexViT(width=WIDTH, depth=1, num_heads=2, patch_size=8)
    text = TextTower(ByteTokenizer(), BERT | {"intermediate_size": 64, "max_position_embeddings": 256})
    return Encoder(backbone, text, embed_dim=32, lengths=[16])


def head_for(encoder: Encoder, **options: Any) -> Counting:
    torch.manual_seed(0)
    head = Counting(**({"channels": 32} | options))
    head.bind(encoder)
    return head


def batch_of(sizes_hw: list[tuple[int, int]], points: list[Any], names: list[str]) -> Batch:
    tensors = [None if p is None else torch.tensor(np.array(p), dtype=torch.float32).reshape(-1, 2) for p in points]
    targets = packed({"points_xy": tensors, "count_class": names})
    images = batch_images([noise(*size_hw) for size_hw in sizes_hw], 8, 64) | {"sizes_hw": sizes_hw}
    return cast(Batch, {"images": images, "targets": targets, "keys": [str(i) for i in range(len(sizes_hw))]})


@pytest.mark.parametrize("upsample", [1, 2])
def test_the_count_is_the_sum_of_the_density(encoder: Encoder, upsample: int) -> None:
    """Also for images of different sizes, each with a density of its own size."""
    head = head_for(encoder, upsample=upsample)
    features = features_of([torch.randn(3, 5, WIDTH), torch.randn(4, 2, WIDTH)])
    batch = batch_of([(24, 40), (32, 16)], [[], []], ["kite", "diya"])
    for found, shape in zip(head.predict(features, batch, encoder), [(3, 5), (4, 2)], strict=True):
        assert found["density"].shape == (shape[0] * upsample, shape[1] * upsample)
        assert found["density"].min() > 0
        assert found["count"] == pytest.approx(found["density"].sum().item(), rel=1e-5)


@pytest.mark.parametrize("stride", [7, 8])
@pytest.mark.parametrize("upsample", [1, 2, 3])
def test_every_point_is_in_its_cell(encoder: Encoder, upsample: int, stride: int) -> None:
    """A perfect density, laid out by `predict`, has the points where NumPy's histogram has them; none is lost."""
    rng = np.random.default_rng(upsample)
    head = head_for(encoder, upsample=upsample)
    sizes = [(3 * stride, 5 * stride), (4 * stride, 2 * stride)]
    features = features_of([torch.randn(3, 5, WIDTH), torch.randn(4, 2, WIDTH)], stride)
    points = [rng.random((20, 2)) * [width, height] for height, width in sizes]
    points[0][:2] = [[sizes[0][1], sizes[0][0]], [0, 0]]  # on the corners
    batch = batch_of(sizes, points, ["kite", "diya"])
    counts_BHW = head._counts(features, batch, head._queries(batch), torch.arange(2))
    head.forward = lambda features, text_BE: counts_BHW  # type: ignore[method-assign]
    for found, points_K2, (height, width) in zip(head.predict(features, batch, encoder), points, sizes, strict=True):
        cells = (height // stride * upsample, width // stride * upsample)
        expected, _, _ = np.histogram2d(points_K2[:, 1], points_K2[:, 0], cells, [[0, height], [0, width]])
        assert found["density"].numpy().tolist() == expected.tolist()
        assert found["count"] == 20


def test_losses_by_hand() -> None:
    """Two cells with 2 and 0 things, answered 1 and 0.5; a second image without an answer, a third without things."""
    density_QHW = torch.tensor([[[1.0, 0.5]], [[3.0, 4.0]], [[0.25, 0.0]]])
    counts_QHW = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    losses = over_all_ranks(count_losses(density_QHW, counts_QHW, torch.tensor([True, False, True])))
    deviance = (1 - 2 - 2 * np.log(1 / 2)) + 0.5 + 0.25
    assert losses["density"].item() == pytest.approx(deviance / (2 + 2), rel=1e-6)
    assert losses["count"].item() == pytest.approx((0.5 + 0.25) / (2 + 2), rel=1e-6)
    perfect = over_all_ranks(count_losses(counts_QHW, counts_QHW, torch.tensor([True] * 3)))
    assert perfect["density"].item() == perfect["count"].item() == 0


def test_the_deviance_is_that_of_a_poisson_variable() -> None:
    """PyTorch's Poisson likelihood less that of the perfect answer, in float64."""
    density, counts = torch.rand(5, 3, 4, dtype=torch.float64) + 0.1, torch.randint(0, 4, (5, 3, 4)).double()
    ours = over_all_ranks(count_losses(density, counts, torch.ones(5, dtype=torch.bool)))["density"] * (
        5 + counts.sum()
    )
    likelihood = torch.distributions.Poisson(density).log_prob(counts).sum()
    best = torch.distributions.Poisson(counts.clamp(min=1e-300)).log_prob(counts).sum()
    torch.testing.assert_close(ours, best - likelihood, rtol=1e-10, atol=1e-10)


POINTS = {
    "things": [[[3, 3], [30, 20]], [[12, 1]]],
    "none": [[], []],
    "one unknown": [None, [[12, 1]]],
    "the other unknown": [[], None],
}


@pytest.mark.parametrize("case", POINTS)
def test_every_parameter_gets_a_gradient(encoder: Encoder, case: str) -> None:
    head = head_for(encoder)
    features = features_of([torch.randn(3, 5, WIDTH), torch.randn(4, 2, WIDTH)])
    losses = step_losses(
        head.loss(features, batch_of([(24, 40), (32, 16)], POINTS[case], ["kite", "diya"]), encoder)
    ).terms
    assert set(losses) == {"density", "count"}
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    used = [*head.named_parameters(), *encoder.text.named_parameters()]
    assert not [name for name, p in used if p.grad is None or not p.grad.isfinite().all()]
    assert head.density.weight.grad.any()


def test_what_lies_beside_an_image_does_not_matter(encoder: Encoder) -> None:
    head = head_for(encoder.eval(), upsample=2)
    maps, sizes = [torch.randn(3, 5, WIDTH), torch.randn(9, 2, WIDTH)], [(24, 40), (72, 16)]
    points = [[[3, 3]], [[9, 70]]]  # one point each, so that both weigh the same
    both = features_of(maps), batch_of(sizes, points, ["kite", "diya"])
    apart = [
        (features_of([maps[i]]), batch_of([sizes[i]], [points[i]], [name])) for i, name in enumerate(["kite", "diya"])
    ]
    together = step_losses(head.loss(*both, encoder)).terms
    for name, value in together.items():
        mean = sum(step_losses(head.loss(*one, encoder)).terms[name] for one in apart) / 2
        torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-6)
    for found, one in zip(head.predict(*both, encoder), apart, strict=True):
        torch.testing.assert_close(found["density"], head.predict(*one, encoder)[0]["density"], rtol=1e-4, atol=1e-6)


def boxed_batch(encoder: Encoder) -> tuple[Counting, Batch]:
    """Two kites and a diya; a crowd of diyas and a kite; nothing; an image whose boxes nobody drew."""
    head = head_for(encoder, ask_boxes=True)
    batch = batch_of([(32, 32)] * 4, [[[1, 1]], [], [], None], ["toran", "kite", "kite", "diya"])
    kite, diya = [0.0, 0, 8, 8], [8.0, 16, 16, 32]
    boxes = [[kite, [16.0, 0, 24, 8], diya], [diya, kite], []]
    batch["targets"] |= packed(
        {
            "boxes_xyxy": [*(torch.tensor(of_image).reshape(-1, 4) for of_image in boxes), None],
            "classes": [torch.tensor([0, 0, 1]), torch.tensor([1, 0]), torch.zeros(0).long(), None],
            "crowd": [torch.zeros(3).bool(), torch.tensor([True, False]), torch.zeros(0).bool(), None],
        }
    )
    batch["origin"] = Origin("counting", classes=["kite", "diya", "toran"])
    return head, batch


def answers(queries: CountQueries) -> list[list[list[float]] | None]:
    """The points of each question."""
    return [queries.xy_P2[queries.query_P == q].tolist() if known else None for q, known in enumerate(queries.known)]


def test_boxes_answer_more_queries(encoder: Encoder) -> None:
    """Every class of the image and others that are drawn, but none whose things are a crowd, of unknown number."""
    head, batch = boxed_batch(encoder)
    asked: dict[tuple[int, str], Any] = {}
    for seed in range(20):
        batch["targets"]["random_seed"] = [seed] * 4
        queries = head._queries(batch)
        found = list(zip(queries.images, queries.names, answers(queries), strict=True))
        assert found[:4] == [(0, "toran", [[1, 1]]), (1, "kite", []), (2, "kite", []), (3, "diya", None)]
        of_boxes = {(image, name): points for image, name, points in found[4:]}
        for own, points in {(0, "kite"): [[4, 4], [20, 4]], (0, "diya"): [[12, 24]], (1, "kite"): [[4, 4]]}.items():
            assert of_boxes[own] == points
        asked |= of_boxes
    assert asked.keys() == {*itertools.product((0, 1, 2), ("kite", "diya", "toran"))} - {(1, "diya")}
    assert [points for (image, name), points in asked.items() if image == 2 or name == "toran"] == [[]] * 5


def test_queries_are_the_same_whatever_lies_beside_an_image(encoder: Encoder) -> None:
    head, batch = boxed_batch(encoder)
    whole = head._queries(batch)
    together = {*zip(whole.images, whole.names, strict=True)}
    for image in range(4):
        alone = head._queries(part_of(batch, image, image + 1))
        assert {*alone.names} == {name for of, name in together if of == image}


def test_questions_about_one_image_are_answered_apart(encoder: Encoder) -> None:
    """The loss over all queries is that of a batch which repeats the image for each of them."""
    head, batch = boxed_batch(encoder.eval())
    maps = [torch.randn(4, 4, WIDTH) for _ in range(4)]
    queries = head._queries(batch)
    together = step_losses(head.loss(features_of(maps), batch, encoder)).terms
    repeated = batch_of([(32, 32)] * len(queries.names), answers(queries), queries.names)
    apart = step_losses(
        head_for(encoder).loss(features_of([maps[image] for image in queries.images]), repeated, encoder)
    ).terms
    for name, value in together.items():
        torch.testing.assert_close(value, apart[name], rtol=1e-5, atol=1e-7)


def test_asking_for_boxes_needs_class_names() -> None:
    with pytest.raises(ValueError, match=r"heads\.counting\.ask_boxes: .* but data\.train\[0\] has none"):
        Counting(ask_boxes=True).check({"data.train[0]": SimpleNamespace(classes=())}, {})
    encoder = tiny_encoder()
    head, batch = boxed_batch(encoder)
    del batch["origin"]
    with pytest.raises(ValueError, match=r"heads\.counting\.ask_boxes: .* found 0 of them and a box of class 1"):
        head._queries(batch)


def test_the_prompt_decides_what_is_counted(encoder: Encoder) -> None:
    """Squares of two colours on one image: after a few steps the answer is the count of the colour that is named."""
    rng = np.random.default_rng(0)
    head = head_for(encoder)
    colours_2D = torch.randn(2, WIDTH)

    def example(images: int) -> tuple[Features, Batch]:
        cells_BN = torch.from_numpy(rng.choice(3, (images, 30), p=[0.7, 0.2, 0.1]))
        maps = [torch.cat([torch.zeros(1, WIDTH), colours_2D])[cells_N].reshape(5, 6, WIDTH) for cells_N in cells_BN]
        asked = rng.integers(0, 2, images)
        points = []
        for cells_N, colour in zip(cells_BN, asked, strict=True):
            y, x = np.divmod(np.flatnonzero(cells_N.numpy() == colour + 1), 6)
            points.append(np.stack([x, y], 1) * 8 + 4)
        return features_of(maps), batch_of([(40, 48)] * images, points, [["kesariya", "peacock"][i] for i in asked])

    parameters = [*head.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        sum(step_losses(head.loss(*example(16), encoder)).terms.values()).backward()
        optimizer.step()
    with torch.no_grad():
        features, batch = example(32)
        head.update_metric(head.predict(features, batch, encoder), features, batch)
        assert head.metric.compute()["mae_ratio"] < 0.25
        other = ["peacock" if name == "kesariya" else "kesariya" for name in batch["targets"]["count_class"]]
        swapped = cast(Batch, batch | {"targets": batch["targets"] | {"count_class": other}})
        head.metric.reset()
        head.update_metric(head.predict(features, swapped, encoder), features, batch)
        assert head.metric.compute()["mae_ratio"] > 0.75


def test_the_metric_by_hand() -> None:
    metric = CountMetric()
    for count, truth, name in (
        (1.0, 2, "car"),
        (4.0, 4, "car"),
        (5.0, 9, "car"),
        (30.0, 33, "cell"),
        (40.0, 37, "cell"),
    ):
        metric.update(count, truth, name)
    numbers = {name: float(value) for name, value in metric.compute().items()}
    # Errors -1, 0, -4, -3, 3. The mean of 2, 4, 9, 33, 37 is 17, its errors 15, 13, 8, 16, 20; the median is 9, its
    # errors 7, 5, 0, 24, 28; the classes' medians are 4 and any from 33 to 37, their errors 2, 0, 5 and together 4.
    assert numbers == pytest.approx(
        {
            "mae": 11 / 5,
            "rmse": (35 / 5) ** 0.5,
            "mae_of_mean": 72 / 5,
            "rmse_of_mean": (1114 / 5) ** 0.5,
            "mae_ratio": 11 / 72,
            "mae_ratio_median": 11 / 64,
            "mae_ratio_class_median": 11 / 11,
        }
    )


def test_the_metric_of_equal_counts_has_no_ratio() -> None:
    metric = CountMetric()
    metric.update(1.0, 3, "car")
    assert {name: float(value) for name, value in metric.compute().items()} == {
        "mae": 2,
        "rmse": 2,
        "mae_of_mean": 0,
        "rmse_of_mean": 0,
    }
    metric.update(5.0, 5, "cell")
    # Each class has one count: the mean and the median are wrong, the classes' medians never.
    assert [name for name in metric.compute() if "ratio" in name] == ["mae_ratio", "mae_ratio_median"]


def test_ranks_sum_up_to_one_metric(tmp_path) -> None:
    """One rank has an image, another two, the third none."""

    def ratio(rank: int) -> float:
        metric = CountMetric()
        for count, truth in ([(1.0, 2)], [(4.0, 4), (5.0, 9)], [])[rank]:
            metric.update(count, truth, "car")
        return float(metric.compute()["mae"])

    assert on_ranks(3, ratio, tmp_path) == [pytest.approx(5 / 3)] * 3


def test_images_without_an_answer_are_not_measured(encoder: Encoder) -> None:
    head = head_for(encoder)
    head.update_metric([{"count": 3.0}, {"count": 2.0}], None, batch_of([(8, 8)] * 2, [None, []], ["kite"] * 2))
    assert float(head.metric.compute()["mae"]) == 2


def test_the_prompt_is_what_is_embedded(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    head, asked = head_for(encoder, prompt="how many {}?"), []
    embed = encoder.embed_text
    monkeypatch.setattr(encoder, "embed_text", lambda texts: asked.extend(texts) or embed(texts))
    batch = batch_of([(16, 16)] * 2, [[], []], ["kite", "दीया"])
    found = head.predict(features_of([torch.randn(2, 2, WIDTH)] * 2), batch, encoder)
    assert asked == ["how many kite?", "how many दीया?"]
    assert found[1]["prompt"] == "how many दीया?"


def test_the_picture_is_hot_where_the_things_are(encoder: Encoder) -> None:
    head = head_for(encoder)
    density_HW = torch.zeros(4, 6)
    density_HW[1, 4] = 2.0
    grey = np.full((32, 48, 3), 100, np.uint8)
    prediction = {"density": density_HW, "count": 2.04, "prompt": "marigold"}
    panels, words = head.visualize(grey, prediction, {"points_xy": torch.full((2, 2), 8.0)})
    assert [panel.title for panel in panels] == ["model: 2.0", "truth: 2"]
    assert words == "how many marigold?"
    assert min(panels[0].image_HW3.shape[:2]) >= 320
    yellow_HW = (panels[1].image_HW3 == (255, 225, 0)).all(-1)
    assert yellow_HW[80, 80]  # 10 times as large
    assert yellow_HW.sum() == 81
    assert [panel.title for panel in head.visualize(grey, prediction, {})[0]] == ["model: 2.0"]
    picture = heat_map(grey, density_HW)
    heat_HW = picture[..., 0].astype(int) - picture[..., 2]
    assert np.unravel_index(heat_HW.argmax(), heat_HW.shape)[0] in range(8, 16)
    assert np.unravel_index(heat_HW.argmax(), heat_HW.shape)[1] in range(32, 40)
    assert heat_HW[-1, 0] == 0
    assert (heat_map(grey, torch.zeros(4, 6)) == grey).all()


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"heads\.counting\.prompt: 'how many' must contain \{\}"):
        Counting(prompt="how many")
    with pytest.raises(ValueError, match=r"heads\.counting\.upsample: found 0"):
        Counting(upsample=0)


def test_a_source_without_points_is_named(encoder: Encoder) -> None:
    head, batch = head_for(encoder), batch_of([(16, 16)], [[]], ["kite"])
    del batch["targets"]["points_xy"]
    with pytest.raises(ValueError, match=r"heads\.counting: sample '0' of its task 'counting' has no points_xy"):
        head.loss(features_of([torch.randn(2, 2, WIDTH)]), batch, encoder)
