"""Labelled, captioned and both kinds of images in one contrastive target: UniCL's matrix by hand, and the prompts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import noise, tiny_encoder

from heads.contrastive import Contrastive
from indiclip.datasets.base import SampleDataset
from indiclip.datasets.prompts import ClassPrompts
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.losses import SigmoidLoss, SoftmaxLoss, caption_ids
from indiclip.preprocessing import Preprocessing

CLASSES = ["kite", "drum"]
PROMPTS = {"en": ["a {}", "the {} there"], "hi": ["एक {}"]}


class Images(SampleDataset):
    """Images of noise with what is given of each: a label, captions, or both."""

    def __init__(self, rows, classes=(), name="x"):
        self.rows, self.classes, self.name = rows, classes, name
        labels = [row.get("label", -1) for row in rows]
        self.labels = np.array(labels) if classes else None

    def __len__(self):
        return len(self.rows)

    def key(self, index):
        return f"{self.name}{index}"

    def captions(self, index):
        return self.rows[index].get("captions", {})

    def __getitem__(self, index):
        return {"image": noise(16, 16, index), "key": self.key(index), **self.rows[index]}


LABELLED = [{"label": 0}, {"label": 1}, {"label": 0, "captions": {"en": ["red kite in the sky"]}}]


def test_prompts_stand_in_for_captions_that_are_not_there():
    names = {"hi": ["पतंग", "ढोल"]}
    found = ClassPrompts(Images(LABELLED, CLASSES), PROMPTS, names)
    assert found[0]["captions"] == {"en": ["a kite", "the kite there"], "hi": ["एक पतंग"]}
    assert found[1]["captions"]["hi"] == ["एक ढोल"]
    assert found[2]["captions"] == {"en": ["red kite in the sky"]}
    assert [found.captions(i) for i in range(3)] == [found[i]["captions"] for i in range(3)]
    alone = ClassPrompts(Images(LABELLED, CLASSES), PROMPTS, names, replace=True)
    assert alone[2]["captions"] == alone.captions(2) == found[0]["captions"]
    assert (alone[2]["label"], alone.key(2), list(alone.labels)) == (0, "x2", [0, 1, 0])


def test_an_image_without_a_class_stays_as_it_is():
    rows = [{"label": -1, "captions": {"en": ["a hill"]}}]
    assert ClassPrompts(Images(rows, CLASSES), PROMPTS, replace=True)[0]["captions"] == {"en": ["a hill"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"templates": {"en": ["kite"]}}, r"templates.en: found 'kite'; expected a \{\} for the class's name"),
        ({"templates": {}}, "templates: found {}; expected a prompt or more"),
        (
            {"templates": {"en": ["a {}"]}, "names": {"en": ["kite"]}},
            "names.en: found 1; expected one for each of the 2",
        ),
        ({"templates": {"xyzzy": ["a {}"]}}, "found the language 'xyzzy'; expected a code"),
    ],
)
def test_what_cannot_be_a_prompt_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassPrompts(Images(LABELLED, CLASSES), **arguments)
    with pytest.raises(ValueError, match="dataset: Images names no classes"):
        ClassPrompts(Images([{}]), PROMPTS)


# Two images of class 0 and one of class 1 with labels alone; a triplet of class 0; pairs, of which two have one caption
# and another's is by chance a prompt that was drawn for class 1.
LABELS = [0, 1, 0, 0, -1, -1, -1]
CAPTIONS = ["a kite", "a drum", "the kite there", "red kite in the sky", "a hill", "a hill", "a drum"]
UNICL = torch.tensor(
    [
        [1, 0, 1, 1, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 1],
        [1, 0, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 1, 0, 0, 0, 0, 1],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_target_is_unicls_matrix_by_hand(kind):
    """Equation 3 of the paper, halved as CLIP's is; and SigLIP's loss with the same matrix."""
    torch.manual_seed(0)
    image_BE, text_BE = (F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1) for _ in range(2))
    loss = (SoftmaxLoss() if kind == "softmax" else SigmoidLoss()).double()
    found = loss(image_BE, text_BE, labels_B=torch.tensor(LABELS), caption_ids_B=caption_ids(CAPTIONS))
    logits_BB = loss.logit_scale.exp() * image_BE @ text_BE.T
    if kind == "softmax":
        rows = -(UNICL / UNICL.sum(1, keepdim=True) * logits_BB.log_softmax(1)).sum(1)
        columns = -(UNICL / UNICL.sum(0) * logits_BB.log_softmax(0)).sum(0)
        expected = (rows.mean() + columns.mean()) / 2
    else:
        expected = -F.logsigmoid((2 * UNICL - 1) * (logits_BB + loss.logit_bias)).sum(1).mean()
    torch.testing.assert_close(found, expected)


def test_sources_of_all_three_kinds_make_one_batch():
    """Through the loader and the head: the loss is that of the labels and texts that the batch says."""
    pairs = [{"captions": {"en": [text]}} for text in ("a hill", "a hill", "two boats", "a cow")]
    sources = [
        Source("contrastive", ClassPrompts(Images(LABELLED[:2] * 2, CLASSES, "labelled"), PROMPTS), 12, max_tokens=4),
        Source("contrastive", Images(pairs, name="pair"), 12, max_tokens=4),
        Source("contrastive", Images(LABELLED[2:] * 4, CLASSES, "triplet"), 12, max_tokens=4),
    ]
    batch = Steps(sources, 0, Preprocessing(8), train=True)[0]["contrastive"]
    label_of = {"labelled0": 0, "labelled1": 1, "labelled2": 0, "labelled3": 1}
    expected = [label_of.get(key, 0 if key.startswith("triplet") else -1) for key in batch["keys"]]
    assert batch["targets"]["label"].tolist() == expected
    assert sorted({*expected}) == [-1, 0, 1]
    prompts = {text for key, text in zip(batch["keys"], batch["targets"]["caption"], strict=True) if "labelled" in key}
    assert prompts <= {"a kite", "the kite there", "a drum", "the drum there", "एक kite", "एक drum"}
    encoder, head = tiny_encoder(), Contrastive(loss="softmax")
    head.bind(encoder)
    features = encoder.features(batch["images"])
    output = head.loss(features, batch, encoder)
    found = output.function(*output.rows).terms["loss"]
    labels, texts = torch.tensor(expected), batch["targets"]["caption"]
    positive = torch.tensor([[a == b for b in texts] for a in texts]) | ((labels == labels[:, None]) & (labels >= 0))
    image_BE, text_BE = encoder.embed_features(features), encoder.embed_text(list(texts))
    losses = []
    for length in encoder.lengths:
        image_BL, text_BL = (F.normalize(of[:, :length], dim=1) for of in (image_BE, text_BE))
        logits = image_BL @ text_BL.T / 0.07
        target = positive / positive.sum(1, keepdim=True)
        losses.append(-(target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2)
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)
