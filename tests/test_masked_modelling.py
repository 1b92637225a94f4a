"""Masked modelling and matching: losses against transformers' FLAVA, and runs on parts, ranks and after a stop."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from experiments import config, fit
from fake_gpu import NoWaits, moved, on_fake_gpu, step_batch
from helpers import ARCHITECTURE, batch_images, caption_batch, noise, packed, step_losses, tiny_encoder
from processes import on_ranks
from test_sharding import fitted, largest_difference, sharded, weights
from test_throughput import steps as flops_steps
from test_views import STOP
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import FlavaConfig, FlavaForPreTraining

from heads.masked_modelling import LOSSES, MaskedModelling
from indiclip.encoder import Encoder
from indiclip.head import computed
from indiclip.module import MultiTask
from indiclip.planning.step_flops import step_flops
from indiclip.tasks.multimodal_encoder import Tokens
from indiclip.tasks.patch_codebook import Codebook
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer
from indiclip.types import Batch, Origin, part_of

CODES = 6
SMALL = {"width": 32, "depth": 1, "num_heads": 2, "codebook": Codebook(CODES)}
CAPTIONS = ["a red kite", "two drums", "लाल पतंग", "a blue kite", "a matka", "three marigolds"]


def head_on(encoder, **options):
    torch.manual_seed(1)
    head = MaskedModelling(**SMALL | options)
    head.bind(encoder)
    return head


def mixed_batch():
    """Images of several sizes, one of a single patch."""
    sizes = [(40, 24), (16, 48), (32, 32), (8, 8), (24, 24), (48, 8)]
    images = batch_images([noise(*size, seed) for seed, size in enumerate(sizes)], 8, 64)
    return Batch(images=images, targets=packed({"caption": CAPTIONS}), keys=[*"abcdef"])


def learnt(head, encoder, batch):
    """The head, whose codebook has seen the batch."""
    step_losses(head.loss(encoder.features(batch["images"]), batch, encoder))
    head.after_step(encoder, 0.1, torch.ones(()))
    return head


def theirs(head, encoder, stub):
    """FLAVA's heads and losses, with our heads' weights, on what stands in the place of its encoders."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    vocabularies = {"image": CODES, "text": encoder.text.tokenizer.vocab_size, "multimodal": 2}
    sizes |= {"layer_norm_eps": 1e-5}
    parts = {f"{name}_config": sizes | {"vocab_size": size} for name, size in vocabularies.items()}
    flava = FlavaForPreTraining(FlavaConfig(**parts, hidden_size=32, init_codebook=False)).eval()
    names = {"0": "transform.dense", "2": "transform.LayerNorm", "3": "decoder"}
    for name, predictor in head.predictors.items():
        state = {f"{names[key[0]]}{key[1:]}": value for key, value in predictor.state_dict().items()}
        getattr(flava, f"{name}_head").load_state_dict(state, strict=False)
    names = {"0": "pooler.dense", "2": "seq_relationship"}
    flava.itm_head.load_state_dict({f"{names[k[0]]}{k[1:]}": value for k, value in head.matching.state_dict().items()})
    flava.flava = stub
    return flava


class Outputs(nn.Module):
    """In the place of FLAVA's encoders: these outputs, one after the other."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, **_):
        return SimpleNamespace(**self.outputs.pop(0))


def labels_of(of, shape):
    """-100 where nothing is hidden."""
    labels = torch.full(shape, -100).flatten()
    labels[of.places_K] = of.targets
    return labels.reshape(shape)


def test_losses_are_flavas():
    """On the same hidden states; `mim` and `mlm` alone, the others with pairs and mismatched pairs in one batch."""
    encoder, batch = tiny_encoder(), mixed_batch()
    head = learnt(head_on(encoder), encoder, batch)
    ours, _ = step_losses(head.loss(encoder.features(batch["images"]), batch, encoder))

    found, (class_BW, image, text) = head._read(batch, batch["targets"]["caption"], encoder)
    of_image, of_text = found["mim"][1], found["mlm"][1]
    image_labels, text_labels = (labels_of(of, of.tokens.valid_BN.shape) for of in (of_image, of_text))
    nothing = {"image_embeddings": None, "text_embeddings": None, "multimodal_embeddings": None}
    nothing |= {"image_output": None, "text_output": None, "multimodal_output": None}
    with_class = torch.cat([torch.zeros(6, 1, 32), of_image.tokens.tokens_BNW], 1)

    def losses(masked, **labels):
        flava = theirs(head, encoder, Outputs(nothing, nothing | masked))
        ids = {"input_ids": torch.zeros(1), "input_ids_masked": torch.zeros(1)}
        return flava(**ids, **labels, return_loss=True, return_dict=True).loss_info

    hidden = image_labels != -100
    of_images = {"mim_labels": image_labels, "bool_masked_pos": hidden}
    assert losses({"image_embeddings": with_class}, **copy.deepcopy(of_images)).mim.item() == pytest.approx(
        ours["mim"].item(), rel=1e-5
    )
    mlm = losses({"text_embeddings": of_text.tokens.tokens_BNW}, mlm_labels=text_labels).mlm
    assert mlm.item() == pytest.approx(ours["mlm"].item(), rel=1e-5)

    pairs = head.multimodal(image, text)
    others = head.multimodal(image, Tokens(*(of.roll(-3, 0) for of in text)))
    rows = [torch.cat([of[0][:, None], torch.zeros(6, 1, 32), *of[1:]], 1) for of in (pairs, others)]
    masked = {"image_embeddings": with_class, "text_embeddings": of_text.tokens.tokens_BNW}
    masked["multimodal_embeddings"] = torch.cat(rows)
    twice = {name: torch.cat([value, value]) for name, value in of_images.items()}
    itm_labels = torch.tensor([1] * 6 + [0] * 6)
    expected = losses(masked, **twice, mlm_labels=torch.cat([text_labels] * 2), itm_labels=itm_labels)
    for name in ("itm", "mmm_image", "mmm_text"):
        assert getattr(expected, name).item() == pytest.approx(ours[name].item(), rel=1e-5), name
    torch.testing.assert_close(class_BW, pairs[0])


def test_without_codes_what_is_lost_is_that_of_a_guess():
    """In the first step, so that GradNorm compares the later ones with something."""
    encoder, batch = tiny_encoder(), mixed_batch()
    head = head_on(encoder)
    terms = step_losses(head.loss(encoder.features(batch["images"]), batch, encoder)).terms
    for name in ("mim", "mmm_image"):
        assert terms[name].item() == pytest.approx(math.log(head.options.size))
    assert torch.autograd.grad(terms["mim"], head.predictors["mim"].parameters())[0].abs().max() == 0


def test_the_perplexity_of_codes_is_that_of_all_ranks(tmp_path):
    encoder, batch = tiny_encoder(), mixed_batch()
    head = learnt(head_on(encoder, losses={"mim": 1.0}), encoder, batch)

    def perplexity(batch):
        found = computed(head.loss(encoder.features(batch["images"]), batch, encoder))
        return found.logged["code_perplexity"].item()

    of_ranks = on_ranks(2, lambda rank: perplexity(part_of(batch, 3 * rank, 3 * rank + 3)), tmp_path)
    assert of_ranks == pytest.approx([perplexity(batch)] * 2)


@pytest.mark.parametrize("hard_negatives", [False, True])
def test_where_ranks_take_blocks_of_a_batch_its_order_does_not_matter(hard_negatives):
    """Which text an image is told apart from goes by the samples' seeds, which are the same on any number of ranks."""
    encoder = tiny_encoder().double()
    head = head_on(encoder, losses={"itm": 1.0}, hard_negatives=hard_negatives).double().eval()
    found = {}
    for in_turn in (True, False):
        for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
            batch = caption_batch(CAPTIONS[:5])
            batch["images"] = {name: [of[i] for i in order] for name, of in batch["images"].items()} | {
                name: of[order] for name, of in batch["images"].items() if isinstance(of, torch.Tensor)
            }
            batch["targets"] = packed({"caption": [CAPTIONS[i] for i in order], "random_seed": [40 + i for i in order]})
            batch["origin"] = Origin("t", in_turn=in_turn)
            terms, _ = step_losses(head.loss(encoder.features(batch["images"]), batch, encoder))
            found.setdefault(in_turn, []).append(terms["itm"].item())
    assert found[False][0] == pytest.approx(found[False][1], abs=1e-12)
    assert found[True][0] != pytest.approx(found[True][1], abs=1e-9)


@pytest.mark.parametrize("losses", [None, {"mim": 2.0}, {"mlm": 1.0}, {"itm": 1.0}, {"mmm_text": 1.0}])
@pytest.mark.parametrize("targets", ["codebook", "teacher"])
def test_every_trained_weight_has_a_gradient(losses, targets):
    """Also of the text tower, which then is not frozen, where no head embeds texts."""
    encoder, batch = tiny_encoder(), mixed_batch()
    head = learnt(head_on(encoder, losses=losses, targets=targets), encoder, batch)
    terms, _ = step_losses(head.loss(encoder.features(batch["images"]), batch, encoder))
    assert terms.keys() == (losses or dict.fromkeys(LOSSES)).keys()
    sum(terms.values()).backward()
    towers = [encoder.backbone] * head.reads_images + [encoder.text] * head.reads_text
    named = [pair for part in (head, *towers) for pair in part.named_parameters()]
    missing = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
    assert missing == []
    assert (head.images is not None and head.images.teacher is not None) == (
        targets == "teacher" and not {"mim", "mmm_image"}.isdisjoint(head.losses)
    )


def test_the_teachers_vectors_are_those_of_whole_images():
    encoder, batch = tiny_encoder(), mixed_batch()
    head = head_on(encoder, targets="teacher", losses={"mim": 1.0})
    head.begin(encoder)
    head.train()
    features = encoder.features(batch["images"])
    (tokens_KD, of), found = head._read(batch, None, encoder)[0]["mim"], head.loss(features, batch, encoder)
    whole_KD = features.tokens_BND.flatten(0, 1)[of.places_K]
    variance_K1 = whole_KD.var(1, correction=0, keepdim=True)
    expected_KD = (whole_KD - whole_KD.mean(1, keepdim=True)) / (variance_K1 + 1e-5).sqrt()
    torch.testing.assert_close(of.targets, expected_KD, atol=1e-5, rtol=1e-4)
    error_KD = (head.predictors["mim"](tokens_KD) - expected_KD).abs()
    huber_KD = torch.where(error_KD < 2, error_KD.square() / 4, error_KD - 1)
    assert step_losses(found).terms["mim"].item() == pytest.approx(huber_KD.mean().item(), rel=1e-4)
    before = [p.clone() for p in head.images.teacher.parameters()]
    with torch.no_grad():
        for parameter in encoder.backbone.parameters():
            parameter += 1
    head.after_step(encoder, 0.5, torch.ones(()))
    for old, new in zip(before, head.images.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.004)
    assert not head.images.teacher.training


def test_predictions_and_their_numbers():
    encoder, batch = tiny_encoder(), mixed_batch()
    batch["targets"]["caption"][1] = CAPTIONS[0]
    head = learnt(head_on(encoder), encoder, batch).eval()
    with torch.no_grad():
        predictions = head.predict(encoder.features(batch["images"]), batch, encoder)
    assert [one["mismatch"] is None for one in predictions] == [True, False, False, False, False, False]
    assert [one["mim"].shape for one in predictions] == [(2, len(one["hidden"])) for one in predictions]
    assert len(predictions[0]["hidden"]) == 6  # of 15
    alone = Batch(images=batch_images([noise(40, 24, 0)], 8, 64), targets=packed({"caption": CAPTIONS[:1]}), keys=["a"])
    with torch.no_grad():
        (one,) = head.predict(encoder.features(alone["images"]), alone, encoder)
    assert one["match"] == pytest.approx(predictions[0]["match"], abs=1e-5)
    assert torch.equal(one["mmm_text"], predictions[0]["mmm_text"])
    head.update_metric(predictions, None, batch)
    numbers = head.metric.compute()
    guessed, true = torch.cat([one["mlm"] for one in predictions], 1)
    assert numbers["mlm_accuracy"].item() == pytest.approx((guessed == true).double().mean().item())
    told = [one["match"] > 0.5 for one in predictions] + [one["mismatch"] <= 0.5 for one in predictions[1:]]
    assert numbers["itm_accuracy"].item() == pytest.approx(sum(told) / 11)
    panels, text = head.visualize(noise(40, 24, 0), predictions[0], {})
    assert [panel.title for panel in panels] == ["image", "hidden", "guessed"]
    assert text.startswith("its caption belongs to it: ")
    assert head.to_json(predictions[0], None) == {"match": pytest.approx(predictions[0]["match"], rel=1e-5)}


def test_a_token_of_four_patches_is_guessed_as_one():
    """Of a convolutional tower; the second image ends within its lower tokens, where its last patches are repeated."""
    torch.manual_seed(0)
    tower = TimmBackbone("test_convnext", (32, 48), 8, feature_index=2)
    encoder = Encoder(tower, TextTower(ByteTokenizer(), ARCHITECTURE), 32, [32], "mean")
    pictures = [noise(32, 48, 0), noise(24, 48, 1)]
    batch = Batch(images=batch_images(pictures, 8, 64, (32, 48)), targets={}, keys=["a", "b"])
    head = learnt(head_on(encoder, losses={"mim": 1.0}), encoder, batch).eval()
    of = head._read(batch, None, encoder)[0]["mim"][1]
    assert of.counts == [2, 2]
    pictures[1] = np.concatenate([pictures[1], pictures[1][-8:]])
    for place, target in zip(of.places_K.tolist(), of.targets.tolist(), strict=True):
        row, column = divmod(place % 6, 3)
        cell = pictures[place // 6][16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        code_P = head.codebook.normalise(torch.from_numpy(cell.flatten()))
        torch.testing.assert_close(head.codebook.codes_CP[target], code_P)  # learned from these tokens alone
    prediction = head.predict(encoder.features(batch["images"]), batch, encoder)[1]
    hidden = head.visualize(noise(24, 48, 1), prediction, {})[0][1].image_HW3
    assert (hidden == 127).all(2).sum() == sum(16 * (8 if place >= 3 else 16) for place in prediction["hidden"])


def test_a_step_never_waits_for_the_device():
    encoder, batch = tiny_encoder(), step_batch()
    heads = [head_on(encoder, hard_negatives=True), head_on(encoder, targets="teacher")]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in (encoder, *heads):
            on_fake_gpu(mode, module)
        with NoWaits():
            batch = moved(batch, "cuda")
            features = encoder.features(batch["images"])
            for head in heads:
                terms, _ = step_losses(head.loss(features, batch, encoder))
                head.after_step(encoder, 0.1, torch.ones((), device="cuda"))
                assert {term.device.type for term in terms.values()} == {"cuda"}


@pytest.mark.slow
def test_the_flops_of_a_step_are_counted_with_all_passes():
    """The oracle is torch's FlopCounterMode around a step of another batch."""
    module, data = flops_steps([32, 48])
    contrastive, _ = module.each_head()
    module = MultiTask(module.encoder, [contrastive, MaskedModelling(**SMALL, task="contrastive", targets="teacher")])
    module.log = module.log_dict = lambda *_, **__: None
    data.train = data.train[:1]
    module.encoder.text.tokenizer.encode = data.encode  # captions of one length
    rates = step_flops(module, data)
    assert 2 < rates.tasks["contrastive"].image_passes < 2.3  # with the gradient of the learned patch
    assert rates.tasks["contrastive"].text_passes == pytest.approx(2, rel=0.02)
    _, other = flops_steps([32, 48], 8)
    other.train = other.train[:1]
    step = other.steps(other.train, train=True)[0]
    with FlopCounterMode(display=False) as counter:
        module.training_step(step, 0).backward()
    assert rates.of(step) == pytest.approx(counter.get_total_flops(), rel=0.03)


def part(name, **options):
    options = {"task": "contrastive", "name": name, "width": 16, "depth": 1, "num_heads": 2} | options
    return {"class_path": "heads.masked_modelling.MaskedModelling", "init_args": options}


def experiment(steps, **trainer):
    """Two heads: a codebook with hard negatives, and a teacher that begins later."""
    tree = config(trainer__max_steps=steps, data__steps_per_epoch=2)
    tree["model"]["heads"] += [
        part("codes", hard_negatives=True, codebook={"size": 8, "decay": 0.5}),
        part("vectors", targets="teacher", teacher_decay=0.5, start=2),
    ]
    (source,) = tree["data"]["train"]
    source |= {"batch_size": 8, "max_tokens": 24}
    source["dataset"]["init_args"] |= {"languages": ["en", "hi"], "num_scenes": 32}
    tree["data"]["train"].append(copy.deepcopy(source))
    source["dataset"]["init_args"]["size"] = [32, 48]
    tree["data"]["val"] = []
    tree["trainer"] |= trainer
    return tree


def exact(steps, micro_batches=1, **trainer):
    """In float64, with an optimizer that makes nothing of rounding, and no dropout."""
    tree = experiment(steps, callbacks=[{"class_path": "trouble.Double"}], **trainer)
    tree["model"] |= {"micro_batches": micro_batches, "warmup_steps": 0, "lr": 0.01, "weight_decay": None}
    tree["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tree["model"]["encoder"]["text"]["architecture"] |= drops
    return tree


@pytest.mark.slow
def test_ranks_shards_and_micro_batches_are_one_batch(tmp_path):
    runs = {"whole": (exact(3), 1), "parts": (exact(3, micro_batches=3), 1)}
    runs["ddp"] = exact(3, strategy="ddp"), 2
    runs["shards"] = exact(3, micro_batches=2, strategy=sharded(1, 2)), 2
    ends = {}
    for name, (tree, world) in runs.items():
        done, folder = fitted(tmp_path / name, tree, world)
        assert done.returncode == 0, done.stderr[-3000:]
        ends[name] = weights(folder)
    assert ends["whole"]["heads.codes.images.codebook.steps"] == 3
    for name in ("parts", "ddp", "shards"):
        assert largest_difference(ends["whole"], ends[name]) < 1e-9, name


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Stopped when a head is about to begin, and after."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "experiments_stop.py").write_text(STOP)
    whole = tmp_path / "whole"
    whole.mkdir()
    assert fit(whole, experiment(4)) == 0
    expected = weights(whole / "runs" / "experiment")
    for number in (2, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        stop = {"class_path": "experiments_stop.Stop", "init_args": {"step": number}}
        assert fit(folder, experiment(4, callbacks=[stop])) == 0
        last = folder / "runs" / "experiment" / "checkpoints" / "last.ckpt"
        assert fit(folder, experiment(4), "--ckpt_path", str(last)) == 0
        found = weights(folder / "runs" / "experiment")
        assert all(torch.equal(found[name], value) for name, value in expected.items()), number


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"losses": {"mlmm": 1.0}}, r"losses: found 'mlmm'; nearest is 'mlm'"),
        ({"losses": {"mim": 0.0}}, r"losses\.mim: found 0\.0"),
        ({"losses": {}}, r"losses: found none"),
        ({"targets": "dvae"}, r"targets: found 'dvae'"),
        ({"codebook": Codebook(size=1)}, r"codebook\.size: found 1; expected a whole number from 2"),
        ({"codebook": Codebook(decay=1.0)}, r"codebook\.decay: found 1\.0; expected 0 to below 1"),
        ({"codebook": Codebook(until=0.0)}, r"codebook\.until: found 0\.0; expected above 0 to 1"),
        ({"image_ratio": 1.5}, r"image_ratio: found 1\.5"),
        ({"width": 30, "num_heads": 4}, r"num_heads: 4 does not divide the width 30"),
        ({"losses": {"mim": 1.0}, "hard_negatives": True}, r"hard_negatives: found true without itm"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=rf"heads\.masked_modelling\.{words}"):
        MaskedModelling(**options)


def test_hard_negatives_without_trained_embeddings_are_refused(tmp_path, capsys):
    tree = experiment(2)
    tree["model"]["heads"] = [part("codes", hard_negatives=True)]
    assert fit(tmp_path, tree) == 2
    assert (
        "heads.codes.hard_negatives: reads embeddings of images and texts, which no head trains"
        in capsys.readouterr().err
    )


def test_captions_are_the_same_on_the_way_to_a_mismatch():
    """Equal captions, or one image alone: nothing is told apart, and the pairs still count."""
    encoder = tiny_encoder()
    for batch in (caption_batch(["a kite", "a kite"]), caption_batch(["a kite"])):
        head = head_on(encoder, losses={"itm": 1.0})
        output = head.loss(encoder.features(batch["images"]), batch, encoder)
        ratio = output.function(*output.rows).terms["itm"]
        assert ratio.number == len(batch["keys"])
