"""The benchmark's page: what a reader must and must not find on it."""

import math
import re

import numpy as np
import pytest
from bench_fakes import answer, card, score, small_run

from indiclip.evals.formatting import Bar, heat, in_reading_order, interval, language_name, metric_name, number, signed
from indiclip.evals.reports.bench_pictures import _languages
from indiclip.evals.reports.bench_report import write_bench_report
from indiclip.evals.reports.confusion import MOST_CLASSES, Mistake, confusion, mistakes, most_confused, pairs
from indiclip.evals.reports.console import print_result
from indiclip.evals.reports.embedding_map import SIDE, closest, embedding_map
from indiclip.evals.reports.page import TEMPLATES
from indiclip.evals.result_files import load_result, save_result
from indiclip.evals.results import IMAGES, PHOTOGRAPHS
from indiclip.evals.samples import Sample


def no_picture(card, part, key):
    return None


def red_picture(card, part, key):
    return np.full((600, 300, 3), (255, 0, 0), np.uint8)


def page_of(tmp_path, result, picture=no_picture):
    return write_bench_report(tmp_path, result, picture).read_text(encoding="utf-8")


def words_of(page):
    """What a reader sees."""
    page = re.sub(r"<style>.*?</style>|data:image/[^\"]*", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def section(page, card_id):
    return page.split(f'<section id="{card_id}">')[1].split("</section>")[0]


def test_says_how_much_of_india_it_covers(tmp_path):
    words = words_of(page_of(tmp_path, small_run()))
    assert "Covers 2 of 11 categories of India." in words
    assert "English 0.65 en · 2 cards" in words
    assert "Hindi 0.25 hi · 1 card" in words


def test_a_skipped_category_is_skipped_with_its_reason_and_has_no_number(tmp_path):
    page = page_of(tmp_path, small_run())
    assert "1 skipped , so in no mean: Gods." in words_of(page)
    row = re.search(r"<tr><td>Gods</td>.*?</tr>", page)[0]
    assert "skipped: no folder gods/" in row
    assert not re.search(r"\d\.\d", row)
    assert 'id="gods-photographs"' not in page


def test_generated_pictures_are_marked_wherever_they_stand(tmp_path):
    page = page_of(tmp_path, small_run())
    assert "India, generated pictures: in no mean" in page
    assert "generated pictures, in no mean" in section(page, "script-procedural")
    assert "generated" not in section(page, "script-photographs")


def test_a_class_called_b_does_not_make_the_page_bold(tmp_path):
    result = small_run(model="<i>m</i>", note="</pre><script>alert(1)</script>")
    name = "<b>x"
    result.predictions = [answer("<u>.jpg", name, "dosa"), answer("2.jpg", "dosa", name)]
    result.cards[0].notes = ["<b>note"]
    result.cards[0].title = "<b>title"
    result.scores.append(score("food", 0.5, "<b>", subset="<b>group"))
    page = page_of(tmp_path, result, red_picture)
    assert "&lt;b&gt;x" in page
    for mark in ("<b>x", "<b>note", "<b>title", "<b>group", "<u>", "<i>m", "<script"):
        assert mark not in page


def test_loads_nothing(tmp_path):
    page = page_of(tmp_path, small_run(), red_picture)
    assert re.findall(r'(?:src|href)="(?!data:image/webp;base64,|#)', page) == []
    assert re.findall(r"url\((?!data:font)", page) == []
    assert "@import" not in page


def test_main_metrics_stand_with_interval_and_chance(tmp_path):
    words = words_of(page_of(tmp_path, small_run()))
    assert "Food top-1 0.200 0.600 0.500 to 0.700 0.400" in words


def test_the_gap_to_english_has_the_interval_of_its_own_score(tmp_path):
    result = small_run()
    assert "0.400 −0.200" in words_of(page_of(tmp_path, result))
    result.scores.append(score("food", 0.2, "hi", "parity_acc1", low=0.1, high=0.35))  # by which English is better
    words = words_of(page_of(tmp_path, result))
    assert "0.400 −0.200 (−0.350 to −0.100)" in words
    assert "against English, top-1" in words
    assert "−0.200 −0.350 to −0.100" in words


def test_every_length_and_view_has_its_number(tmp_path):
    result = small_run()
    result.views.append("64-square")
    result.scores += [score("food", 0.123, view="64-square"), score("food", 0.077, view="64-square", length=4)]
    part = words_of(section(page_of(tmp_path, result), "food-photographs"))
    assert "4 0.300 0.077 8 0.600 0.123" in part


def test_groups_of_images_have_a_row_each(tmp_path):
    result = small_run()
    result.scores += [score("script", 0.9, subset="tamil", num_items=3), score("script", 0.7, subset="old_bengali")]
    page = section(page_of(tmp_path, result), "script-photographs")
    assert page.count('<table class="groups">') == 1  # whose first column, of whole prompts too, is wide
    part = words_of(page)
    assert "tamil 3 0.900" in part
    assert "old bengali 0 0.700" in part


def test_images_seen_in_training_are_counted_and_scores_without_them_set_beside(tmp_path):
    result = small_run()
    first, *others = result.predictions
    result.predictions = [first._replace(flagged=True), *others]
    result.scores.append(score("food", 0.55, subset="clean", num_items=3))
    page = page_of(tmp_path, result)
    assert "1 image was found in the training data" in words_of(page).split("Every card")[0]
    part = words_of(section(page, "food-photographs"))
    assert "1 of 4 are in the training data: not said how." in part
    assert "0.600 0.550 −0.050 3" in part
    assert "clean" not in part


def test_the_ways_by_which_images_were_looked_for_are_said(tmp_path):
    counts = {"images": 4, "flagged": 3, "by_bytes": 1, "by_image": 2, "by_caption": 0, "not_comparable": 1}
    cards = {"food": counts | {"looked_for": ["bytes", "image"]}}
    seen = {"training_images": 1200, "training_texts": 0, "training_captions": 30, "training_unreadable": 2}
    page = page_of(tmp_path, small_run(contamination=seen | {"cards": cards}))
    top = words_of(page).split("Every card")[0]
    assert "3 images were found in the training data" in top
    assert "Looked through: 1,200 training images, 30 captions and texts; 2 unreadable." in top
    part = words_of(section(page, "food-photographs"))
    said = "3 of 4 are in the training data: the same bytes 1; the same looks 2; with too little structure to be known"
    assert f"{said} by its looks 1; not looked for: a caption." in part


def test_without_a_search_nothing_is_said_about_training(tmp_path):
    assert "training data" not in page_of(tmp_path, small_run())
    assert "No image was found in the training data." in page_of(tmp_path, small_run(contamination={}))


def test_a_value_that_is_no_number_is_a_dash_and_no_bar(tmp_path):
    result = small_run()
    result.scores[0] = score("food", math.nan, chance=0.2, low=math.nan, high=math.nan)
    page = page_of(tmp_path, result).split("</style>")[1]
    assert "nan" not in page
    assert "Food top-1 0.200 – 0.400" in words_of(page)


def test_confusions_are_named_with_their_counts(tmp_path):
    part = section(page_of(tmp_path, small_run()), "food-photographs")
    assert "1 of 2 dosa taken for roti" in words_of(part)
    assert part.count("<rect") == 3  # dosa right, dosa as roti, roti right


def test_pictures_are_small_and_their_number_is_bounded(tmp_path):
    result = small_run()
    result.predictions = [answer(f"{i}.jpg", f"c{i % 7}", f"c{i % 11 % 7}") for i in range(700)]
    page = page_of(tmp_path, result, red_picture)
    assert 6 < page.count("<img") <= 18
    assert len(page) < 200_000


def test_a_picture_that_is_gone_leaves_its_words(tmp_path):
    page = page_of(tmp_path, small_run())
    assert "<img" not in page
    assert "no picture" in page
    assert "roti 0.50 · dosa 0.25" in words_of(page)


def test_texts_are_no_classes_so_there_is_no_map_of_them(tmp_path):
    result = small_run()
    result.cards[0].metric, result.cards[0].protocol = "image_to_text_r5", "retrieval"
    result.cards[0].candidates = "images"
    result.scores[0] = score("food", 0.6, metric="image_to_text_r5", protocol="retrieval")
    result.predictions = [answer("1.jpg", "a plate", "a bowl", protocol="retrieval")]
    part = section(page_of(tmp_path, result), "food-photographs")
    assert "<rect" not in part
    assert "Mistakes, the surest first" in part
    assert "taken for each other" not in part


def test_without_india_the_headline_says_so(tmp_path):
    result = small_run()
    result.cards, result.scores, result.predictions = [card("mine", suite="own")], [], []
    assert "No card of the India suite was in this run." in page_of(tmp_path, result)


@pytest.mark.parametrize(
    ("suites", "name"),
    [
        (["india", "india"], "India benchmark"),
        (["own", "world"], "World and Own cards benchmark"),
        (["own"], "Own cards benchmark"),
    ],
)
def test_the_page_is_called_by_what_was_scored(tmp_path, suites, name):
    result = small_run()
    result.cards = [card(f"card{i}", suite=suite) for i, suite in enumerate(suites)]
    result.cards.append(card("gods", suite="culture", status="skipped"))
    result.scores, result.predictions = [], []
    page = page_of(tmp_path, result)
    assert f"<title>{name}: m</title>" in page
    assert f'<p class="eyebrow">{name}</p>' in page


def test_what_was_scored_comes_before_what_was_skipped(tmp_path):
    result = small_run()
    result.cards.insert(0, card("dances", status="skipped", notes=["no folder dances/"]))
    result.cards.insert(0, card("faces", status="skipped", suite="culture", notes=["no folder faces/"]))
    table = page_of(tmp_path, result).split('<table class="overview">')[1].split("</table>")[0]
    titles = re.findall(r"<tr><td>(?:<a [^>]*>)?(\w+)", table)
    assert titles == ["Food", "Script", "Dances", "Gods", "Script", "Faces"]


def test_own_cards_have_no_mean_and_texts_are_no_photographs(tmp_path):
    result = small_run()
    result.cards = [card("mine", suite="own"), card("pairs", suite="own", is_texts=True, num_images=100)]
    result.scores = [score("mine", 0.25, suite="own"), score("pairs", 0.75, suite="own")]
    page = page_of(tmp_path, result)
    words = words_of(page)
    assert "mean, corrected" not in words
    assert "India benchmark" not in words
    assert "Pairs texts 100 texts" in words_of(section(page, "pairs-photographs"))
    result.cards = [card(one.card, is_texts=one.is_texts) for one in result.cards]
    result.scores = [score("mine", 0.25), score("pairs", 0.75)]
    assert "mean, corrected for chance 0.500" in words_of(page_of(tmp_path, result))


def of_images():
    """A model without texts: probes of one card, and the main number of another, in which no text is involved."""
    result = small_run()
    result.cards = [card("food"), card("shots", metric="acc1_1_shot", protocol="few_shot")]
    result.scores = [score("food", 0.5, IMAGES, protocol="knn"), score("food", 0.75, IMAGES, protocol="linear_probe")]
    result.scores.append(score("shots", 0.25, IMAGES, "acc1_1_shot", protocol="few_shot", chance=0.2))
    result.answers = {}
    return result


def test_a_model_without_texts_has_its_numbers_on_top(tmp_path, capsys):
    result = of_images()
    words = words_of(page_of(tmp_path, result))
    head = "card main metric chance images only kNN, top-1 probe, top-1 India, photographs: 2 of 2 scored"
    assert f"{head} Food top-1 – 0.500 0.750 Shots top-1 after 1 shot 0.200 0.250" in words
    print_result(result, tmp_path)
    assert re.search(r"shots +top-1 after 1 shot .* 0\.250", capsys.readouterr().out)
    result.cards, result.scores = result.cards[:1], result.scores[:2]
    words = words_of(page_of(tmp_path, result))
    assert "chance kNN, top-1 probe, top-1 India, photographs: 1 of 1 scored Food top-1 – 0.500 0.750" in words
    assert "Languages side by side" not in words


def test_what_takes_no_text_has_a_column_beside_any_language(tmp_path, capsys):
    result = small_run()
    result.scores += [score("script", 0.5, language) for language in ("as", "bn", "gu", "kn")]
    result.cards.append(card("shots", metric="acc1_1_shot", protocol="few_shot"))
    result.scores.append(score("shots", 0.25, IMAGES, "acc1_1_shot", protocol="few_shot"))
    print_result(result, tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"chance +en +hi +\w+ +images only", said)
    assert "in the report: 3 more languages" in said


def test_a_card_whose_generated_part_is_scored_is_not_skipped_for_lack_of_photographs(tmp_path, capsys):
    result = small_run()
    result.cards[1].status, result.cards[1].notes = "absent", ["photos has no folder of it"]
    print_result(result, tmp_path)
    said = capsys.readouterr().out
    assert "\nno photographs of: script\n" in said
    assert "skipped: gods" in said
    assert "has no folder" not in said
    assert "1 skipped , so in no mean: Gods." in words_of(page_of(tmp_path, result))


def test_a_picture_says_in_which_languages_it_was_right():
    said = [_languages(dict(zip("abc", hits, strict=False))) for hits in ([1], [0, 0], [1, 1], [0, 0, 0], [1, 0, 1])]
    assert said == ["", "wrong in both languages", "right in both languages", "wrong in all 3 languages", "wrong in b"]


def test_counts_of_confusions():
    rows = [answer(f"{i}", truth, predicted) for i, (truth, predicted) in enumerate(["ab", "ab", "ba", "aa", "cc"])]
    found = confusion(rows)
    index = {name: i for i, name in enumerate(found.classes)}
    assert found.count_CC[index["a"], index["b"]] == 2
    assert found.count_CC.sum() == 5
    assert mistakes(found) == [Mistake("a", "b", 2, 3), Mistake("b", "a", 1, 1)]
    assert pairs(found) == [("a", "b")]


def test_confused_classes_lie_side_by_side():
    """Two groups that are confused only within themselves, named so that the alphabet would interleave them."""
    rows = [answer(f"{i}{j}{k}", f"{i}", f"{j}") for i in range(8) for j in range(i % 2, 8, 2) for k in range(3)]
    order = [int(name) % 2 for name in confusion(rows).classes]
    assert order in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)


def test_of_many_classes_the_most_confused_are_drawn(tmp_path):
    rows = [answer(f"{i}", f"class{i}", f"class{i}") for i in range(MOST_CLASSES + 40)]
    rows += [answer(f"x{i}", "class7", "class33") for i in range(5)]
    few = most_confused(confusion(rows), 30)
    assert sorted(few.classes) == ["class33", "class7"]
    result = small_run()
    result.predictions = rows
    assert "The 2 most confused of 100 classes." in section(page_of(tmp_path, result), "food-photographs")


def test_no_mistake_at_all(tmp_path):
    result = small_run()
    result.predictions = [answer(f"{i}", f"class{i}", f"class{i}") for i in range(MOST_CLASSES + 1)]
    assert "No mistake." in section(page_of(tmp_path, result), "food-photographs")


NAMES = {
    "dosa": {"en": "masala dosa", "hi": "डोसा"},
    "roti": {"en": "flat bread", "ta": "ரொட்டி"},
    "idli_x": {"en": "idli"},
}


def test_classes_have_both_their_names_wherever_they_stand_and_never_their_ids(tmp_path):
    result = small_run()
    result.cards[0].names = NAMES
    rows = [("dosa", "roti"), ("dosa", "roti"), ("roti", "idli_x"), ("roti", "roti"), ("idli_x", "idli_x")]
    result.predictions = [answer(f"{i}.jpg", *row) for i, row in enumerate(rows)]
    result.scores.append(score("food", 0.9, subset="idli_x"))
    part = section(page_of(tmp_path, result, red_picture), "food-photographs")
    words = words_of(part)
    assert "2 of 2 masala dosa डोसा taken for flat bread ரொட்டி" in words
    assert '<bdi lang="ta">ரொட்டி</bdi>' in part
    assert 'alt="masala dosa · डोसा: taken for flat bread · ரொட்டி"' in part
    for id_ in ("roti", "idli x", "idli_x"):
        assert id_ not in words.replace("masala dosa", "")


def test_no_picture_is_in_the_gallery_twice(tmp_path):
    """Classes that are all taken for one of a single image: it stands beside the first of them only."""
    result = small_run()
    rows = [("a", "x"), ("a", "x"), ("b", "x"), ("c", "x"), ("x", "x"), ("c", "c"), ("b", "a")]
    result.predictions = [answer(f"{i}.jpg", *row) for i, row in enumerate(rows)]
    part = section(page_of(tmp_path, result, red_picture), "food-photographs")
    shown = re.findall(r'<figure title="(\d).jpg"', part)
    assert sorted(shown) == sorted(set(shown))
    assert shown[:2] == ["0", "4"]


def test_a_text_that_is_called_like_a_class_stays_as_it_is(tmp_path):
    result = small_run()
    result.cards[0].names, result.cards[0].candidates = NAMES, "texts"
    result.predictions = [answer("1.jpg", "dosa", "idli_x")]
    words = words_of(section(page_of(tmp_path, result), "food-photographs"))
    assert "dosa → idli_x" in words
    assert "masala" not in words


def test_names_of_classes_outlive_saving(tmp_path):
    result = small_run()
    result.cards[0].names = NAMES
    save_result(result, tmp_path)
    assert load_result(tmp_path).cards[0].names == NAMES


def test_one_share_has_one_colour_in_tables_and_maps(tmp_path):
    """Half of the dosas are taken for rotis, and half of the images are right."""
    result = small_run()
    result.scores[0] = score("food", 0.5, chance=0.2)
    result.scores.append(score("script", 0.5, chance=0.4))
    page = page_of(tmp_path, result)
    assert heat(0.5) in re.findall(r'<rect class="wrong" fill-opacity="(\d+%)"', page)
    assert set(re.findall(r'<td class="number heat" style="--v:(\d+%)">0.500', page)) == {heat(0.5)}
    assert f'<i class="right" style="--v:{heat(0.5)}">50%</i>' in page
    assert (heat(0), heat(0.25), heat(1)) == ("0%", "25%", "50%")


@pytest.mark.parametrize("metric", ["median_km", "parity_acc1", "similarity_gap", "acc1_corrected", "spread"])
def test_what_is_no_share_has_no_colour(metric):
    assert "heat" not in MACROS.heated(score("food", 0.5, metric=metric))
    assert "heat" in MACROS.heated(score("food", 0.5, metric="within_25_km"))


def embeddings_of(groups, each=8, width=6):
    """Groups of images around directions that are at right angles, named by the group and the number."""
    generator = np.random.default_rng(0)
    rows = np.repeat(np.eye(groups, width), each, axis=0) + generator.normal(0, 0.05, (groups * each, width))
    keys = [f"{group}-{i}.jpg" for group in range(groups) for i in range(each)]
    classes = [f"c{group}" for group in range(groups) for _ in range(each)]
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return Sample("food", PHOTOGRAPHS, keys, classes, rows)


def test_a_map_of_embeddings_keeps_neighbours_and_is_the_same_again():
    sample = embeddings_of(5)
    first, second = (embedding_map(sample, {}, lambda key: np.zeros((20, 30, 3), np.uint8), 60) for _ in range(2))
    assert first == second
    places = np.array([(point.x, point.y) for point in first.points])
    distance = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(len(places))
    group = np.array(sample.classes)
    assert (group[distance.argmin(1)] == group).mean() == 1
    shown = [point for point in first.points if point.has_picture]
    for i, one in enumerate(shown):  # and no thumbnail covers another
        assert all(max(abs(one.x - other.x), abs(one.y - other.y)) > SIDE for other in shown[:i])
    assert 5 <= len(shown) <= 60


def test_the_closest_classes_are_those_of_the_nearest_means():
    rows = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 1], [0, 0.6, 0.8]], np.float32)
    sample = Sample("food", PHOTOGRAPHS, list("abcd"), ["x", "y", "z", "z"], rows)
    pairs = closest(sample)
    assert [pair[:2] for pair in pairs] == [("x", "y"), ("y", "z"), ("x", "z")]
    mean = np.array([0, 0.3, 0.9]) / np.hypot(0.3, 0.9)
    assert [pair[2] for pair in pairs] == pytest.approx([0.8, 0.6 * mean[1], 0.0], abs=1e-6)


@pytest.mark.parametrize("rows", [np.ones((40, 4)), np.eye(4), np.ones((40, 1))])
def test_there_is_no_map_of_few_images_or_of_equal_ones(rows):
    keys = [f"{i}" for i in range(len(rows))]
    sample = Sample("food", PHOTOGRAPHS, keys, [""] * len(rows), rows.astype(np.float32))
    assert embedding_map(sample, {}, lambda key: None, 60) is None


def test_the_page_has_the_map_with_words_beside_it(tmp_path):
    result = small_run()
    result.samples = [embeddings_of(3)]
    result.cards[0].names = {"c0": {"en": "dosa"}, "c1": {"en": "roti"}}
    result.predictions = [answer("0-0.jpg", "c0", "c0"), answer("1-0.jpg", "c1", "c0")]
    part = section(page_of(tmp_path, result, red_picture), "food-photographs")
    assert "Map of 24 images by t-SNE" in part
    assert re.findall(r'class="dots (\w+)"', part)[-1] == "open"  # most images of the sample have no answer
    assert "dosa and roti: cosine of their mean embeddings" in part
    assert "<h3>Map" not in section(page_of(tmp_path, small_run()), "food-photographs")


def test_protocols_without_words_of_their_own_read_well(tmp_path):
    result = small_run()
    for shots in (16, 2, 1):
        result.scores.append(score("food", 0.5, IMAGES, f"acc1_{shots}_shots", protocol="few_shot"))
    result.scores.append(score("food", 0.25, metric="hits_r10", protocol="my_own_way"))
    for language, prompt, value in (("en", "bare name", 0.25), ("hi", "bare name", 0.125), ("en", "a {c}", 0.5)):
        result.scores.append(score("food", value, language, protocol="wording", subset=prompt))
    words = words_of(section(page_of(tmp_path, result), "food-photographs"))
    assert "top-1 after 1 shots top-1 after 2 shots top-1 after 16 shots images only 0.500 0.500 0.500" in words
    assert "My own way hits R@10 English 0.250" in words
    assert "images English Hindi bare name 0 0.250 0.125 a {c} 0 0.500" in words


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("acc1_1_shot", "top-1 after 1 shot"),
        ("acc1_16_shots", "top-1 after 16 shots"),
        ("r10", "R@10"),
        ("image_only_r50", "image only, R@50"),
        ("image_to_text_r5", "image to text R@5"),
        ("mp5_64", "mP@5 of 64 numbers"),
        ("parity_acc1", "against English, top-1"),
        ("within_25_km", "within 25 km"),
        ("f1_macro", "f1 macro"),
    ],
)
def test_names_of_metrics(metric, words):
    assert metric_name(metric) == words


def test_metrics_that_differ_in_a_number_stand_in_its_order():
    found = ["acc1_16_shots", "acc1_2_shots", "mean", "image_to_text_r10", "acc1_4_shots", "image_to_text_r5"]
    ordered = ["acc1_2_shots", "acc1_4_shots", "acc1_16_shots", "mean", "image_to_text_r5", "image_to_text_r10"]
    assert in_reading_order(found) == ordered


def test_a_share_of_distances_is_no_distance():
    assert number(0.25, "within_25_km") == "0.250"


def test_the_page_says_what_its_intervals_are(tmp_path):
    words = words_of(page_of(tmp_path, small_run()))
    assert "Wilson’s score interval" in words
    assert "Newcombe’s paired interval" in words


def test_an_interval_of_one_point_is_none():
    assert interval(0.5, 0.5) == ""
    assert "whisker" not in MACROS.chart([Bar("a", score("x", 0.5, low=0.5, high=0.5))], "acc1")


def test_what_scrolls_can_be_reached_by_keyboard_and_says_what_it_is(tmp_path):
    result = small_run()
    result.samples = [embeddings_of(3)]
    page = page_of(tmp_path, result, red_picture)
    scrolling = re.findall(r'<(?:div class="scroll"|pre)[^>]*>', page)
    assert len(scrolling) > 5
    assert all('tabindex="0"' in tag for tag in scrolling)
    assert all('aria-label="' in tag for tag in scrolling if tag.startswith("<div"))
    assert not re.findall(r"<img(?![^>]*alt=)", page)


@pytest.mark.parametrize(
    ("value", "metric", "words"),
    [
        (0.12345, "acc1", "0.123"),
        (-0.5, "acc1", "−0.500"),
        (-0.0001, "acc1", "0.000"),
        (1234.4, "median_km", "1,234 km"),
        (0.6314, "within_750_km", "0.631"),
        (math.inf, "acc1", "–"),
        (None, "acc1", "–"),
    ],
)
def test_numbers_for_people(value, metric, words):
    assert number(value, metric) == words


def test_differences_for_people():
    assert [signed(value) for value in (0.1, -0.1, 0.0001, 0.0, math.nan)] == [
        "+0.100",
        "−0.100",
        "0.000",
        "0.000",
        "–",
    ]
    assert interval(0.1, None) == ""


def test_names_of_languages():
    assert language_name("hi-Latn") == "Hindi, romanised"
    assert language_name("xx") == "xx"


MACROS = TEMPLATES.get_template("macros.html").module


def test_bars_of_distances_reach_to_the_longest():
    widths = re.findall(
        r"--v:([\d.]+)%", MACROS.chart([Bar("a", score("x", 50.0)), Bar("b", score("x", 200.0))], "median_km")
    )
    assert widths == ["25.0", "100.0"]
    assert re.findall(r"--v:([\d.]+)%", MACROS.chart([Bar("a", score("x", 0.25))], "acc1")) == ["25.0"]


def test_words_are_escaped_in_every_cell():
    assert "<td>&lt;td&gt;</td>" in MACROS.table(["x"], [["<td>"]])
    assert "<th>&lt;b&gt;<small>&lt;i&gt;</small></th>" in MACROS.table([("<b>", "<i>")], [])
    assert MACROS.table(["x", "y"], [["1", score("food", 0.5)]]).count("<td") == 2


def test_no_template_marks_words_as_safe():
    for name in TEMPLATES.list_templates():
        assert not re.search(r"\bsafe\b|autoescape", TEMPLATES.loader.get_source(TEMPLATES, name)[0]), name


def test_the_seconds_of_a_run_are_told(tmp_path):
    result = small_run(seconds={"images": 61.2, "texts": 3.1, "scores": 2.4})
    file = write_bench_report(tmp_path, result, lambda *_: None)
    assert " 67 s on " in file.read_text("utf-8")


def test_chance_of_a_card_is_that_of_its_main_protocol_and_comes_before_its_hard_pairs(tmp_path):
    result = small_run()
    result.scores.append(score("food", 0.5, protocol="hard_pairs", chance=0.31))
    told = section(page_of(tmp_path, result), "food-photographs")
    assert "main metric: top-1, chance 0.200" in told
    assert told.index("Zero shot") < told.index("Hard pairs")


def test_chance_under_a_table_is_that_of_english(tmp_path):
    result = small_run()
    result.scores[1] = score("food", 0.4, "hi", chance=0.25)  # fewer classes have a name
    assert "chance 0.200" in words_of(section(page_of(tmp_path, result), "food-photographs")).split("Hindi")[1]
