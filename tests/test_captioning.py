"""Captioning: whose loss counts how much, what is drawn, and that a small decoder learns captions, names and places."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from experiments import ROOT, learnt
from helpers import batch_images, features_of, noise, step_losses
from test_sharding import fitted, largest_difference, one_loss_for_all, sharded, weights
from torch.utils.flop_counter import FlopCounterMode

from heads.captioning import Captioning
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.generated.mela import Mela
from indiclip.head import Frame
from indiclip.loading.collate import collate
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.module import MultiTask
from indiclip.planning.counter import count_step
from indiclip.preprocessing import Preprocessing
from indiclip.tasks.caption_sequences import drawn_regions
from indiclip.text import TextTower
from indiclip.tokenizers import FastTokenizer
from indiclip.training.record import read_history
from indiclip.types import Batch, Origin, Rows, Texts, part_of, targets_of

TOKENIZER = FastTokenizer(str(ROOT / "conf" / "tokenizers" / "mela.json"))
BERT = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_encoder() -> Encoder:
    torch.manual_seed(0)
    backbone = NaFlexViT(width=32, depth=1, num_heads=2, patch_size=8)
    text = TextTower(TOKENIZER, BERT | {"intermediate_size": 64})
    return Encoder(backbone, text, embed_dim=32, lengths=[16])


def make_head(encoder: Encoder, **options) -> Captioning:
    torch.manual_seed(1)
    head = Captioning(**{"task": "t", "depth": 2, "max_tokens": 40} | options)
    head.bind(encoder)
    return head


def make_batch(number: int = 4, train: bool = True) -> Batch:
    """Scenes of two sizes, with captions in two languages."""
    mela = [Mela(50, size, languages=["en", "hi"], people=0.0, seed=i) for i, size in enumerate([48, [64, 32]])]
    steps = [Steps([Source("t", dataset, number, max_tokens=40)], 0, Preprocessing(8), train) for dataset in mela]
    samples = [steps[i % 2].read("t", steps[i % 2].plans["t"].batch(0)[i // 2]) for i in range(number)]
    return collate(samples) | {"origin": Origin("t", classes=mela[0].classes)}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return make_encoder()


def losses(head, batch, encoder):
    return step_losses(head.loss(encoder.features(batch["images"]), batch, encoder))


def test_each_text_counts_alike_whatever_else_is_in_the_batch(encoder):
    """Images of other sizes, longer texts: the loss is the mean of those of the images alone."""
    head, batch = make_head(encoder, regions=True), make_batch()
    batch["targets"]["language"] = ["en", "hi", "", "en"]
    terms, logged = losses(head, batch, encoder)
    alone = [losses(head, part_of(batch, i, i + 1), encoder)[0] for i in range(4)]
    for name in ("caption", "refer", "ground"):
        torch.testing.assert_close(terms[name], torch.stack([of[name] for of in alone]).mean(), rtol=1e-5, atol=0)
    first, second, _, fourth = (of["caption"].item() for of in alone)
    found = {name: value.item() for name, value in logged.items() if "/" in name}
    assert found == pytest.approx({"caption/en": (first + fourth) / 2, "caption/hi": second}, rel=1e-5)


def test_a_caption_s_loss_is_the_mean_over_its_tokens(encoder):
    """Oracle: logits one prefix at a time, with torch's cross entropy."""
    head, batch = make_head(encoder, parallel=0.0), part_of(make_batch(), 1, 2)
    (row,) = TOKENIZER.encode(batch["targets"]["caption"])
    ids = [*row[1:-1], head.vocabulary.end]
    read = head.vocabulary.caption_prompt(batch["targets"]["language"][0])
    features = encoder.features(batch["images"])
    memory, expected = head.decoder.read(features.tokens_BND, None), []
    for id in ids:
        logits_V = head.decoder(torch.tensor([read]), memory)[0, -1] @ head.decoder.table.T
        expected.append(F.cross_entropy(logits_V, torch.tensor(id)))
        read = [*read, id]
    terms, _ = losses(head, batch, encoder)
    torch.testing.assert_close(terms["caption"], torch.stack(expected).mean(), rtol=1e-5, atol=0)
    batch["targets"]["caption"] = Texts(batch["targets"]["caption"], [row])  # as workers give it
    torch.testing.assert_close(losses(head, batch, encoder)[0]["caption"], terms["caption"])


def test_what_is_drawn_is_a_function_of_the_seeds(encoder):
    """The share of parallel captions, and which box: each that is no crowd, and none where classes have no names."""
    head, batch = make_head(encoder, parallel=0.25), make_batch(1)
    boxes_R4, of_one = torch.arange(12.0).reshape(3, 4), torch.zeros(3, dtype=torch.long)
    rows = {"boxes_xyxy": boxes_R4, "classes": torch.tensor([0, 1, 2]), "crowd": torch.tensor([False, True, False])}
    batch["targets"] |= {name: Rows(values, of_one, [3], [True]) for name, values in rows.items()}
    found, is_parallel = Counter(), []
    for seed in range(400):
        batch["targets"]["random_seed"] = [seed]
        (region,) = drawn_regions(batch)
        assert drawn_regions(batch) == [region]
        found[region.name] += 1
        assert region.box_xyxy == boxes_R4[batch["origin"].classes.index(region.name)].tolist()
        is_parallel += head._captions(batch, encoder)[1].tolist()
    names = batch["origin"].classes
    assert {*found} == {names[0], names[2]}
    assert min(found.values()) > 150
    assert 0.19 < np.mean(is_parallel) < 0.31  # three standard deviations of 400 draws
    head.eval()
    assert not any(head._captions(batch, encoder)[1])  # a held-out caption is scored as it is written
    batch["origin"] = Origin("t")
    assert drawn_regions(batch) == [None]


def test_without_boxes_their_losses_are_0_and_all_parameters_have_gradients(encoder):
    head, batch = make_head(encoder, regions=True), make_batch()
    batch["targets"] = {name: value for name, value in batch["targets"].items() if not isinstance(value, Rows)}
    terms, _ = losses(head, batch, encoder)
    assert terms["refer"] == terms["ground"] == 0 < terms["caption"]
    sum(terms.values()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


CAPTIONS = ["a red kite", "लाल पतंग", "two drums", "दो ढोल", "nobody is there, only a lamp", "वहाँ कोई नहीं"]
LANGUAGES = ["en", "hi"] * 3
CELLS = [(3, 2)] * 2 + [(2, 5)] * 2 + [(1, 1)] * 2
BOXES = torch.tensor([[1, 2, 15, 23], [0, 8, 40, 16], [2, 2, 7, 6]]).float().repeat_interleave(2, 0)


@pytest.fixture(scope="module")
def trained(encoder):
    """A head that has learnt three images by heart, each in two languages; and the features and batch of these."""
    torch.manual_seed(2)
    maps = [torch.randn(*cells, 32) for cells in CELLS[::2] for _ in range(2)]
    maps = [maps[i - i % 2] for i in range(6)]
    images = batch_images([noise(8 * rows, 8 * columns) for rows, columns in CELLS], 8, 64)
    one_each = torch.arange(6), [1] * 6, [True] * 6
    rows = {"boxes_xyxy": Rows(BOXES, *one_each), "classes": Rows(torch.arange(6) // 2, *one_each)}
    targets = {"caption": CAPTIONS, "language": LANGUAGES, **rows}
    batch = Batch(
        images=images, targets=targets, keys=[*"abcdef"], origin=Origin("t", classes=["kite", "drum", "lamp"])
    )
    features, head = features_of(maps), make_head(encoder, regions=True, parallel=0.3, num_bins=20, depth=1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for step in range(60):
        batch["targets"]["random_seed"] = [1000 * step + i for i in range(6)]
        terms, _ = step_losses(head.loss(features, batch, encoder))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    return head.eval(), features, batch


@torch.no_grad()
def test_it_writes_what_it_has_learnt_in_the_language_that_is_asked_for(trained, encoder):
    head, features, batch = trained
    predictions = head.predict(features, batch, encoder)
    assert [(one["caption"], one["language"]) for one in predictions] == [*zip(CAPTIONS, LANGUAGES, strict=True)]
    assert max(one["cross_entropy"] / one["num_tokens"] for one in predictions) < 0.2
    head.update_metric(predictions, features, batch)
    numbers = head.metric.compute()
    assert numbers["chrf/hi"] == numbers["chrf"] == numbers["box_at_half"] == numbers["named"] == 1
    head.metric.reset()
    everything = [{language: []} for language in LANGUAGES]  # lists without a caption beside the one that was drawn
    head.update_metric(predictions, features, batch | {"targets": batch["targets"] | {"captions": everything}})
    assert head.metric.compute()["chrf"] == 1
    bare = Batch(images=batch["images"], targets={}, keys=batch["keys"])  # nothing is known of the images
    head.language = "hi"
    written = [one["caption"] for one in head.predict(features, bare, encoder)]
    head.language = ""
    assert written == [CAPTIONS[i - i % 2 + 1] for i in range(6)]


@torch.no_grad()
def test_what_it_names_first_is_in_its_place(trained, encoder):
    head, features, batch = trained
    batch["images"]["scale"] = [(0.5, 0.5)] * 6
    for image, one in enumerate(head.predict(features, batch, encoder)):
        assert one["name"] == batch["origin"].classes[image // 2]
        assert (one["box_xyxy"] - BOXES[image]).abs().max() < 40 / 20
        written = head.to_json(one, Frame.of(batch, image))
        expected = {"caption": CAPTIONS[image], "language": LANGUAGES[image], "name": one["name"]}
        assert written == expected | {"box": pytest.approx((2 * one["box_xyxy"]).tolist(), rel=1e-4)}
        pixels_HW3 = noise(8 * CELLS[image][0], 8 * CELLS[image][1])
        (panel,), lines = head.visualize(pixels_HW3, one, targets_of(batch, image))
        assert panel.labels == [(*one["box_xyxy"][:2].tolist(), one["name"])]
        assert [line.text for line in lines[1::2]] == [CAPTIONS[image]] * 2
        assert (panel.image_HW3 != pixels_HW3).any()


def test_a_plan_counts_the_decoder(encoder):
    """Oracle: torch's counter on a real step of the head, the products of the chunked loss with it."""
    head, batch = Captioning(task="t", depth=1), make_batch(2)
    module = MultiTask(encoder, [head])
    counted = count_step(module, {"t": batch})["t"]["captioning"]
    features = encoder.features(batch["images"])
    features.tokens = features.tokens.detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        terms, _ = step_losses(head.loss(features, batch, encoder))
        sum(terms.values()).backward()
    assert counted.flops == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, r"heads\.captioning\.depth: found 0; expected 1 or more"),
        ({"depth": 2, "text_layers": 2}, r"heads\.captioning\.text_layers: found 2; expected 0 to 1"),
        ({"parallel": 1.5}, r"heads\.captioning\.parallel: found 1\.5; expected 0 to 1"),
        ({"language": "Hindi (hi)"}, r"heads\.captioning\.language: found 'Hindi \(hi\)'; expected a code such as hi"),
        ({"language": "Hindi"}, r"heads\.captioning\.language: found 'Hindi'; expected a code such as hi"),
        ({"num_bins": 1}, r"heads\.captioning\.num_bins: found 1; expected 2 or more"),
        ({"max_tokens": 65}, r"heads\.captioning\.max_tokens: found 65; expected 1 to 64"),  # the tokenizer's context
        ({"width": 64, "num_heads": 3}, r"heads\.captioning\.num_heads: found 3; expected a number that divides .* 64"),
    ],
)
def test_mistakes_name_the_key(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        Captioning(**options).bind(encoder)


class Without(Mela):
    captioned = False


def test_data_that_do_not_fit_are_refused(encoder):
    without = Mela(4)
    without.classes = []
    message = r"heads\.captioning\.regions: needs boxes whose classes have names, but data\.train\[0\] has none"
    with pytest.raises(ValueError, match=message):
        make_head(encoder, regions=True).check({"data.train[0]": without}, {})
    make_head(encoder).check({"data.train[0]": without}, {})
    samples = {"data.train[0]": {"label": 3}, "data.train[1]": {"caption": "a diya"}}
    with pytest.raises(
        ValueError, match=r"heads\.captioning\.regions: needs boxes, but the first samples of data\.tra"
    ):
        make_head(encoder, regions=True).check_samples(samples)
    make_head(encoder, regions=True).check_samples(samples | {"data.train[2]": Mela(4)[0]})
    make_head(encoder).check_samples(samples)
    with pytest.raises(ValueError, match=r"heads\.captioning\.task: data\.val\[0\]: Without .* without a caption"):
        make_head(encoder).check({}, {"data.val[0]": Without(4)})


@pytest.mark.slow
def test_two_ranks_of_shards_train_and_write_as_one_process_does(tmp_path):
    """Although the logits' matrix is read beside the decoder's own call. Losses, weights, and held-out captions."""
    found = {}
    for world, strategy in {1: "auto", 2: sharded(1, 2)}.items():
        tree = one_loss_for_all(strategy, 3)
        options = {"task": "contrastive", "depth": 1, "regions": True, "num_bins": 20, "max_tokens": 24}
        tree["model"]["heads"].append({"class_path": "heads.captioning.Captioning", "init_args": options})
        tree["data"]["steps_per_epoch"] = 3
        done, folder = fitted(tmp_path / str(world), tree, world)
        assert done.returncode == 0, done.stderr
        found[world] = folder
    assert largest_difference(*(weights(folder) for folder in found.values())) < 1e-6
    rows = [[learnt(row) for row in read_history(folder)] for folder in found.values()]
    assert {"train/captioning/caption", "train/captioning/refer", "train/captioning/ground"} <= rows[0][0].keys()
    assert any(name.startswith("val/captioning/") for name in rows[0][-1])
    for one, two in zip(*rows, strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-6, nan_ok=True)
