"""The head against its formulas on one image at a time; on ranks, in micro-batches, sharded, killed at its borders."""

import copy

import pytest
import test_same_numbers
import torch
from experiments import config, fit
from fake_gpu import NoWaits, moved, on_fake_gpu
from helpers import ARCHITECTURE, step_losses, tiny_encoder
from processes import on_ranks
from test_same_numbers import OneStep, heads, same
from test_sharding import fitted, largest_difference, sharded
from test_sharding import weights as sharded_weights
from test_views import STOP, weights
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torchvision.transforms import v2

from heads.self_distillation import SelfDistillation
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.generated.mela import Mela
from indiclip.head import computed
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.loading.views import View
from indiclip.module import MultiTask
from indiclip.parameter_groups import parameter_groups
from indiclip.preprocessing import Preprocessing
from indiclip.tasks.block_masks import masks_of
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer
from indiclip.training.ema import EMA
from indiclip.types import images_of, random_seeds

SMALL = {"task": "contrastive", "hidden_dim": 16, "bottleneck_dim": 8, "num_prototypes": 12}
DINOV2 = SMALL | {"koleo_weight": 0.1}
SIGLIP2 = SMALL | {
    **{"ibot_weight": 0.25, "koleo_weight": 0.0, "centring": "mean", "teacher_temperature": 0.04, "momentum": 0.9},
    **{"mask_kind": "random", "mask_share": 1.0, "mask_ratio": (0.5, 0.5)},
}
PRESETS = {"dinov2": DINOV2, "siglip2": SIGLIP2, "tipsv2": SIGLIP2 | {"head_only": True, "visible_weight": 0.5}}
CROPS = {"dinov2": 2, "siglip2": 1, "tipsv2": 1}


def batches_of(preset, rank=0, world=1, images=8):
    """A step with pictures of several sizes; global views keep them, so that there is padding."""
    flip, crop = v2.RandomHorizontalFlip(), v2.RandomResizedCrop(size=[16, 24], scale=(0.2, 0.5))
    views = [View("global", CROPS[preset], [flip], max_tokens=24), View("local", 3, [crop], max_tokens=6)]
    mela = [Mela(50, size, "single", languages=test_same_numbers.LANGUAGES, seed=1) for size in (32, [32, 48])]
    scenes = Mela(30, [32, 48], people=1.0, depth=True, seed=2)
    sources = [
        *(Source("contrastive", dataset, images, max_tokens=24, views=views) for dataset in mela),
        Source("scenes", scenes, images, max_tokens=24),
    ]
    return Steps(sources, 5, Preprocessing(8), train=True, rank=rank, world_size=world)[3]


@pytest.fixture(params=PRESETS)
def preset(request, monkeypatch):
    """With detection, DensePose, counting and depth in the same step."""
    options = PRESETS[request.param]
    monkeypatch.setattr(test_same_numbers, "heads", lambda loss: [*heads(loss), SelfDistillation(**options)])
    return request.param


def made(preset, seed=0):
    """An encoder, and a head whose teacher is another model."""
    encoder = tiny_encoder(seed, batch_norm=True).double()
    head = SelfDistillation(**PRESETS[preset])
    head.bind(encoder)
    torch.manual_seed(seed + 1)
    for teacher in head.teacher.parameters():
        teacher += torch.randn_like(teacher) / 20
    nn.init.normal_(head.mask_P)
    return encoder, head.double()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_is_that_of_one_image_after_the_other(preset):
    """Each crop alone, without padding, in loops over crops and tokens."""
    with torch.no_grad():
        encoder, head = made(preset)
    batch = batches_of(preset)["contrastive"]
    found = step_losses(head.loss(encoder.features(batch["images"]), batch, encoder)).terms
    seen, local, B, G = batch["views"]["global"], batch["views"]["local"], len(batch["keys"]), CROPS[preset]
    assert min(seen["num_patches"]) < max(seen["num_patches"])
    options = PRESETS[preset] | {"kind": head.masks.keywords["kind"], "share": head.masks.keywords["share"]}
    masks = masks_of(
        random_seeds(batch),
        [(height // 8, width // 8) for height, width in seen["sizes_hw"]],
        options["share"], head.masks.keywords["ratio"], options["kind"],
    )  # fmt: skip

    def layers(name, of):
        return lambda x: of[name].logits(of[name](x))

    def targets(logits_RK):
        if preset != "dinov2":
            return (logits_RK / 0.04).softmax(-1)
        q_RK = (logits_RK / 0.07).exp()
        for _ in range(3):
            q_RK = q_RK / q_RK.sum(0)
            q_RK = q_RK / q_RK.sum(1, keepdim=True)
        return q_RK

    backbone = encoder.backbone if head.head_only else head.teacher.backbone
    pool = encoder.image_pool if head.head_only else head.teacher.image_pool
    teacher, student = head.teacher.layers, head.student
    pooled, teacher_pooled, tokens, teacher_tokens, weights_R = [], [], [], [], []
    for i, mask_HW in enumerate(masks):
        image = images_of(seen, i, i + 1)
        hidden_N = torch.from_numpy(mask_HW).flatten()
        hidden_P = head.mask_P * encoder.backbone.std_P + encoder.backbone.mean_P
        patches_BNP = torch.where(hidden_N[:, None], hidden_P, image["patches_BNP"])
        of_student = encoder.features({**image, "patches_BNP": patches_BNP})
        of_teacher = backbone(image)
        pooled.append(encoder.pool_features(of_student)[0])
        teacher_pooled.append(pool(of_teacher.tokens_BND, None)[0])
        for n, hidden in enumerate(hidden_N.tolist()):
            if weight := 1 / int(hidden_N.sum()) if hidden else head.visible_weight / max(int((~hidden_N).sum()), 1):
                tokens.append(of_student.tokens_BND[0, n])
                teacher_tokens.append(of_teacher.tokens_BND[0, n])
                weights_R.append(weight)
    of_local = [encoder.pool_features(encoder.features(images_of(local, i, i + 1)))[0] for i in range(3 * B)]

    says = targets(layers("image", teacher)(torch.stack(teacher_pooled))).unflatten(0, (B, G))
    terms = []
    for b in range(B):
        crops = [*of_local[3 * b : 3 * b + 3], *(pooled[G * b : G * b + G] if G > 1 else [])]
        for s, crop in enumerate(crops):
            log_K = (layers("image", student)(crop) / 0.1).log_softmax(-1)
            terms += [-(says[b, g] * log_K).sum() for g in range(G) if s - 3 != g]
    assert len(terms) == B * (8 if G > 1 else 3)
    assert_close(found["dino"], torch.stack(terms).mean())
    says_RK = targets(layers("patch", teacher)(torch.stack(teacher_tokens)))
    log_RK = (layers("patch", student)(torch.stack(tokens)) / 0.1).log_softmax(-1)
    entropy_R = -(says_RK * log_RK).sum(-1)
    expected = (entropy_R * torch.tensor(weights_R)).sum() / (B * G)
    assert_close(found["ibot"], head.ibot_weight * expected, rtol=1e-6, atol=0)
    if G > 1:
        unit = nn.functional.normalize(torch.stack(pooled).unflatten(0, (B, G)), dim=-1)
        nearest = [torch.cdist(unit[:, g], unit[:, g]).fill_diagonal_(9).min(1).values for g in range(G)]
        assert_close(found["koleo"], 0.1 * sum(-distance.log().mean() for distance in nearest), rtol=1e-5, atol=1e-6)


def test_two_ranks_are_one(tmp_path, preset):
    def step(rank=0, world=1):
        return OneStep().step(batches_of(preset, rank, world))

    expected = step()
    assert "train/self_distillation/dino" in expected[0]
    for found in on_ranks(2, lambda rank: step(rank, 2), tmp_path):
        same(found, expected)


@pytest.mark.parametrize("number", [3, 8])
def test_micro_batches_are_the_batch(preset, number):
    expected = OneStep().step(batches_of(preset))
    same(OneStep(micro_batches=number).step(batches_of(preset)), expected)


@pytest.mark.parametrize("head_only", [False, True])
def test_the_teacher_is_an_average_that_nothing_else_touches(head_only):
    head = SelfDistillation(**SMALL, head_only=head_only, momentum=0.9, final_momentum=1.0)
    module = MultiTask(tiny_encoder(batch_norm=True), [*heads()[:1], head])
    module.train()
    assert not any(part.training for part in head.teacher.modules())
    assert head.student.training
    names = [name for group in parameter_groups(module, layer_decay=0.7) for name in group["param_names"]]
    assert not any(".teacher." in name for name in names)
    ema = EMA()
    ema.update(module)
    assert not any(".teacher." in name for name in ema._averages)
    assert not any("teacher" in name for name in module.encoder.state_dict())
    copied = {"layers"} if head_only else {"layers", "backbone", "image_pool"}
    assert {name.split(".")[1] for name in head.state_dict() if name.startswith("teacher.")} == copied

    before = copy.deepcopy(head.student)
    head.begin(module.encoder)
    for parameter in head.student.parameters():
        parameter.data += 1
    head.after_step(module.encoder, 0.5, torch.ones(()))  # half of the way from 0.9 to 1
    of_teacher = zip(head.teacher.layers.parameters(), before.parameters(), strict=True)
    for teacher, first in of_teacher:
        assert_close(teacher.data, first.data + 0.05)


def test_a_step_on_a_gpu_waits_for_nothing():
    encoder = tiny_encoder(batch_norm=True)
    module = MultiTask(encoder, [SelfDistillation(**DINOV2)])
    head, batch = module.each_head()[0], batches_of("dinov2")["contrastive"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        on_fake_gpu(mode, module)
        on_device = moved(batch, "cuda")
        with NoWaits():
            losses = computed(head.loss(encoder.features(on_device["images"]), on_device, encoder))
    assert {name: of.device.type for name, of in losses.terms.items()} == dict.fromkeys(
        ("dino", "ibot", "koleo"), "cuda"
    )


def test_losses_are_in_float32_beside_autocast():
    encoder = tiny_encoder()
    head, batch = SelfDistillation(**DINOV2), batches_of("dinov2")["contrastive"]
    head.bind(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        output = head.loss(encoder.features(batch["images"]), batch, encoder)
        terms = computed(output).terms
    assert {row.dtype for row in output.rows} == {torch.float32}
    for name, value in computed(output).terms.items():  # of the same rows, without autocast
        assert torch.equal(terms[name], value)


def experiment(start=0.5, momentum=0.8, **options):
    tree = config(trainer__max_steps=4, data__steps_per_epoch=2)
    crop = {"class_path": "torchvision.transforms.v2.RandomResizedCrop", "init_args": {"size": [16, 16]}}
    view = {"count": 2, "max_tokens": 4, "augment": [crop], "start": start}
    views = [view | {"name": name} for name in ("global", "local")]
    init_args = SMALL | {"start": start, "momentum": momentum, "centring": "mean"} | options
    head = {"class_path": "heads.self_distillation.SelfDistillation", "init_args": init_args}
    tree["model"]["heads"].append(head)
    tree["model"] |= {"warmup_steps": 0, "lr": 0.01}
    tree["data"]["overrides"] = [{"task": "contrastive", "views": views}]
    return tree


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_were_not(tmp_path, monkeypatch):
    """At the step in which the teacher begins, and behind it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "experiments_stop.py").write_text(STOP)
    folders = [tmp_path / name for name in ("whole", "border", "behind")]
    for folder in folders:
        folder.mkdir()

    def tree_of(start):
        tree = experiment(start)
        tree["data"]["val"] = []
        return tree

    assert fit(folders[0], tree_of(0.5)) == 0
    state = weights(folders[0])["state_dict"]
    assert state["heads.self_distillation.begun"]
    apart = {
        name: (value - state[name.replace("heads.self_distillation.teacher", "encoder")]).abs().max()
        for name, value in state.items()
        if name.startswith("heads.self_distillation.teacher.backbone")
    }
    assert 0 < max(apart.values()) < 0.1  # it began as the student was, which then went on
    for step, folder in zip((2, 3), folders[1:], strict=True):
        tree = tree_of(2)
        stop = {"class_path": "experiments_stop.Stop", "init_args": {"step": step}}
        assert fit(folder, tree | {"trainer": tree["trainer"] | {"callbacks": [stop]}}) == 0
        ended = weights(folder)
        assert (ended["global_step"], bool(ended["state_dict"]["heads.self_distillation.begun"])) == (step, step > 2)
        last = folder / "runs" / "experiment" / "checkpoints" / "last.ckpt"
        assert fit(folder, tree, "--ckpt_path", str(last)) == 0
        resumed = weights(folder)["state_dict"]
        assert all(torch.equal(resumed[name], value) for name, value in state.items())


@pytest.mark.slow
def test_shards_end_at_the_weights_of_ddp(tmp_path):
    """Towers in float64; one teacher with a backbone and one without; a validation comes before they begin."""
    found = {}
    for name, strategy in {"ddp": "ddp", "sharded": sharded(1, 2)}.items():
        tree = experiment()
        options = tree["model"]["heads"][1]["init_args"] | {"name": "without", "head_only": True}
        tree["model"]["heads"].append({"class_path": "heads.self_distillation.SelfDistillation", "init_args": options})
        tree["trainer"] |= {"strategy": strategy, "callbacks": [{"class_path": "trouble.Double"}]}
        done, found[name] = fitted(tmp_path / name, tree, 2)
        assert done.statuses == [0, 0], done.stderr
    assert largest_difference(*(sharded_weights(folder) for folder in found.values())) < 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"local_view": None, "global_view": "one"}, "'one'; found no such view"),
        ({"mask_ratio": [0.5, 0.1]}, "heads.self_distillation.mask_ratio: found [0.5, 0.1]"),
        ({"dino_weight": 0.0, "ibot_weight": 0.0}, "dino_weight and ibot_weight are 0"),
        ({"num_prototypes": 1}, "heads.self_distillation.num_prototypes: found 1; expected 2 or more"),
        ({"mask_share": 0.0}, "heads.self_distillation.mask_share: found 0.0; expected above 0 to 1"),
        ({"mask_ratio": [0.0, 0.0]}, "heads.self_distillation.mask_ratio[1]: found 0.0; expected above 0 to 1"),
        ({"local_view": None}, "data.train[0].views: found 'local', which no head of the task 'contrastive' reads"),
        ({"student_temperature": 0.0}, "heads.self_distillation.student_temperature: found 0; expected more than 0"),
        ({"momentum": 1.5}, "heads.self_distillation.momentum"),
        ({"start": 9}, "heads.self_distillation.start: 9 is beyond the last of the run's 4 steps"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, capsys, options, words):
    assert fit(tmp_path, experiment(**options)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("indiclip:")]
    assert words in line


def test_a_run_cannot_begin_without_a_head(tmp_path, capsys):
    tree = experiment()
    del tree["model"]["heads"][0]
    assert fit(tmp_path, tree) == 2
    assert "heads.self_distillation.start: no head begins before step 2" in capsys.readouterr().err


def test_pooling_of_the_tower_itself_has_an_average_too():
    options = {"global_pool": "token", "class_token": True}
    backbone = NaFlexViT(width=32, depth=1, num_heads=2, patch_size=8, options=options)
    encoder = Encoder(backbone, TextTower(ByteTokenizer(), ARCHITECTURE), 64, [16], pool="tower")
    head = SelfDistillation(**DINOV2, momentum=0.9)
    head.bind(encoder)
    for parameter in encoder.backbone.parameters():
        parameter.data += 1
    head.after_step(encoder, 0.0, torch.ones(()))
    token = encoder.backbone.vit.embeds.cls_token, head.teacher.backbone.vit.embeds.cls_token
    assert_close(token[0] - token[1], torch.full_like(token[0], 0.9))
    batch = batches_of("dinov2")["contrastive"]
    losses = step_losses(head.loss(encoder.features(batch["images"]), batch, encoder)).terms
    assert all(value.isfinite() for value in losses.values())


def test_it_reads_views_alone_so_that_the_images_beside_them_may_be_mixed():
    encoder, batch = tiny_encoder(), batches_of("dinov2")["contrastive"]
    head = SelfDistillation(**DINOV2)
    head.bind(encoder)
    del batch["images"]
    assert head.mixes
    assert computed(head.loss(None, batch, encoder)).terms["dino"].isfinite()


def test_what_patches_count_is_asked_with_a_loss_of_patches_alone():
    with pytest.raises(ValueError, match="heads.self_distillation.visible_weight: found 0.5 without an ibot_weight"):
        SelfDistillation(ibot_weight=0.0, visible_weight=0.5)


def test_one_view_has_nothing_to_be_compared_with():
    head = SelfDistillation(**SMALL, local_view=None)
    head.check_views({"global": 2})
    with pytest.raises(ValueError, match="heads.self_distillation.local_view: found none, and one 'global' view"):
        head.check_views({"global": 1})
