"""Views of images: against what the same transforms make of the same pictures."""

import pytest
import torch
from experiments import config, fit
from torchvision.transforms import v2

from indiclip.generated.mela import Mela
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.loading.views import View
from indiclip.preprocessing import Preprocessing
from indiclip.types import part_of


def source(**options):
    return Source("contrastive", Mela(num_scenes=12, size=32, layout="single"), 4, max_tokens=16, **options)


def crops(name="local", count=3, **options):
    crop = v2.RandomResizedCrop(size=[16, 16], scale=(0.2, 0.5))
    return View(name, count, [crop], max_tokens=4, **options)


def steps(*sources, world=1, rank=0, **options):
    return Steps([*sources], 0, Preprocessing(8), True, rank, world, **options)


def test_each_image_has_its_views_beside_it_one_after_the_other():
    batch = steps(source(views=[crops(), View("whole")]))[0]["contrastive"]
    assert batch["views"]["local"]["num_patches"] == [4] * 12
    whole = batch["views"]["whole"]
    assert torch.equal(whole["patches_BNP"], batch["images"]["patches_BNP"])  # a view without augmentation
    plain = steps(source())[0]["contrastive"]
    assert torch.equal(plain["images"]["patches_BNP"], batch["images"]["patches_BNP"])  # which views do not change
    assert "views" not in plain


def test_views_are_random_each_time_and_the_same_on_any_number_of_ranks():
    whole = steps(source(views=[crops()]))[1]["contrastive"]
    patches = whole["views"]["local"]["patches_BNP"]
    assert len({patch.numpy().tobytes() for patch in patches}) == 12
    parts = [steps(source(views=[crops()]), world=2, rank=rank)[1]["contrastive"] for rank in range(2)]
    for rank, part in enumerate(parts):  # which samples are dealt to in turn
        own = patches.unflatten(0, (4, 3))[rank::2].flatten(0, 1)
        assert torch.equal(part["views"]["local"]["patches_BNP"], own)
    part = part_of(whole, 1, 3)
    assert torch.equal(part["views"]["local"]["patches_BNP"], patches[3:9])


def test_views_begin_at_their_step():
    late = steps(source(views=[crops(start=0.5)]), run_steps=4)
    assert ["views" in late[step]["contrastive"] for step in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("others", [[], [crops(count=2)], [crops(start=0.5)], [crops("global")]])
def test_sources_of_a_task_have_the_same_views(others):
    """Else rows of a view would be of other images than they seem; how each augments its own is its affair."""
    mirrored = View("local", 3, [v2.RandomHorizontalFlip()], max_tokens=9)
    assert len(steps(source(views=[crops()]), source(views=[mirrored]))[0]["contrastive"]["keys"]) == 4
    with pytest.raises(ValueError, match=r"the sources of task 'contrastive' differ in views \(name, count or start\)"):
        steps(source(views=[crops()]), source(views=others), run_steps=4)


HEADS = """
import torch
from indiclip.head import Losses
from heads.contrastive import Contrastive

class Late(Contrastive):
    required_views = ("local",)

    def bind(self, encoder):
        super().bind(encoder)
        self.scale = torch.nn.Parameter(torch.ones(2, 2))
        self.register_buffer("calls", torch.zeros(3))

    def begin(self, encoder):
        self.calls[0] += 1

    def after_step(self, encoder, progress, made):
        self.calls[1] += 1
        self.calls[2] = progress

    def loss(self, features, batch, encoder):
        local = encoder.features(batch["views"]["local"])
        assert len(local.tokens) == 3 * len(batch["keys"])
        return Losses({"size": (local.tokens.mean() * self.scale.sum()).square()})
"""


@pytest.fixture
def late_head(tmp_path, monkeypatch):
    (tmp_path / "late_head.py").write_text(HEADS)
    monkeypatch.syspath_prepend(tmp_path)

    def tree(start, view_start=0.5, **options):
        views = {"name": "local", "count": 3, "max_tokens": 4, "start": view_start}
        views["augment"] = [
            {"class_path": "torchvision.transforms.v2.RandomResizedCrop", "init_args": {"size": [16, 16]}}
        ]
        changed = config(trainer__max_steps=4, data__steps_per_epoch=2, **options)
        late = {"class_path": "late_head.Late", "init_args": {"task": "contrastive", "name": "late", "start": start}}
        changed["model"]["heads"].append(late)
        changed["data"]["overrides"] = [{"task": "contrastive", "views": [views]}]
        return changed

    return tree


def weights(folder):
    return torch.load(folder / "runs" / "experiment" / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
def test_a_head_begins_at_its_step_and_a_resumed_run_with_it(tmp_path, late_head):
    """Killed (here: ended) before, at and behind the border; bit-equal to the run that was not."""
    whole, parts = tmp_path / "whole", [tmp_path / str(i) for i in (1, 2, 3)]
    for folder in (whole, *parts):
        folder.mkdir()
    assert fit(whole, late_head(0.5)) == 0
    state = weights(whole)["state_dict"]
    assert state["heads.late.calls"].tolist() == [1, 2, 1]
    assert not torch.equal(state["heads.late.scale"], torch.ones(2, 2))
    for number, folder in enumerate(parts, 1):
        tree = late_head(2, 2)  # the same step, as the run's length changes here
        tree["trainer"]["max_steps"] = 4
        stop = {"class_path": "experiments_stop.Stop", "init_args": {"step": number}}
        (tmp_path / "experiments_stop.py").write_text(STOP)
        assert fit(folder, tree | {"trainer": tree["trainer"] | {"callbacks": [stop]}}) == 0
        assert weights(folder)["global_step"] == number
        begun = weights(folder)["state_dict"]
        assert torch.equal(begun["heads.late.scale"], torch.ones(2, 2)) == (number < 3)  # nor did it decay before
        last = folder / "runs" / "experiment" / "checkpoints" / "last.ckpt"
        assert fit(folder, tree, "--ckpt_path", str(last)) == 0
        resumed = weights(folder)["state_dict"]
        assert all(torch.equal(resumed[name], value) for name, value in state.items())


STOP = """
from lightning import Callback

class Stop(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.should_stop = True
"""


@pytest.mark.parametrize(
    ("start", "view_start", "words"),
    [
        (4, 4, "heads.late.start: 4 is beyond the last of the run's 4 steps"),
        (1000, 0.25, "heads.late.start: 1000 is beyond the last of the run's 4 steps"),  # not that the two differ
        (0.25, 0.5, "'local' has start 0.5; expected heads.late.start 0.25"),
    ],
)
def test_starts_that_cannot_be_are_one_line_before_training(tmp_path, late_head, capsys, start, view_start, words):
    assert fit(tmp_path, late_head(start, view_start)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("indiclip:")]
    assert words in line


def test_what_is_wrong_with_a_view_that_begins_late_is_said_before_training(tmp_path, late_head, capsys):
    tree = late_head(0.5)
    floats = {"class_path": "torchvision.transforms.v2.Normalize", "init_args": {"mean": [0.0], "std": [1.0]}}
    tree["data"]["overrides"][0]["views"][0]["augment"] = [floats]
    assert fit(tmp_path, tree) == 2
    assert "data.train[0]: TypeError: Input tensor should be a float tensor" in capsys.readouterr().err


def test_a_head_without_its_views_is_one_line(tmp_path, late_head, capsys):
    tree = late_head(0.5)
    del tree["data"]["overrides"]
    assert fit(tmp_path, tree) == 2
    assert "data.train[0].views: late reads 'local'; found no such view" in capsys.readouterr().err
