"""Gaps between groups: against loops, simulated coverage, and a user's table with columns of their own."""

import numpy as np
import pytest
from bench_fakes import Shades, score, shades_of
from layout_files import tar, write
from test_protocols import LENGTHS, classes, items_of, make_card, scores_of, unit

from indiclip.evals.bench import run_bench
from indiclip.evals.find import find_bench
from indiclip.evals.formatting import is_share
from indiclip.evals.protocols.group_gaps import UNKNOWN, GroupGaps, largest_gap
from indiclip.evals.protocols.protocol import Options

__all__ = ["make_card"]


def gaps(*by, **other):
    return {"class_path": "indiclip.evals.protocols.group_gaps.GroupGaps", "init_args": {"by": list(by)} | other}


def test_two_groups_have_newcombes_interval():
    # Newcombe 1998, p. 873, table II, example (a), method 10: 56/70 less 48/80 is 0.0524 to 0.3339.
    found = largest_gap([np.arange(80) < 48, np.arange(70) < 56])
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


@pytest.mark.parametrize("rates", [[0.6] * 6, [0.5, 0.6, 0.9], [0.9, 0.4]])
def test_the_largest_of_many_gaps_is_covered_as_often_as_it_says(rates):
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        _, low, high = largest_gap([generator.random(60) < rate for rate in rates])
        covered += low <= max(rates) - min(rates) <= high
    assert covered / 300 > 0.93


def test_accuracies_of_groups_are_those_of_a_loop(make_card):
    card = make_card("zero_shot.ZeroShot", gaps("age", "tone", least=4), classes=classes(6, hi=lambda c: f"hi {c}"))
    assert card.required_fields == {"class", "age", "tone"}
    generator = np.random.default_rng(0)
    label_N = np.arange(60) % 6
    center_CE = generator.normal(size=(6, 12))
    age_N = generator.choice(["old", "young", ""], 60, p=[0.5, 0.4, 0.1])
    tone_N = np.array(["a", "b"] * 20 + ["c"] * 17 + ["d"] * 3)
    noise_N1 = np.where(age_N == "old", 3.0, 1.0)[:, None]
    image_NE = center_CE[label_N] + noise_N1 * generator.normal(size=(60, 12))
    texts = {f"{name} {c}": center_CE[c] + 0.3 * generator.normal(size=12) for c in range(6) for name in ("name", "hi")}
    columns = {"age": [[one] for one in age_N], "tone": [[one] for one in tone_N]}
    found = scores_of(items_of(card, 60, label_N, columns=columns), image_NE, texts)
    for length in LENGTHS:
        for code, name in (("en", "name"), ("hi", "hi")):
            cosine_NC = unit(image_NE, length) @ unit([texts[f"{name} {c}"] for c in range(6)], length).T
            hit_N = cosine_NC.argmax(1) == label_N
            for column, group_N in (("age", age_N), ("tone", tone_N)):
                rates = {}
                for group in set(group_N):
                    row = found["acc1", code, length, f"{column}={group or UNKNOWN}"]
                    rates[group] = hit_N[group_N == group].mean()
                    assert row.value == pytest.approx(rates[group])
                    assert row.num_items == (group_N == group).sum()
                kept = [rate for group, rate in rates.items() if group not in ("", "d")]  # of d there are three
                gap, worst = (
                    found[f"{metric}_{column}", code, length, ""] for metric in ("largest_gap", "worst_group")
                )
                assert gap.value == pytest.approx(max(kept) - min(kept))
                assert 0 <= gap.low <= gap.value <= gap.high
                assert worst.value == pytest.approx(min(kept))
    assert found["worst_group_age", "en", 12, ""].chance == pytest.approx(1 / 6)
    assert found["largest_gap_age", "en", 12, ""].chance is None


def test_a_gap_has_no_colour_of_what_is_good():
    assert not is_share(score("faces", 0.5, metric="largest_gap_age"))
    assert is_share(score("faces", 0.5, metric="worst_group_age"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "age"}, "by: found 'age'; expected a list of columns, such as"),
        ({"by": []}, r"by: found \[\]; expected a list"),
        ({"by": ["age"], "least": 0}, "least: found 0; expected a whole number from 1"),
    ],
)
def test_slips_in_a_card_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupGaps(**arguments)


PAGE = [{"id": name, "names": {"en": name}} for name in ("red", "green", "blue")]


def table(tmp_path, header="file,class,light"):
    rows = [header]
    for name in ("red", "green", "blue"):
        for number, png in enumerate(shades_of(name, 8)):
            write(tmp_path / "things", {f"{name}-{number}.png": png})
            rows.append(f"{name}-{number}.png,{name},{'dark' if number % 2 else 'bright'}")
    (tmp_path / "things" / "table.csv").write_text("\n".join(rows))
    return find_bench(tmp_path, [str(tmp_path / "things.yaml")])


def test_a_users_table_has_columns_of_their_own(tmp_path, make_card):
    make_card("zero_shot.ZeroShot", gaps("light"), classes=PAGE)
    result = run_bench(Shades(), table(tmp_path), Options())
    rows = {(s.protocol, s.metric, s.subset): s for s in result.scores if s.length == 3 and s.language == "en"}
    hits = {"dark": [], "bright": []}
    for answer in result.predictions:
        number = int(answer.key.split("-")[1].split(".")[0])
        hits["dark" if number % 2 else "bright"].append(answer.rank == 0)
    rates = {light: np.mean(of) for light, of in hits.items()}
    for light, rate in rates.items():
        assert rows["group_gaps", "acc1", f"light={light}"].value == pytest.approx(rate)
        assert rows["group_gaps", "acc1", f"light={light}"].num_items == 12
    gap = rows["group_gaps", "largest_gap_light", ""]
    assert gap.value == pytest.approx(max(rates.values()) - min(rates.values()))
    assert "eval/own/things/en/group_gaps_largest_gap_light" in result.logged()


def test_a_column_that_a_table_does_not_have_is_named(tmp_path, make_card):
    make_card("zero_shot.ZeroShot", gaps("light"), classes=PAGE)
    with pytest.raises(ValueError, match=r"table\.csv: no column 'light'.*nearest is 'ligth'"):
        table(tmp_path, "file,class,ligth")


def test_shards_have_no_columns(tmp_path, make_card):
    make_card("zero_shot.ZeroShot", gaps("light"), classes=PAGE)
    write(tmp_path / "things", {"a.tar": tar({"0.png": next(shades_of("red", 1)), "0.cls": "red"})})
    with pytest.raises(ValueError, match="things: shards, which have no columns; expected a table with light"):
        find_bench(tmp_path, [str(tmp_path / "things.yaml")])
