"""Work that ranks share ends on all of them, however it ends on one."""

from types import SimpleNamespace

import pytest
from processes import on_ranks

from indiclip.training.fault_tolerance.ranks import AgreedStop, Interrupted, together


def ends(failures, exchanges=3):
    """How the work ends on each of two ranks; `failures`: (rank, after so many exchanges) -> what is raised there."""

    def work(rank):
        strategy = SimpleNamespace(launcher=None)
        trainer = SimpleNamespace(
            world_size=2, global_rank=rank, local_rank=rank, is_global_zero=not rank, strategy=strategy
        )
        seen = []
        try:
            with together(trainer, "work") as exchange:
                for number in range(exchanges):
                    if (rank, number) in failures:
                        raise failures[rank, number]
                    seen.append(exchange((rank, number)))
                if (rank, exchanges) in failures:
                    raise failures[rank, exchanges]
        except (AgreedStop, Interrupted) as stop:
            return type(stop).__name__, str(stop), len(seen)
        return seen

    return work


def test_values_are_those_of_all_ranks(tmp_path):
    expected = [[(0, number), (1, number)] for number in range(3)]
    assert on_ranks(2, ends({}), tmp_path) == [expected, expected]


@pytest.mark.parametrize(
    ("failures", "message", "exchanges"),
    [
        ({(0, 3): OSError("full")}, "work: rank 0: full", (3, 3)),  # in what only the first rank does at the end
        ({(1, 1): ValueError("torn")}, "work: rank 1: torn", (1, 1)),
        ({(0, 2): ValueError("a"), (1, 2): ValueError("b")}, "work: rank 0: a", (2, 2)),
        ({(0, 2): ValueError("a"), (1, 0): ValueError("b")}, "work: rank 1: b", (0, 0)),
        ({(1, 0): KeyError("x")}, "work: rank 1: KeyError: 'x'", (0, 0)),
    ],
)
def test_an_error_on_one_ends_the_work_on_both(tmp_path, failures, message, exchanges):
    assert on_ranks(2, ends(failures), tmp_path) == [("AgreedStop", message, number) for number in exchanges]


def test_a_signal_to_one_interrupts_both(tmp_path):
    assert on_ranks(2, ends({(1, 2): Interrupted(15)}), tmp_path) == [("Interrupted", "15", 2)] * 2


def test_a_single_process_raises_its_own_error():
    def work():
        with together(SimpleNamespace(world_size=1), "work") as exchange:
            assert exchange(1) == [1]
            raise KeyError("torn")

    with pytest.raises(KeyError, match="torn"):
        work()
