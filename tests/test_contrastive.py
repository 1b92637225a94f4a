"""The contrastive head: its metric against numbers worked out by hand, gradients, label-aware zero-shot."""

import pytest
import torch
from helpers import caption_batch, tiny_encoder

from heads.contrastive import Contrastive, EmbeddingMetric


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


def test_mistakes_name_the_key():
    with pytest.raises(ValueError, match="heads.contrastive.templates"):
        Contrastive(templates=["a photo"])
    encoder, head = tiny_encoder(), Contrastive()
    head.build(encoder)
    batch = caption_batch(["a", "b"])
    batch["targets"] = {}
    with pytest.raises(ValueError, match="the sample '0' has no caption"):
        head.loss(encoder.features(batch["images"]), batch, encoder)
