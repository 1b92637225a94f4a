"""Throughput by hand-made clocks and counts, FLOPs against torch's counter, sums over ranks, pauses."""

import json

import pytest
from experiments import config, fit
from helpers import tiny_encoder
from processes import two_ranks
from test_watchdog import Then
from test_watchdog import fit as fit_module
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from heads.contrastive import Contrastive
from heads.detection import Detection
from heads.self_distillation import SelfDistillation
from indiclip.generated.mela import Mela
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source
from indiclip.loading.views import View
from indiclip.module import MultiTask
from indiclip.planning.hardware import installed
from indiclip.planning.step_flops import StepFlops, TaskFlops, TowerFlops, step_flops, text_lengths
from indiclip.training.fault_tolerance.watchdog import Watchdog
from indiclip.training.record import read_history
from indiclip.training.throughput import Meter, Rates, Throughput, Work


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self):
        return self.now


def test_rates_by_a_hand_made_clock():
    """Steps of 2 s, of which 0.5 s are spent waiting; 30 s of validation and saving between them are no training."""
    clock = Clock()
    meter = Meter(window=3, clock=clock)
    assert meter.rates() is None
    for number in range(6):
        meter.wait_begins()
        clock.now += 0.5 if number else 50.0  # workers start
        meter.wait_ends()
        clock.now += 1.5 if number else 4.0
        meter.step_ends(Work(samples=8, tokens=100 + number, flops=4e9))
        if number == 0:  # without its wait, and only as long as there is no other
            assert meter.rates() == Rates(2.0, 25.0, 1e9, 0.0)
        if number == 1:
            assert meter.rates() == Rates(4.0, 101 / 2, 2e9, 0.25)
        with meter.pause():
            clock.now += 20.0
            with meter.pause():
                clock.now += 10.0
    assert meter.rates() == Rates(4.0, (103 + 104 + 105) / 6, 2e9, 0.25)


def test_ranks_are_summed_and_utilisation_is_their_mean():
    callback = Throughput(peak_tflops=2e-3)
    callback._peak, callback._flops = 2e9, StepFlops(TowerFlops(()), TowerFlops(()), {})
    ranks = [(Rates(4.0, 100.0, 1e9, 0.5), 3e9), (Rates(2.0, 60.0, 5e8, 0.0), 4e9)]
    assert callback._over_ranks(ranks) == {
        "throughput/samples_per_second": 6.0,
        "throughput/tokens_per_second": 160.0,
        "throughput/mfu": 0.375,
        "throughput/waiting_for_data": 0.25,
        "throughput/peak_memory_gb": 4.0,
    }
    callback._peak = None
    assert "throughput/mfu" not in callback._over_ranks(ranks)


def steps(sizes, batch_size=4, **options):
    """Model and data of two tasks, images of other sizes in each of them, captions cut to one length: no padding."""
    encoder = tiny_encoder(pool="mean", **options)
    module = MultiTask(encoder, [Contrastive(loss="softmax"), Detection(num_classes=17, out_channels=16, num_convs=1)])
    module.log = module.log_dict = lambda *_, **__: None
    sources = [
        Source("contrastive", Mela(32, sizes[0], "single", languages=["en", "hi"]), batch_size, max_tokens=64),
        Source("detection", Mela(32, sizes[1]), batch_size, max_tokens=64),
    ]
    encode = encoder.text.tokenizer.encode
    return module, MultiTaskData(sources, patch_size=8, encode=lambda texts: [row[:16] for row in encode(texts)])


@pytest.mark.parametrize("frozen", [[], ["image"]])
def test_flops_of_any_step_are_those_of_the_real_one(frozen):
    """The oracle is torch's FlopCounterMode around steps of other sizes and batches than those that were counted."""
    module, data = steps([32, 48])
    module = MultiTask(module.encoder, module.each_head(), freeze=frozen)
    module.log = module.log_dict = lambda *_, **__: None
    rates = step_flops(module, data)
    assert next(module.parameters()).is_floating_point()  # real weights again
    for sizes, batch_size in [([32, 48], 4), ([48, 32], 4), ([64, 64], 8)]:
        _, other = steps(sizes, batch_size)
        step = other.steps(other.train, train=True)[0]
        with FlopCounterMode(display=False) as counter:
            module.training_step(step, 0).backward()
        assert rates.of(step) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_views_and_teachers_cost_from_the_step_on_in_which_their_head_begins():
    """The oracle is torch's FlopCounterMode, with the head and without it."""
    module, data = steps([32, 48])
    flip = v2.RandomHorizontalFlip()
    data.train[0].views = [View("global", 2, [flip], max_tokens=64), View("local", 3, [flip], max_tokens=9)]
    options = {"hidden_dim": 16, "bottleneck_dim": 8, "num_prototypes": 12, "mask_ratio": (0.25, 0.25)}
    late = SelfDistillation(task="contrastive", start=0.5, **options)
    module = MultiTask(module.encoder, [*module.each_head(), late])
    module.log = module.log_dict = lambda *_, **__: None
    rates = step_flops(module, data)
    step = data.steps(data.train, train=True)[0]
    for idle in ([], ["self_distillation"]):
        if idle:
            del module.heads["self_distillation"]
        with FlopCounterMode(display=False) as counter:
            module.training_step(step, 0).backward()
        assert rates.of(step, idle=idle) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_tower_is_a_polynomial_of_its_tokens():
    """A block of width D with an MLP of 4 D: 24 D^2 FLOPs a token forward, 4 D n^2 of attention (Kaplan et al. 2020,
    table 1), twice that backward, and once more what fused attention computes again of it (2 D n^2)."""
    width, patch = 32, 8
    module, data = steps([32, 48])
    constant, linear, square = step_flops(module, data).image.coefficients
    embedding = 2 * (3 * patch**2) * width * 2  # of patches, whose own gradient nobody needs
    assert linear == pytest.approx(3 * 24 * width**2 + embedding)
    assert square == pytest.approx(3 * 4 * width + 2 * width)
    assert constant == pytest.approx(0, abs=1)


def test_dropped_patches_cost_nothing():
    module, data = steps([64, 32])
    rates = step_flops(module, data)
    step = data.steps(data.train, train=True)[0]
    dropped = Source("contrastive", data.train[0].dataset, 4, max_tokens=64, drop=0.5)
    fewer = MultiTaskData([dropped, data.train[1]], patch_size=8, encode=data.encode)
    half = fewer.steps(fewer.train, train=True)[0]
    patches, kept = (sum(of["contrastive"]["images"]["num_patches"]) for of in (step, half))
    assert kept == patches / 2
    beside = rates.tasks["contrastive"].per_patch * kept
    attention = rates.image.coefficients[2] * (4 * 64**2 - 4 * 32**2)
    expected = rates.image.coefficients[1] * kept + beside + attention
    assert text_lengths(step["contrastive"]) == text_lengths(half["contrastive"])
    assert rates.of(step) - rates.of(half) == pytest.approx(expected)


def test_comparisons_grow_with_the_ranks():
    flops = StepFlops(TowerFlops((1.0,)), TowerFlops((0.0, 2.0)), {"a": TaskFlops(3.0, 5.0, False, 7.0)})
    batch = {"images": {"num_patches": [2, 4]}, "targets": {}, "keys": ["x", "y"]}
    assert flops.of({"a": batch}, world=8) == 2 * 1 + 6 * 3 + 4 * 8 * 5 + 7


@pytest.mark.parametrize(
    ("name", "key"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA H100 PCIe", None)],
)
def test_the_peak_is_that_of_the_board(name, key):
    """An H100 on PCIe has the name of the die and another peak."""
    found = installed(name)
    assert (found and found.peak("bf16")) == key


def throughput(**options):
    return {"class_path": "indiclip.training.throughput.Throughput", "init_args": options}


@pytest.mark.slow
def test_a_run_logs_what_it_reaches_and_goes_on_when_resumed(tmp_path):
    tree = config(trainer__max_steps=4, data__steps_per_epoch=3, data__val=[])
    tree["trainer"] |= {"log_every_n_steps": 2, "callbacks": [throughput(peak_tflops=1e-3)]}
    assert fit(tmp_path, tree) == 0
    tree["trainer"]["max_steps"] = 6
    assert fit(tmp_path, tree, "--ckpt_path", "last") == 0
    folder = tmp_path / "runs" / "experiment"
    rows = {row["step"]: row for row in read_history(folder) if "throughput/mfu" in row}
    assert sorted(rows) == [2, 4, 6]
    for row in rows.values():
        assert row["throughput/samples_per_second"] > 0
        assert row["throughput/tokens_per_second"] > 16 * row["throughput/samples_per_second"]  # 16 patches and a text
        assert 0 <= row["throughput/waiting_for_data"] < 1
        assert 0.05 < row["throughput/peak_memory_gb"] < 64
    report = (folder / "report.html").read_text()
    assert "throughput/samples_per_second" in report
    events = [file.read_bytes() for file in folder.glob("events.out.tfevents.*")]
    assert any(b"throughput/tokens_per_second" in event for event in events)


def test_nothing_of_it_stays_after_a_run(tmp_path):
    begun = []
    look = Then("on_train_start", lambda trainer, *_: begun.append({*vars(trainer.fit_loop.epoch_loop)}))
    trainer = fit_module(tmp_path, Mela(24, 32, "single"), Throughput(), look, watchdog=Watchdog())
    fetches = {"_on_before_fetch", "_on_after_fetch"}
    assert fetches <= begun[0]
    assert not fetches & vars(trainer.fit_loop.epoch_loop).keys()
    assert "save_checkpoint" not in vars(trainer)


def test_without_a_known_peak_nothing_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("indiclip.training.throughput.step_flops", None)  # not called
    assert fit(tmp_path, config()) == 0
    metrics = json.loads((tmp_path / "runs" / "experiment" / "metrics.json").read_text())["metrics"]
    assert "throughput/samples_per_second" in metrics
    assert "throughput/mfu" not in metrics


def test_two_ranks_are_added_up(tmp_path):
    """Each rank's own rates, in files, against what is logged: the sum, and of the MFU the mean."""
    tree = config(trainer__max_steps=4, trainer__limit_val_batches=0, data__steps_per_epoch=4)
    tree["trainer"] |= {"log_every_n_steps": 4}
    tree["trainer"]["callbacks"] = [
        throughput(peak_tflops=1e-3),
        {"class_path": "trouble.OwnRates", "init_args": {"folder": str(tmp_path)}},
    ]
    done, folder = two_ranks(tmp_path, tree)
    assert done.returncode == 0, done.stderr[-3000:]
    own = [json.loads((tmp_path / f"rates-{rank}.json").read_text()) for rank in range(2)]
    (row,) = [row for row in read_history(folder) if "throughput/mfu" in row]
    assert row["throughput/samples_per_second"] == pytest.approx(own[0][0] + own[1][0], rel=1e-5)
    assert row["throughput/tokens_per_second"] == pytest.approx(own[0][1] + own[1][1], rel=1e-5)
    assert row["throughput/mfu"] == pytest.approx((own[0][2] + own[1][2]) / 2 / 1e9, rel=1e-4)
