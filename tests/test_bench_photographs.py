"""A benchmark run from a folder of images to its results."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from indiclip.evals.bench import run_bench
from indiclip.evals.find import check_languages, find_bench
from indiclip.evals.leaderboard import groups_of, row_of
from indiclip.evals.models.embedder import View
from indiclip.evals.protocols.protocol import Options
from indiclip.evals.reports.bench_report import write_bench_report
from indiclip.evals.result_files import save_result
from indiclip.evals.samples import sample_of


class MeanColour:
    """Images are their mean colour, texts a number of their letters."""

    weights = ""

    name, lengths, embeds_text = "colour", [2, 3], True

    def views(self, names):
        return [View(name, None, "square") for name in names]

    def prepare(self, image, view):
        from indiclip.preprocessing import read_upright

        return read_upright(image).float().mean((1, 2))

    def collate(self, prepared):
        return torch.stack(prepared)

    def embed_images(self, batch):
        return normalize(batch, dim=1)

    def embed_texts(self, texts):
        return normalize(torch.tensor([[len(text), text.count("a"), 1.0] for text in texts]), dim=1)


def photographs(root, classes=("idli", "jalebi", "samosa"), card="edibles"):
    for number, name in enumerate(classes):
        (root / card / name).mkdir(parents=True)
        for shade in (90, 160, 230):
            pixels = np.roll(np.array([shade, 20, 40], np.uint8), number)
            Image.fromarray(np.tile(pixels, (8, 8, 1))).save(root / card / name / f"{shade}.png")
    return root


def run(root, cards=("edibles",), **options):
    bench = find_bench(root, cards, procedural=False)
    return run_bench(MeanColour(), bench, Options(resamples=20, **options))


def test_two_models_on_the_same_photographs_stand_in_one_table_of_the_leaderboard(tmp_path):
    results = [run(photographs(tmp_path)), run(tmp_path)]
    results[1].model = "another"
    (group,) = groups_of([row_of(result) for result in results])
    assert [row["model"] for row in group] == ["colour", "another"]
    assert group[0]["data"]
    assert (group[0]["covered"], group[0]["of"]) == (1, 11)


def test_top_1_is_what_the_predictions_say(tmp_path):
    result = run(photographs(tmp_path))
    for language in ("en", "hi"):
        rows = [row for row in result.predictions if (row.protocol, row.language) == ("zero_shot", language)]
        (said,) = (
            score.value
            for score in result.scores
            if (score.protocol, score.language, score.metric) == ("zero_shot", language, "acc1")
            and (score.length, score.subset) == (3, "")
        )
        assert said == pytest.approx(np.mean([row.truth == row.predicted for row in rows]))


def test_every_recall_stands_beside_what_guessing_gives(tmp_path):
    result = run(photographs(tmp_path))  # 9 images of 3 classes, 40 candidates
    chances = {score.metric: score.chance for score in result.scores if score.language == "en" and not score.subset}
    assert chances["acc5"] == pytest.approx(5 / 40)
    assert chances["text_to_image_r1"] == pytest.approx(1 / 3)
    assert chances["text_to_image_r5"] == pytest.approx(1 - (6 * 5 * 4 * 3 * 2) / (9 * 8 * 7 * 6 * 5))


def test_a_page_is_written_of_so_few_images_that_guessing_is_always_right(tmp_path):
    result = run(photographs(tmp_path, ("idli",)))  # 3 images: any is among the first 5
    assert 1.0 in {score.chance for score in result.scores if score.metric == "text_to_image_r5"}
    write_bench_report(tmp_path, result, lambda *_: None)


def test_a_language_that_no_card_has_is_said(tmp_path):
    bench = find_bench(photographs(tmp_path), ["edibles"], procedural=False)
    check_languages(bench, ["hi", "hi-Latn"])
    with pytest.raises(ValueError, match="languages: found 'hin'; nearest is 'hi'; expected one of as, .*en, "):
        check_languages(bench, ["hin"])
    with pytest.raises(ValueError, match="languages: found 'tamil'; nearest is 'ta'; expected one of as, "):
        check_languages(bench, ["tamil"])


def test_a_card_that_is_named_twice_is_scored_once_and_two_of_one_name_are_refused(tmp_path):
    bench = find_bench(photographs(tmp_path), ["edibles", "edibles"], procedural=False)
    assert len(bench.items) == 1
    own = tmp_path / "edibles.yaml"
    own.write_text("{title: Mine, task: retrieval}")
    with pytest.raises(ValueError, match=r"india/edibles.yaml and .*edibles.yaml are both called 'edibles'; rename"):
        find_bench(tmp_path, ["edibles", str(own)])


def test_a_folder_with_another_name_is_pointed_out(tmp_path):
    photographs(tmp_path, card="edibles_food")
    with pytest.raises(FileNotFoundError, match="nearest is 'edibles_food'; found the folders edibles_food; expected"):
        find_bench(tmp_path, ["edibles"], procedural=False)
    with pytest.raises(FileNotFoundError, match="^nothing to score: no folder of images was given$"):
        find_bench(None, ["edibles", "festivals"])


def test_a_card_whose_images_are_all_unreadable_is_skipped_for_that(tmp_path):
    (tmp_path / "edibles" / "idli").mkdir(parents=True)
    (tmp_path / "edibles" / "idli" / "1.jpg").write_text("no picture")
    (card,) = run(tmp_path).cards
    assert (card.status, card.notes[0]) == ("skipped", "none of the images to score can be read")
    assert card.notes[1].startswith("not counted, unreadable: idli/1.jpg: expected the bytes of a JPEG")
    assert len(card.notes) == 2


def test_a_run_keeps_embeddings_for_the_report_and_the_names_of_its_classes(tmp_path):
    result = run(photographs(tmp_path))
    (sample,) = result.samples
    assert sorted(sample.keys) == sorted({row.key for row in result.predictions})
    assert sample.classes == [key.split("/")[0] for key in sample.keys]
    assert np.linalg.norm(sample.image_SE, axis=1) == pytest.approx(1, abs=1e-6)
    assert result.cards[0].names["idli"] == {"en": "idli", "hi": "इडली"}
    save_result(result, tmp_path / "run")
    saved = (tmp_path / "run" / "metrics.json").read_text("utf-8")
    assert "इडली" in saved
    assert "samples" not in saved


def test_names_for_people_are_in_a_language_that_was_asked_for(tmp_path):
    photographs(tmp_path)
    assert run(tmp_path, languages=["ta"]).cards[0].names["idli"] == {"en": "idli", "ta": "இட்லி"}


def test_of_many_images_a_sample_has_every_class_before_a_second_of_any(tmp_path):
    (items,) = find_bench(photographs(tmp_path), ["edibles"], procedural=False).items
    embeddings = torch.eye(9)
    embeddings[0] = torch.nan  # which nothing can be said about
    (few,) = sample_of(items, embeddings, 4)
    assert (len(few.keys), len(set(few.classes))) == (4, 3)
    assert items.keys[0] not in sample_of(items, embeddings)[0].keys
    turned = items.select(range(8, -1, -1))
    assert set(sample_of(turned, embeddings.flip(0), 4)[0].keys) == set(few.keys)
