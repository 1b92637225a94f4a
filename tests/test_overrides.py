"""What stacked configs change in the sources of a task: all of them count, in any order, or one line says why not."""

from dataclasses import fields, replace
from itertools import permutations

import pytest
from torchvision.transforms import v2

from indiclip.commands.config_samples import build_config
from indiclip.generated.mela import Mela
from indiclip.loading.mixing import Mix
from indiclip.loading.overrides import SourceOverride, overridden
from indiclip.loading.source import Source
from indiclip.loading.stages import Stage
from indiclip.loading.teacher_options import TeacherCache
from indiclip.loading.views import View
from indiclip.training.config_errors import one_line

FLIP, GREY = v2.RandomHorizontalFlip(), v2.RandomGrayscale()
# Two values of each option that takes the place of the source's own.
APART = {
    "teachers": (TeacherCache("a"), TeacherCache("b")),
    "samples": (3, 5),
    "mix": (Mix(mixup=0.2), Mix(mixup=0.5)),
    "batch_size": (2, 4),
    "every": (2, 3),
    "max_tokens": (9, 4),
    "drop": (0.5, 0.0),
    "stages": ([Stage(0.5, max_tokens=4)], [Stage(0.8, max_tokens=4)]),
}


def source(**options):
    return Source("contrastive", Mela(num_scenes=12, size=32, layout="single"), 4, max_tokens=16, **options)


def test_lists_are_added_and_all_else_replaced():
    override = SourceOverride("contrastive", augment=[GREY], drop=0.5, views=[View("local")])
    (found,) = overridden([source(augment=[FLIP])], [override])
    assert (found.augment, found.drop, found.batch_size) == ([FLIP, GREY], 0.5, 4)
    assert [view.name for view in found.views] == ["local"]
    assert found.transform.augment == [FLIP, GREY]
    for of_source, of_override, left in ((3, 2, 2), (2, 5, 5), (5, None, 5)):
        (found,) = overridden([source(samples=of_source)], [SourceOverride("contrastive", samples=of_override)])
        assert len(found.dataset) == left
    with pytest.raises(ValueError, match=r"data.overrides\[0\].task: no source .* 'contrastve'; nearest .*contrastive"):
        overridden([source()], [SourceOverride("contrastve")])


def test_several_of_one_task_count_all_in_any_order():
    """Also the number of samples, where another override has made the source anew before."""
    parts = [{"samples": 5}, {"drop": 0.5, "augment": [GREY]}, {"every": 2, "drop": 0.5}]
    for order in permutations(parts):
        overrides = [SourceOverride("contrastive", **options) for options in order]
        of_task, other = overridden([source(samples=3), replace(source(), task="other")], overrides)
        assert (len(of_task.dataset), of_task.drop, of_task.every, of_task.augment) == (5, 0.5, 2, [GREY])
        assert (len(other.dataset), other.drop, other.every) == (12, 0.0, 1)


REPLACING = [field.name for field in fields(SourceOverride) if field.name not in ("task", "augment", "views")]


@pytest.mark.parametrize("name", REPLACING)
def test_two_that_want_an_option_differently_are_one_line(name):
    overrides = [SourceOverride("contrastive", **{name: value}) for value in APART[name]]
    expected = rf"data.overrides\[1\].{name}: found .*, and data.overrides\[0\].{name} of the same task 'contrastive'"
    with pytest.raises(ValueError, match=expected):
        overridden([source()], overrides)
    assert getattr(overridden([source()], overrides[:1] * 2)[0], name) == APART[name][0]


def stacked(*methods, words=()):
    files = ["conf/quickstart.yaml", *(f"methods/{name}" for name in methods)]
    return build_config([*(word for file in files for word in ("--config", file)), *words])[1].train[0]


def test_a_folder_of_teachers_that_is_named_must_be_there(tmp_path):
    """A page's `make` does not make it; that of its own folder, it may."""
    words = ["--config", "conf/quickstart.yaml", "--config", "methods/distillation", "--data.overrides.teachers"]
    cache = build_config([*words, f"{{folder: {tmp_path / 'cach'}}}"])[1].train[0].teachers
    (tmp_path / "cache").mkdir()
    with pytest.raises(FileNotFoundError, match=r"x.teachers.folder: .* is no folder; nearest is 'cache'; expected"):
        cache.check_folder("x")
    assert build_config([*words[:-1]])[1].train[0].teachers.folder is None
    cache = build_config([*words[:-1], "--data.overrides.teachers.make.folder", str(tmp_path / "new")])
    cache = cache[1].train[0].teachers
    assert (cache.path, cache.make.models) == (tmp_path / "new", ["initial"])
    cache.check_folder("x")


@pytest.mark.parametrize(
    ("texts", "expected"), [("english", "the code en"), ("hindi", "the code hi"), ("x", "own, or")]
)
def test_the_language_of_teachers_is_a_code(texts, expected):
    with pytest.raises(ValueError, match=f"teachers.texts: found '{texts}'; expected {expected}"):
        TeacherCache("a", texts=texts)


def test_an_option_within_an_override_names_its_own_key():
    with pytest.raises(ValueError, match="make.views") as found:
        stacked("distillation", words=["--data.overrides.teachers.make.views", "0"])
    assert one_line(found.value) == "data: teachers.make.views: found 0; expected a whole number from 1"


@pytest.mark.parametrize("methods", [("mixup", "cutmix"), ("cutmix", "mixup")])
def test_mixup_and_cutmix_stack(methods):
    assert stacked(*methods).mix == Mix(mixup=0.2, cutmix=1.0)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (("mixup", "augreg_medium2"), r"overrides\[1\].mix: found Mix\(mixup=0.5, .*\[0\].mix .* is Mix\(mixup=0.2"),
        (
            ("augreg_light1", "augreg_strong2"),
            r"overrides\[1\].augment: found a RandAugment behind .*overrides\[0\].aug",
        ),
        (
            ("augreg_light1", "augreg_light1"),
            r"overrides\[1\].augment: found a RandAugment behind .*overrides\[0\].aug",
        ),
    ],
)
def test_two_levels_of_one_augmentation_do_not(methods, words):
    with pytest.raises(ValueError, match=words):
        stacked(*methods)
