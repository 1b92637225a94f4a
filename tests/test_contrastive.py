"""The contrastive head: its metric against numbers worked out by hand, gradients, label-aware zero-shot."""

import sys

import pytest
import torch
from helpers import caption_batch, noise, on_ranks, tiny_encoder

from heads.contrastive import Contrastive, EmbeddingMetric, retrieval_ranks
from indiclip.patches import batch_images
from indiclip.types import Batch


def test_retrieval_by_hand():
    """Three images, two distinct captions, x twice. By hand: every image is nearer to x, also image 1, which is y's."""
    image_BE = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.9, (1 - 0.81) ** 0.5]])
    text_BE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    metric = EmbeddingMetric(lengths=[2], retrieval_at=[1, 2])
    metric.update(image_BE, text_BE, torch.tensor([7, 9, 7]), hits=[])
    result = {name: value.item() for name, value in metric.compute().items()}
    assert result["image_to_text_r1"] == pytest.approx(2 / 3)  # image 1 finds x first
    assert result["image_to_text_r2"] == 1
    assert result["text_to_image_r1"] == 1  # y's nearest image is 1; x's nearest is 0
    assert "zero_shot" not in result


def test_metric_of_two_halves_is_the_metric_of_the_whole():
    torch.manual_seed(0)
    image_BE = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    text_BE = torch.nn.functional.normalize(image_BE + 0.5 * torch.randn(20, 8), dim=1)
    ids_B = torch.arange(20) % 15
    text_BE[15:] = text_BE[:5]  # equal captions have equal embeddings
    hits = [torch.tensor([True, i % 3 == 0]) for i in range(20)]
    whole, halves = EmbeddingMetric([4, 8], [1, 5]), EmbeddingMetric([4, 8], [1, 5])
    whole.update(image_BE, text_BE, ids_B, hits)
    for part in (slice(0, 7), slice(7, 20)):
        halves.update(image_BE[part], text_BE[part], ids_B[part], hits[part])
    for name, value in whole.compute().items():
        torch.testing.assert_close(halves.compute()[name], value)
    assert whole.compute()["zero_shot"] == pytest.approx(7 / 20)
    assert whole.compute()["zero_shot_4"] == 1


def test_ranks_equal_counting_one_by_one():
    torch.manual_seed(1)
    image_BE = torch.nn.functional.normalize(torch.randn(50, 6), dim=1)
    text_CE = torch.nn.functional.normalize(torch.randn(20, 6), dim=1)
    group_B = torch.cat([torch.arange(20), torch.randint(0, 20, (30,))])
    rank_B, rank_C = retrieval_ranks(image_BE, text_CE, group_B, rows=7)
    similarity = (image_BE @ text_CE.T).tolist()
    group = group_B.tolist()
    for i, row in enumerate(similarity):
        assert rank_B[i] == sum(row[c] > row[group[i]] for c in range(20))
    for c in range(20):
        best = max(similarity[i][c] for i in range(50) if group[i] == c)
        assert rank_C[c] == sum(similarity[i][c] > best for i in range(50) if group[i] != c)


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_collapsed_model_finds_nothing(value):
    """Equal vectors, or NaN: ties count against the right one."""
    metric = EmbeddingMetric([4], [1, 5])
    metric.update(torch.full((50, 4), value), torch.full((50, 4), value), torch.arange(50), [])
    assert {name: number.item() for name, number in metric.compute().items()} == {
        "image_to_text_r1": 0, "image_to_text_r5": 0, "text_to_image_r1": 0, "text_to_image_r5": 0,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_ranks_with_unequal_shares_agree_on_the_metric(tmp_path):
    """Fifteen pairs, five and none are the twenty."""
    torch.manual_seed(2)
    image_BE, text_BE = torch.nn.functional.normalize(torch.randn(2, 20, 8), dim=2)
    hits = [torch.tensor([True, i % 3 == 0]) for i in range(20)]

    def numbers(rank):
        metric = EmbeddingMetric([4, 8], [1, 5])
        part = (slice(0, 15), slice(15, 20), slice(0))[rank]
        if rank < 2:
            metric.update(image_BE[part], text_BE[part], torch.arange(20)[part], hits[part])
        return {name: value.item() for name, value in metric.compute().items()}

    answers = on_ranks(3, numbers, tmp_path)
    whole = EmbeddingMetric([4, 8], [1, 5])
    whole.update(image_BE, text_BE, torch.arange(20), hits)
    expected = {name: value.item() for name, value in whole.compute().items()}
    assert answers[0] == answers[1] == answers[2] == pytest.approx(expected)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_labels_on_one_rank_alone(tmp_path, loss):
    """The mean of two ranks' losses is the whole batch's, where only the first rank's pairs have labels."""
    captions, labels = ["a kite", "a drum", "a kite", "पतंग"], [3, 4, None, None]
    encoder, head = tiny_encoder(), Contrastive(loss=loss)
    head.build(encoder)

    def value(rows):
        images = batch_images([noise(24, 24, i) for i in rows], 8, 64)
        targets = {"caption": [captions[i] for i in rows], "label": [labels[i] for i in rows]}
        if targets["label"] == [None, None]:
            del targets["label"]
        batch = Batch(images=images, targets=targets, keys=[str(i) for i in rows])
        with torch.no_grad():
            return head.loss(encoder.features(images), batch, encoder)["loss"].item()

    answers = on_ranks(2, lambda rank: value(range(2 * rank, 2 * rank + 2)), tmp_path)
    assert sum(answers) / 2 == pytest.approx(value(range(4)), rel=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_every_parameter_gets_a_gradient(loss):
    encoder, head = tiny_encoder(), Contrastive(loss=loss)
    head.build(encoder)
    batch = caption_batch(["a kite", "a drum", "पतंग", "a kite"])
    sum(head.loss(encoder.features(batch["images"]), batch, encoder).values()).backward()
    for name, parameter in [*encoder.named_parameters(), *head.named_parameters()]:
        assert parameter.grad is not None, name


def test_learns_four_pictures_and_says_so_at_every_length():
    encoder, head = tiny_encoder(), Contrastive(loss="softmax")
    head.build(encoder)
    head.class_names = ["kite", "drum", "lotus", "bell"]
    batch = caption_batch(["kite", "drum", "lotus", "bell"], labels=[0, 1, 2, 3])
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        head.loss(encoder.features(batch["images"]), batch, encoder)["loss"].backward()
        optimizer.step()
    encoder.eval()
    head.eval()
    with torch.no_grad():
        predictions = head.predict(encoder.features(batch["images"]), batch, encoder)
    head.update_metric(predictions, batch)
    result = head.metric.compute()
    assert {name: value.item() for name, value in result.items() if "zero_shot" in name} == {
        "zero_shot": 1,
        "zero_shot_16": 1,
        "zero_shot_32": 1,
    }
    assert [prediction["nearest"][0] for prediction in predictions] == batch["targets"]["caption"]


def test_other_weights_are_scored_by_their_own_class_texts():
    head, batch = Contrastive(), caption_batch(["kite", "drum"], labels=[0, 1])
    encoder, other = tiny_encoder().eval(), tiny_encoder(seed=1).eval()
    head.build(encoder)
    head.class_names = ["kite", "drum"]
    module = torch.nn.ModuleDict({"encoder": encoder, "head": head})
    with torch.no_grad():
        head.predict(encoder.features(batch["images"]), batch, encoder)
        before = head._class_text[-1]
        other_head = Contrastive()
        other_head.build(other)
        module.load_state_dict(torch.nn.ModuleDict({"encoder": other, "head": other_head}).state_dict())
        head.predict(encoder.features(batch["images"]), batch, encoder)
        torch.testing.assert_close(head._class_text[-1], other.embed_text(head.class_names))
    assert not torch.allclose(before, head._class_text[-1], atol=1e-3)


def test_mistakes_name_the_key():
    with pytest.raises(ValueError, match="heads.contrastive.templates"):
        Contrastive(templates=["a photo"])
    encoder, head = tiny_encoder(), Contrastive()
    head.build(encoder)
    batch = caption_batch(["a", "b"])
    batch["targets"] = {}
    with pytest.raises(ValueError, match="the sample '0' has no caption"):
        head.loss(encoder.features(batch["images"]), batch, encoder)
