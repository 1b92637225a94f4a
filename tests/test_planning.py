"""What a step is planned to take: its counts against torch's counters around the real step, the rest by hand."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import caption_batch, tiny_encoder
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from heads.contrastive import Contrastive
from indiclip.commands.config_samples import build_run
from indiclip.commands.plan_config import strategy_of
from indiclip.losses import SigmoidLoss, SoftmaxLoss
from indiclip.module import MultiTask
from indiclip.planning import step_model
from indiclip.planning.communication import Cluster, traffic
from indiclip.planning.counter import Count, OperatorCounter, count_step
from indiclip.planning.cpu import Processor
from indiclip.planning.estimate import Estimate, ways_to_fit
from indiclip.planning.fake import autocast_as_on_cuda, faked
from indiclip.planning.hardware import Device, convert, device
from indiclip.planning.memory import Weights, checkpointed, per_gpu, weigh
from indiclip.planning.parts import IMAGE_TOWER, PROJECTIONS, TEXT_TOWER, blocks
from indiclip.planning.step_model import TaskModel, count_loss, expected_distinct
from indiclip.task_weights import GradNorm, PCGrad

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import bench_plan  # noqa: E402

NEEDS_DATA = {"cifar10": "cifar10", "real_small": "coco"}


@pytest.mark.parametrize(
    "name",
    [
        "quickstart",
        "depth",
        *(pytest.param(of, marks=pytest.mark.slow) for of in ("portable", "cifar10", "real_small")),
    ],
)
def test_flops_and_kept_bytes_are_those_of_the_real_step(name, request, monkeypatch):
    """The oracles are torch's FlopCounterMode and saved tensors around `training_step` and its backward pass."""
    if name in NEEDS_DATA:
        data_root = request.getfixturevalue("data_root")
        if not (data_root / NEEDS_DATA[name]).is_dir():
            pytest.skip(f"no {NEEDS_DATA[name]} in {data_root}")
        monkeypatch.setenv("INDICLIP_DATA", str(data_root))
    (planned_flops, flops), (planned_bytes, saved) = bench_plan.planned_and_counted(str(ROOT / "conf" / f"{name}.yaml"))
    assert planned_flops == pytest.approx(flops, rel=0.01)
    assert planned_bytes == pytest.approx(saved, rel=0.01)


def tiny_model(**options):
    return MultiTask(tiny_encoder(lengths=(64,), pool="mean"), [Contrastive(loss="softmax")], **options)


def test_parts_by_hand():
    """Of three pairs. A matrix product of (m, k) and (k, n) is 2 m k n FLOPs; its backward pass is two of them."""
    B, D, E = 3, 32, 64
    model = tiny_model()
    T = len(model.encoder.tokenize(["word"])[0][0])
    counts = count_step(model, {"contrastive": caption_batch(["word", "work", "worm"])})["contrastive"]
    projection, mean = 2 * B * D * E, 2 * B * T * D  # the mean over tokens is a product too, of a mask that learns not
    assert counts[PROJECTIONS].forward == 2 * projection + mean
    assert counts[PROJECTIONS].backward == 2 * (2 * projection) + mean
    logits = 2 * B * B * E  # computed twice, and two products for the gradients, all in the forward pass
    assert (counts["contrastive loss"].forward, counts["contrastive loss"].backward) == (
        4 * logits,
        0,
    )
    block = 2 * B * T * (3 * D * D + D * D + 2 * D * 64) + 4 * B * T * T * D  # BERT's MLP is 64 wide
    assert counts[TEXT_TOWER].forward == block
    assert counts[IMAGE_TOWER].flops > counts[TEXT_TOWER].flops


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions_in_groups_by_hand(groups):
    """Each output reads 8 / groups channels of 3 x 3 pixels; the gradients are as many products each as forward."""
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=groups, bias=False)
    image = torch.randn(2, 8, 5, 5, requires_grad=True)
    with OperatorCounter(conv, "conv") as counter:
        conv(image).sum().backward()
    forward = 2 * 2 * 16 * 5 * 5 * (8 // groups) * 9
    count = counter.counts()["conv"]
    assert (count.forward, count.backward) == (forward, 2 * forward)


def test_a_frozen_tower_has_no_backward_pass():
    batch = {"contrastive": caption_batch(["a", "b"])}
    frozen = count_step(tiny_model(freeze=["image"]), batch)["contrastive"][IMAGE_TOWER]
    trained = count_step(tiny_model(), batch)["contrastive"][IMAGE_TOWER]
    assert (frozen.forward, frozen.backward, frozen.saved) == (trained.forward, 0, 0)
    assert trained.backward > trained.forward


def test_counting_leaves_the_model_as_it_was():
    model, batch = tiny_model(), {"contrastive": caption_batch(["a", "bc"])}
    before, hooks = dict(model.named_parameters()), len(model.encoder.text._forward_hooks)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flops = sum(count.flops for count in count_step(model, batch)["contrastive"].values())
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(model.encoder.text._forward_hooks) == hooks
    assert "embed_text" not in vars(model.encoder)
    model.log = model.log_dict = lambda *_, **__: None
    with FlopCounterMode(display=False) as counter:
        model.training_step(batch, 0).backward()
    in_place = 2 * (2 * 2 * 2 * 64)  # gradients of the logits, by `addmm_`, which that counter leaves out
    assert flops == counter.get_total_flops() + in_place


class Waits(nn.Module):
    """An image tower's stand-in that reads its input's largest whole number, as some of timm's do."""

    def forward(self, images):
        rows = int(images["coords_BN2"].amax(1)[0, 0].item()) + 1
        return self.inner(images) if rows == 3 else None


def test_whole_numbers_of_the_batch_can_be_read():
    """Of pictures of 24 pixels at patch 8: three rows."""
    model = tiny_model()
    waits = Waits()
    waits.inner, waits.patch_size = model.encoder.backbone, 8
    batch = {"contrastive": caption_batch(["a", "b"])}
    truth = count_step(model, batch)["contrastive"]
    model.encoder.backbone = waits
    assert count_step(model, batch)["contrastive"][IMAGE_TOWER].flops == truth[IMAGE_TOWER].flops


def test_weights_come_back_after_an_error():
    layer = nn.Linear(2, 2)
    weight = layer.weight
    with faked(layer):
        assert layer.weight is not weight
    with pytest.raises(ZeroDivisionError), faked(layer):
        _ = 1 / 0
    assert layer.weight is weight


@pytest.mark.slow
def test_growth_is_that_of_a_larger_batch(monkeypatch, tmp_path):
    """Three times the samples that were read, against a count of so many, with captions that differ."""
    monkeypatch.setattr(step_model, "SAMPLES", 8)
    model, data, _ = build_run(["--config", str(ROOT / "conf" / "quickstart.yaml")])
    steps = data.steps(data.train, train=True)
    for task in ("contrastive", "scenes"):
        ours = replace(step_model._task_model(model, steps, task, 0, None), batch_size=24, losses={})
        prepared = [steps.read(task, ref) for ref in steps.plans[task].batch(0)[:8]]
        batch = step_model._tiled(prepared, 3, steps.origins[task])
        truth = step_model._count(model, task, batch, ours.text_tokens, None)
        counts = ours.counts(1)
        for part in truth.keys() - {"contrastive loss", TEXT_TOWER}:
            assert counts[part].flops == pytest.approx(truth[part].flops, rel=1e-9), part
            assert counts[part].saved == pytest.approx(truth[part].saved, rel=0.01), part


@pytest.mark.parametrize("kind", [SoftmaxLoss, SigmoidLoss])
def test_a_loss_grows_with_the_ranks(kind):
    """Against FlopCounterMode on one rank, and against eight fake ranks where it is reckoned from two and four."""
    loss = kind(lengths=[16, 32])
    task = TaskModel(6, 6, {}, {}, losses={"loss": loss}, embed_dim=32)
    embeddings = [torch.randn(6, 32, requires_grad=True) for _ in range(2)]
    with FlopCounterMode(display=False) as flops:
        loss(*embeddings).backward()
    # That counter leaves out the gradients, by `addmm_`: two products, where softmax has computed the logits twice.
    factor = {SoftmaxLoss: 2, SigmoidLoss: 3}[kind]
    assert task.loss("loss", 1).count.flops == factor * flops.get_total_flops()
    assert task.loss("loss", 8).count.flops == pytest.approx(count_loss(loss, 6, 32, 8).count.flops)
    assert task.loss("loss", 8).peak > task.loss("loss", 2).peak
    assert not torch.distributed.is_initialized()


def test_different_texts_of_a_batch():
    torch.manual_seed(0)
    draws = [str(number) for number in torch.randint(300, (1000,)).tolist()]
    assert expected_distinct(draws[:200], 1000) == pytest.approx(len({*draws}), rel=0.1)
    assert expected_distinct(["a", "b", "c"], 1000) == 1000
    assert expected_distinct(["a", "a"], 10) == pytest.approx(1)


def test_norms_are_float32_in_mixed_precision_as_on_cuda():
    x = torch.randn(2, 8)
    with autocast_as_on_cuda(torch.bfloat16):
        y = nn.Linear(8, 8)(x)
        assert (y.dtype, nn.LayerNorm(8)(y).dtype, y.softmax(1).dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert nn.Linear(8, 8)(x).dtype == torch.float32


def test_weights_and_state_by_hand():
    """AdamW keeps two numbers per weight and, per tensor, the step's; the bytes are those of float32."""
    model = tiny_model()
    numbers = sum(p.numel() for p in model.parameters())
    found = weigh(model)
    tensors = sum(1 for p in model.parameters() if p.requires_grad)
    assert (found.total, found.trained, found.optimizer) == (4 * numbers, 4 * numbers, 8 * numbers + 4 * tensors)
    assert (found.separate_heads, found.stay_gathered) == (0, False)
    for strategy, separate in ((GradNorm(), 0), (PCGrad(), len(model.heads))):
        model.task_weights = strategy
        assert (weigh(model).separate_heads, weigh(model).stay_gathered) == (separate, True)
    assert len(blocks(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))))) == 2


WEIGHTS = Weights(
    total=4000,
    trained=3200,
    optimizer=6400,
    largest_block=400,
    outside=800,
    num_blocks={IMAGE_TOWER: 4},
    update=Count(),
)


def test_memory_by_hand():
    counts = {IMAGE_TOWER: Count(saved=1000, block_inputs=100), "head": Count(saved=50)}
    ddp = per_gpu(WEIGHTS, counts, 7, "ddp", shards=1, world=16)
    assert ddp == {
        "weights": 4000, "gradients": 3200, "optimizer state": 6400, "activations": 1050,
        "loss (logits, embeddings)": 7, "communication buffers": 3200,
    }  # fmt: skip
    hsdp = per_gpu(WEIGHTS, counts, 7, "hsdp", shards=8, world=16, computes_in=2, micro_batches=2)
    assert (hsdp["weights"], hsdp["gradients"], hsdp["optimizer state"]) == (500, 400, 800)
    assert hsdp["activations"] == 525
    assert hsdp["communication buffers"] == (2 * 400 + 800) / 2 + 400
    assert checkpointed(counts, WEIGHTS) == {IMAGE_TOWER: 100 + 1000 / 4, "head": 50}
    compared = replace(WEIGHTS, stay_gathered=True, separate_heads=2)
    fsdp = per_gpu(compared, counts, 7, "fsdp", shards=16, world=16, computes_in=2)
    assert (fsdp["communication buffers"], fsdp["gradients of each head"]) == (4000 / 2 + 400, 8 * 3200)
    alone = per_gpu(WEIGHTS, counts, 7, "ddp", shards=1, world=1)
    assert alone["communication buffers"] == 0


GPU = Device("gpu", {"bf16": 100.0, "fp32": 10.0}, 80, 1000, {}, nvlink_gbs=400, nic_gbs=25)


def test_communication_by_hand():
    node, two = Cluster(GPU, 1, 8), Cluster(GPU, 2, 8)
    assert node.gather_seconds(8e9) == pytest.approx(7e9 / 400e9)
    assert node.reduce_seconds(8e9) == pytest.approx(2 * 7e9 / 400e9)
    assert two.gather_seconds(16e9) == pytest.approx(15e9 / 8 / 25e9)  # adapters: 200 GB/s of a node, slower than 400
    assert Cluster(GPU, 1, 8, link_share=0.5).gather_seconds(8e9) == pytest.approx(7e9 / 200e9)
    weights = replace(WEIGHTS, total=16e9, trained=16e9, largest_block=1.6e9)
    fsdp = traffic(two, "fsdp", weights, embeddings=0, computes_in=2)
    assert (fsdp.weights, fsdp.gradients) == pytest.approx((7.5e9 / 200e9, 15e9 / 200e9))
    hsdp = traffic(two, "hsdp", weights, embeddings=0, computes_in=2)
    assert hsdp.weights == pytest.approx(8e9 * 7 / 8 / 400e9)
    assert hsdp.gradients == pytest.approx(16e9 * 7 / 8 / 400e9 + 2 * (16e9 / 8) / 2 / 25e9)
    assert traffic(Cluster(GPU, 1, 1), "ddp", weights, 5e9).total == 0
    ddp = traffic(two, "ddp", weights, embeddings=16e9)
    assert (ddp.weights, ddp.gradients, ddp.loss) == pytest.approx((0, 2 * 15e9 / 200e9, 2 * 15e9 / 200e9))
    assert ddp.exposed(1, 1) == pytest.approx(ddp.loss + ddp.tail)  # the rest hides
    assert ddp.exposed(0, 0) == pytest.approx(ddp.total)
    for strategy in ("ddp", "fsdp", "hsdp"):
        compared = replace(weights, stay_gathered=True)
        once, gradnorm, pcgrad = (
            traffic(two, strategy, of, 0) for of in (weights, compared, replace(compared, separate_heads=3))
        )
        assert gradnorm.total == pytest.approx(once.weights + once.gradients)  # gathered once, and nothing hides that
        assert gradnorm.exposed(9, 9) == pytest.approx(once.weights + once.tail)
        # Of PCGrad each of three heads' gradients is all-reduced, and then the sum, when all passes are made.
        assert pcgrad.total == pytest.approx(gradnorm.total + 3 * 2 * 15e9 / 200e9)
        assert pcgrad.exposed(9, 9) == pytest.approx(pcgrad.total)


def estimate(cluster, **changes):
    """A task of ten samples of 6e12 FLOPs in all, on a GPU of 100 TFLOPS of which half are reached."""
    counts = {IMAGE_TOWER: Count(forward=2e12, backward=4e12, saved=50e9, block_inputs=1e9)}
    task = TaskModel(10, 10, counts, counts, image_bytes=1000)
    return Estimate(cluster, {"task": task}, WEIGHTS, "ddp", "bf16", 0.5, **changes)


def test_seconds_and_money_by_hand():
    one = estimate(Cluster(GPU, 1, 1))
    assert one.step() == pytest.approx({"compute": 0.12, "loss": 0, "exposed": 0, "step": 0.12})
    assert one.samples_per_second() == pytest.approx(10 / 0.12)
    assert one.storage() == pytest.approx({"task": 1000 * 10 / 0.12})
    assert one.cost(30000, 2.0) == pytest.approx({"steps": 30000, "days": 1 / 24, "gpu_hours": 1, "usd": 2})
    assert one.cost(None, 2.0)["days"] is None
    # A second forward pass of the towers, which is a third of the work.
    assert estimate(Cluster(GPU, 1, 1), micro_batches=2).step()["step"] == pytest.approx(0.16)
    rows = one.scaling()
    assert [row["gpus"] for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert rows[-1]["batch"] == 1280
    assert rows[0]["efficiency"] == 1
    rows = estimate(Cluster(GPU, 1, 8)).scaling()
    assert all(before["efficiency"] >= after["efficiency"] for before, after in pairwise(rows))


def test_what_would_make_it_fit():
    """50 GB of activations and 2 reserved in 48 GB of memory."""
    small = replace(GPU, hbm_gb=48)
    run = estimate(Cluster(small, 1, 1))
    assert not run.fits
    assert ways_to_fit(run, {"task": "data.train[0].batch_size"}) == [
        "model.micro_batches: 2 (gradient caching): 27.0 GB",
        "activation checkpointing of the towers' blocks: 15.5 GB",
        "data.train[0].batch_size: 5: 27.0 GB",
    ]
    heavy = replace(run, weights=replace(WEIGHTS, total=80e9), cluster=Cluster(replace(GPU, hbm_gb=70), 1, 8))
    assert [line.split(":")[1] for line in ways_to_fit(heavy, {})] == [
        " indiclip.training.sharding.ShardedStrategy, sharded over all GPUs (fsdp)",
        " indiclip.training.sharding.ShardedStrategy, sharded within each node (hsdp)",
    ]


def test_days_of_tpus_in_days_of_gpus():
    """48 x 275 / 1,979 and / 989.4; https://arxiv.org/abs/2303.15343, table 1 has the 48."""
    days = convert(48, "tpuv4", "h100")
    assert days["fp8"] == pytest.approx(6.67, abs=0.005)
    assert days["bf16, sparse"] == pytest.approx(6.67, abs=0.005)
    assert days["bf16"] == pytest.approx(13.34, abs=0.005)
    assert convert(10, "a100", "a100")["bf16"] == 10


def test_devices_have_a_source_for_each_number():
    for name in ("h100", "h200", "a100", "l40s"):
        assert device(name).sources.keys() == {"tflops", "hbm", "nvlink", "nic"}
    with pytest.raises(ValueError, match="--gpu: found 'h10'; nearest is 'h100'; expected one of h100, "):
        device("h10")
    with pytest.raises(ValueError, match=r"trainer.precision: NVIDIA A100 .* has no fp8"):
        device("a100").peak("fp8")


def test_seconds_on_a_processor_add_up():
    processor = Processor(flops=100, attention=50, bandwidth=10, exponential=0.25, operator=0.5)
    count = Count(forward=200, backward=200, attention=100, moved=20, exponentials=8, operators=4)
    assert processor.seconds(count) == 3 + 2 + 2 + 2 + 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "ddp"), ("auto", "ddp"), ("ddp_find_unused_parameters_true", "ddp"), ("fsdp", "fsdp")],
)
def test_strategy_of_a_name(value, expected):
    assert strategy_of(value) == expected


@pytest.mark.parametrize(("replicas", "expected"), [("auto", "hsdp"), (1, "fsdp"), (16, "hsdp")])
def test_strategy_of_a_mesh(replicas, expected):
    from jsonargparse import Namespace

    options = Namespace(data_parallel_size=replicas)
    for name in ("indiclip.training.sharding.ShardedStrategy", "lightning.pytorch.strategies.ModelParallelStrategy"):
        assert strategy_of(Namespace(class_path=name, init_args=options)) == expected


def test_an_operator_that_fills_a_given_tensor_moves_its_bytes_once():
    a, b, out = torch.ones(3, 4), torch.ones(4, 5), torch.empty(3, 5)
    with OperatorCounter(nn.Identity(), "all") as counter:
        torch.mm(a, b, out=out)
    assert counter.sums["all"]["moved"] == 4 * (3 * 4 + 4 * 5 + 3 * 5)
    assert counter.sums["all"]["forward"] == 2 * 3 * 4 * 5
