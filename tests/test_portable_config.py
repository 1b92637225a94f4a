"""A run's folder works from anywhere, and so do the shipped configs; no secret is written down."""

import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from experiments import config, fit
from PIL import Image
from transformers import BertConfig, BertModel

from indiclip.cli import main
from indiclip.config_files import SHIPPED, find_config, read_config
from indiclip.training.cli import run
from indiclip.training.portable_config import PortableConfig

ROOT = Path(__file__).parent.parent
LAST = "checkpoints/last.ckpt"
MELA = str(SHIPPED / "tokenizers" / "mela.json")


def shard(file, classes=("cat", "dog")):
    """Four pictures with labels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number in range(4):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(picture, "PNG")
            members = {"png": picture.getvalue(), "txt": b"a thing", "cls": str(number % 2).encode()}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (file.parent / "classes.txt").write_text("\n".join(classes))


def of_shards(urls, classes=None, tokenizer=None):
    dataset = {"class_path": "indiclip.webdataset.shards.Shards", "init_args": {"urls": urls, "classes": classes}}
    tree = config(data__train__0__dataset=dataset, data__val__0__dataset=dataset)
    if tokenizer:
        fast = {"class_path": "indiclip.tokenizers.FastTokenizer", "init_args": {"source": tokenizer}}
        tree["model"]["encoder"]["text"]["tokenizer"] = fast
    return tree


def options(saved):
    """Of the training source, and of the tokenizer."""
    text = saved["model"]["encoder"]["init_args"]["text"]["init_args"]
    return saved["data"]["train"][0]["dataset"]["init_args"], text["tokenizer"]["init_args"]


def test_a_run_is_scored_and_goes_on_wherever_its_folder_and_the_caller_are(tmp_path, monkeypatch, capsys):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    shard(project / "data" / "a.tar")
    shutil.copy(SHIPPED / "tokenizers" / "mela.json", project)
    elsewhere.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.delenv("INDICLIP_DATA", raising=False)
    data = "${oc.env:INDICLIP_DATA,data}"
    tree = of_shards(f"{data}/*.tar", f"{data}/classes.txt", "mela.json")
    assert fit(project, tree) == 0
    saved = yaml.safe_load((project / "runs/experiment/config.yaml").read_text())
    source, tokenizer = options(saved)
    assert source["urls"] == f"${{oc.env:INDICLIP_DATA,{project}/data}}/*.tar"
    assert source["classes"] == "${here:files/classes.txt}"
    assert tokenizer["source"] == "${here:files/mela.json}"
    shutil.move(project / "runs" / "experiment", elsewhere / "moved")
    for file in ("mela.json", "data/classes.txt"):
        (project / file).unlink()
    monkeypatch.chdir(elsewhere)
    assert run(["validate", "--config", "moved/config.yaml", "--ckpt_path", f"moved/{LAST}"]) == 0
    monkeypatch.chdir(tmp_path)
    part = tmp_path / "longer.yaml"
    part.write_text("trainer: {max_steps: 3}")
    capsys.readouterr()
    words = ["fit", "--config", "elsewhere/moved/config.yaml", "--config", str(part), "--ckpt_path"]
    assert run([*words, "last"]) == 0
    assert "changed since the checkpoint:\n  trainer.max_steps: 2 -> 3\n" in capsys.readouterr().out
    assert torch.load(elsewhere / "moved" / LAST, weights_only=True)["global_step"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "longer.yaml", "project"]


def test_files_of_one_name_are_told_apart_and_words_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/t.json", "b/t.json", "c/t.json", "mean", "photos/x.jpg", "weights.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("other" if name.startswith("b") else "same")
    model = {"x": "a/t.json", "y": "b/t.json", "z": "c/t.json", "pool": "mean", "teacher": "weights.pt"}
    model["weights"] = "timm:test_vit:weights.pt"
    model["serialized"] = json.dumps({"split": "/", "vocabulary": "longer than any path " * 300})
    data = {"classes": ["mean", "photos"], "images": "photos", "part": "photos", "urls": "photos/*.tar", "n": 3}
    made = PortableConfig({"model": model, "data": data}, None, tmp_path / "run")
    (tmp_path / "run").mkdir()
    made.copy_files()
    here = "${here:files/"
    assert made.tree["model"] == {
        "x": f"{here}t.json}}", "y": f"{here}t-2.json}}", "z": f"{here}t.json}}",
        "pool": "mean", "teacher": f"{tmp_path}/weights.pt", "weights": f"timm:test_vit:{tmp_path}/weights.pt",
        "serialized": model["serialized"],
    }  # fmt: skip
    assert made.tree["data"] == data | {"images": f"{tmp_path}/photos", "urls": f"{tmp_path}/photos/*.tar"}
    assert (tmp_path / "run/files/t-2.json").read_text() == "other"
    again = read_config_of(made.tree, tmp_path / "run")
    assert PortableConfig(again, None, tmp_path / "run").tree == made.tree


def read_config_of(tree, folder):
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return read_config(folder / "config.yaml")


def test_weights_to_begin_with_are_not_needed_again(tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=2000, **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer = {"class_path": "indiclip.tokenizers.FastTokenizer", "init_args": {"source": "me/on-the-hub"}}
    tree = config()
    text = {"pretrained": str(tmp_path / "bert"), "architecture": None, "tokenizer": tokenizer}
    tree["model"]["encoder"]["text"] |= text
    (tmp_path / "hub").mkdir()
    shutil.copy(MELA, tmp_path / "hub" / "tokenizer.json")
    (tmp_path / "hub" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with monkeypatch.context() as patch:
        patch.setattr("indiclip.tokenizer_sources._from_hub", lambda _: tmp_path / "hub")
        assert fit(tmp_path, tree) == 0
    shutil.rmtree(tmp_path / "bert")
    folder = tmp_path / "runs" / "experiment"
    flags = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / LAST)]
    assert run(["validate", *flags]) == 0
    assert run(["predict", *flags]) == 0
    assert run(["fit", *flags, "--trainer.max_steps", "3"]) == 0
    text = yaml.safe_load((folder / "config.yaml").read_text())["model"]["encoder"]["init_args"]["text"]
    assert text["init_args"]["pretrained"] == str(tmp_path / "bert")  # what a new run begins with
    assert run(["fit", "--config", str(folder / "config.yaml"), "--runs", str(tmp_path)]) == 2


class Signed(SimpleHTTPRequestHandler):
    """Serves a folder to who gives the signature."""

    def send_head(self):
        if "signature=s3cr3t-query" not in self.path:
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    shard(tmp_path / "served" / "a.tar")
    handler = functools.partial(Signed, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{made.server_port}"
        made.shutdown()


def leaks(folder, *secrets):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [(path.name, secret) for path in files for secret in secrets if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("is_literal", [True, False])
def test_no_secret_of_a_url_is_in_any_file_of_the_run(is_literal, server, tmp_path, monkeypatch, capfd):
    secrets = ("s3cr3t-password", "s3cr3t-query")
    monkeypatch.setenv("MY_PASSWORD", secrets[0])
    monkeypatch.setenv("MY_SIGNATURE", secrets[1])
    password, signature = secrets if is_literal else ("${oc.env:MY_PASSWORD}", "${oc.env:MY_SIGNATURE}")
    tree = of_shards(f"http://me:{password}@{server}/a.tar?signature={signature}")
    assert fit(tmp_path, tree) == 0
    folder = tmp_path / "runs" / "experiment"
    assert leaks(folder, *secrets) == []
    flags = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / LAST)]
    written = options(yaml.safe_load((folder / "config.yaml").read_text()))[0]["urls"]
    if is_literal:
        assert written == f"http://***@{server}/a.tar?***"
        assert run(["validate", *flags]) == 2
        assert "whose password or signature was not written down; give it again" in capfd.readouterr().err
        assert fit(tmp_path, tree, *flags[2:], "--trainer.max_steps", "3") == 0
    else:
        assert written == tree["data"]["train"][0]["dataset"]["init_args"]["urls"]
        assert run(["fit", *flags, "--trainer.max_steps", "3"]) == 0
        assert "trainer.max_steps: 2 -> 3" in capfd.readouterr().out
    tree["data"]["train"][0]["dataset"]["init_args"]["urls"] = f"http://me:{password}@{server}/b.tar?x={signature}"
    assert fit(tmp_path, tree, "--name", "other") == 2
    said = "".join(capfd.readouterr())
    assert "the server answers 403" in said
    assert not any(secret in said for secret in secrets)
    assert leaks(folder, *secrets) == []


def test_a_shipped_config_is_found_by_its_name_and_the_nearest_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == find_config("conf/quickstart.yaml") == SHIPPED / "quickstart.yaml"
    assert find_config("evals/india") == SHIPPED / "evals" / "india.yaml"
    assert run(["fit", "--config", "quikstart"]) == 2
    assert "--config: no file quikstart; nearest is 'quickstart'; shipped are " in (said := capsys.readouterr().err)
    assert " methods/," in said
    assert "methods/ema" not in said
    assert main(["check", "--config", "heads/detectoin"]) == 2
    assert "nearest is 'heads/detection'; shipped are heads/counting," in capsys.readouterr().err
    (tmp_path / "quickstart").write_text("model: {}")
    assert find_config("quickstart") == Path("quickstart")  # a file of the user's own comes first


def test_shipped_configs_name_their_files_wherever_they_are_read():
    def words(value):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [value] if isinstance(value, str) else [word for part in parts for word in words(part)]

    for file in SHIPPED.rglob("*.yaml"):
        beside_the_checkout = [word for word in words(read_config(file)) if "/" in word and (ROOT / word).exists()]
        assert all(Path(word).is_absolute() for word in beside_the_checkout), file


@pytest.mark.slow
def test_an_installed_wheel_trains_the_quickstart_without_a_checkout(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    words = ["fit", "--config", "quickstart", "--config", "evals/mela_hard", "--trainer.fast_dev_run", "true"]
    code = f"import indiclip, sys; print(indiclip.__file__); from indiclip.cli import main; sys.exit(main({words}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "empty",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert [path for path in (tmp_path / "empty").rglob("*") if path.is_file()] == []
