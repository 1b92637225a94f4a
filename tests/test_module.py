"""The loop: every head in every step, shared features, weights, groups, exact resume."""

import math
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import caption_batch, tiny_encoder
from processes import on_ranks

from heads.contrastive import Contrastive
from heads.counting import Counting
from heads.densepose import DensePose
from heads.detection import Detection
from indiclip import optim
from indiclip.datasets.base import SampleDataset
from indiclip.generated.mela import Mela
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.module import MultiTask
from indiclip.parameter_groups import parameter_groups
from indiclip.preprocessing import Preprocessing
from indiclip.task_weights import PCGrad, Uncertainty
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer

SMALL = {"task": "scenes", "out_channels": 32, "num_convs": 1, "scales": [1.0, 0.5], "num_classes": 17}


def four_tasks(seed=0, **options):
    torch.manual_seed(seed)
    heads = [
        Contrastive(loss="softmax"),
        Detection(**SMALL),
        DensePose(task="scenes", roi_size=7, channels=16, num_convs=1),
        Counting(task="scenes", channels=16),
    ]
    return MultiTask(tiny_encoder(seed), heads, warmup_steps=2, **options)


def mela_data(num_workers=0, steps_per_epoch=4):
    train = [
        Source("contrastive", Mela(50, 32, "single", languages=["en", "hi", "ta"], seed=1), 4, max_tokens=16),
        Source("scenes", Mela(30, [32, 48], people=1.0, seed=2), 2, max_tokens=24),
    ]
    val = [Source("scenes", Mela(5, 32, people=1.0, seed=3), 2, max_tokens=16)]
    return MultiTaskData(train, val, seed=3, num_workers=num_workers, steps_per_epoch=steps_per_epoch, patch_size=8)


def trainer(folder, **options):
    return L.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("strategy", [Uncertainty, PCGrad])
def test_every_parameter_gets_a_gradient_in_every_step(tmp_path, strategy):
    class Watch(L.Callback):
        steps = 0

        def on_after_backward(self, trainer, module):
            self.steps += 1
            assert [name for name, p in module.named_parameters() if p.grad is None] == []

    watch = Watch()
    module = four_tasks(task_weights=strategy())
    trainer(tmp_path, max_steps=5, callbacks=[watch], enable_checkpointing=False).fit(module, datamodule=mela_data())
    assert watch.steps == 5


def test_heads_of_one_task_share_its_features():
    module = four_tasks()
    calls = []
    module.encoder.backbone.register_forward_hook(lambda *_: calls.append(1))
    data = mela_data()
    module.log = module.log_dict = lambda *a, **k: None
    total = module.training_step(data.steps(data.train, True)[0], 0)
    assert len(calls) == 2  # two tasks, four heads
    torch.testing.assert_close(total, sum(module.head_losses.values()))


def test_what_a_head_logs_beside_its_losses_is_not_trained_on():
    module = MultiTask(tiny_encoder(), [Contrastive()])
    batch = caption_batch(["a kite", "पतंग", "a drum"])
    batch["targets"]["language"] = ["en", "hi", "en"]
    written = {}
    module.log = lambda name, value, **_: written.update({name: value})
    module.log_dict = lambda values, **_: written.update(values)
    total = module.training_step({"contrastive": batch}, 0)
    assert written.keys() == {
        "train/loss", "train/contrastive/loss", "train/contrastive/loss/en", "train/contrastive/loss/hi",
    }  # fmt: skip
    torch.testing.assert_close(total, written["train/contrastive/loss"].squeeze(), atol=0, rtol=0)
    assert not written["train/contrastive/loss/hi"].requires_grad


def group_of(groups, name):
    return next(group for group in groups if name in group["param_names"])


def test_parameter_groups():
    module = four_tasks()
    groups = parameter_groups(module, {"encoder.backbone": 0.1})
    assert sum(len(group["params"]) for group in groups) == sum(1 for _ in module.parameters())
    block = group_of(groups, "encoder.backbone.vit.blocks.0.attn.qkv.weight")
    assert (block["lr_scale"], "weight_decay" in block) == (0.1, False)
    for name in ("encoder.backbone.vit.embeds.pos_embed", "encoder.text_pool.pool.latent"):
        assert group_of(groups, name)["weight_decay"] == 0
    assert group_of(groups, "heads.contrastive.criterion.logit_scale")["lr_scale"] == 1
    with pytest.raises(ValueError, match="no parameter lies under encoder.backbon; nearest is 'encoder.backbone'$"):
        parameter_groups(module, {"encoder.backbon": 0.1, "encoder.backbone": 1.0})


TEXT_MODELS = {
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "gemma": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_embeddings_do_not_decay_whatever_they_are_called(kind):
    tower = TextTower(ByteTokenizer(), {"model_type": kind} | TEXT_MODELS[kind])
    tables = {name for name, part in tower.named_modules() if isinstance(part, torch.nn.Embedding)}
    assert tables
    groups = parameter_groups(tower)
    flat = {name for group in groups if "weight_decay" in group for name in group["param_names"]}
    decaying = {name for group in groups if "weight_decay" not in group for name in group["param_names"]}
    assert {name for name in decaying if name.removesuffix(".weight") in tables} == set()
    assert {name for name, p in tower.named_parameters() if p.ndim == 1} <= flat
    assert any("attn" in name or "SelfAttention" in name for name in decaying)


def test_swins_bias_tables_do_not_decay():
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", (64, 64), options={"img_size": 64, "depths": [1, 1, 1, 1]})
    groups = parameter_groups(backbone)
    decaying = [name for group in groups if "weight_decay" not in group for name in group["param_names"]]
    assert decaying
    assert not any("relative_position_bias_table" in name for name in decaying)


def test_schedules_by_hand():
    """Four steps of warm-up to 1, then six: the factors of the rate before each of the ten steps, and after."""

    def factors(schedule):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
        scheduler = schedule.scheduler(optimizer, 4, 10)
        found = []
        for _ in range(11):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    up = [0, 0.25, 0.5, 0.75, 1]
    half_cosine = [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(7)]
    assert factors(optim.Cosine()) == pytest.approx([*up[:4], *half_cosine])
    assert factors(optim.Cosine(0.1)) == pytest.approx([*up[:4], *(0.1 + 0.9 * value for value in half_cosine)])
    assert factors(optim.Linear()) == pytest.approx([*up, *(1 - i / 6 for i in range(1, 7))])
    assert factors(optim.Constant()) == pytest.approx([*up, *[1] * 6])
    assert factors(optim.WarmupStableDecay(4, "linear")) == pytest.approx([*up, 1, 1, 0.75, 0.5, 0.25, 0])
    with pytest.raises(ValueError, match="model.lr_schedule.decay_steps: 8 and model.warmup_steps 4 are more than the"):
        factors(optim.WarmupStableDecay(8))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_mid_epoch_is_exact(tmp_path, workers):
    """Six steps in one go, or three, a new process's worth of objects, and three more: the same weights to the bit."""
    seen = {}

    class Keys(L.Callback):
        def __init__(self, name):
            self.rows = seen.setdefault(name, [])

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.rows.append([(part["keys"], part["targets"].get("caption")) for part in batch.values()])

    def fit(name, steps, ckpt=None, num_workers=0):
        module = four_tasks()
        run = trainer(tmp_path / name, max_steps=6, limit_val_batches=0, callbacks=[Keys(name)])
        if steps == 6:
            run.fit(module, datamodule=mela_data(num_workers), ckpt_path=ckpt, weights_only=True)
            return module

        class Stop(L.Callback):
            def on_train_batch_end(self, trainer, module, *_):
                if trainer.global_step == steps:
                    trainer.save_checkpoint(tmp_path / "half.ckpt")
                    trainer.should_stop = True

        run.callbacks.append(Stop())
        run.fit(module, datamodule=mela_data(num_workers))
        return module

    whole = fit("whole", 6)
    fit("first", 3)
    resumed = fit("second", 6, ckpt=tmp_path / "half.ckpt", num_workers=workers)
    assert seen["first"] + seen["second"] == seen["whole"]
    for (name, expected), got in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, got), name


def test_an_unreadable_sample_is_replaced_and_told():
    from indiclip.images import UnreadableSample

    class Broken(SampleDataset):
        def __len__(self):
            return 6

        def key(self, index):
            return f"key{index}"

        def __getitem__(self, index):
            if index % 3 == 1:
                raise UnreadableSample(f"key{index}", "no end marker")
            return Mela(6, 32, "single", seed=1)[index]

    data = MultiTaskData([Source("c", Broken(), 6)], [Source("c", Broken(), 6)], patch_size=8)
    batch = data.steps(data.train, train=True)[0]["c"]
    assert len(batch["keys"]) == 6
    assert sorted(batch["quarantined"]) == [("c", "key1", "", "no end marker"), ("c", "key4", "", "no end marker")]
    batch = data.steps(data.val, train=False)[0]["c"]
    assert len(batch["keys"]) == 4  # a held-out sample counts once
    assert len(batch["quarantined"]) == 2


def test_same_head_twice_is_said():
    with pytest.raises(ValueError, match="model.heads: contrastive stands there more than once; .* need a `name`"):
        MultiTask(tiny_encoder(), [Contrastive(), Contrastive()])
    with pytest.raises(ValueError, match="model.heads: the list is empty"):
        MultiTask(tiny_encoder(), [])


def test_a_step_without_a_heads_task_is_said():
    module = MultiTask(tiny_encoder(), [Contrastive()])
    with pytest.raises(ValueError, match="model.heads: contrastive reads the task .*; the step has no batch"):
        module.training_step({"other": caption_batch(["a"])}, 0)


def test_two_detection_heads_with_classes_of_their_own_share_a_task(tmp_path):
    options = {"task": "scenes", "out_channels": 16, "num_convs": 1, "scales": [1.0]}
    heads = [
        Detection(classes=["person"], name="people", **options),
        Detection(classes=["kite", "diya"], name="things", **options),
        Contrastive(),
    ]
    module = MultiTask(tiny_encoder(), heads, warmup_steps=2)
    run = trainer(tmp_path, max_steps=2, enable_checkpointing=False)
    run.fit(module, datamodule=mela_data(steps_per_epoch=2))
    for name in ("people", "things"):
        assert {f"train/{name}/box", f"val/{name}/ap50"} <= run.callback_metrics.keys()


class Fair(Mela):
    """Single things, whose classes stand in the opposite order where asked for."""

    def __init__(self, num_scenes, seed, turned=False, labelled=True):
        super().__init__(num_scenes, 32, "single", seed=seed)
        self.labelled = labelled
        self.last = len(self.classes) - 1 if turned else 0
        self.classes = (self.classes[::-1] if turned else self.classes) if labelled else []

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample | {"label": abs(self.last - sample["label"]) if self.labelled else -1}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_held_out_source_keeps_its_classes_and_scores(tmp_path, num_workers):
    """The scores of three sources together are those of each by itself, whatever their sizes and order."""
    sources = {
        "plain": lambda **name: Source("contrastive", Fair(9, 1), 4, max_tokens=16, **name),
        "turned": lambda **name: Source("contrastive", Fair(5, 2, turned=True), 2, max_tokens=16, **name),
        "1": lambda **name: Source("contrastive", Fair(3, 3, labelled=False), 4, max_tokens=16, **name),
    }
    module = MultiTask(tiny_encoder(), [Contrastive()])

    def scores(*val):
        run = trainer(tmp_path, enable_checkpointing=False)
        run.validate(
            module, datamodule=MultiTaskData([], list(val), patch_size=8, num_workers=num_workers), verbose=False
        )
        return {name: value.item() for name, value in run.callback_metrics.items()}

    named = [make(**({"name": name} if name != "1" else {})) for name, make in sources.items()]
    together = scores(named[0], named[2], named[1])  # the nameless one is number 1
    expected = {}
    for name, make in sources.items():
        for metric, value in scores(make()).items():
            expected[metric.replace("val/contrastive/", f"val/contrastive/{name}/")] = value
    assert together == pytest.approx(expected, abs=1e-6)
    assert "val/contrastive/turned/zero_shot" in together
    assert "val/contrastive/1/zero_shot" not in together
    with pytest.raises(ValueError, match=r"data\.val\[1\]\.name: contrastive/a is the name of an earlier source too"):
        scores(sources["plain"](name="a"), sources["turned"](name="a"))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_ranks_that_saw_other_sources_agree(tmp_path):
    """The second rank has no sample of the second source."""
    module = MultiTask(tiny_encoder(), [Contrastive()])

    def work(rank):
        data = MultiTaskData([], [Source("contrastive", Fair(n, n), 4, max_tokens=16) for n in (5, 1)], patch_size=8)
        steps, written = Steps(data.val, 0, Preprocessing(8), train=False, rank=rank, world_size=2), {}
        module.log_dict = written.update
        module._trainer = SimpleNamespace(world_size=2)
        module.eval()
        with torch.no_grad():
            module.on_validation_epoch_start()
            for step in range(2):
                module.validation_step(steps[step], step)
            module.on_validation_epoch_end()
        return {name: value.item() for name, value in written.items()}

    first, second = on_ranks(2, work, tmp_path)
    assert first == second
    assert {"val/contrastive/0/zero_shot", "val/contrastive/1/zero_shot"} <= first.keys()


def test_validate_then_fit_in_python(tmp_path):
    """Lightning validates in inference mode, and in fit it does not: no metric's state goes from one to the other."""
    data = mela_data(steps_per_epoch=2)
    data.val.append(Source("contrastive", Mela(6, 32, "single", seed=5), 4, max_tokens=16))
    module, run = four_tasks(), trainer(tmp_path, max_steps=2, enable_checkpointing=False)
    run.validate(module, datamodule=data, verbose=False)
    before = run.callback_metrics["val/counting/mae"].item()
    run.fit(module, datamodule=data)
    assert run.callback_metrics["val/counting/mae"].item() != before
    run.validate(module, datamodule=data, verbose=False)


def test_reduced_precision_clips_with_the_fused_optimizer(tmp_path):
    """Lightning takes a fused AdamW to unscale the gradients itself, and refuses to clip them; ours does not."""
    module = four_tasks()
    run = trainer(tmp_path, max_steps=2, precision="bf16-mixed", gradient_clip_val=1e-3, enable_checkpointing=False)
    before = [p.detach().clone() for p in module.parameters()]
    run.fit(module, datamodule=mela_data())
    assert module.optimizers().param_groups[0]["fused"]
    norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_whatever_the_weights_type_positions_are_in_float32(precision, tmp_path):
    """Lightning makes new tensors of the weights' type; bfloat16 knows no 257."""
    data = mela_data(steps_per_epoch=2)
    module, run = four_tasks(), trainer(tmp_path, max_steps=2, precision=precision, enable_checkpointing=False)
    seen = []
    module.heads["detection"].register_forward_hook(lambda head, inputs, out: seen.append(out[1].centres_A2.dtype))
    (run.validate if precision == "bf16-true" else run.fit)(module, datamodule=data)  # bf16-true trains nothing
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float64}
    assert {*seen} == {torch.float32}
    assert {"val/detection/ap50", "val/counting/mae", "val/densepose/uv_gps"} <= run.callback_metrics.keys()


@pytest.mark.parametrize("options", [{}, {"pool": "mean", "batch_norm": True}])
def test_checkpoint_carries_what_load_needs(tmp_path, options):
    import indiclip

    module = MultiTask(tiny_encoder(**options), [Contrastive()])
    module.encoder.embed_text(["kite", "drum"])  # moves the running statistics, where there are any
    run = trainer(tmp_path, max_steps=1)
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "x.ckpt")
    encoder = indiclip.load(tmp_path / "x.ckpt")
    with torch.no_grad():
        batch = caption_batch(["a"])
        module.eval()
        torch.testing.assert_close(
            encoder.embed_image(batch["images"]), module.encoder.embed_image(batch["images"]), atol=0, rtol=0
        )
        torch.testing.assert_close(encoder.embed_text("पतंग"), module.encoder.embed_text("पतंग"), atol=0, rtol=0)
