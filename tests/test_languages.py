"""Which of an image's captions is drawn: fair, the same for any workers, ranks and restarts, and free of the crops."""

import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indiclip.datasets.base import SampleDataset
from indiclip.datasets.languages import caption_language, draw_caption, language_tag
from indiclip.datasets.split import Split
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.preprocessing import Preprocessing
from indiclip.types import Sample

LANGUAGES = ("en", "hi", "ta", "sat-Olck")
WITHOUT = {"sat-Olck": 3, "ta": 5}  # every so-manieth image lacks a caption in it


class Captioned(SampleDataset):
    """Images with captions in four languages; some of them lack one, image 7 has none but a caption of its own."""

    def __init__(self, size=30):
        self.size = size

    def __len__(self):
        return self.size

    def key(self, index):
        return f"i{index}"

    def captions(self, index):
        return {name: [f"{name} {index}"] for name in LANGUAGES if index % WITHOUT.get(name, 1000) or not index}

    def __getitem__(self, index):
        sample = Sample(image=np.zeros((8, 8, 3), np.uint8), key=self.key(index))
        return sample | ({"caption": "own"} if index == 7 else {"captions": self.captions(index)})


def drawn(steps, first, last):
    """(key, language, caption) of every sample of some steps."""
    rows = []
    for step in range(first, last):
        batch = steps[step]["t"]
        targets = batch["targets"]
        rows += zip(batch["keys"], targets["language"], targets["caption"], strict=True)
    return rows


@pytest.mark.parametrize("batch", [{"batch_size": 10}, {"batch_tokens": 10, "batch_multiple": 2, "max_tokens": 1}])
def test_in_as_many_epochs_as_it_has_languages_an_image_is_seen_once_in_each(batch):
    steps, data = Steps([Source("t", Captioned(), **batch)], 3, Preprocessing(8), train=True), Captioned()
    seen = {}
    for key, language, caption in drawn(steps, 0, 3 * 12):  # three steps are an epoch
        assert caption == (f"{language} {key[1:]}" if language else "own")
        seen.setdefault(key, []).append(language)
    for i in range(30):
        if i == 7:
            assert seen["i7"] == [None] * 12
            continue
        languages = sorted(data.captions(i))
        n = len(languages)
        rounds = [seen[f"i{i}"][first : first + n] for first in range(0, 12, n)]
        assert all(sorted(one) == languages for one in rounds)
    assert len({tuple(seen[f"i{i}"][:2]) for i in range(30)}) > 6  # the images do not go through them in step
    assert any(seen[f"i{i}"][:4] != seen[f"i{i}"][4:8] for i in (1, 2, 4))  # nor an image always in the same order


def test_shares_of_one_epoch_and_of_all_are_even():
    """2,000 images with four captions, of which most are seen once."""
    captions = {name: [name] for name in LANGUAGES}
    images = [Sample(key=str(i), captions=captions) for i in range(2000)]
    for epoch in (0, 5):
        counts = Counter(draw_caption(image, f"s:{image['key']}", epoch)["language"] for image in images)
        assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts.values())
    assert len(counts) == 4


def test_no_language_sees_other_crops():
    """Every bit of the augmentation's seed is set as often in one language as in another."""
    seeds, languages = [], []
    steps = Steps([Source("t", Captioned(2000), 100)], 3, Preprocessing(8), train=True)
    for place in [place for step in range(20) for place in steps.plans["t"].batch(step)]:
        if place.index % 15 and place.index != 7:
            seeds.append(zlib.crc32(repr((3, "t", place)).encode()))
            languages.append(steps.read("t", place)["language"])
    bits = np.array(seeds)[:, None] >> np.arange(32) & 1
    of_hindi = np.array(languages) == "hi"
    apart = bits[of_hindi].mean(0) - bits[~of_hindi].mean(0)
    # Two means of a coin's tosses: 5 standard deviations, of 32 pairs
    assert np.abs(apart).max() < 5 * 0.5 * (1 / of_hindi.sum() + 1 / (~of_hindi).sum()) ** 0.5


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_draw_is_the_same_with_any_workers_ranks_and_after_a_restart():
    sources = [Source("t", Captioned(), 10)]
    whole = drawn(Steps(sources, 3, Preprocessing(8), train=True), 0, 20)
    for num_workers in (0, 2):
        data = MultiTaskData(sources, seed=3, num_workers=num_workers, steps_per_epoch=20, patch_size=8)
        batches = [{i: step} for i, step in enumerate(data.train_dataloader())]
        assert [row for i, step in enumerate(batches) for row in drawn(step, i, i + 1)] == whole
    ranks = [Steps(sources, 3, Preprocessing(8), True, rank, 2) for rank in range(2)]
    parts = [[drawn(rank, step, step + 1) for step in range(20)] for rank in ranks]
    assert [row for pair in zip(*parts, strict=True) for rows in zip(*pair, strict=True) for row in rows] == whole
    # 70 samples on, in the midst of an epoch, by objects that have read nothing before
    assert drawn(Steps(sources, 3, Preprocessing(8), train=True), 7, 20) == whole[70:]
    other = drawn(Steps(sources, 4, Preprocessing(8), train=True), 0, 3)  # another seed, an epoch
    assert set(other) != set(whole[:30])


def test_the_plan_and_the_augmentation_are_those_without_captions():
    """What is drawn for the languages takes nothing from what is drawn for the crops."""
    from torchvision.transforms import v2

    class Plain(Captioned):
        def __getitem__(self, index):
            noise = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            return super().__getitem__(index) | {"image": noise}

    class Uncaptioned(Plain):
        def __getitem__(self, index):
            return {k: v for k, v in super().__getitem__(index).items() if k in ("image", "key")}

    augment = [v2.RandomResizedCrop([16, 16]), v2.ColorJitter(0.4)]
    ours, theirs = (
        Steps([Source("t", data, 10, augment=augment)], 3, Preprocessing(8), train=True)
        for data in (Plain(), Uncaptioned())
    )
    for step in (0, 4):
        a, b = ours[step]["t"], theirs[step]["t"]
        assert a["keys"] == b["keys"]
        assert (a["images"]["patches_BNP"] == b["images"]["patches_BNP"]).all()


def test_held_out_images_keep_all_captions_and_draw_one_by_their_key():
    steps = Steps([Source("t", Split(Captioned(200), "val"), 10)], 3, Preprocessing(8), train=False)
    other = Steps([Source("t", Split(Captioned(100), "val"), 7)], 5, Preprocessing(8), train=False)
    batch = steps[0]["t"]
    assert batch["targets"]["captions"] == [Captioned().captions(int(key[1:])) for key in batch["keys"]]
    # Another seed of the run, other batches and less data change nothing.
    few, many = drawn(other, 0, 2), dict.fromkeys(drawn(steps, 0, 3))
    assert set(few) <= set(many)
    assert {language for _, language, _ in many} == set(LANGUAGES)


def test_training_batches_carry_one_caption_each():
    batch = Steps([Source("t", Captioned(), 10)], 3, Preprocessing(8), train=True)[0]["t"]
    assert "captions" not in batch["targets"]


def test_an_added_language_moves_only_the_images_that_get_it():
    for i in range(200):
        three = draw_caption(Sample(key="", captions={name: ["x"] for name in LANGUAGES[:3]}), f"{i}")
        four = draw_caption(Sample(key="", captions={name: ["x"] for name in LANGUAGES}), f"{i}")
        assert four["language"] in (three["language"], "sat-Olck")


def test_a_sample_is_left_as_it_is():
    sample = Sample(key="a", captions={"en": ["x"]})
    assert draw_caption(sample, "s") == {"key": "a", "captions": {"en": ["x"]}, "caption": "x", "language": "en"}
    assert sample == {"key": "a", "captions": {"en": ["x"]}}
    plain = Sample(key="a", caption="x")
    assert draw_caption(plain, "s") is plain


CAPTIONS = st.dictionaries(
    st.sampled_from(["", *LANGUAGES]), st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True), min_size=1
)


@settings(deadline=None)
@given(CAPTIONS, st.text())
def test_languages_take_turns_and_within_a_language_its_texts(captions, stream):
    """In each round every language once; in as many rounds as a language has texts, each of them once."""
    size, longest = len(captions), max(map(len, captions.values()))
    drawn = [draw_caption(Sample(key="a", captions=captions), stream, epoch) for epoch in range(size * longest)]
    for first in range(0, len(drawn), size):
        assert sorted(one.get("language", "") for one in drawn[first : first + size]) == sorted(captions)
    for language, texts in captions.items():
        seen = [one["caption"] for one in drawn if one.get("language", "") == language]
        assert sorted(seen[: len(texts)]) == sorted(texts)


@settings(deadline=None)
@given(st.sets(st.sampled_from(LANGUAGES), min_size=1), st.text(), st.integers(0, 50))
def test_the_language_that_is_drawn_does_not_depend_on_how_many_texts_it_has(languages, stream, epoch):
    one, many = (Sample(key="a", captions=dict.fromkeys(languages, texts)) for texts in (["x"], ["x", "y", "z"]))
    assert draw_caption(one, stream, epoch)["language"] == draw_caption(many, stream, epoch)["language"]


def test_an_unknown_language_is_none():
    assert draw_caption(Sample(key="a", captions={"": ["x"]}), "s") == {
        "key": "a", "captions": {"": ["x"]}, "caption": "x"
    }  # fmt: skip


def test_what_a_language_is_called():
    tags = {
        "hi": "hi",
        "hi-latn": "hi-Latn",
        "ta_IN": "ta-IN",
        "Tamil": "ta",
        "தமிழ்": "ta",
        "Bengali": "bn",
        "hin": "hi",
    }
    tags |= dict.fromkeys(("", "h", "Hindi or so", "a/b", "हि", "Male", "caption", "und", "x-a", "file", "A"), "")
    tags |= {"zh-Hant-TW": "zh-Hant-TW", "sat-Olck": "sat-Olck", "key": "key"}
    assert {name: language_tag(name) for name in tags} == tags
    columns = {"en": "en", "brx": "brx", "sa": "sa", "Tamil": "ta", "en-IN": "en-IN", "bho": "bho", "id-ID": "id-ID"}
    others = "url key is tag row alt file text id ID Id no No min Min new ms MS cat bin sid may sun war kg ts run"
    columns |= dict.fromkeys(others.split(), "")
    assert {name: caption_language(name) for name in columns} == columns
