"""Strategies that weigh the heads' losses: by hand, against the papers' algorithms written down plainly, and resumed.

That ranks and micro-batches make no difference is in tests/test_same_numbers.py.
"""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
import yaml
from experiments import config, fit
from fake_gpu import NoWaits, on_fake_gpu
from helpers import tiny_encoder
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch._subclasses import FakeTensorMode

from heads.contrastive import Contrastive
from heads.depth import Depth
from indiclip.backbone import NaFlexViT
from indiclip.module import MultiTask
from indiclip.module_checks import check_task_weights
from indiclip.old_names import translate_checkpoint, translate_config
from indiclip.task_weights import GradNorm, PCGrad, Uncertainty, project
from indiclip.training.fault_tolerance.manifest import newest_good
from indiclip.training.record import read_history


def test_uncertainty_by_hand():
    strategy = Uncertainty()
    strategy.bind({"a": 2.0})
    with torch.no_grad():
        strategy.log_variances["a"].fill_(0.5)
    assert strategy.part("a", torch.tensor(3.0)).item() == pytest.approx(2 * (3 * 2.718281828**-0.5 + 0.5), rel=1e-6)
    assert strategy.logged["a/log_variance"].item() == 0.5


def test_two_conflicting_gradients_by_hand():
    """(1, 0) and (-1, 1): each less its part against the other, (1/2, 1/2) and (0, 1)."""
    rows = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])]
    torch.testing.assert_close(project(rows, 0), torch.tensor([0.5, 1.5]))
    agreeing = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    torch.testing.assert_close(project(agreeing, 0), torch.tensor([2.0, 1.0]))
    nothing = [torch.zeros(2), torch.tensor([-1.0, 1.0])]  # a head whose loss is constant
    torch.testing.assert_close(project(nothing, 0), torch.tensor([-1.0, 1.0]))


def test_many_gradients_against_the_papers_algorithm():
    """Each seed draws an order; the order matters, and what is subtracted are the others' own gradients."""
    rows = list(torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    found = set()
    for seed in range(5):
        draw, expected = random.Random(seed), torch.zeros(3, dtype=torch.float64)
        for i in range(6):
            order = [j for j in range(6) if j != i]
            draw.shuffle(order)
            projected = rows[i].clone()
            for j in order:
                if projected @ rows[j] < 0:
                    projected -= projected @ rows[j] / rows[j].norm() ** 2 * rows[j]
            expected += projected
        torch.testing.assert_close(project(rows, seed), expected)
        found.add(round(project(rows, seed)[0].item(), 9))
    assert len(found) > 1


def test_only_what_several_heads_reach_is_projected():
    """Losses s + a and -s + 2 s b of a shared s = 1 and own a, b: by hand; what no head reaches gets no gradient."""
    s, a, b, other = (torch.nn.Parameter(torch.tensor([value])) for value in (1.0, 1.0, 0.25, 0.0))
    parts = {"first": (s + a).sum(), "second": (-s + 2 * s * b).sum()}
    watched = [s, a, b, other]
    gradients = {n: torch.autograd.grad(p, watched, retain_graph=True, allow_unused=True) for n, p in parts.items()}
    loss = PCGrad().total(sum(parts.values()), gradients, watched, 0)
    (2 * loss).backward()  # as a loss scale would
    assert loss.item() == pytest.approx(1.5)
    # 1 and -0.5 on s point apart, and of each nothing is left.
    assert [p.grad if p.grad is None else p.grad.item() for p in watched] == [0.0, 2.0, 4.0, None]


def test_gradnorm_against_the_papers_algorithm():
    """Two regressions whose targets differ in scale 1 : 10, through one shared matrix (the paper's toy, section 4).

    The plain algorithm differentiates |norm - target| by autograd; ours has the slope by hand.
    """
    torch.manual_seed(0)
    inputs, shared = torch.randn(32, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    targets = {"small": 1.0 * torch.tanh(inputs @ torch.randn(4, 4).double()), "large": None}
    targets["large"] = 10 * torch.tanh(inputs @ torch.randn(4, 4).double())
    ours, plain = (shared.clone().requires_grad_() for _ in range(2))
    strategy = GradNorm(alpha=0.5, lr=0.05)
    strategy.bind({"small": 1.0, "large": 1.0})
    strategy.double()
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    first = None
    for step in range(40):
        losses = {name: (torch.tanh(inputs @ ours) - target).square().mean() for name, target in targets.items()}
        parts = {name: strategy.part(name, loss) for name, loss in losses.items()}
        gradients = {name: torch.autograd.grad(part, [ours], retain_graph=True) for name, part in parts.items()}
        total = strategy.total(sum(parts.values()), gradients, [ours], step)
        (gradient,) = torch.autograd.grad(total, [ours])
        ours.data -= 0.05 * gradient

        losses = torch.stack([(torch.tanh(inputs @ plain) - target).square().mean() for target in targets.values()])
        first = losses.detach() if first is None else first
        norms = torch.stack([
            torch.autograd.grad(weight * loss, plain, create_graph=True)[0].norm()
            for weight, loss in zip(weights, losses, strict=True)
        ])  # fmt: skip
        rates = (losses / first).detach()
        aims = (norms.mean() * (rates / rates.mean()) ** 0.5).detach()
        distance = (norms - aims).abs().sum() / norms.mean().detach()
        (slope,) = torch.autograd.grad(distance, weights, retain_graph=True)
        (gradient,) = torch.autograd.grad((weights.detach() * losses).sum(), plain)
        plain.data -= 0.05 * gradient
        weights = (weights.detach() - 0.05 * slope).clamp(min=1e-3)
        weights = (weights * 2 / weights.sum()).requires_grad_()
        torch.testing.assert_close(strategy.learned_K, weights.detach())
    torch.testing.assert_close(ours.detach(), plain.detach())
    assert strategy.learned_K[0] > 1.5  # the task with the small gradients is helped
    assert strategy.logged["small/task_weight"].item() > 1.5


def test_a_head_that_begins_later_has_its_own_first_loss():
    """Two take part, and later three: weights of those that do have a mean of 1, and the third begins with its loss."""
    strategy = GradNorm()
    strategy.bind(dict.fromkeys("abc", 1.0))
    weight = torch.nn.Parameter(torch.ones(2))
    for active in ("ab", "ab", "abc"):
        parts = {n: strategy.part(n, weight.sum() * (2 + "abc".index(n))) for n in active}
        gradients = {n: torch.autograd.grad(part, [weight], retain_graph=True) for n, part in parts.items()}
        strategy.total(sum(parts.values()), gradients, [weight], 0)
        rows = ["abc".index(n) for n in active]
        assert strategy.learned_K[rows].mean().item() == pytest.approx(1)
    assert strategy.first_losses_K.tolist() == [4, 6, 8]


@pytest.mark.parametrize("factors", [(0.0, 1.0), (float("nan"), 1.0, float("nan")), (float("inf"), 1.0, float("inf"))])
def test_gradnorm_keeps_its_weights_in_a_step_that_says_nothing(factors):
    """A step that is not finite is skipped; and a head's loss is 0 before it has targets."""
    strategy, weight = GradNorm(), torch.nn.Parameter(torch.ones(2))
    strategy.bind(dict.fromkeys("ab", 1.0))
    for factor in factors:
        before = strategy.learned_K.clone()
        parts = {n: strategy.part(n, weight.sum() * of) for n, of in (("a", factor), ("b", 3.0))}
        gradients = {n: torch.autograd.grad(part, [weight], retain_graph=True) for n, part in parts.items()}
        strategy.total(sum(parts.values()), gradients, [weight], 0)
        assert torch.equal(strategy.learned_K, before) == (factor != 1)
    assert strategy.first_losses_K.tolist() == [2, 6]


def gradnorm_of(heads, depth=4, **options):
    """Paths of the blocks that GradNorm watches, for heads that are given as (block, weight)."""
    encoder = tiny_encoder()
    encoder.backbone = NaFlexViT(width=32, depth=depth, num_heads=2, patch_size=8)
    made = [Contrastive(weight=heads[0][1], name="first")]
    for number, (block, weight) in enumerate(heads[1:]):
        made.append(Depth(channels=8, block=block, weight=weight, name=f"depth{number}"))
    module = MultiTask(encoder, made, task_weights=GradNorm(), **options)
    names = {id(p): name for name, p in module.named_parameters()}
    watched = [names[id(p)] for p in module.task_weights.watched(module)]
    assert watched
    return {name.removeprefix("encoder.backbone.vit.blocks.")[0] for name in watched}


@pytest.mark.parametrize(
    ("heads", "frozen", "block"),
    [
        ([(None, 1)], [], "3"),
        ([(None, 1), (None, 1)], [], "3"),
        ([(None, 1), (-2, 1), (1, 1)], [], "1"),
        ([(None, 1), (0, 1)], [], "0"),
        ([(None, 1), (-2, 1), (1, 0)], [], "2"),  # one without a weight has no say
        ([(None, 1), (-2, 1)], [2, 3], "1"),  # what is not trained has no gradient
        ([(None, 1), (0, 1), (2, 1)], [0, 1], "2"),  # one that trains no block shares none
    ],
)
def test_gradnorm_watches_the_last_block_that_all_heads_share(heads, frozen, block):
    freeze = [f"encoder.backbone.vit.blocks.{number}" for number in frozen]
    assert gradnorm_of(heads, freeze=freeze) == {block}


def test_what_has_no_gradient_on_the_shared_block_is_left_out():
    """Two heads learn the same weights with and without three others: of texts alone, of weight 0, of loss 0."""
    found = {}
    for names in ("ab", "abcde"):
        strategy = GradNorm(lr=0.1)
        strategy.bind(dict.fromkeys(names, 1.0) | ({"d": 0.0} if "d" in names else {}))
        shared, apart = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        for step in range(50):
            of_shared = shared.sum() * 0.97**step
            losses = {"a": of_shared, "b": 9 + of_shared, "c": apart.sum(), "d": 5 * of_shared, "e": 0 * of_shared}
            parts = {n: strategy.part(n, losses[n]) for n in names}
            gradients = {
                n: torch.autograd.grad(part, [shared], retain_graph=True, allow_unused=True)
                for n, part in parts.items()
            }
            strategy.total(sum(parts.values()), gradients, [shared], step)
        found[names] = strategy.learned_K.tolist()
    assert found["abcde"] == pytest.approx([*found["ab"], 1, 1, 1])
    assert found["ab"][1] > 1.2  # b is the slower one


def test_gradnorm_waits_for_no_gpu():
    strategy = GradNorm()
    strategy.bind(dict.fromkeys("abc", 1.0))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        on_fake_gpu(mode, strategy)
        losses = {n: torch.ones((), device="cuda") for n in "abc"}
        watched = [torch.ones(2, device="cuda")]
        with NoWaits():
            total = sum(strategy.part(n, loss) for n, loss in losses.items())
            strategy.total(total, {"a": [watched[0]], "b": [watched[0]], "c": [None]}, watched, 0)
    assert strategy.learned_K.device.type == "cuda"


DETECTION = {
    "class_path": "heads.detection.Detection",
    "init_args": {"task": "contrastive", "num_classes": 17, "out_channels": 16, "num_convs": 1, "scales": [1.0]},
}


@pytest.mark.parametrize("name", ["GradNorm", "PCGrad"])
def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(tmp_path, name):
    """Through the command, with what the strategy has learned; two heads on one batch."""
    tree = config(trainer__max_steps=4, model__warmup_steps=0, model__lr=0.01)
    tree["model"]["heads"].append(DETECTION)
    tree["model"]["task_weights"] = {"class_path": f"indiclip.task_weights.{name}"}
    tree["data"] |= {"val": [], "steps_per_epoch": 4}
    tree["trainer"]["callbacks"] = [
        {"class_path": "indiclip.training.fault_tolerance.checkpoints.Checkpoints",
         "init_args": {"every_n_train_steps": 2, "save_top_k": -1}},
    ]  # fmt: skip
    assert fit(tmp_path, tree) == 0
    folder = tmp_path / "runs" / "experiment" / "checkpoints"
    assert fit(tmp_path, tree, "--name", "b", "--ckpt_path", str(folder / "2.ckpt")) == 0
    whole, resumed = (
        torch.load(file, weights_only=True)["state_dict"]
        for file in (folder / "4.ckpt", tmp_path / "runs" / "b" / "checkpoints" / "4.ckpt")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[n]) for n, value in whole.items())
    if name == "GradNorm":
        assert not torch.equal(whole["task_weights.learned_K"], torch.ones(2))


def test_heads_of_earlier_blocks_of_texts_alone_and_of_no_weight_leave_the_others_theirs(tmp_path):
    """Through the command: each of them once took what the others' weights are made of."""
    tree = config(trainer__max_steps=4, model__warmup_steps=0, model__lr=0.01)
    tree["model"]["encoder"]["backbone"]["init_args"]["depth"] = 2
    texts = {"class_path": "heads.masked_modelling.MaskedModelling"}
    texts["init_args"] = {"task": "contrastive", "losses": {"mlm": 1.0}, "width": 16, "num_heads": 1}
    tree["model"]["heads"] += [copy.deepcopy(DETECTION), texts]
    tree["model"]["heads"].append({"class_path": "heads.contrastive.Contrastive", "init_args": {"name": "scores"}})
    tree["model"]["heads"][1]["init_args"]["block"] = -2
    tree["model"]["heads"][3]["init_args"] |= {"task": "contrastive", "weight": 0.0}
    tree["model"]["task_weights"] = {"class_path": "indiclip.task_weights.GradNorm", "init_args": {"lr": 0.1}}
    tree["data"] |= {"val": [], "steps_per_epoch": 4}
    assert fit(tmp_path, tree) == 0
    last = read_history(tmp_path / "runs" / "experiment")[-1]
    learned = {n.split("/")[1]: value for n, value in last.items() if n.endswith("/task_weight")}
    assert learned["masked_modelling"] == learned["scores"] == 1
    assert learned["contrastive"] + learned["detection"] == pytest.approx(2)
    assert learned["contrastive"] != 1


def test_configs_and_checkpoints_with_the_old_switch_go_on(tmp_path):
    """A checkpoint as it was written then: other names, and single numbers in weights and moments."""
    old = {"model": {"uncertainty_weighting": True}}
    assert translate_config(old) == {"model": {"task_weights": {"class_path": "indiclip.task_weights.Uncertainty"}}}
    assert translate_config({"model": {"uncertainty_weighting": False}}) == {"model": {}}
    tree = config(trainer__max_steps=2)
    tree["model"]["uncertainty_weighting"] = True
    assert fit(tmp_path, tree) == 0
    folder = tmp_path / "runs" / "experiment"
    file = newest_good(folder / "checkpoints")[0]
    checkpoint = torch.load(file, weights_only=True)
    new, name = "task_weights.log_variances.contrastive", "log_variances.contrastive"
    expected = checkpoint["state_dict"][new].clone()
    assert expected.shape == (1,)
    checkpoint["state_dict"][name] = checkpoint["state_dict"].pop(new).squeeze()
    (optimizer,) = checkpoint["optimizer_states"]
    (group,) = [group for group in optimizer["param_groups"] if new in group["param_names"]]
    place = group["param_names"].index(new)
    group["param_names"][place] = name
    state = optimizer["state"][group["params"][place]]
    state |= {key: value.squeeze() for key, value in state.items() if key != "step"}
    translate_checkpoint(checkpoint)
    assert torch.equal(checkpoint["state_dict"][new], expected)
    assert group["param_names"][place] == new
    assert {value.shape for key, value in state.items() if key != "step"} == {(1,)}
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["task_weights"]["class_path"] == "indiclip.task_weights.Uncertainty"


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    tree = config()
    tree["model"]["task_weights"] = {"class_path": "indiclip.task_weights.GradNorm", "init_args": {"alpha": -1.0}}
    assert fit(tmp_path, tree) == 2
    assert "model.task_weights.alpha: found -1.0; expected 0 or more" in capsys.readouterr().err
    tree["model"]["task_weights"] = {"class_path": "indiclip.task_weights.PCGrad"}
    assert fit(tmp_path, tree) == 2
    assert "PCGrad compares heads; found contrastive alone with a weight; expected two" in capsys.readouterr().err
    tree["model"]["heads"].append({"class_path": "heads.contrastive.Contrastive", "init_args": {"name": "second"}})
    tree["model"]["heads"][1]["init_args"]["task"] = "contrastive"
    gradnorm = {"class_path": "indiclip.task_weights.GradNorm"}
    assert fit(tmp_path, tree | {"model": tree["model"] | {"task_weights": gradnorm, "freeze": ["image"]}}) == 2
    assert "GradNorm compares gradients on a block of the backbone, of which nothing is" in capsys.readouterr().err
    tree["model"]["compile"] = True
    assert fit(tmp_path, tree) == 2
    assert "model.task_weights: PCGrad goes back through a block once for each head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("strategy", "precision", "message"),
    [
        (FSDPStrategy, "32-true", "PCGrad needs each head's whole gradients on each rank"),
        (SingleDeviceStrategy, "16-mixed", "PCGrad takes gradients before they are scaled"),
    ],
)
def test_what_takes_a_gpu_is_refused_by_its_line(strategy, precision, message):
    """Lightning makes neither on a CPU, so the check alone is called."""
    heads = [Contrastive(name="first"), Contrastive(name="second")]
    module = MultiTask(tiny_encoder(), heads, task_weights=PCGrad())
    trainer = SimpleNamespace(strategy=object.__new__(strategy), precision=precision)
    with pytest.raises(ValueError, match=message):
        check_task_weights(module.task_weights, module, trainer, compiles=False)
    check_task_weights(module.task_weights, module, SimpleNamespace(strategy=None, precision="32-true"), compiles=False)
