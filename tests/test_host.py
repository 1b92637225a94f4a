"""What the training process does beside the device's work: no tokenising, no walk through lists, no barrier."""

import pickle

import torch
from experiments import config, fit
from helpers import tiny_encoder
from processes import two_ranks

from indiclip.generated.mela import Mela
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.preprocessing import Preprocessing
from indiclip.tokenizers import ByteTokenizer
from indiclip.types import Step, Texts, part_of


def captioned(encode):
    source = Source("contrastive", Mela(40, 32, "single", languages=["en", "hi"]), 16, max_tokens=16)
    return Steps([source], 0, Preprocessing(8), train=True, encode=encode)[0]


def test_captions_that_are_tokenised_where_they_are_read_are_embedded_alike():
    encoder = tiny_encoder().eval()
    plain, step = captioned(None), captioned(encoder.text.tokenizer.encode)
    texts = pickle.loads(pickle.dumps(step))["contrastive"]["targets"]["caption"]
    assert isinstance(texts, Texts)
    assert list(texts) == plain["contrastive"]["targets"]["caption"]
    encode, encoder.text.tokenizer.encode = encoder.text.tokenizer.encode, None  # not asked
    found = encoder.pool_text(texts)
    part = encoder.pool_text(part_of(step["contrastive"], 3, 9)["targets"]["caption"])
    encoder.text.tokenizer.encode = encode
    torch.testing.assert_close(found, encoder.pool_text(list(texts)))
    torch.testing.assert_close(part, found[3:9])


def test_the_command_has_the_workers_tokenise(tmp_path, monkeypatch):
    """A worker inherits the tokenizer; the training process encodes only what it embeds once, at the start."""
    encoded = []
    encode = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, texts: encoded.append(texts) or encode(self, texts))
    assert fit(tmp_path, config(data__num_workers=1, data__val=[])) == 0
    assert not any("mela" in text for texts in encoded for text in texts)


def test_a_step_moves_its_tensors_and_looks_at_no_list():
    class Never(list):
        def __iter__(self):
            raise AssertionError("walked through")

    step = captioned(None)
    batch = step["contrastive"]
    batch["keys"] = Never(batch["keys"])
    moved = step.to("meta")
    assert isinstance(moved, Step)
    assert moved["contrastive"]["images"]["patches_BNP"].device.type == "meta"
    assert batch["images"]["patches_BNP"].device.type == "cpu"
    assert moved["contrastive"]["keys"] is batch["keys"]


def test_no_rank_waits_at_a_barrier_in_a_step(tmp_path):
    tree = config(trainer__max_steps=6, trainer__limit_val_batches=0, data__steps_per_epoch=6)
    tree["trainer"]["callbacks"] = [{"class_path": "trouble.Barriers", "init_args": {"folder": str(tmp_path)}}]
    done, _ = two_ranks(tmp_path, tree, started_by="torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        counts = [int(line) for line in (tmp_path / f"barriers-{rank}").read_text().split()]
        assert len(counts) == 6
        assert len(set(counts[:-1])) == 1  # the last step ends with a checkpoint
