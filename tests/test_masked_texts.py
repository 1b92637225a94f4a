"""Hidden tokens: against transformers' `inputs_embeds` with the vector put there by hand."""

import numpy as np
import pytest
import torch
from test_gradients import TEXTS

from indiclip.tasks.masked_texts import embedding_of, hidden_behind, hidden_tokens, hide
from indiclip.tasks.masked_towers import MaskedTextTower
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer


class Spaced(ByteTokenizer):
    """Puts a space before every text, so that an empty one has a token of its own."""

    frame_ids = frozenset({ByteTokenizer.start_id, ByteTokenizer.end_id})

    def encode(self, texts):
        return super().encode([f" {text}" for text in texts])


def test_what_frames_a_text_is_never_hidden_and_all_else_is():
    tower = TextTower(Spaced(), {"model_type": "bert"} | TEXTS["bert"])
    masked = MaskedTextTower(tower, ratio=1.0)(["a kite"], [7], tower)
    assert masked.hidden[0].tolist() == [*range(1, 8)]  # two spaces among them


def test_a_share_of_the_tokens_is_hidden_but_never_those_that_every_text_has():
    rows = [[1, *range(10, 30), 2], [1, 10, 2], [1, 2], []]
    places = hidden_tokens(rows, 0.15, [1, 2, 3, 4], {0, 1, 2})
    assert [len(of) for of in places] == [3, 1, 0, 0]
    assert places[1].tolist() == [1]
    seen = np.concatenate([hidden_tokens(rows[:1], 0.15, [seed], {0, 1, 2})[0] for seed in range(2000)])
    shares = np.bincount(seen, minlength=22) / 2000
    assert shares[[0, 21]].tolist() == [0, 0]
    assert np.abs(shares[1:21] - 3 / 20).max() < 0.04  # five standard deviations


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "clip_text_model", "t5", "gemma", "modernbert", "m2m_100"])
def test_a_tower_reads_the_vector_at_hidden_places(family):
    torch.manual_seed(0)
    tower = TextTower(ByteTokenizer(), {"model_type": family} | TEXTS[family]).eval()
    rows = tower.tokenizer.encode(["a kite", "two drums, one of them red"])  # so that they are packed, where they can
    texts = hide(tower, rows, [np.array([3]), np.array([1, 20])])
    width = texts.ids_BT.shape[1]
    assert texts.places_K.tolist() == [3, width + 1, width + 20]
    assert texts.tokens_K.tolist() == [rows[0][3], rows[1][1], rows[1][20]]
    vector_D = torch.randn(embedding_of(tower).embedding_dim, requires_grad=True)
    with torch.no_grad():
        plain_BTD = tower(*tower.padded(rows))
    with hidden_behind(tower, vector_D):
        found_BTD = tower(texts.ids_BT, texts.valid_BT, texts.lengths)

    # The table with one row more.
    table = embedding_of(tower)
    other = TextTower(
        ByteTokenizer(), {"model_type": family} | TEXTS[family] | {"vocab_size": table.num_embeddings + 1}
    )
    state = tower.state_dict()
    for name, value in other.state_dict().items():
        if name in state and value.shape != state[name].shape:
            scale = getattr(table, "embed_scale", getattr(table, "scalar_embed_scale", 1.0))
            state[name] = torch.cat([state[name], vector_D.detach()[None] / scale])
    other.load_state_dict(state)
    with torch.no_grad():
        expected_BTD = other.eval()(texts.ids_BT, texts.valid_BT, texts.lengths)
    valid_BT = texts.valid_BT
    torch.testing.assert_close(found_BTD[valid_BT], expected_BTD[valid_BT], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found_BTD[valid_BT], plain_BTD[valid_BT], atol=1e-3)
    found_BTD[valid_BT].square().sum().backward()
    assert vector_D.grad.abs().sum() > 0
    with torch.no_grad():  # nothing is left behind
        assert torch.equal(tower(*tower.padded(rows)), plain_BTD)
