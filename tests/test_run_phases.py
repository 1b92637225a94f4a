"""Where the phases of a run begin: as the run itself has it, however short it is."""

from types import SimpleNamespace

import pytest
from experiments import config

from indiclip.generated.mela import Mela
from indiclip.loading.source import Source
from indiclip.loading.stages import Stage
from indiclip.loading.views import View
from indiclip.planning.run_phases import RunPhases


@pytest.mark.parametrize(("num_steps", "borders"), [(2, [0, 1]), (10, [0, 4, 8, 9]), (3, [0, 1, 2])])
def test_what_begins_at_a_share_is_never_behind_the_last_step(num_steps, borders):
    """By hand: stages end at 0.4, views begin at 0.8, a head at 0.9; of two steps all that begins is in the last."""
    mela = Mela(**config()["data"]["train"][0]["dataset"]["init_args"])
    source = Source("contrastive", mela, 4, stages=[Stage(0.4, max_tokens=4)], views=[View("late", start=0.8)])
    heads = [SimpleNamespace(name=name, start=start) for name, start in {"own": 0.0, "late": 0.9}.items()]
    phases = RunPhases(SimpleNamespace(each_head=lambda: heads), SimpleNamespace(train=[source]))
    assert phases.borders(num_steps) == borders
    assert phases.heads(num_steps - 1, num_steps) == ["own", "late"]
    assert phases.heads(0, num_steps) == ["own"]
