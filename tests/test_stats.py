"""`indiclip shards stats`: numbers counted by hand."""

import json

from test_shards import png, write_tar

from indiclip.cli import main


def stats(capsys, *words):
    assert main(["shards", "stats", *map(str, words), "--json", "--workers", "0"]) == 0
    return json.loads(capsys.readouterr().out)


def test_counts_of_a_hand_made_shard(tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("kite\nमटका\n", "utf-8")
    captions = {
        "language": ("hi", {"caption": "एक दीया", "language": "hi"}),
        "by language": ("", {"captions": {"ta": "விளக்கு", "en": "a lamp"}}),
        "list": ("", {"captions": ["namaste", "ஒரு விளக்கு"], "annotations": [{"class": 1}, {"class": 1}]}),
    }
    members = [("0.png", png(0, (64, 32))), ("0.txt", "বাতি x"), ("0.cls", "1"), ("1.png", b"broken"), ("1.txt", "x")]
    members += [("2.png", png(2, (32, 32))), ("2.cls", "0"), ("3.png", png(3, (32, 32))), ("3.cls", "1")]
    for number, (_, entry) in enumerate(captions.values()):
        members += [(f"j{number}.png", png(9, (40, 100))), (f"j{number}.json", json.dumps(entry))]
    found = stats(capsys, write_tar(tmp_path / "a.tar", members), "--max_tokens", 6)
    assert (found["shards"], found["samples"], found["unreadable"]) == (1, 7, 1)
    assert found["formats"] == {"PNG": 6}
    assert found["width"] == {"min": 32, "median": 40, "p99": 64, "max": 64, "mean": 41.33}
    assert found["aspects"] == {"1:4 to 1:2": 3, "about 1:1": 2, "2:1 to 4:1": 1}
    # 64x32 fits as 48x32 pixels, 3 x 2 patches of 16; 32x32 is 4 of them; 40x100 fits as 1 x 4 or 2 x 3 patches.
    assert found["tokens"]["max"] <= 6
    assert found["tokens"]["min"] == 4
    assert (found["captions"], found["captioned_samples"]) == (6, 4)
    assert found["words"] == {"min": 1, "median": 2, "p99": 2, "max": 2, "mean": 1.67}
    assert found["scripts"] == {"Tamil": 2, "Latin": 2, "Bengali + Latin": 1, "Devanagari": 1}
    assert found["languages"]["declared"] == {"hi": 1, "ta": 1, "en": 1}
    assert found["languages"]["by_script"] == {
        "Bengali + Latin": 1, "Latin (English, romanised, ...)": 1, "ta": 1,
    }  # fmt: skip
    assert found["labels"] == {"मटका": 2, "kite": 1}
    assert found["boxes"] == {"मटका": 2}


def test_the_emoji_names_are_counted_by_language(data_root, tmp_path, capsys):
    folder = data_root / "emoji_multilingual"
    words = [str(folder / "names.tsv"), "--images", str(folder / "images"), "--out", str(tmp_path)]
    for language in ("ta", "ur"):
        command = ["shards", "pack", *words, "--name", language, "--caption_column", language, "--workers", "0"]
        assert main(command) == 0
    capsys.readouterr()
    found = stats(capsys, tmp_path / "*.tar")
    assert found["samples"] == 2 * 696
    assert found["languages"] == {"declared": {"ta": 696, "ur": 696}, "by_script": {}}
    assert found["scripts"]["Tamil"] > 690
    assert found["scripts"]["Arabic"] > 690


def test_the_table_names_everything_and_an_empty_caption_list(tmp_path, capsys):
    members = {"0.png": png(), "0.txt": "एक दीया", "1.png": png(), "1.cls": "4"}
    path = write_tar(tmp_path / "a.tar", members)
    assert main(["shards", "stats", path, "--workers", "0"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "2 samples in 1 shards",
        "characters  min 7, median 7",
        "          1  100.0%  Devanagari (hi, mr, ne, sa, ...)",
        "          1  100.0%  4",
    ):
        assert line in shown


def test_a_shard_that_is_none_is_one_line_from_another_process(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_text("no tar" * 200)
    assert main(["shards", "stats", str(tmp_path / "*.tar"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert "a.tar: no tar: " in error
    assert error.count("\n") == 1
