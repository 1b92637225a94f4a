"""Which samples make step k: a pure function, every sample once an epoch, the same for any number of ranks."""

import pickle
from collections import Counter

import numpy as np
import pytest

from indiclip.data.plan import Place, Plan, apportion


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


def test_ranks_share_one_global_batch_whatever_their_number():
    plan = Plan("t", [100, 30], [2, 1], 12, seed=2)
    for step in range(5):
        whole = plan.batch(step)
        for world in (1, 2, 3, 4):
            parts = [whole[rank::world] for rank in range(world)]
            assert {len(part) for part in parts} == {12 // world}
            assert Counter(place for part in parts for place in part) == Counter(whole)


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
