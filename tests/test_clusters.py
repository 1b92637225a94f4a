"""What an epoch draws of each cluster: counts by hand, each sample as often as others, the same in any process."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from test_plan import Numbers

from indiclip.datasets.captions import CaptionTable
from indiclip.datasets.split import Split
from indiclip.loading import clusters as clusters_module
from indiclip.loading import sampler
from indiclip.loading.clusters import ClusterDraws, Clusters, cluster_sizes
from indiclip.loading.plan import Plan
from indiclip.loading.sampler import BatchSpec, SourceInfo
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.preprocessing import Preprocessing

SIZES = np.array([256, 0, 81, 16, 1])
NUMBERS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), SIZES)).astype(np.int32)


class Grouped(Numbers):
    """Sample i is in cluster i % `count`, or in that of `numbers`."""

    def __init__(self, length, clusters=None):
        super().__init__("a", length)
        self.clusters = clusters


def draws_of(seed=0, numbers=NUMBERS, **options):
    shares = Clusters(**options).shares(cluster_sizes(numbers), "clusters")
    return ClusterDraws(numbers, shares, (seed,))


def epoch_of(draws, epoch):
    return np.arange(len(NUMBERS)).repeat(draws.times(np.arange(len(NUMBERS)), epoch))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 1.0}, [256, 0, 81, 16, 1]),
        # Square roots 16, 9, 4, 1, of which a sample each makes 30.
        ({"alpha": 0.5, "share": 30 / 354}, [16, 0, 9, 4, 1]),
        # 60 would take two of the last cluster's only sample: the others give it, 59 in 16 : 9 : 4.
        ({"alpha": 0.5, "share": 60 / 354}, [59 * 16 / 29, 0, 59 * 9 / 29, 59 * 4 / 29, 1]),
        ({"alpha": 0.5, "share": 60 / 354, "repeats": 2}, [32, 0, 18, 8, 2]),
        # The fourth gives its 16, the last its one.
        ({"alpha": 0.0, "share": 100 / 354}, [41.5, 0, 41.5, 16, 1]),
        # 9 : 16 : 1 of 30 are 10.4, 18.5 and 1.2; the fourth has 16, the last one, so the third gives what is left.
        ({"alpha": 0.5, "share": 30 / 354, "weights": {0: 0.0, 3: 4.0}}, [0, 0, 13, 16, 1]),
    ],
)  # fmt: skip
def test_a_cluster_gives_its_share(options, expected):
    shares = Clusters(**options).shares(SIZES, "clusters")
    np.testing.assert_allclose(shares, expected)


def test_an_epoch_has_the_shares_and_no_sample_twice():
    draws = draws_of(alpha=0.2, share=64 / 354)
    shares = Clusters(alpha=0.2, share=64 / 354).shares(SIZES, "clusters")
    total = Counter()
    for epoch in range(200):
        drawn = epoch_of(draws, epoch)
        assert len(drawn) == len(set(drawn.tolist())) == 64
        found = np.bincount(NUMBERS[drawn], minlength=5)
        assert (abs(found - shares) < 1).all()  # rounded up or down
        assert found.tolist() == draws.counts(epoch).tolist()
        total.update(drawn.tolist())
    for cluster, size in enumerate(SIZES):
        times = [total[i] for i in np.flatnonzero(cluster == NUMBERS)]
        assert sum(times) == pytest.approx(200 * shares[cluster], abs=16)  # deviation of a rounding is at most a half
        if size:  # they take turns: less apart than draws of their own in each epoch would be
            share = shares[cluster] / size
            assert np.var(times) <= 200 * share * (1 - share) / 2 + 1e-9


def test_small_clusters_come_again_where_they_may():
    """Ten epochs of twice the data, every cluster alike: whole rounds, and one sample more or less."""
    draws = draws_of(alpha=0.0, share=100 / 354, repeats=30)
    for epoch in range(10):
        drawn = Counter(epoch_of(draws, epoch).tolist())
        for cluster, size in enumerate(SIZES):
            if size:
                times = [drawn[i] for i in np.flatnonzero(cluster == NUMBERS)]
                assert sum(times) == 25
                assert max(times) - min(times) <= 1


def test_draws_are_a_function_of_seed_and_epoch_alone():
    first, second, other = draws_of(0, share=64 / 354), draws_of(0, share=64 / 354), draws_of(1, share=64 / 354)
    second.times(np.arange(9), 7)  # looked at before
    parts = np.concatenate([second.times(part, 3) for part in np.array_split(np.arange(len(NUMBERS)), 5)])
    assert parts.tolist() == first.times(np.arange(len(NUMBERS)), 3).tolist()
    assert parts.tolist() != first.times(np.arange(len(NUMBERS)), 4).tolist()
    assert parts.tolist() != other.times(np.arange(len(NUMBERS)), 3).tolist()


def test_parts_that_are_sorted_alone_make_one_order(monkeypatch):
    monkeypatch.setattr(clusters_module, "_SLICE", 50)
    test_an_epoch_has_the_shares_and_no_sample_twice()
    assert cluster_sizes(NUMBERS).tolist() == SIZES.tolist()


@pytest.mark.parametrize("spec", [BatchSpec(8), BatchSpec(4, 4 * 20, 10)])
@pytest.mark.parametrize("starts", [None, np.array([0, 100, 100, 180, 300, 354])])
@pytest.mark.parametrize("world", [1, 2])
def test_steps_go_through_what_epochs_draw(spec, starts, world):
    """Whatever the shards; the oracle is `ClusterDraws.times` over the whole dataset."""
    draws = draws_of(share=96 / 354)
    source = SourceInfo(len(NUMBERS), starts, draws=draws)
    plan, again = (Plan("t", [source], [1.0], spec, 0, window=2) for _ in range(2))
    assert plan.steps_per_epoch == 12
    refs = [[ref for rank in range(world) for ref in plan.batch(step, rank, world)] for step in range(36)]
    for epoch in range(3):
        found = sorted(ref.index for step in refs for ref in step if ref.position // 96 == epoch)
        assert found == epoch_of(draws, epoch).tolist()
    assert sorted(again.batch(20)) == sorted(refs[20])  # without the steps before it
    if starts is not None:
        windows = plan._samplers[0]._windows
        reads = [{int(np.searchsorted(starts, ref.index, side="right")) - 1 for ref in step} for step in refs]
        assert all(len(shards) <= 4 for shards in reads)  # two windows of two
        assert len(windows) == 3


def test_parts_without_shards_draw_alike(monkeypatch):
    monkeypatch.setattr(sampler, "LARGEST_WINDOW", 100)
    monkeypatch.setattr(sampler, "PART", 60)
    test_steps_go_through_what_epochs_draw(BatchSpec(8), None, 1)


def test_ten_million_samples_take_five_bytes_each():
    """Beside the clusters themselves: their places, and a part that is sorted; and an epoch is drawn by windows."""
    numbers = (np.arange(10**7) % 50_000).astype(np.int32)
    shares = Clusters(alpha=0.2, share=0.5).shares(cluster_sizes(numbers), "clusters")
    tracemalloc.start()
    draws = ClusterDraws(numbers, shares, (0,))
    kept = tracemalloc.get_traced_memory()[0]
    source = SourceInfo(len(numbers), np.arange(0, 10**7 + 1, 10_000), draws=draws)
    refs = Plan("t", [source], [1.0], BatchSpec(4096), 0).batch(1000, 3, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(refs) == 64
    assert kept < 5 * 10**7
    assert peak < 35 * 10**7


def steps_of(dataset, **options):
    source = Source("t", dataset, 4, clusters=Clusters(**options))
    return Steps([source], 0, Preprocessing(8), train=True)


def test_clusters_are_the_files_or_the_datasets(tmp_path):
    np.save(tmp_path / "c.npy", np.arange(40, dtype=np.uint16) % 2)
    for dataset, options in (
        (Grouped(40), {"file": str(tmp_path / "c.npy")}),
        (Grouped(40, np.arange(40) % 2), {}),
        (Split(Grouped(80, np.arange(80) % 2), "val", 0.5), {}),
    ):
        clusters = np.arange(40) % 2 if not isinstance(dataset, Split) else dataset.clusters
        steps = steps_of(dataset, share=0.5, weights={1: 0.0}, **options)
        assert len(steps) == 5
        drawn = [ref.index for step in range(10) for ref in steps.plans["t"].batch(step)]
        assert len(drawn) == 40
        assert (clusters[drawn] == 0).all()


def test_a_column_of_a_table_is_the_clusters(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    (tmp_path / "a.csv").write_text("file,caption,cluster\n0.png,a,7\n1.png,b,\n0.png,c,8\n2.png,d,0\n")
    rows = {"file": ["0.png", "1.png", "0.png", "2.png"], "caption": ["a", "b", "c", "d"], "cluster": [7, None, 8, 0]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        table = CaptionTable(str(tmp_path), str(tmp_path / name))
        assert table.clusters.tolist() == [7, -1, 0]  # of the first row of an image
        assert table.inventory.used["columns"] == 3
        with pytest.raises(ValueError, match=r"clusters: the cluster of sample '1.png' is -1; expected one of 0 to"):
            steps_of(table)
    (tmp_path / "b.csv").write_text("file,caption,cluster\n0.png,a,-3\n")
    with pytest.raises(
        ValueError, match=r"b.csv: line 2: column 'cluster': found '-3'; expected a whole number from 0"
    ):
        CaptionTable(str(tmp_path), str(tmp_path / "b.csv"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "task 't': clusters: the samples of Grouped have neither cluster nor label; expected .*clusters.file"),
        ({"file": "short.npy"}, r"short.npy: found int64 \(3,\); expected whole numbers, one for each of 40 samples"),
        ({"file": "halves.npy"}, r"halves.npy: found float64 \(40,\); expected whole numbers"),
        ({"file": "text.npy"}, r"text.npy: no .npy file of whole numbers"),
        ({"file": "shrot.npy"}, r"clusters.file: shrot.npy: no such file or folder; nearest is 'short.npy'"),
        ({"file": "good.npy", "weights": {7: 2.0}}, "clusters.weights: there is no cluster 7; there are 4"),
        ({"file": "good.npy", "share": 1.25}, "50 samples an epoch are more than 40, 1 of each; expected a smaller"),
        ({"file": "good.npy", "weights": {0: 0.0}}, "40 samples an epoch are more than 30, 1 of each"),
        ({"alpha": 1.5}, "task 't': clusters.alpha: found 1.5; expected 0 to 1"),
        ({"share": 0.0}, "task 't': clusters.share: found 0.0; expected above 0"),
        ({"weights": {0: -1.0}}, "task 't': clusters.weights.0: found -1.0; expected 0 or more"),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    np.save("short.npy", np.arange(3))
    np.save("halves.npy", np.full(40, 0.5))
    np.save("good.npy", np.arange(40) % 4)
    (tmp_path / "text.npy").write_text("1\n2\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        steps_of(Grouped(40), **options)


def test_clusters_and_batches_by_length_are_refused():
    with pytest.raises(ValueError, match="clusters: they draw other samples in each epoch; leave out either them or"):
        Source("t", Grouped(40), 4, clusters=Clusters(), group_by_length=True)
