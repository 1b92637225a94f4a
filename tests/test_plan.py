"""Which samples make step k: a pure function, every sample once an epoch, the same for any number of ranks."""

import pickle
import tracemalloc
import zlib
from collections import Counter

import numpy as np
import pytest

from indiclip.datasets.base import SampleDataset
from indiclip.images import UnreadableSample
from indiclip.loading import sampler
from indiclip.loading.plan import Plan, SampleRef, apportion
from indiclip.loading.sampler import BatchSpec, SourceInfo, scatter
from indiclip.loading.source import Source, TokenCounts
from indiclip.loading.steps import Steps
from indiclip.preprocessing import Preprocessing
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
    assert [ref.index for ref in contrastive.batch(0)] == [1, 4, 5, 8]
    assert [ref.index for ref in contrastive.batch(9)] == [3, 8, 1, 9]


def test_orders_by_length_are_those_of_earlier_releases():
    """A checksum of many steps, made when grouping by length was the only order."""
    rng, found = np.random.default_rng(7), []
    for case in range(12):
        shards = rng.integers(0, 40, rng.integers(1, 12))
        size = max(1, int(shards.sum()))
        starts = np.minimum(np.cumsum([0, *shards]), size).tolist()
        sources = [
            SourceInfo(size, starts, Lengths(rng.integers(1, 20, size))),
            SourceInfo(50, None, Lengths(np.arange(50) % 7 + 1)),
        ]
        for spec in (BatchSpec(8), BatchSpec(2, 80, 20), BatchSpec(4, 200, 20)):
            many = Plan("t", sources, [2, 1], spec, case, window=3)
            steps = [(*map(tuple, many.batch(step)), many.next_shards(step)) for step in range(40)]
            found.append((many.steps_per_epoch, steps))
    assert zlib.crc32(repr(found).encode()) == 1672843667


@pytest.mark.parametrize(("sizes", "batch"), [([12], 4), ([10], 4), ([3], 8), ([64, 10, 5], 7)])
def test_every_sample_comes_exactly_once_in_an_epoch_of_its_source(sizes, batch):
    many = plan(sizes, [1.0] * len(sizes), batch, seed=1)
    refs = [ref for step in range(90) for ref in many.batch(step)]
    for source, size in enumerate(sizes):
        mine = sorted((ref for ref in refs if ref.source == source), key=lambda ref: ref.position)
        whole = len(mine) // size - 1  # the newest batches of the last epoch may not have come yet
        epochs = [mine[epoch * size : (epoch + 1) * size] for epoch in range(whole)]
        assert len(epochs) >= 2
        orders = [tuple(ref.index for ref in epoch) for epoch in epochs]
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
            longest = samples.lengths(np.array([ref.index for ref in batch])).max()
        assert len(batch) * longest <= budget.tokens
        assert len(batch) % budget.samples == 0
        assert len(batch) > 0
    refs = sorted((ref for batch in batches for ref in batch), key=lambda ref: ref.position)
    whole = refs[-1].position // samples.size - 1
    for epoch in range(whole):
        mine = refs[epoch * samples.size : (epoch + 1) * samples.size]
        assert [ref.position for ref in mine] == list(range(epoch * samples.size, (epoch + 1) * samples.size))
        assert sorted(ref.index for ref in mine) == list(range(samples.size))
    assert whole >= 1


def padding(plan, lengths):
    """Share of the tokens that are padding, and each batch's tokens, over an epoch."""
    used, padded = 0, []
    for step in range(plan.steps_per_epoch):
        tokens = np.array([lengths[ref.source].lengths[ref.index] for ref in plan.batch(step)])
        used += tokens.sum()
        padded.append(tokens.max() * len(tokens))
    return 1 - used / sum(padded), padded


@pytest.mark.parametrize("num_sources", [1, 2])
def test_grouped_batches_are_hardly_padded_and_use_the_budget(num_sources):
    """Of a source with all lengths, and of one with long images beside one with short ones."""
    rng = np.random.default_rng(0)
    sources, lengths = [], []
    for low, high in [(40, 700)] if num_sources == 1 else [(120, 700), (30, 300)]:
        sizes = rng.integers(low, high, (10_000, 2))  # aspects from 1:17 to 17:1
        count = TokenCounts(sizes, 16, 256)
        tokens = count(np.arange(len(sizes)))
        assert tokens.tolist()[:50] == [
            np.prod(Preprocessing(16).fit_hw(h, w, 256)) // 256 for h, w in sizes[:50].tolist()
        ]
        sources.append(SourceInfo(len(sizes), np.arange(0, 10_001, 250), count))
        lengths.append(Lengths(tokens))
    spec = BatchSpec(8, 64 * 256, 256)
    mixed = Plan("t", [source._replace(lengths=None) for source in sources], [1.0] * num_sources, spec, 0)
    share, batches = padding(mixed, lengths)
    assert share > 0.10
    assert max(batches) <= spec.tokens
    assert np.mean(batches) > 0.95 * spec.tokens  # some image of a batch is about as long as any
    for chosen in (spec, BatchSpec(64)) if num_sources == 1 else (spec,):
        share, batches = padding(Plan("t", sources, [1.0] * num_sources, chosen, 0), lengths)
        assert share < 0.04  # the aim is 0.10
        if chosen is spec:
            assert np.mean(batches) > 0.95 * spec.tokens


def test_sources_of_different_lengths_need_a_token_budget():
    """With a fixed size each step has images of both."""
    lengths = [Lengths(np.full(640, 256)), Lengths(np.full(640, 16))]
    for grouped in (True, False):
        sources = [SourceInfo(640, None, each if grouped else None, each.lengths[0]) for each in lengths]
        assert padding(Plan("t", sources, [1, 1], BatchSpec(64), 0), lengths)[0] > 0.4
        share = padding(Plan("t", sources, [1, 1], BatchSpec(8, 64 * 256, 256), 0), lengths)[0]
        assert share == 0


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_source_smaller_than_batch_multiple_is_trained_on(size):
    many = Plan("t", [SourceInfo(size)], [1.0], BatchSpec(8, 64, 4), 0)
    assert many.steps_per_epoch == 1
    assert {ref.index for ref in many.batch(0)} == set(range(size))
    assert len(many.batch(0)) == 8


def test_a_fixed_size_backbone_has_the_tokens_of_its_canvas():
    """Its images fill the canvas whatever `max_tokens` says."""
    source = Source("t", Numbers("a", 64), batch_tokens=640, batch_multiple=2, max_tokens=4)
    canvas = Steps([source], 0, Preprocessing(8, (32, 64)), train=True)
    assert [len(canvas[step]["t"]["keys"]) for step in range(4)] == [20] * 4  # of 4 x 8 tokens
    assert len(Steps([source], 0, Preprocessing(8), train=True)[0]["t"]["keys"]) == 64
    with pytest.raises(
        ValueError, match=r"batch_tokens 640 .* hold 2 images \(batch_multiple\) of 512 tokens \(canvas_hw"
    ):
        Steps([source], 0, Preprocessing(8, (128, 256)), train=True)


def test_a_window_bounds_the_shards_that_are_read_at_a_time():
    samples = SourceInfo(1000, list(range(0, 1001, 10)))
    many = Plan("t", [samples], [1.0], BatchSpec(20), 0, window=4)
    shards = [{ref.index // 10 for ref in many.batch(step)} for step in range(50)]
    for first in range(0, 48, 2):  # two batches are a window of 40 samples
        assert len(shards[first] | shards[first + 1]) <= 4
    orders = [tuple(ref.index for ref in many.batch(step)) for step in (0, 1)]
    assert all(sorted(order) != list(order) for order in orders)
    assert len(set.union(*shards)) == 100


def test_sources_with_a_token_budget_take_turns_by_their_weights():
    sources = [SourceInfo(90), SourceInfo(60), SourceInfo(30)]
    many = Plan("t", sources, [5, 3, 2], BatchSpec(2, 8, 2), 0)
    of_step = [{ref.source for ref in many.batch(step)} for step in range(400)]
    assert all(len(found) == 1 for found in of_step)
    assert Counter(source for found in of_step for source in found) == {0: 200, 1: 120, 2: 80}
    for first in range(0, 400, 10):
        assert Counter(source for found in of_step[first : first + 10] for source in found) == {0: 5, 1: 3, 2: 2}
    for source, size in enumerate((90, 60, 30)):
        seen = [ref for step in range(400) for ref in many.batch(step) if ref.source == source]
        seen.sort(key=lambda ref: ref.position)  # the last batch of an epoch may come after the next one's first
        assert sorted(ref.index for ref in seen[:size]) == list(range(size))
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
    with pytest.raises(ValueError, match="batch_tokens of task 't': found 0; expected 1 or more"):
        Source("t", Numbers("a", 3), batch_tokens=0)


def test_held_out_samples_come_once_in_order_with_a_token_budget_too():
    many = Plan("t", [SourceInfo(21, None, Lengths(np.full(21, 3)))], [1.0], BatchSpec(2, 30, 5), 0, shuffle=False)
    steps = [many.batch(step) for step in range(many.steps_per_epoch)]
    assert [len(step) for step in steps] == [6, 6, 6, 3]
    assert [ref.index for step in steps for ref in step] == list(range(21))


class Numbers(SampleDataset):
    """Sample i is a grey image with the key `<name><i>`; those of `torn` cannot be read."""

    def __init__(self, name: str, length: int, torn: tuple[int, ...] = (), sizes_hw: np.ndarray | None = None) -> None:
        self.name, self.length, self.torn, self.sizes_hw = name, length, torn, sizes_hw

    def __len__(self) -> int:
        return self.length

    def key(self, index: int) -> str:
        return f"{self.name}{index}"

    def __getitem__(self, index: int) -> Sample:
        if index in self.torn:
            raise UnreadableSample(f"{self.name}{index}", "torn")
        return Sample(image=np.full((8, 8, 3), index, np.uint8), key=f"{self.name}{index}")


def keys_of(sources: list[Source], train: bool, step: int, rank: int = 0, world: int = 1) -> list[str]:
    batches = Steps(sources, 5, Preprocessing(8), train, rank, world)[step]
    return batches["t"]["keys"] if batches else []


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("train", [True, False])
def test_ranks_share_one_global_batch_whatever_their_number(world, train):
    """In training evenly; a held-out part may leave a rank less, or nothing."""
    sources = [Source("t", Numbers("a", 13), 12, 2.0)]
    if train:  # held-out sources share no batches
        sources.append(Source("t", Numbers("b", 6), 12, 1.0))
    for step in range(2):
        parts = [keys_of(sources, train, step, rank, world) for rank in range(world)]
        together = [part[i] for i in range(12) for part in parts if i < len(part)]
        assert together == keys_of(sources, train, step)
        assert len({len(part) for part in parts}) == 1 or not train


def test_a_batch_that_ranks_cannot_share_is_said():
    with pytest.raises(
        ValueError, match=r"batch_size 12 of task 't' is over all ranks and must be a multiple of the 5"
    ):
        Steps([Source("t", Numbers("a", 13), 12)], 0, Preprocessing(8), True, 0, 5)
    with pytest.raises(ValueError, match=r"'t' differ in batch_size, .* such as 12 samples and 6 samples;"):
        Steps([Source("t", Numbers("a", 13), 12), Source("t", Numbers("b", 13), 6)], 0, Preprocessing(8), True)


def test_an_unreadable_sample_is_replaced_in_training_and_counted():
    steps = Steps([Source("t", Numbers("a", 6, torn=(1, 2)), 6)], 0, Preprocessing(8), True)
    batch = steps[0]["t"]
    assert sorted(batch["keys"]) == ["a0", "a3", "a3", "a3", "a4", "a5"]
    assert sorted(found.key for found in batch["quarantined"]) == ["a1", "a2", "a2"]
    with pytest.raises(
        ValueError, match=r"data: 3 samples in a row of task 't' are unreadable, the last one a\d: torn"
    ):
        Steps([Source("t", Numbers("a", 3, torn=(0, 1, 2)), 3)], 0, Preprocessing(8), True)[0]


def test_a_held_out_step_without_a_readable_sample_counts_what_is_unreadable():
    steps = Steps([Source("t", Numbers("a", 3, torn=(2,)), 1)], 0, Preprocessing(8), False)
    assert [steps[i]["t"]["keys"] for i in range(3)] == [["a0"], ["a1"], []]
    assert [steps[i]["t"]["quarantined"] for i in range(3)] == [[], [], [("t", "a2", "", "torn")]]


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
        assert Counter(ref.source for ref in many.batch(step)) == {0: 10, 1: 6, 2: 4}


def test_an_epoch_ends_with_the_source_that_takes_longest():
    assert plan([100, 10], [1, 1], 8).steps_per_epoch == 25
    assert plan([101], [1], 8).steps_per_epoch == 13


def test_validation_goes_through_everything_once_in_order():
    held_out = plan([5, 9], [1, 1], 4, seed=3, shuffle=False)
    steps = [held_out.batch(step) for step in range(held_out.steps_per_epoch + 2)]
    assert [ref.index for step in steps for ref in step if ref.source == 0] == list(range(5))
    assert [ref.index for step in steps for ref in step if ref.source == 1] == list(range(9))
    assert steps[3] == [SampleRef(1, 6, 6), SampleRef(1, 7, 7)]
    assert steps[5:] == [[], []]


@pytest.mark.parametrize("spec", [BatchSpec(16), BatchSpec(8, 16 * 100, 100)])
@pytest.mark.parametrize("grouped", [False, True])
def test_what_a_batch_holds_does_not_go_with_the_size_of_the_images(spec, grouped):
    """Data whose class is a function of the size: cells, small and square, and half as many cars, wide and large.

    Pearson's statistic over the table of batches and classes; where they are independent it has a mean of its degrees
    of freedom, batches - 1, and a variance of twice that.
    """
    cars = np.random.default_rng(0).permutation(6000) < 2000
    sizes = np.where(cars[:, None], [160, 320], [128, 128])
    lengths = TokenCounts(sizes, 16, 100)
    source = (
        SourceInfo(6000, np.arange(0, 6001, 100), lengths) if grouped else SourceInfo(6000, np.arange(0, 6001, 100))
    )
    many = Plan("t", [source], [1.0], spec, 3)
    batches = [cars[[ref.index for ref in many.batch(step)]] for step in range(2 * many.steps_per_epoch)]
    sizes_B, cars_B = (np.array([function(batch) for batch in batches]) for function in (len, sum))
    expected_B = sizes_B / 3
    statistic = ((cars_B - expected_B) ** 2 * (1 / expected_B + 1 / (sizes_B - expected_B))).sum()
    freedom = len(batches) - 1
    if grouped:
        assert statistic > 10 * freedom  # each batch has one class
    else:
        assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5
        assert len(set(sizes_B)) == 1


def test_sizes_do_not_decide_the_batches_unless_a_source_asks_for_it():
    """The same through `Source`, with all that it can know of the images."""
    sizes = np.random.default_rng(0).integers(8, 300, (500, 2))
    for budget in ({"batch_size": 16}, {"batch_tokens": 1000}):
        orders = {}
        for grouped in (None, False, True):
            data, options = Numbers("a", 500), {} if grouped is None else {"group_by_length": grouped}
            sized = Numbers("a", 500, sizes_hw=sizes)
            steps = [
                Steps([Source("t", each, max_tokens=80, **budget, **options)], 0, Preprocessing(16), True)
                for each in (data, sized)
            ]
            orders[grouped] = [[each.plans["t"].batch(step) for step in range(50)] for each in steps]
        assert orders[None] == orders[False]
        assert orders[False][0] == orders[False][1]  # knowing the sizes changes nothing
        assert orders[True][0] != orders[True][1]


def test_a_budget_is_of_the_longest_image_that_there_is():
    """Where images are shorter than max_tokens, more of them fit."""
    small = Source(
        "t", Numbers("a", 500, sizes_hw=np.full((500, 2), 32)), batch_tokens=64 * 4, batch_multiple=1, max_tokens=64
    )
    plans = [Steps([small], 0, Preprocessing(16, canvas), True).plans["t"] for canvas in (None, (32, 64))]
    assert [len(each.batch(0)) for each in plans] == [64, 32]


@pytest.mark.parametrize("spec", [BatchSpec(6), BatchSpec(2, 40, 9)])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_parts_of_ranks_make_up_the_step(spec, shuffle, world):
    sources = [SourceInfo(23), SourceInfo(31, [0, 9, 31], Lengths(np.arange(31) % 9 + 1)), SourceInfo(8)]
    many = Plan("t", sources, [3, 2, 1], spec, 0, shuffle)
    for step in range(60):
        whole = many.batch(step)
        assert [many.batch(step, rank, world) for rank in range(world)] == [whole[rank::world] for rank in range(world)]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000, 4097])
def test_scattered_numbers_are_a_permutation(size):
    numbers = np.arange(size)
    found = scatter(numbers, size, np.random.default_rng(0))
    assert sorted(found.tolist()) == numbers.tolist()
    part = scatter(numbers[size // 3 :], size, np.random.default_rng(0))
    assert part.tolist() == found[size // 3 :].tolist()  # a function of each number alone


def test_parts_of_a_scattered_range_are_as_random_draws():
    """Each tenth of a range gets its share of every part; Pearson's statistic as above, over 99 x 9 degrees."""
    found = scatter(np.arange(1_000_000), 1_000_000, np.random.default_rng(1))
    counts = np.histogram2d(np.arange(1_000_000) // 10_000, found // 100_000, [100, 10])[0]
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 891) < 4 * (2 * 891) ** 0.5
    assert abs(np.corrcoef(np.arange(1_000_000), found)[0, 1]) < 4e-3
    assert np.mean(np.diff(found) == 1) < 1e-4


@pytest.mark.parametrize("case", range(20))
def test_divided_windows_lose_and_repeat_nothing(case, monkeypatch):
    monkeypatch.setattr(sampler, "LARGEST_WINDOW", 20)
    monkeypatch.setattr(sampler, "PART", 7)
    test_token_budgets_hold_and_no_sample_is_lost_or_repeated(case)
    test_every_sample_comes_exactly_once_in_an_epoch_of_its_source([64, 10, 5], 7)


@pytest.mark.parametrize("shards", [1, 100_000])
@pytest.mark.parametrize("spec", [BatchSpec(4096), BatchSpec(8, 4096 * 256, 256), BatchSpec(262_144)])
def test_a_source_of_a_billion_samples_starts_at_once(shards, spec):
    """Counted, as time would depend on the machine: memory, and lengths asked for (of those that are grouped)."""
    asked = 0

    def lengths(indices):
        nonlocal asked
        asked += len(indices)
        return indices % 256 + 1

    size = 10**9
    starts = None if shards == 1 else np.arange(shards + 1) * (size // shards)
    info = SourceInfo(size, starts, None if spec.tokens else lengths)
    tracemalloc.start()
    many = Plan("t", [info], [1.0], spec, 0)
    assert many.steps_per_epoch == -(-size // (spec.samples if spec.tokens is None else 4096))
    for step in (0, 10_000_000):
        refs = many.batch(step, rank=3, world_size=64)
        assert len({ref.index for ref in refs}) == len(refs) == (spec.samples if spec.tokens is None else 4096) // 64
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert asked < 5_000_000
    assert peak < 200 * 2**20


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
