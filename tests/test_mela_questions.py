"""Questions about scenes: what is true of the labels, and that one word makes the difference in every language."""

from collections import Counter

import numpy as np
import pytest
from bench_fakes import Shades, shades_of
from layout_files import write
from test_protocols import LENGTHS, items_of, make_card, scores_of, unit

from indiclip.evals import mela_questions
from indiclip.evals.bench import run_bench
from indiclip.evals.cards.card import load_card
from indiclip.evals.find import find_bench
from indiclip.evals.mela_questions import questions
from indiclip.evals.protocols.protocol import Options
from indiclip.generated.mela import Mela
from indiclip.generated.mela_words import CLASSES, LANGUAGES, words

__all__ = ["make_card"]


@pytest.fixture(scope="module")
def items():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mela_questions, "PER_KIND", 40)
        return questions(load_card("mela_questions"), seed=3, size=64)


def test_thirteen_languages():
    assert set(LANGUAGES) == {"en", "hi", "bn", "ta", "te", "mr", "gu", "kn", "ml", "pa", "or", "as", "ur"}


def words_of(kind, language):
    """The words that a question of a kind is about."""
    table = words(language)
    if kind == "count":
        return table["numbers"]
    if kind == "thing":
        return [*table["kinds"].values(), *table.get("plurals", {}).values()]
    return list(table["colours" if kind == "colour" else "places"].values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_differ_in_one_word_from_the_true_one(items, language):
    for (kind,), (right, *wrong) in zip(items.columns["kind"], items.captions[language], strict=True):
        known = words_of(kind, language)
        assert len({right, *wrong}) == 4
        for other in wrong:
            swapped = {
                right[:at] + new + right[at + len(old) :]
                for old in known
                for new in known
                for at in range(len(right))
                if right.startswith(old, at) and old != new
            }
            assert other in swapped, (kind, right, other)


def test_the_first_caption_is_true_of_the_labels_and_no_other_is(items):
    english = words("en")
    numbers = {word: number for number, word in enumerate(english["numbers"], 1)}
    names = {name: kind for table in ("kinds", "plurals") for kind, name in english[table].items()}
    colours = {name: colour for colour, name in english["colours"].items()}
    for index, ((kind,), captions) in enumerate(zip(items.columns["kind"], items.captions["en"], strict=True)):
        name, seed, number = items.keys[index].split("-")
        assert name == "mela"
        scene = Mela(size=64, layout="single", people=0.0, seed=int(seed)).scene(int(number))
        truths = []
        for caption in captions:
            told = [numbers[word] for word in caption.split() if word in numbers]
            shown = [colours[name] for name in colours if caption.startswith(f"{name} ") or f" {name} " in caption]
            things = [names[name] for name in names if name in caption]
            x, y = (scene.points_xy / 64 - 0.5).T
            middle = (np.abs(x) < 0.16) & (np.abs(y) < 0.16)
            places = {"left": x < 0, "right": x > 0, "top": y < 0, "bottom": y > 0, "centre": middle}
            where = [place for place in places if english["places"][place] in caption]
            truths.append(
                told in ([], [len(scene.classes)])
                and all(set(scene.colours) == {colour} for colour in shown)
                and all(CLASSES[scene.classes[0]] == thing for thing in things)
                and all(places[place].all() for place in where)
            )
        if captions[0].endswith("centre"):  # within a tenth of the middle: no side is told of that
            assert max(np.abs(x).max(), np.abs(y).max()) < 0.1
            truths[1:] = [False] * 3
        assert truths == [True, False, False, False], (kind, captions)


def test_every_kind_count_and_place_is_asked_as_often(items):
    assert Counter(kind for (kind,) in items.columns["kind"]) == dict.fromkeys(mela_questions.TOLD, 40)
    rights = {kind: Counter() for kind in ("count", "place")}
    for (kind,), (right, *_) in zip(items.columns["kind"], items.captions["en"], strict=True):
        if kind in rights:
            rights[kind][next(word for word in words_of(kind, "en") if word in right)] += 1
    assert set(rights["count"].values()) == set(rights["place"].values()) == {8}


def test_a_seed_is_a_bench(items, monkeypatch):
    monkeypatch.setattr(mela_questions, "PER_KIND", 5)
    again, other = (questions(load_card("mela_questions"), seed, 64) for seed in (3, 4))
    assert again.captions["hi"] == questions(load_card("mela_questions"), 3, 64).captions["hi"]
    assert not set(again.keys) & set(other.keys)
    assert again.images[0].shape == (64, 64, 3)
    # Training counts its fairs from 0.
    assert min(int(key.split("-")[1]) for key in again.keys) > 1_000_000


def test_more_candidates_than_there_are(make_card):
    card = make_card("choices.Choices", num_candidates=5)
    with pytest.raises(ValueError, match=r"things\.yaml: num_candidates: found 5; expected 2 to 4"):
        questions(card)


# The protocol


def test_choices_are_those_of_a_loop_in_every_language_and_kind(make_card):
    card = make_card("choices.Choices")
    generator = np.random.default_rng(0)
    counts = generator.integers(2, 5, 40)
    captions = {
        "en": [[f"en {i} {t}" for t in range(count)] for i, count in enumerate(counts)],
        "ta": [[f"ta {i} {t}" for t in range(count)] if i % 3 else [] for i, count in enumerate(counts)],
    }
    kinds = ["" if i % 5 == 0 else "count" if i % 2 else "place" for i in range(40)]
    in_any_order = dict(reversed(captions.items()))
    items = items_of(card, 40, captions=in_any_order, columns={"kind": [[kind] for kind in kinds]})
    image_NE = generator.normal(size=(40, 12))
    texts = {
        text: (t == 0) * image_NE[i] + 3 * generator.normal(size=12)
        for of in captions.values()
        for i, of_image in enumerate(of)
        for t, text in enumerate(of_image)
    }
    assert set(card.protocols[0].texts(items, Options(["ta"]))) == set(texts)
    found = scores_of(items, image_NE, texts)
    for length in LENGTHS:
        hits = {"en": {}, "ta": {}}
        for code, of in captions.items():
            for i, of_image in enumerate(of):
                if of_image:
                    cosines = unit([texts[text] for text in of_image], length) @ unit(image_NE[i], length)
                    hits[code][i] = bool(cosines[0] > cosines[1:].max())
            for subset in ("", "count", "place"):
                kept = [i for i in hits[code] if subset in ("", kinds[i])]
                row = found["acc1", code, length, subset]
                assert row.value == pytest.approx(np.mean([hits[code][i] for i in kept]))
                assert row.chance == pytest.approx(np.mean([1 / counts[i] for i in kept]))
                assert row.num_items == len(kept)
        gap = np.mean([hits["en"][i] for i in hits["ta"]]) - np.mean(list(hits["ta"].values()))
        assert found["parity_acc1", "ta", length, ""].value == pytest.approx(gap)


def test_a_users_table_has_a_row_for_each_caption(tmp_path, make_card):
    for name in ("red", "green", "blue"):
        write(tmp_path / "things", {f"{name}.png": next(shades_of(name, 1, spread=0))})
    rows = ["file,kind,en,hi"]
    rows += [f"{name}.png,colour,a {name} sky,{name} आसमान\n{name}.png,colour,a {other} sky," for name, other in
             (("red", "green"), ("green", "blue"), ("blue", "red"))]  # fmt: skip
    rows += ["blue.png,colour,a cyan sky,green आसमान", "red.png,colour,,blue आसमान", "green.png,colour,,cyan आसमान"]
    (tmp_path / "things" / "table.csv").write_text("\n".join(rows), "utf-8")
    make_card("choices.Choices", num_candidates=2)
    bench = find_bench(tmp_path, [str(tmp_path / "things.yaml")])
    result = run_bench(Shades(), bench, Options())
    english = next(s for s in result.scores if (s.metric, s.language, s.length, s.subset) == ("acc1", "en", 3, ""))
    assert (english.value, english.num_items, english.chance) == (1.0, 3, pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3))
    assert {answer.key: answer.truth for answer in result.predictions if answer.language == "hi"} == {
        f"{name}.png": f"{name} आसमान" for name in ("red", "green", "blue")
    }


def test_one_caption_is_no_choice(make_card):
    card = make_card("choices.Choices")
    items = items_of(card, 2, captions={"en": [["a", "b"], ["a", "a"]]}, columns={"kind": [["x"], ["x"]]})
    with pytest.raises(ValueError, match=r"1\.jpg: captions in en: found 2, 1 of them different; expected"):
        card.protocols[0].check(items)
