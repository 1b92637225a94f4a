"""What every head keeps to: its name, its fields, and that its step never waits for the device."""

import ast
from pathlib import Path

import pytest
import torch
from fake_gpu import NoWaits, moved, on_fake_gpu, step_batch
from helpers import step_losses, tiny_encoder
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import masking_utils

from heads.captioning import Captioning
from heads.contrastive import Contrastive
from heads.counting import Counting
from heads.densepose import DensePose
from heads.detection import Detection
from indiclip.encoder import Encoder
from indiclip.head import Head
from indiclip.types import Batch

DETECTION = {"out_channels": 16, "num_convs": 1, "scales": [2.0, 1.0, 0.5]}
HEADS = {
    "contrastive, sigmoid": lambda: Contrastive(),
    "contrastive, softmax": lambda: Contrastive(loss="softmax"),
    "detection": lambda: Detection(num_classes=17, **DETECTION),
    "detection of some": lambda: Detection(classes=["person", "kite"], **DETECTION),
    "densepose": lambda: DensePose(roi_size=7, channels=16, num_convs=1, box_jitter=0.05),
    "captioning": lambda: Captioning(depth=1, max_tokens=8),
    "captioning, regions": lambda: Captioning(depth=1, max_tokens=8, regions=True),
    "counting": lambda: Counting(channels=16),
    "counting, boxes": lambda: Counting(channels=16, upsample=2, ask_boxes=True),
}


def step(head: Head, encoder: Encoder, batch: Batch) -> dict[str, Tensor]:
    terms, logged = step_losses(head.loss(encoder.features(batch["images"]), batch, encoder))
    return terms | dict(logged)


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("encoder_options", [{}, {"pool": "mean", "batch_norm": True}], ids=["attention", "mean"])
def test_a_step_never_waits_for_the_device(make, encoder_options, monkeypatch):
    """Fake tensors on a GPU that is not there: they raise on `.item()`, `nonzero`, indexing by a mask."""
    # There is no backward pass without the GPU's driver; of the contrastive losses, which make one, the rest is run.
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: False)  # so that a mask would be read
    monkeypatch.setattr(torch.autograd, "grad", lambda _, leaves, *gradient: [torch.zeros_like(x) for x in leaves])
    batch, encoder, head = step_batch(), tiny_encoder(**encoder_options), make()
    head.bind(encoder)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in (encoder, head):
            on_fake_gpu(mode, module)
        with NoWaits():
            values = step(head, encoder, moved(batch, "cuda"))
    assert {value.device.type for value in values.values()} == {"cuda"}
    assert {value.device.type for value in batch["targets"].values() if isinstance(value, Tensor)} == {"cpu"}


def test_a_wait_would_be_found():
    with FakeTensorMode(allow_non_fake_inputs=True), NoWaits():
        x = torch.zeros(3, device="cuda")
        for wait in (
            lambda: x.sum().item(),
            lambda: x[x > 0],
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: x.new_tensor([1.0]),
            lambda: x.cpu(),
            lambda: torch.zeros(3).to("cuda"),
        ):
            with pytest.raises((RuntimeError, DataDependentOutputException, DynamicOutputShapeException)):
                wait()
        torch.zeros(3).to("cuda", non_blocking=True)


@pytest.mark.gpu
@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_a_step_never_waits_for_a_real_device(make):
    batch, encoder, head = step_batch(), tiny_encoder(pool="mean", batch_norm=True).cuda(), make()
    head.bind(encoder)
    head.cuda()
    batch = moved(batch, "cuda")
    sum(step(head, encoder, batch).values()).backward()  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(step(head, encoder, batch).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_name_of_its_own():
    assert Contrastive().name == "contrastive"
    assert Counting(name="things").name == "things"
    for wrong in ("", "a/b", "a.b"):
        with pytest.raises(ValueError, match=f"heads.Counting.name: found '{wrong}', expected letters"):
            Counting(name=wrong)


@pytest.mark.parametrize("file", sorted((Path(__file__).parent.parent / "heads").glob("*.py")), ids=lambda f: f.stem)
def test_no_message_calls_a_head_by_its_file(file):
    """As it may have another name, by which alone two heads of one class are told apart."""
    nodes = [*ast.walk(ast.parse(file.read_text()))]
    # A docstring is a statement of its own.
    said = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in said]
    assert [text for text in texts if f"heads.{file.stem}" in text] == []


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_what_predict_needs_is_what_training_needs_or_less(make):
    """Without its other fields a batch can be predicted."""
    batch, encoder, head = step_batch(), tiny_encoder().eval(), make()
    head.bind(encoder)
    assert set(head.predict_fields) <= set(head.required_fields)
    batch["targets"] = {name: value for name, value in batch["targets"].items() if name in head.predict_fields}
    with torch.no_grad():
        features = encoder.features(batch["images"])
        assert len(head.predict(features, batch, encoder)) == 4
        for name in head.required_fields:
            if name not in head.predict_fields:
                with pytest.raises(ValueError, match=f"heads.{head.name}: sample .* of its task .* has no "):
                    head.loss(features, batch, encoder)
