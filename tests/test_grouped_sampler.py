"""Shards that are dealt to groups: the same samples on any number of ranks, and a node reads its own shards."""

import pickle
import tracemalloc

import numpy as np
import pytest
from test_plan import Lengths, Numbers

from indiclip.loading.grouped_sampler import GroupedSampler, block
from indiclip.loading.plan import Plan
from indiclip.loading.sampler import BatchSpec, SourceInfo
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.preprocessing import Preprocessing


def random_source(rng):
    shards = rng.integers(0, 60, rng.integers(6, 40))
    shards[:6] += 1
    groups = int(rng.integers(2, 7))
    return SourceInfo(int(shards.sum()), np.cumsum([0, *shards]), groups=groups), int(rng.integers(groups, 30))


@pytest.mark.parametrize("case", range(30))
def test_an_epoch_has_every_sample_once_and_each_group_gives_its_part_of_the_line(case):
    """Beside a count of the positions one by one."""
    rng = np.random.default_rng(case)
    info, samples = random_source(rng)
    many = GroupedSampler(info, samples, (case, 1), window=int(rng.integers(1, 5)))
    batches = -(-3 * info.size // samples)
    found = [many.batch(number, 0, samples) for number in range(batches)]
    indices, positions = (np.concatenate(part) for part in zip(*found, strict=True))
    assert positions.tolist() == list(range(batches * samples))
    group_of_place = [group for group in range(info.groups) for _ in range(*many._cuts[group : group + 2])]
    order = np.random.default_rng([case, 1, 0]).permutation(len(info.starts) - 1)
    line = [sample for shard in order for sample in range(info.starts[shard], info.starts[shard + 1])]
    for epoch in range(3):
        mine = slice(epoch * info.size, (epoch + 1) * info.size)
        assert sorted(indices[mine].tolist()) == list(range(info.size))
        groups = np.array([group_of_place[position % samples] for position in positions[mine]])
        before = 0
        for group in range(info.groups):
            given = indices[mine][groups == group].tolist()
            assert sorted(given) == sorted(line[before : before + len(given)])
            before += len(given)
    assert indices[: info.size].tolist() != indices[info.size : 2 * info.size].tolist()


@pytest.mark.parametrize("case", range(10))
def test_a_batch_is_the_same_in_any_order_of_asking_and_in_any_parts(case):
    rng = np.random.default_rng(case)
    info, samples = random_source(rng)
    many, other = (GroupedSampler(info, samples, (1, 2), window=2) for _ in "ab")
    whole = [many.batch(number, 0, samples) for number in range(50)]
    for number in rng.permutation(50).tolist():
        cut = int(rng.integers(samples + 1))
        parts = other.batch(number, 0, cut), other.batch(number, cut, samples)
        assert np.concatenate([part[0] for part in parts]).tolist() == whole[number][0].tolist()
        assert np.concatenate([part[1] for part in parts]).tolist() == whole[number][1].tolist()
        other = pickle.loads(pickle.dumps(other)) if rng.random() < 0.1 else other


@pytest.mark.parametrize("world", [1, 2, 4, 5, 10, 20])
def test_the_blocks_of_ranks_make_up_the_step_evenly(world):
    sources = [
        SourceInfo(400, np.arange(0, 401, 10), groups=4),
        SourceInfo(70),
        SourceInfo(300, np.arange(0, 301, 10), groups=3),
    ]
    many = Plan("t", sources, [11, 2, 7], BatchSpec(20), 0, window=2)
    for step in range(40):
        whole, parts = many.batch(step), [many.batch(step, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {20 // world}
        assert sorted(ref for part in parts for ref in part) == sorted(whole)
        for source in (0, 2):
            together = [ref for part in parts for ref in part if ref.source == source]
            assert together == [ref for ref in whole if ref.source == source]


def test_blocks_are_as_many_as_samples_dealt_in_turn():
    rng = np.random.default_rng(0)
    for _ in range(300):
        samples, before, world = (int(rng.integers(low, 40)) for low in (0, 0, 1))
        blocks = [block(samples, before, rank, world) for rank in range(world)]
        dealt = [sum((before + i) % world == rank for i in range(samples)) for rank in range(world)]
        assert [end - begin for begin, end in blocks] == dealt
        assert [0, *[end for _, end in blocks]] == [*[begin for begin, _ in blocks], samples]


@pytest.mark.parametrize("groups", [16, 48])
@pytest.mark.parametrize("nodes", [1, 2, 4, 15, 16])
def test_a_node_reads_its_share_of_the_shards(nodes, groups):
    """In an epoch and a little of 480 shards; what is fetched ahead is of the same shards."""
    shards, samples = 480, 480
    sizes = np.random.default_rng(3).integers(150, 250, shards)
    starts = np.cumsum([0, *sizes])
    many = Plan("t", [SourceInfo(int(starts[-1]), starts, groups=groups)], [1.0], BatchSpec(samples), 0, window=2)
    read: list[set[int]] = []
    for node in range(nodes):
        found, fetched = set[int](), set[int]()
        for step in range(many.steps_per_epoch + 20):
            refs = many.batch(step, node, nodes)  # what its ranks read together
            found |= set((np.searchsorted(starts, [ref.index for ref in refs], side="right") - 1).tolist())
            fetched |= set(many.next_shards(step, node, nodes)[0][1])
        read.append(found)
        assert len(fetched - found) <= 2  # of the epoch after, whose cuts are by less than a batch elsewhere
        of_ranks = [many.batch(7, 2 * node + rank, 2 * nodes) for rank in (0, 1)]
        assert of_ranks[0] + of_ranks[1] == many.batch(7, node, nodes)
    assert set.union(*read) == set(range(shards))
    # A group that two nodes share is read by both; a cut through a shard, in each of the two epochs, has two sides.
    shared = 0 if groups % nodes == 0 else shards / groups
    assert max(map(len, read)) <= shards / nodes + 2 * shared + 8


def test_without_groups_every_node_reads_every_shard():
    """What groups are for."""
    many = Plan("t", [SourceInfo(4800, np.arange(0, 4801, 10))], [1.0], BatchSpec(384), 0)
    found = {ref.index // 10 for step in range(many.steps_per_epoch) for ref in many.batch(step, 0, 16)}
    assert len(found) > 0.4 * 480  # a rank of 16, which has 1/16 of the samples


def test_a_window_bounds_the_shards_that_a_group_reads_at_a_time():
    info = SourceInfo(4000, np.arange(0, 4001, 20), groups=4)
    many = GroupedSampler(info, 40, (0, 0), window=5)
    for number in range(98):
        ahead = many.next_shards(number, 10, 20)
        shards = {int(index) // 20 for near in (number, number + 1) for index in many.batch(near, 10, 20)[0]}
        assert len(shards) <= 2 * 5  # both sides of a border between windows
        assert shards - {int(index) // 20 for index in many.batch(number, 10, 20)[0]} <= set(ahead) | shards
        assert 1 <= len(ahead) <= 6


def test_shards_are_fetched_before_they_are_read():
    info = SourceInfo(2000, np.arange(0, 2001, 20), groups=4)
    many = GroupedSampler(info, 40, (0, 0), window=4)
    known: set[int] = {int(index) // 20 for number in range(9) for index in many.batch(number, 20, 40)[0]}
    for number in range(120):
        assert {int(index) // 20 for index in many.batch(number, 20, 40)[0]} <= known
        known |= set(many.next_shards(number, 20, 40))


def test_groups_that_cannot_be_are_said():
    starts = np.arange(0, 101, 10)
    for info, spec, message in (
        (SourceInfo(100, starts, groups=16), 64, r"shard_groups of task 't' is 16, but the source has 10 shards with"),
        (SourceInfo(100, groups=2), 64, "has 0 shards with samples; expected at least one for each group"),
        (SourceInfo(100, starts, groups=8), 4, "gives 4 samples to a batch; expected at least one from each group"),
        (SourceInfo(100, starts, Lengths([1] * 100), groups=8), 8, "is 8 and group_by_length is true"),
    ):
        with pytest.raises(ValueError, match=f"^data: .*{message}"):
            Plan("t", [info], [1.0], BatchSpec(spec), 0)
    with pytest.raises(ValueError, match="data: shard_groups of task 't': found 0; expected 1 or more"):
        Source("t", Numbers("a", 3), 3, shard_groups=0)


def test_more_ranks_than_shards_are_said():
    data = Numbers("a", 60)
    data.starts = np.arange(0, 61, 10)
    source = Source("t", data, 16, shard_groups=2)
    batch = Steps([source], 0, Preprocessing(8), True, 3, 4)[0]["t"]
    assert len(batch["keys"]) == 4
    assert not batch["origin"].in_turn
    with pytest.raises(ValueError, match="has 6 shards for 8 ranks, and shard_groups 2 .* set shard_groups to 1"):
        Steps([source], 0, Preprocessing(8), True, 3, 8)
    # Every rank reads every shard.
    assert Steps([Source("t", data, 16)], 0, Preprocessing(8), True, 3, 8)[0]["t"]["origin"].in_turn


def test_a_billion_samples_in_128_groups_need_no_table_of_them():
    """A rank of 128; and one process that makes all of it."""
    info = SourceInfo(10**9, np.arange(0, 10**9 + 1, 10_000), groups=128)
    for world, most in ((128, 20), (1, 250)):
        tracemalloc.start()
        many = Plan("t", [info], [1.0], BatchSpec(32_768), 0)
        for step in (0, 12_345_678):
            refs = many.batch(step, world // 2, world)
            assert len({ref.index for ref in refs}) == len(refs) == 32_768 // world
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most * 2**20
