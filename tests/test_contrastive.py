"""The contrastive head: its metric against numbers worked out by hand, gradients, label-aware zero-shot."""

import sys

import pytest
import torch
from helpers import batch_images, caption_batch, noise, packed, step_losses, tiny_encoder
from processes import on_ranks

from heads.contrastive import Contrastive, EmbeddingMetric
from indiclip.datasets.base import SampleDataset
from indiclip.evals.protocols import cosines
from indiclip.evals.protocols.cosines import pair_ranks
from indiclip.generated.mela import Mela
from indiclip.ratios import over_all_ranks
from indiclip.types import Batch, Origin


def one_each(metric, image_BE, text_BE, ids, hits=()):
    """Adds images with a caption each, in no language."""
    captions = [{"": [f"caption {number}"]} for number in torch.as_tensor(ids).tolist()]
    metric.update(image_BE, captions, [{"": text_E[None]} for text_E in text_BE], [""] * len(captions), list(hits))


def test_retrieval_by_hand():
    """Three images, two distinct captions, x twice. By hand: every image is nearer to x, also image 1, which is y's."""
    image_BE = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.9, (1 - 0.81) ** 0.5]])
    text_BE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    metric = EmbeddingMetric(lengths=[2], retrieval_at=[1, 2])
    one_each(metric, image_BE, text_BE, [7, 9, 7])
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
    one_each(whole, image_BE, text_BE, ids_B, hits)
    for part in (slice(0, 7), slice(7, 20)):
        one_each(halves, image_BE[part], text_BE[part], ids_B[part], hits[part])
    for name, value in whole.compute().items():
        torch.testing.assert_close(halves.compute()[name], value)
    assert whole.compute()["zero_shot"] == pytest.approx(7 / 20)
    assert whole.compute()["zero_shot_4"] == 1


@pytest.mark.parametrize("per_image", [1, 5])
def test_ranks_equal_counting_one_by_one(per_image, monkeypatch):
    """With five captions an image, and captions that several images share, seven images at a time."""
    monkeypatch.setattr(cosines, "_CHUNK", 7 * 20)
    torch.manual_seed(1)
    image_BE = torch.nn.functional.normalize(torch.randn(50, 6), dim=1)
    text_CE = torch.nn.functional.normalize(torch.randn(20, 6), dim=1)
    image_S = torch.arange(50).repeat_interleave(per_image)
    text_S = torch.cat([torch.arange(20), torch.randint(0, 20, (50 * per_image - 20,))])
    rank_B, rank_C = pair_ranks(image_BE, text_CE, image_S, text_S)
    similarity = (image_BE @ text_CE.T).tolist()
    pairs = set(zip(image_S.tolist(), text_S.tolist(), strict=True))
    for i, row in enumerate(similarity):
        best = max(row[c] for c in range(20) if (i, c) in pairs)
        assert rank_B[i] == sum(row[c] > best for c in range(20) if (i, c) not in pairs)
    for c in range(20):
        best = max(similarity[i][c] for i in range(50) if (i, c) in pairs)
        assert rank_C[c] == sum(similarity[i][c] > best for i in range(50) if (i, c) not in pairs)


def test_every_caption_of_an_image_counts():
    """COCO's five: an image is found by any of them, and each of them has to find its image. By hand, in the plane."""

    def at(*degrees):
        angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    metric = EmbeddingMetric([2], [1])
    captions = [{"": ["near a", "far from a"]}, {"": ["near b"]}]
    metric.update(at(0, 90), captions, [{"": at(10, 80)}, {"": at(85)}], ["", ""], [])
    result = {name: value.item() for name, value in metric.compute().items()}
    assert result["image_to_text_r1"] == 1  # a's first caption is its nearest; b is nearest to its own
    assert result["text_to_image_r1"] == pytest.approx(2 / 3)  # "far from a" finds b first


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_collapsed_model_finds_nothing(value):
    """Equal vectors, or NaN: ties count against the right one."""
    metric = EmbeddingMetric([4], [1, 5])
    one_each(metric, torch.full((50, 4), value), torch.full((50, 4), value), range(50))
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
            one_each(metric, image_BE[part], text_BE[part], torch.arange(20)[part], hits[part])
        return {name: value.item() for name, value in metric.compute().items()}

    answers = on_ranks(3, numbers, tmp_path)
    whole = EmbeddingMetric([4, 8], [1, 5])
    one_each(whole, image_BE, text_BE, torch.arange(20), hits)
    expected = {name: value.item() for name, value in whole.compute().items()}
    assert answers[0] == answers[1] == answers[2] == pytest.approx(expected)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_labels_on_one_rank_alone(tmp_path, loss):
    """The mean of two ranks' losses is the whole batch's, where only the first rank's pairs have labels."""
    captions, labels = ["a kite", "a drum", "a kite", "पतंग"], [3, 4, None, None]
    encoder, head = tiny_encoder(), Contrastive(loss=loss)
    head.bind(encoder)

    def value(rows):
        images = batch_images([noise(24, 24, i) for i in rows], 8, 64)
        targets = packed({"caption": [captions[i] for i in rows], "label": [labels[i] for i in rows]})
        batch = Batch(images=images, targets=targets, keys=[str(i) for i in rows])
        with torch.no_grad():
            return step_losses(head.loss(encoder.features(images), batch, encoder)).terms["loss"].item()

    answers = on_ranks(2, lambda rank: value(range(2 * rank, 2 * rank + 2)), tmp_path)
    assert sum(answers) / 2 == pytest.approx(value(range(4)), rel=1e-5)


def language_batch(captions, languages, by_language=None):
    batch = caption_batch(captions)
    batch["targets"] |= {"language": languages} | ({"captions": by_language} if by_language else {})
    return batch


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_the_loss_by_language_by_hand(loss):
    """Of different captions without labels: the mean of the rows that a plain double-precision loss gives."""
    captions = ["a kite", "पतंग", "a drum", "ढोल", "a bell"]
    encoder, head = tiny_encoder(), Contrastive(loss=loss)
    head.bind(encoder)
    batch = language_batch(captions, ["en", "hi", "en", "hi", "en"])
    with torch.no_grad():
        features = encoder.features(batch["images"])
        terms, logged = step_losses(head.loss(features, batch, encoder))
        image_BE, text_BE = encoder.embed_features(features).double(), encoder.embed_text(captions).double()
        pair_B = torch.zeros(5, dtype=torch.float64)
        for length in encoder.lengths:
            image, text = (torch.nn.functional.normalize(x[:, :length], dim=1) for x in (image_BE, text_BE))
            logits_BB = head.criterion.logit_scale.double().exp() * image @ text.T
            if loss == "sigmoid":
                sign_BB = 2 * torch.eye(5, dtype=torch.float64) - 1
                rows_B = -torch.nn.functional.logsigmoid(sign_BB * (logits_BB + head.criterion.logit_bias)).sum(1)
            else:
                rows_B = -(logits_BB.log_softmax(1).diagonal() + logits_BB.log_softmax(0).diagonal()) / 2
            pair_B += rows_B / len(encoder.lengths)
    assert logged.keys() == {"loss/en", "loss/hi"}
    assert logged["loss/en"].item() == pytest.approx(pair_B[[0, 2, 4]].mean().item(), rel=1e-5)
    assert logged["loss/hi"].item() == pytest.approx(pair_B[[1, 3]].mean().item(), rel=1e-5)
    weighted = (3 * logged["loss/en"] + 2 * logged["loss/hi"]) / 5
    assert weighted.item() == pytest.approx(terms["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_languages_and_labels_together_average_to_the_loss(precision):
    """With repeated captions, labels and reduced precision too."""
    encoder, head = tiny_encoder(), Contrastive(loss="softmax")
    head.bind(encoder)
    batch = language_batch(["a kite", "पतंग", "a kite", "পতাকা"], ["en", "hi", "en", "bn"])
    batch["targets"]["label"] = torch.tensor([0, 0, -1, 1])
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        terms, logged = step_losses(head.loss(encoder.features(batch["images"]), batch, encoder))
    shares = {"loss/en": 2, "loss/hi": 1, "loss/bn": 1}
    weighted = sum(n * logged[name].item() for name, n in shares.items()) / 4
    assert weighted == pytest.approx(terms["loss"].item(), rel=1e-5)


def test_what_has_no_language_or_no_other_counts_in_none():
    encoder, head = tiny_encoder(), Contrastive()
    head.bind(encoder)

    def logged(languages):
        batch = language_batch(["a", "b", "c"], languages)
        found = step_losses(head.loss(encoder.features(batch["images"]), batch, encoder)).logged
        return {name: value.item() for name, value in found.items()}

    assert logged(["hi", None, "hi"]) == {}  # one language
    assert logged([None] * 3) == {}
    assert logged(["hi", None, "ta"]).keys() == {"loss/hi", "loss/ta"}
    assert logged(["hi", None, "hi"]).keys() == {"loss/hi"}  # the run has two, this step one
    assert logged(["hi", "no code", "x/y"]).keys() == {"loss/hi"}
    batch = caption_batch(["a", "b"])
    assert step_losses(head.loss(encoder.features(batch["images"]), batch, encoder)).logged == {}


def brute_force(image, text, caption, k):
    """Recall@k both ways, by sorting: images' vectors, their captions' vectors and texts."""
    distinct = list(dict.fromkeys(caption))
    of = {words: text[caption.index(words)] for words in distinct}

    def near(a, b):
        return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))

    hits = 0
    for i, words in enumerate(caption):
        ranking = sorted(distinct, key=lambda other: -near(image[i], of[other]))
        hits += words in ranking[:k]
    found = 0
    for words in distinct:
        ranking = sorted(range(len(image)), key=lambda i: -near(image[i], of[words]))
        found += any(caption[i] == words for i in ranking[:k])
    return hits / len(caption), found / len(distinct)


def languages_case(count=30):
    """Images with captions in three languages: English has all, Hindi lacks every third, Tamil has the first ten."""
    torch.manual_seed(4)
    image_BE = torch.nn.functional.normalize(torch.randn(count, 8), dim=1)
    captions, texts_E = [], []
    for i in range(count):
        captions.append({"en": f"en {i % 25}"})  # some are equal
        if i % 3:
            captions[-1] = {"hi": f"hi {i}"} | captions[-1]
        if i < 10:
            captions[-1]["ta"] = f"ta {i}"
        noise = {"en": 0.4, "hi": 0.8, "ta": 0.6}
        texts_E.append({})
        for name in captions[-1]:
            generator = torch.Generator().manual_seed(sum(captions[-1][name].encode()))  # equal texts, equal vectors
            text_E = image_BE[i % 25] + noise[name] * torch.randn(8, generator=generator)
            texts_E[-1][name] = torch.nn.functional.normalize(text_E, dim=0)
    return image_BE, captions, texts_E


def listed(metric, image_BE, captions, texts_E, drawn):
    """Adds images with one caption in each of their languages."""
    captions = [{name: [text] for name, text in by.items()} for by in captions]
    texts_TE = [{name: text_E[None] for name, text_E in by.items()} for by in texts_E]
    metric.update(image_BE, captions, texts_TE, drawn, [])


def test_retrieval_by_language_equals_brute_force():
    image_BE, captions, texts_E = languages_case()
    metric = EmbeddingMetric([8], [1, 5])
    drawn = ["hi" if i % 3 == 1 else "en" for i in range(30)]
    for part in (slice(0, 11), slice(11, 30)):
        listed(metric, image_BE[part], captions[part], texts_E[part], drawn[part])
    result = {name: value.item() for name, value in metric.compute().items()}

    def expected(name, k, images):
        text = [texts_E[i][name] for i in images]
        return brute_force([image_BE[i] for i in images], text, [captions[i][name] for i in images], k)

    of = {name: [i for i in range(30) if name in captions[i]] for name in ("en", "hi", "ta")}
    for name, images in of.items():
        for k in (1, 5):
            image_to_text, text_to_image = expected(name, k, images)
            assert result[f"image_to_text_r{k}/{name}"] == pytest.approx(image_to_text), (name, k)
            assert result[f"text_to_image_r{k}/{name}"] == pytest.approx(text_to_image), (name, k)
    for name in ("hi", "ta"):  # on the images that have both
        gap = expected("en", 5, of[name])[0] - expected(name, 5, of[name])[0]
        assert result[f"image_to_text_r5_gap/{name}"] == pytest.approx(gap)
    head = Contrastive()
    head.bind(tiny_encoder())
    words = head.measures(Mela(4, 32))["image_to_text_r5_gap"].words
    assert words == "image to text, recall at 5: English less this language"  # less than 0 where the language is better
    text = [texts_E[i][name] for i, name in enumerate(drawn)]
    words = [captions[i][name] for i, name in enumerate(drawn)]
    overall = brute_force(list(image_BE), text, words, 5)
    assert (result["image_to_text_r5"], result["text_to_image_r5"]) == pytest.approx(overall)
    assert "image_to_text_r5_gap/en" not in result
    assert {name: result[f"images/{name}"] for name in of} == {"en": 30, "hi": 20, "ta": 10}
    assert 0 < result["image_to_text_r1/hi"] < result["image_to_text_r1/en"] < 1  # the case is none of the easy ones


def test_the_images_are_not_counted_where_all_have_all_languages():
    image_BE, captions, texts_E = languages_case(10)
    metric = EmbeddingMetric([8], [1])
    captions, texts_E = ([{name: by[name] for name in ("en", "ta")} for by in part] for part in (captions, texts_E))
    # Those without a known language are in no language's gallery.
    listed(metric, image_BE, [*captions[:9], {"": "x"}], [*texts_E[:9], {"": image_BE[9]}], ["en"] * 9 + [""])
    assert {name for name in metric.compute() if name.startswith("images/")} == set()


def test_a_pair_that_is_not_finite_is_found_by_its_language():
    encoder, head = tiny_encoder(), Contrastive()
    head.bind(encoder)
    head.criterion.pair_losses_B, head._languages = torch.tensor([1.0, float("inf"), 2.0]), {"en", "hi"}
    logged = over_all_ranks(head._loss_by_language(["en", "hi", "en"]))
    assert {name: value.item() for name, value in logged.items()} == {"loss/en": 1.5, "loss/hi": float("inf")}


def test_one_language_alone_is_not_scored_twice():
    image_BE, captions, texts_E = languages_case()
    metric = EmbeddingMetric([8], [1])
    english = [{"en": of_image["en"]} for of_image in captions]
    listed(metric, image_BE, english, [{"en": t["en"]} for t in texts_E], ["en"] * 30)
    assert metric.compute().keys() == {"image_to_text_r1", "text_to_image_r1"}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_ranks_that_saw_different_languages_agree(tmp_path):
    """The first rank has no Tamil, the second no English, the third no sample."""
    image_BE, captions, texts_E = languages_case()
    captions = [{n: c for n, c in by.items() if n != ("ta" if i < 15 else "en")} for i, by in enumerate(captions)]
    captions[20]["ta"], texts_E[20]["ta"] = "ta 20", image_BE[19]
    texts_E = [{n: t[n] for n in by} for t, by in zip(texts_E, captions, strict=True)]

    def numbers(parts):
        metric = EmbeddingMetric([8], [1, 5])
        for part in parts:
            listed(metric, image_BE[part], captions[part], texts_E[part], [next(iter(by), "") for by in captions[part]])
        return {name: value.item() for name, value in metric.compute().items()}

    answers = on_ranks(3, lambda rank: numbers([[slice(0, 15)], [slice(15, 30)], []][rank]), tmp_path)
    expected = numbers([slice(0, 30)])
    assert answers[0] == answers[1] == answers[2] == pytest.approx(expected)
    assert "image_to_text_r1/ta" in expected


def test_held_out_captions_are_scored_in_all_languages_by_the_head():
    """What `predict` gives for a language is what the encoder gives for its captions alone."""
    encoder, head = tiny_encoder().eval(), Contrastive()
    head.bind(encoder)
    by_language = [{"en": ["a kite"], "hi": ["एक पतंग", "पतंग"]}, None, {"hi": ["ढोल"], "no code": ["x"]}]
    batch = language_batch(["a kite", "a bell", "ढोल"], ["en", None, "hi"], by_language)
    with torch.no_grad():
        predictions = head.predict(encoder.features(batch["images"]), batch, encoder)
        assert [list(prediction["texts_TE"]) for prediction in predictions] == [["en", "hi"], [""], ["hi", ""]]
        expected_TE = encoder.embed_text(["एक पतंग", "पतंग"])
        torch.testing.assert_close(predictions[0]["texts_TE"]["hi"], expected_TE, atol=1e-6, rtol=0)
        torch.testing.assert_close(predictions[2]["text_E"], encoder.embed_text("ढोल")[0], atol=1e-6, rtol=0)
    head.update_metric(predictions, encoder.features(batch["images"]), batch)
    assert {name for name in head.metric.compute() if "/" in name} == {
        *("image_to_text_r1/en", "image_to_text_r5/en", "text_to_image_r1/en", "text_to_image_r5/en"),
        *("image_to_text_r1/hi", "image_to_text_r5/hi", "text_to_image_r1/hi", "text_to_image_r5/hi"),
        *("image_to_text_r5_gap/hi", "images/en", "images/hi"),
    }


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_every_parameter_gets_a_gradient(loss):
    encoder, head = tiny_encoder(), Contrastive(loss=loss)
    head.bind(encoder)
    batch = caption_batch(["a kite", "a drum", "पतंग", "a kite"])
    sum(step_losses(head.loss(encoder.features(batch["images"]), batch, encoder)).terms.values()).backward()
    for name, parameter in [*encoder.named_parameters(), *head.named_parameters()]:
        assert parameter.grad is not None, name


def test_learns_four_pictures_and_says_so_at_every_length():
    encoder, head = tiny_encoder(), Contrastive(loss="softmax")
    head.bind(encoder)
    names = ["kite", "drum", "lotus", "bell"]
    batch = caption_batch(names, labels=[0, 1, 2, 3]) | {"origin": Origin("contrastive", classes=names)}
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        step_losses(head.loss(encoder.features(batch["images"]), batch, encoder)).terms["loss"].backward()
        optimizer.step()
    encoder.eval()
    head.eval()
    with torch.no_grad():
        predictions = head.predict(encoder.features(batch["images"]), batch, encoder)
    head.update_metric(predictions, None, batch)
    result = head.metric.compute()
    assert {name: value.item() for name, value in result.items() if "zero_shot" in name} == {
        "zero_shot": 1,
        "zero_shot_16": 1,
        "zero_shot_32": 1,
    }
    assert [prediction["nearest"][0] for prediction in predictions] == batch["targets"]["caption"]


def test_other_weights_are_scored_by_their_own_class_texts():
    names = ("kite", "drum")
    head, batch = Contrastive(), caption_batch(list(names), labels=[0, 1])
    batch["origin"] = Origin("contrastive", classes=names)
    encoder, other = tiny_encoder().eval(), tiny_encoder(seed=1).eval()
    head.bind(encoder)
    module = torch.nn.ModuleDict({"encoder": encoder, "head": head})
    with torch.no_grad():
        head.predict(encoder.features(batch["images"]), batch, encoder)
        before = head._class_text[names][-1]
        other_head = Contrastive()
        other_head.bind(other)
        module.load_state_dict(torch.nn.ModuleDict({"encoder": other, "head": other_head}).state_dict())
        head.predict(encoder.features(batch["images"]), batch, encoder)
        torch.testing.assert_close(head._class_text[names][-1], other.embed_text(list(names)))
    assert not torch.allclose(before, head._class_text[names][-1], atol=1e-3)


def test_a_text_tower_that_others_train_is_scored_by_its_own_class_texts():
    """Such as a distillation that begins before this head, which is scored from the first validation on."""
    names = ("kite", "drum")
    head, batch, encoder = Contrastive(), caption_batch(list(names), labels=[0, 1]), tiny_encoder().eval()
    batch["origin"] = Origin("contrastive", classes=names)
    head.bind(encoder)
    for seed in range(2):
        head.eval()
        with torch.no_grad():
            encoder.text_projection.weight.copy_(tiny_encoder(seed=seed).text_projection.weight)
            head.predict(encoder.features(batch["images"]), batch, encoder)
            torch.testing.assert_close(head._class_text[names][-1], encoder.embed_text(list(names)))
        head.train()


def test_mistakes_name_the_key():
    for template in ("a photo", "{} {}"):
        with pytest.raises(ValueError, match="heads.contrastive.templates"):
            Contrastive(templates=[template])
    encoder, head = tiny_encoder(), Contrastive()
    with pytest.raises(ValueError, match=r"heads.pairs.length_weights: found \[1.0\] for the lengths \[16, 32, 64\]"):
        Contrastive(name="pairs", length_weights=[1.0]).bind(encoder)
    head.bind(encoder)
    batch = caption_batch(["a", "b"])
    batch["targets"] = {}
    with pytest.raises(ValueError, match="heads.contrastive: sample '0' of its task 'contrastive' has no caption"):
        head.loss(encoder.features(batch["images"]), batch, encoder)


def test_images_without_a_caption_can_be_embedded():
    """To be predicted an image needs no caption; to be trained on or scored it does."""
    encoder, head = tiny_encoder().eval(), Contrastive()
    head.bind(encoder)
    batch = caption_batch(["a kite", "a drum"])
    with torch.no_grad():
        captioned = head.predict(encoder.features(batch["images"]), batch, encoder)
        batch["targets"]["caption"][1] = None
        half = head.predict(encoder.features(batch["images"]), batch, encoder)
        batch["targets"] = {}
        bare = head.predict(encoder.features(batch["images"]), batch, encoder)
    for found in (half, bare):
        assert all(torch.equal(a["image_E"], b["image_E"]) for a, b in zip(found, captioned, strict=True))
    torch.testing.assert_close(half[0]["text_E"], captioned[0]["text_E"])  # padded to another length
    assert half[1]["text_E"] is bare[0]["text_E"] is None
    assert half[1]["nearest"] == ["a kite"]
    assert bare[0]["nearest"] == []


class OfClass(SampleDataset):
    """No samples, of one class."""

    def __init__(self, name):
        self.classes = [name]

    def __len__(self):
        return 0

    def key(self, index):
        raise IndexError(index)

    __getitem__ = key


def test_labels_of_sources_that_number_classes_in_another_way_are_refused():
    """In training; what is held out is scored by its own classes."""
    kites, drums = OfClass("kite"), OfClass("drum")
    Contrastive().check({"data.train[0]": kites}, {"data.val[0]": drums})
    with pytest.raises(ValueError, match=r"data\.train\[1\]: the sources .* class 0 is 'kite' and 'drum'"):
        Contrastive().check({"data.train[0]": kites, "data.train[1]": drums}, {})
