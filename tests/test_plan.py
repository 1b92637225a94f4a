"""Which samples make step k: a pure function, every sample once an epoch, the same for any number of ranks."""

import pickle
from collections import Counter

import numpy as np
import pytest

from indiclip.datasets.base import SampleDataset
from indiclip.images import UnreadableSample
from indiclip.loading.plan import BatchSpec, Plan, SampleRef, SourceInfo, apportion
from indiclip.loading.source import Source, TokenCounts
from indiclip.loading.steps import Steps
from indiclip.patches import fit_hw
from indiclip.types import Sample


def plan(sizes, weights, batch_size, seed=0, task="t", shuffle=True):
    return Plan(task, [SourceInfo(size) for size in sizes], weights, BatchSpec(batch_size), seed, shuffle)


class Lengths:
    """Tokens of each sample; a class, so that it can be pickled."""

    def __init__(self, lengths) -> None:
        self.lengths = np.asarray(lengths)

    def __call__(self, indices):
        return self.lengths[indices]


def test_a_step_is_the_same_in_any_order_of_asking_and_in_another_process():
    def make():
        lengths = Lengths(np.random.default_rng(0).integers(1, 9, 50))
        sources = [SourceInfo(50, [0, 10, 31, 50], lengths), SourceInfo(7)]
        return [
            Plan("detection", sources, [3, 1], BatchSpec(8), seed=5, window=2),
            Plan("detection", sources, [3, 1], BatchSpec(2, 24, 8), seed=5, window=2),
        ]

    for forward, other in zip(make(), pickle.loads(pickle.dumps(make())), strict=True):
        steps = [forward.batch(step) for step in range(60)]
        for step in np.random.default_rng(0).permutation(60):
            assert other.batch(int(step)) == steps[step]
        assert pickle.loads(pickle.dumps(forward)).batch(39) == steps[39]  # also with an order at hand


def test_the_first_steps_are_those_of_earlier_releases():
    # A change here would give every running experiment another order when it resumes.
    contrastive = plan([10], [1.0], 4, task="contrastive")
    assert [place.index for place in contrastive.batch(0)] == [1, 4, 5, 8]
    assert [place.index for place in contrastive.batch(9)] == [3, 8, 1, 9]


@pytest.mark.parametrize(("sizes", "batch"), [([12], 4), ([10], 4), ([3], 8), ([64, 10, 5], 7)])
def test_every_sample_comes_exactly_once_in_an_epoch_of_its_source(sizes, batch):
    many = plan(sizes, [1.0] * len(sizes), batch, seed=1)
    places = [place for step in range(90) for place in many.batch(step)]
    for source, size in enumerate(sizes):
        mine = sorted((place for place in places if place.source == source), key=lambda place: place.position)
        whole = len(mine) // size - 1  # the newest batches of the last epoch may not have come yet
        epochs = [mine[epoch * size : (epoch + 1) * size] for epoch in range(whole)]
        assert len(epochs) >= 2
        orders = [tuple(place.index for place in epoch) for epoch in epochs]
        assert all(sorted(order) == list(range(size)) for order in orders)
        assert size < 10 or len(set(orders)) == len(orders)  # shuffled anew; small sources repeat one by chance


def random_case(rng):
    """A source of shards of any sizes, with images of any lengths, and a budget."""
    shards = rng.integers(0, 40, rng.integers(1, 12))
    size = max(1, int(shards.sum()))
    starts = np.minimum(np.cumsum([0, *shards]), size).tolist()
    starts[-1] = size
    max_tokens, multiple = int(rng.integers(1, 30)), int(rng.choice([1, 2, 4, 8]))
    lengths = Lengths(rng.integers(1, max_tokens + 1, size))
    tokens = int(multiple * max_tokens * rng.choice([1, 1.5, 3, 10]))
    samples = SourceInfo(size, starts if rng.random() < 0.8 else None, lengths if rng.random() < 0.8 else None)
    return samples, BatchSpec(multiple, tokens, max_tokens), int(rng.integers(1, 6))


@pytest.mark.parametrize("case", range(60))
def test_token_budgets_hold_and_no_sample_is_lost_or_repeated(case):
    rng = np.random.default_rng(case)
    samples, budget, window = random_case(rng)
    many = Plan("t", [samples], [1.0], budget, case, window=window)
    batches = [many.batch(step) for step in range(4 * many.steps_per_epoch + 20)]
    for batch in batches:
        longest = budget.max_tokens
        if samples.lengths:
            longest = samples.lengths(np.array([place.index for place in batch])).max()
        assert len(batch) * longest <= budget.tokens
        assert len(batch) % budget.samples == 0
        assert len(batch) > 0
    places = sorted((place for batch in batches for place in batch), key=lambda place: place.position)
    whole = places[-1].position // samples.size - 1
    for epoch in range(whole):
        mine = places[epoch * samples.size : (epoch + 1) * samples.size]
        assert [place.position for place in mine] == list(range(epoch * samples.size, (epoch + 1) * samples.size))
        assert sorted(place.index for place in mine) == list(range(samples.size))
    assert whole >= 1


def padding(plan, lengths, grouped=True):
    """Share of the tokens that are padding, and each batch's tokens, over an epoch."""
    used, padded, rng = 0, [], np.random.default_rng(1)
    for step in range(plan.steps_per_epoch):
        tokens = np.array([lengths[place.source].lengths[place.index] for place in plan.batch(step)])
        if not grouped:  # as many images of the source that has its turn, whatever their lengths
            tokens = rng.choice(lengths[plan.batch(step)[0].source].lengths, len(tokens))
        used += tokens.sum()
        padded.append(tokens.max() * len(tokens))
    return 1 - used / sum(padded), padded


@pytest.mark.parametrize("num_sources", [1, 2])
def test_mixed_aspects_are_hardly_padded_and_the_budget_is_used(num_sources):
    """Of a source with all lengths, and of one with long images beside one with short ones."""
    rng = np.random.default_rng(0)
    sources, lengths = [], []
    for low, high in [(40, 700)] if num_sources == 1 else [(120, 700), (30, 300)]:
        sizes = rng.integers(low, high, (10_000, 2))  # aspects from 1:17 to 17:1
        count = TokenCounts(sizes, 16, 256)
        tokens = count(np.arange(len(sizes)))
        assert tokens.tolist()[:50] == [np.prod(fit_hw(h, w, 16, 256)) // 256 for h, w in sizes[:50].tolist()]
        sources.append(SourceInfo(len(sizes), np.arange(0, 10_001, 250), count))
        lengths.append(Lengths(tokens))
    budget = BatchSpec(8, 64 * 256, 256)
    for chosen in (budget, BatchSpec(64)) if num_sources == 1 else (budget,):
        plan = Plan("t", sources, [1.0] * num_sources, chosen, 0)
        share, batches = padding(plan, lengths)
        assert share < 0.04  # the aim is 0.10
        assert padding(plan, lengths, grouped=False)[0] > 0.10
        if chosen is budget:
            assert np.mean(batches) > 0.95 * budget.tokens


def test_sources_of_different_lengths_need_a_token_budget():
    """With a fixed size each step has images of both."""
    lengths = [Lengths(np.full(640, 256)), Lengths(np.full(640, 16))]
    sources = [SourceInfo(640, None, each) for each in lengths]
    assert padding(Plan("t", sources, [1, 1], BatchSpec(64), 0), lengths)[0] > 0.4
    assert padding(Plan("t", sources, [1, 1], BatchSpec(8, 64 * 256, 256), 0), lengths)[0] == 0


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_source_smaller_than_batch_multiple_is_trained_on(size):
    many = Plan("t", [SourceInfo(size)], [1.0], BatchSpec(8, 64, 4), 0)
    assert many.steps_per_epoch == 1
    assert {place.index for place in many.batch(0)} == set(range(size))
    assert len(many.batch(0)) == 8


def test_a_fixed_size_backbone_has_the_tokens_of_its_canvas():
    """Its images fill the canvas whatever `max_tokens` says."""
    source = Source("t", Numbers("a", 64), batch_tokens=640, batch_multiple=2, max_tokens=4)
    canvas = Steps([source], 0, 8, (32, 64), train=True)
    assert sorted(len(canvas[step]["t"]["keys"]) for step in range(4)) == [4, 20, 20, 20]  # of 4 x 8 tokens
    assert len(Steps([source], 0, 8, None, train=True)[0]["t"]["keys"]) == 64
    with pytest.raises(
        ValueError, match=r"batch_tokens 640 .* hold 2 images \(batch_multiple\) of 512 tokens \(canvas_hw"
    ):
        Steps([source], 0, 8, (128, 256), train=True)


def test_a_window_bounds_the_shards_that_are_read_at_a_time():
    samples = SourceInfo(1000, list(range(0, 1001, 10)))
    many = Plan("t", [samples], [1.0], BatchSpec(20), 0, window=4)
    shards = [{place.index // 10 for place in many.batch(step)} for step in range(50)]
    for first in range(0, 48, 2):  # two batches are a window of 40 samples
        assert len(shards[first] | shards[first + 1]) <= 4
    orders = [tuple(place.index for place in many.batch(step)) for step in (0, 1)]
    assert all(sorted(order) != list(order) for order in orders)
    assert len(set.union(*shards)) == 100


def test_sources_with_a_token_budget_take_turns_by_their_weights():
    sources = [SourceInfo(90), SourceInfo(60), SourceInfo(30)]
    many = Plan("t", sources, [5, 3, 2], BatchSpec(2, 8, 2), 0)
    of_step = [{place.source for place in many.batch(step)} for step in range(400)]
    assert all(len(found) == 1 for found in of_step)
    assert Counter(source for found in of_step for source in found) == {0: 200, 1: 120, 2: 80}
    for first in range(0, 400, 10):
        assert Counter(source for found in of_step[first : first + 10] for source in found) == {0: 5, 1: 3, 2: 2}
    for source, size in enumerate((90, 60, 30)):
        seen = [place.index for step in range(400) for place in many.batch(step) if place.source == source]
        assert sorted(seen[:size]) == list(range(size))
    assert many.steps_per_epoch == 50  # the second source's 15 batches, 30 in a hundred


def test_a_budget_that_holds_no_batch_is_said():
    with pytest.raises(
        ValueError, match=r"batch_tokens 100 of task 't' does not hold 8 images \(batch_multiple\) of 16"
    ):
        Plan("t", [SourceInfo(10)], [1.0], BatchSpec(8, 100, 16), 0)
    with pytest.raises(ValueError, match="source 1 of task 't' gets no sample in 100 steps; raise its weight"):
        Plan("t", [SourceInfo(10), SourceInfo(10)], [1000, 1], BatchSpec(8, 1000, 16), 0)
    with pytest.raises(ValueError, match="task 't' needs one of batch_size and batch_tokens"):
        Source("t", Numbers("a", 3))
    with pytest.raises(ValueError, match="batch_tokens of task 't' is 0; expected 1 or more"):
        Source("t", Numbers("a", 3), batch_tokens=0)


def test_held_out_samples_come_once_in_order_with_a_token_budget_too():
    many = Plan("t", [SourceInfo(21, None, Lengths(np.full(21, 3)))], [1.0], BatchSpec(2, 30, 5), 0, shuffle=False)
    steps = [many.pass_through(step) for step in range(many.steps_per_epoch)]
    assert [len(step) for step in steps] == [6, 6, 6, 3]
    assert [place.index for step in steps for place in step] == list(range(21))


class Numbers(SampleDataset):
    """Sample i is a grey image with the key `<name><i>`; those of `torn` cannot be read."""

    def __init__(self, name: str, length: int, torn: tuple[int, ...] = ()) -> None:
        self.name, self.length, self.torn = name, length, torn

    def __len__(self) -> int:
        return self.length

    def key(self, index):
        return f"{self.name}{index}"

    def __getitem__(self, index: int) -> Sample:
        if index in self.torn:
            raise UnreadableSample(f"{self.name}{index}", "torn")
        return Sample(image=np.full((8, 8, 3), index, np.uint8), key=f"{self.name}{index}")


def keys_of(sources: list[Source], train: bool, step: int, rank: int = 0, world: int = 1) -> list[str]:
    batches = Steps(sources, 5, 8, None, train, rank, world)[step]
    return batches["t"]["keys"] if batches else []


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("train", [True, False])
def test_ranks_share_one_global_batch_whatever_their_number(world, train):
    """In training evenly; a held-out part may leave a rank less, or nothing."""
    sources = [Source("t", Numbers("a", 13), 12, 2.0), Source("t", Numbers("b", 6), 12, 1.0)]
    for step in range(2):
        parts = [keys_of(sources, train, step, rank, world) for rank in range(world)]
        together = [part[i] for i in range(12) for part in parts if i < len(part)]
        assert together == keys_of(sources, train, step)
        assert len({len(part) for part in parts}) == 1 or not train


def test_a_batch_that_ranks_cannot_share_is_said():
    with pytest.raises(
        ValueError, match=r"batch_size 12 of task 't' is over all ranks and must be a multiple of the 5"
    ):
        Steps([Source("t", Numbers("a", 13), 12)], 0, 8, None, True, 0, 5)
    with pytest.raises(ValueError, match=r"sources of task 't' differ in batch_size"):
        Steps([Source("t", Numbers("a", 13), 12), Source("t", Numbers("b", 13), 6)], 0, 8, None, True)


def test_an_unreadable_sample_is_replaced_in_training_and_counted():
    steps = Steps([Source("t", Numbers("a", 6, torn=(1, 2)), 6)], 0, 8, None, True)
    batch = steps[0]["t"]
    assert sorted(batch["keys"]) == ["a0", "a3", "a3", "a3", "a4", "a5"]
    assert sorted(found.key for found in batch["quarantined"]) == ["a1", "a2", "a2"]
    with pytest.raises(
        ValueError, match=r"data: 3 samples in a row of task 't' are unreadable, the last one a\d: torn"
    ):
        Steps([Source("t", Numbers("a", 3, torn=(0, 1, 2)), 3)], 0, 8, None, True)[0]


def test_a_held_out_step_without_a_readable_sample_is_counted_with_the_next():
    steps = Steps([Source("t", Numbers("a", 3, torn=(1,)), 1)], 0, 8, None, False)
    with pytest.warns(UserWarning, match="nothing in held-out step 1 is readable"):
        assert [steps[i].keys() for i in range(2)] == [{"t"}, set()]
    assert steps[2]["t"]["quarantined"] == [("t", "a1", "", "torn")]


def test_seeds_and_tasks_have_orders_of_their_own():
    orders = [
        [p.index for p in plan([1000], [1.0], 1000, seed, task).batch(0)]
        for task, seed in (("a", 0), ("a", 1), ("b", 0))
    ]
    assert all((np.array(orders[i]) == orders[j]).mean() < 0.02 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_every_batch_has_the_sources_in_their_proportion():
    many = plan([1000, 1000, 1000], [0.5, 0.3, 0.2], 20)
    assert many.counts == [10, 6, 4]
    for step in (0, 7, 1000):
        assert Counter(place.source for place in many.batch(step)) == {0: 10, 1: 6, 2: 4}


def test_an_epoch_ends_with_the_source_that_takes_longest():
    assert plan([100, 10], [1, 1], 8).steps_per_epoch == 25
    assert plan([101], [1], 8).steps_per_epoch == 13


def test_validation_goes_through_everything_once_in_order():
    held_out = plan([5, 9], [1, 1], 4, seed=3, shuffle=False)
    steps = [held_out.pass_through(step) for step in range(held_out.steps_per_epoch + 2)]
    assert [place.index for step in steps for place in step if place.source == 0] == list(range(5))
    assert [place.index for step in steps for place in step if place.source == 1] == list(range(9))
    assert steps[3] == [SampleRef(1, 6, 6), SampleRef(1, 7, 7)]
    assert steps[5:] == [[], []]


def test_apportion_is_exact_and_fair():
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(7, [0.1, 0.2, 0.7]) == [1, 1, 5]
    rng = np.random.default_rng(0)
    for _ in range(500):
        total, weights = int(rng.integers(1, 500)), rng.uniform(0.01, 10, rng.integers(1, 9))
        counts = apportion(total, weights.tolist())
        assert sum(counts) == total
        assert (abs(np.array(counts) - total * weights / weights.sum()) < 1).all()


def test_bad_sources_are_named():
    with pytest.raises(ValueError, match="source 1 of task 'detection' has no samples"):
        plan([10, 0], [1, 1], 8, task="detection")
    with pytest.raises(
        ValueError, match="source 1 of task 'detection' gets no sample in a batch of 4; raise its weight"
    ):
        plan([10, 10], [100, 1], 4, task="detection")
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"source 0 of task 't' has weight {weight}; expected more than 0"):
            plan([10, 10], [weight, 1], 4)
