"""Which samples make step k: a pure function, every sample once an epoch, the same for any number of ranks."""

import pickle
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import Dataset

from indiclip.data.images import UnreadableSample
from indiclip.data.module import Source, Steps
from indiclip.data.plan import Place, Plan, apportion
from indiclip.types import Sample


def test_a_step_is_the_same_in_any_order_of_asking_and_in_another_process():
    forward = Plan("detection", [50, 7], [3, 1], 8, seed=5)
    steps = [forward.batch(step) for step in range(40)]
    other = pickle.loads(pickle.dumps(Plan("detection", [50, 7], [3, 1], 8, seed=5)))
    for step in np.random.default_rng(0).permutation(40):
        assert other.batch(int(step)) == steps[step]
    assert pickle.loads(pickle.dumps(forward)).batch(39) == steps[39]  # also with an order at hand


def test_the_first_steps_are_those_of_earlier_releases():
    # A change here would give every running experiment another order when it resumes.
    plan = Plan("contrastive", [10], [1.0], 4, seed=0)
    assert [place.index for place in plan.batch(0)] == [8, 2, 7, 3]
    assert [place.index for place in plan.batch(9)] == [1, 7, 6, 2]


@pytest.mark.parametrize(("sizes", "batch"), [([12], 4), ([10], 4), ([3], 8), ([64, 10, 5], 7)])
def test_every_sample_comes_exactly_once_in_an_epoch_of_its_source(sizes, batch):
    plan = Plan("t", sizes, [1.0] * len(sizes), batch, seed=1)
    places = [place for step in range(60) for place in plan.batch(step)]
    for source, size in enumerate(sizes):
        mine = [place for place in places if place.source == source]
        assert [place.position for place in mine] == list(range(len(mine)))
        epochs = [mine[start : start + size] for start in range(0, len(mine) - size + 1, size)]
        assert len(epochs) >= 2
        orders = [tuple(place.index for place in epoch) for epoch in epochs]
        assert all(sorted(order) == list(range(size)) for order in orders)
        assert size < 10 or len(set(orders)) == len(orders)  # shuffled anew; small sources repeat one by chance


class Numbers(Dataset):
    """Sample i is a grey image with the key `<name><i>`; those of `torn` cannot be read."""

    def __init__(self, name: str, length: int, torn: tuple[int, ...] = ()) -> None:
        self.name, self.length, self.torn = name, length, torn

    def __len__(self) -> int:
        return self.length

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
    with pytest.raises(ValueError, match=r"sources of task 't' have different batch_size"):
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
        [p.index for p in Plan(task, [1000], [1.0], 1000, seed).batch(0)]
        for task, seed in (("a", 0), ("a", 1), ("b", 0))
    ]
    assert all((np.array(orders[i]) == orders[j]).mean() < 0.02 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_every_batch_has_the_sources_in_their_proportion():
    plan = Plan("t", [1000, 1000, 1000], [0.5, 0.3, 0.2], 20, seed=0)
    assert plan.counts == [10, 6, 4]
    for step in (0, 7, 1000):
        assert Counter(place.source for place in plan.batch(step)) == {0: 10, 1: 6, 2: 4}


def test_an_epoch_ends_with_the_source_that_takes_longest():
    assert Plan("t", [100, 10], [1, 1], 8, 0).steps_per_epoch == 25
    assert Plan("t", [101], [1], 8, 0).steps_per_epoch == 13


def test_validation_goes_through_everything_once_in_order():
    plan = Plan("t", [5, 9], [1, 1], 4, seed=3, shuffle=False)
    steps = [plan.pass_through(step) for step in range(plan.steps_per_epoch + 2)]
    assert [place.index for step in steps for place in step if place.source == 0] == list(range(5))
    assert [place.index for step in steps for place in step if place.source == 1] == list(range(9))
    assert steps[3] == [Place(1, 6, 6), Place(1, 7, 7)]
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
        Plan("detection", [10, 0], [1, 1], 8, 0)
    with pytest.raises(
        ValueError, match="source 1 of task 'detection' gets no sample in a batch of 4; raise its weight"
    ):
        Plan("detection", [10, 10], [100, 1], 4, 0)
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"source 0 of task 't' has weight {weight}; expected more than 0"):
            Plan("t", [10, 10], [weight, 1], 4, 0)
