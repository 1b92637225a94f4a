"""The decoder: a transformers decoder with the same weights, padding, parallel prediction, writing with a cache."""

from itertools import chain

import pytest
import torch
from transformers import BlenderbotConfig
from transformers.models.blenderbot.modeling_blenderbot import BlenderbotDecoder

from indiclip.tasks.caption_decoder import CaptionDecoder
from indiclip.tasks.caption_sequences import Prompted, sequences_of
from indiclip.tasks.caption_vocabulary import CaptionVocabulary

WIDTH, IDS, POSITIONS = 16, 40, 20


def decoder(**options):
    torch.manual_seed(0)
    made = CaptionDecoder(**{"num_ids": IDS, "width": WIDTH, "depth": 2, "num_heads": 4, "memory_width": WIDTH,
                             "num_positions": POSITIONS} | options)  # fmt: skip
    for parameter in made.parameters():  # far from where biases and norms begin
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.zeros_(made.norm.bias)  # else the same few ids are the best everywhere
    torch.nn.init.normal_(made.position_table.weight)
    return made.eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(3, 7, WIDTH), torch.arange(7) < torch.tensor([7, 4, 1])[:, None]


NAMES = {
    "embedding": "embed_tokens",
    "position_table": "embed_positions",
    "self_norm": "self_attn_layer_norm",
    "self_attention": "self_attn",
    "cross_norm": "encoder_attn_layer_norm",
    "cross_attention": "encoder_attn",
    "mlp_norm": "final_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
}


def blenderbot(own):
    """transformers' decoder of the same kind, with the same weights."""
    config = BlenderbotConfig(
        vocab_size=IDS, d_model=WIDTH, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=4 * WIDTH,
        max_position_embeddings=POSITIONS, activation_function="gelu", pad_token_id=None,
        bos_token_id=0, eos_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    weights = {}
    for name, weight in own.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(f"{ours}.", f"{theirs}.")
        weights[f"layer_{name}" if name.startswith("norm.") else name] = weight
    peer = BlenderbotDecoder(config).eval()
    peer.load_state_dict(weights)
    return peer


def test_states_are_those_of_a_transformers_decoder_with_the_same_weights(images):
    """Blenderbot's: normalised before each part, learned positions, GELU. Padding of the images is masked there too."""
    own = decoder()
    tokens_BND, valid_BN = images
    ids_BT = torch.randint(IDS, (3, 9))
    with torch.no_grad():
        found = own(ids_BT, own.read(tokens_BND, valid_BN))
        options = {"encoder_hidden_states": tokens_BND, "encoder_attention_mask": valid_BN.long()}
        expected = blenderbot(own)(input_ids=ids_BT, **options).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text_layers", [0, 1])
def test_written_texts_are_those_of_whole_sequences_without_a_cache(images, text_layers):
    """Prompts of three lengths; each id is the best after all before it, alone in its batch, and an end ends."""
    own = decoder(text_layers=text_layers)
    tokens_BND, valid_BN = images
    prompts, choices, most = [[3], [4, 5, 6], [7, 8]], slice(10, 30), 6

    def best(row, ids):
        memory = own.read(tokens_BND[row : row + 1, : int(valid_BN[row].sum())], None)
        return 10 + int((own(torch.tensor([ids]), memory)[0, -1] @ own.table[choices].T).argmax())

    expected = []
    for row, prompt in enumerate(prompts):
        text = []
        while len(text) < most:
            text.append(best(row, [*prompt, *text]))
        expected.append(text)
    memory = own.read(tokens_BND, valid_BN)
    assert own.write(prompts, memory, choices, most) == expected
    end = expected[1][2]
    assert len({*chain(*expected)}) > 3  # not one and the same
    ended = [text[: text.index(end)] if end in text else text for text in expected]
    assert own.write(prompts, memory, choices, most, end) == ended
    assert len({*map(len, ended)}) > 1


def losses(own, texts, vocabulary, images):
    """The cross entropy of each answer's tokens, text by text."""
    tokens_BND, valid_BN = images
    sequences = sequences_of(texts, vocabulary)
    hidden_BTW = own(sequences.ids_BT, own.read(tokens_BND, valid_BN), sequences.mask_BTT)
    logits_LV = hidden_BTW.flatten(0, 1)[sequences.places_L] @ own.table.T
    losses_L = torch.nn.functional.cross_entropy(logits_LV, sequences.targets_L, reduction="none")
    return [losses_L[sequences.image_L == row] for row in range(len(texts))], sequences


def test_what_is_predicted_sees_what_it_may():
    """Causal: the ids before. Parallel: none of the answer's. A text alone has the losses that it has among longer."""
    vocabulary = CaptionVocabulary(10, num_bins=4)
    own = decoder(num_ids=vocabulary.size, num_positions=60)
    tokens_BND, valid_BN = torch.randn(2, 5, WIDTH), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    prompt = vocabulary.caption_prompt("hi")
    assert len(prompt) == 3
    for parallel in (False, True):
        texts = [Prompted(prompt, [1, 2, 3, 4], parallel), Prompted([*prompt, 5], [6] * 7, not parallel)]
        (first, _), sequences = losses(own, texts, vocabulary, (tokens_BND, valid_BN))
        assert sequences.targets_L[sequences.image_L == 0].tolist() == [1, 2, 3, 4, vocabulary.end]
        assert sequences.num_tokens == [5, 8]
        torch.testing.assert_close(sequences.weights_L, torch.tensor([1 / 5] * 5 + [1 / 8] * 8))
        (alone,), _ = losses(own, texts[:1], vocabulary, (tokens_BND[:1], valid_BN[:1]))
        torch.testing.assert_close(first, alone, atol=1e-5, rtol=1e-5)
        other = [Prompted(prompt, [1, 2, 9, 4], parallel)]
        (changed,), _ = losses(own, other, vocabulary, (tokens_BND[:1], valid_BN[:1]))
        same = torch.isclose(changed, alone, atol=1e-6).tolist()
        # The third id is another one: what is to be predicted there changes, and what comes after it where it is read.
        assert same == ([True, True, False, True, True] if parallel else [True, True, False, False, False])


def test_an_image_without_a_text_has_no_weight():
    vocabulary = CaptionVocabulary(10, num_bins=4)
    sequences = sequences_of([None, Prompted([vocabulary.refer, 3], [1])], vocabulary)
    assert sequences.weights_L.tolist() == [0.0, 0.5, 0.5]
    assert sequences.num_tokens == [0, 2]


def test_a_box_comes_back_within_half_a_bin():
    vocabulary = CaptionVocabulary(100, num_bins=500)
    size_hw = (300, 200)
    for box in ([0.0, 0.0, 200.0, 300.0], [13.2, 250.9, 14.1, 299.9], [-5.0, 3.0, 250.0, 310.0]):
        ids = vocabulary.box(box, size_hw)
        assert all(vocabulary.places.start <= id < vocabulary.places.stop == vocabulary.size for id in ids)
        clipped = [min(max(place, 0), side) for place, side in zip(box, (200, 300) * 2, strict=True)]
        assert vocabulary.box_xyxy(ids, size_hw) == pytest.approx(clipped, abs=300 / 500 / 2 + 1e-6)
        assert vocabulary.box_xyxy([*ids[2:], *ids[:2]], size_hw) == vocabulary.box_xyxy(ids, size_hw)


def test_ids_of_any_language_code_are_apart():
    """Behind the tokenizer's; `hi` is where `hi-Latn` begins, and "" says nothing."""
    vocabulary = CaptionVocabulary(100, num_bins=5)
    assert vocabulary.caption_prompt("") == [vocabulary.caption]
    hindi, latin = vocabulary.caption_prompt("hi"), vocabulary.caption_prompt("hi-Latn")
    assert latin[: len(hindi)] == hindi
    assert len({tuple(vocabulary.caption_prompt(code)) for code in ("hi", "ta", "brx", "kok", "hi-Latn", "")}) == 6
    ids = {*vocabulary.caption_prompt("abcdefghijklmnopqrstuvwxyz-01234"), *vocabulary.caption_prompt("56789")}
    special = {vocabulary.end, vocabulary.caption, vocabulary.refer, vocabulary.ground, vocabulary.mask}
    assert len(ids | special | {*range(100)} | {*range(*vocabulary.places.indices(10**6))}) == vocabulary.size
    assert len(vocabulary.caption_prompt("a" * 99)) == vocabulary.longest_prompt
