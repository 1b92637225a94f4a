"""The loaders of a run: the same steps from any number of workers, and what they are not asked for."""

import json

import pytest
from test_shards import png, write_tar

from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source
from indiclip.webdataset.shards import Shards


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_one_shard_and_64_workers_give_the_steps_of_none(tmp_path):
    """Fewer samples than workers in an epoch: most workers begin in a later one."""
    members = {
        f"{i:02}.{kind}": png(i) if kind == "png" else f"number {i}" for i in range(50) for kind in ("png", "txt")
    }
    source = Source("t", Shards(write_tar(tmp_path / "a.tar", members)), batch_size=4)
    seen = []
    for num_workers in (0, 64):
        data = MultiTaskData([source], seed=3, num_workers=num_workers, steps_per_epoch=150, patch_size=4)
        seen.append([(step["t"]["keys"], step["t"]["targets"]["caption"]) for step in data.train_dataloader()])
    assert len(seen[0]) == 150
    assert seen[1] == seen[0]
    assert sorted(key for keys, _ in seen[1][:25] for key in keys) == sorted(2 * [f"a/{i:02}" for i in range(50)])


def test_captions_that_are_no_texts_are_quarantined_and_the_others_drawn_by_language(tmp_path):
    entries = [{"captions": {"en": f"number {i}", "hi": f"संख्या {i}"}} for i in range(6)]
    entries[4]["captions"]["hi"] = [4]
    members = [
        (f"{i}.{kind}", png(i) if kind == "png" else json.dumps(entry))
        for i, entry in enumerate(entries)
        for kind in ("png", "json")
    ]
    path = write_tar(tmp_path / "a.tar", members)
    data = MultiTaskData([Source("t", Shards(path), batch_size=6)], [Source("t", Shards(path), 6)], patch_size=4)
    training = data.steps(data.train, train=True)
    epochs = [training[step]["t"] for step in range(2)]
    assert epochs[0]["quarantined"]
    for lost in epochs[0]["quarantined"]:
        assert (lost.key, lost.shard) == ("a/4", path)
        assert lost.reason == "captions of the .json: hi is 4; expected text"
    first, second = (dict(zip(e["keys"], e["targets"]["language"], strict=True)) for e in epochs)
    for key in ("a/0", "a/1", "a/2", "a/3"):
        assert {first[key], second[key]} == {"en", "hi"}
    held_out = data.steps(data.val, train=False)[0]["t"]
    assert held_out["keys"] == ["a/0", "a/1", "a/2", "a/3", "a/5"]
    assert held_out["targets"]["captions"][4] == {name: [text] for name, text in entries[5]["captions"].items()}
    assert [lost.key for lost in held_out["quarantined"]] == ["a/4"]


def test_a_negative_seed_is_named():
    with pytest.raises(ValueError, match=r"seed_everything \(data\.seed\): found -1; expected 0 or more"):
        MultiTaskData([], seed=-1)
