"""What every head keeps to: its name, its fields, and that its step never waits for the device."""

from typing import Any

import pytest
import torch
from helpers import step_losses, tiny_encoder
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from heads.contrastive import Contrastive
from heads.counting import Counting
from heads.densepose import DensePose
from heads.detection import Detection
from indiclip.encoder import Encoder
from indiclip.generated.mela import Mela
from indiclip.head import Head
from indiclip.loading.collate import collate
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.preprocessing import Preprocessing
from indiclip.types import Batch, Origin, Rows

DETECTION = {"out_channels": 16, "num_convs": 1, "scales": [2.0, 1.0, 0.5]}
HEADS = {
    "contrastive, sigmoid": lambda: Contrastive(),
    "contrastive, softmax": lambda: Contrastive(loss="softmax"),
    "detection": lambda: Detection(num_classes=17, **DETECTION),
    "detection of some": lambda: Detection(classes=["person", "kite"], **DETECTION),
    "densepose": lambda: DensePose(roi_size=7, channels=16, num_convs=1, box_jitter=0.05),
    "counting": lambda: Counting(channels=16),
    "counting, boxes": lambda: Counting(channels=16, upsample=2, ask_boxes=True),
}


def step_batch() -> Batch:
    """Scenes of several sizes, so that there is padding, with captions in three languages."""
    mela = [Mela(2, size, people=1.0, languages=["en", "hi", "ta"], seed=i) for i, size in enumerate([48, [64, 32]])]
    steps = [Steps([Source("t", dataset, 2, max_tokens=40)], 0, Preprocessing(8), train=True) for dataset in mela]
    samples = [steps[i].read("t", ref) for i in (0, 1) for ref in steps[i].plans["t"].batch(0)]
    return collate(samples) | {"origin": Origin("t", classes=mela[0].classes)}


class NoWaits(TorchDispatchMode):
    """Raises where a copy between host and device would make the host wait; the rest fake tensors raise on."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            to, source = (args[0].device, args[1]) if len(args) > 1 else (kwargs.get("device"), args[0])
            waits = not kwargs.get("non_blocking") and not (len(args) > 2 and args[2])
            if to is not None and torch.device(to).type != source.device.type and waits:
                raise RuntimeError(f"{function} from {source.device} to {to} waits for the device")
        return function(*args, **kwargs)


def on_fake_gpu(mode: FakeTensorMode, module: torch.nn.Module) -> None:
    """Replace parameters and buffers by fake ones on `cuda`."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                fake = mode.from_tensor(value.detach()).to("cuda")
                part._parameters[name] = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = mode.from_tensor(value).to("cuda")


def moved(value: Any, device: str) -> Any:
    """As Lightning moves a batch."""
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, Rows):
        return value.to(device)
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


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
