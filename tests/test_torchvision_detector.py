"""torchvision's detectors as a head: its own losses and predictions, on any backbone; from a run to a detector."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from export_runs import save_run
from helpers import ARCHITECTURE, batch_images, noise, packed, tiny_encoder
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import detection

import indiclip
from heads.torchvision_detector import TorchvisionDetector
from indiclip.encoder import Encoder
from indiclip.export.new_folder import new_folder
from indiclip.export.torchvision import as_torchvision
from indiclip.export.torchvision_backbone import build_detector, load_detector
from indiclip.generated.mela import Mela
from indiclip.json_lines import read
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer
from indiclip.types import Batch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import bench_transfer  # noqa: E402
import finetune_torchvision  # noqa: E402

FEW = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 8, "box_batch_size_per_image": 8}


def batch_of(sizes=((48, 64), (40, 32))):
    images = batch_images([noise(*size, seed) for seed, size in enumerate(sizes)], 8, 256)
    boxes = [np.float32([[4, 6, 30, 28], [10, 2, 30, 30]]), np.zeros((0, 4), np.float32)]
    masks = [np.zeros((2, *sizes[0]), np.uint8), np.zeros((0, *sizes[1]), np.uint8)]
    masks[0][0, 6:28, 4:30] = masks[0][1, 2:30, 10:30] = 1
    fields = {
        "boxes_xyxy": [torch.from_numpy(each) for each in boxes],
        "classes": [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.long)],
        "crowd": [torch.tensor([False, False]), torch.zeros(0, dtype=torch.bool)],
        "masks": [torch.from_numpy(each) for each in masks],
    }
    return Batch(images=images, targets=packed(fields), keys=["0", "1"])


def head_of(encoder, kind, **options):
    torch.manual_seed(1)
    options = ({"score_thresh": 0.0} if kind == "FCOS" else FEW) | options  # weights are random
    head = TorchvisionDetector(num_classes=3, detector=kind, out_channels=32, options=options, task="detection")
    head.bind(encoder)
    return head


@pytest.mark.parametrize("kind", ["FCOS", "FasterRCNN", "MaskRCNN"])
def test_losses_and_predictions_are_torchvisions(kind):
    """The same weights in torchvision's detector, given the pixels, say the same."""
    encoder = tiny_encoder()
    head, batch = head_of(encoder, kind), batch_of()
    backbone = as_torchvision(encoder, 32)
    theirs = build_detector(
        getattr(detection, kind), backbone, 3 + head.first_label, min_size=1, max_size=99, **head.options
    )
    theirs.transform.min_size, theirs.transform.max_size = (None,), None
    theirs.transform.resize = lambda image, target: (image, target)  # the images have their size already
    backbone.pyramid.load_state_dict(head.pyramid.state_dict())
    weights = head.detector.state_dict() | {f"backbone.{n}": w for n, w in backbone.state_dict().items()}
    theirs.load_state_dict(weights)

    pixels = [torch.from_numpy(noise(*size, i)).permute(2, 0, 1) / 255 for i, size in enumerate(((48, 64), (40, 32)))]
    torch.manual_seed(3)
    features = encoder.features(batch["images"])
    ours = head.train().loss(features, batch, encoder).terms
    torch.manual_seed(3)
    expected = theirs.train()(pixels, [head._truth(batch, image) for image in range(2)])
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4)
    sum(ours.values()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert encoder.backbone.vit.blocks[0].attn.qkv.weight.grad.abs().sum() > 0

    with torch.no_grad():
        found, expected = head.eval().predict(features, batch, encoder), theirs.eval()(pixels)
    for one, other in zip(found, expected, strict=True):
        assert len(one["scores"])
        torch.testing.assert_close(one["scores"], other["scores"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one["boxes_xyxy"], other["boxes"], atol=1e-3, rtol=1e-4)
        assert torch.equal(one["labels"] + head.first_label, other["labels"])
    head.update_metric(found, features, batch)
    assert head.metric.compute()["ap"] >= 0


def test_a_backbone_of_one_canvas_size_has_the_same_maps():
    """Also where the image does not fill it: what torchvision pads, and what the head's features leave out."""
    net = TimmBackbone("convnext_atto", (64, 64), 8, options={"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]})
    encoder = Encoder(net, TextTower(ByteTokenizer(), ARCHITECTURE), 32, (16,)).eval()
    head = head_of(encoder, "FCOS").eval()
    assert head.pyramid.strides == [4, 8, 16, 32, 64]
    backbone = as_torchvision(encoder, 32).eval()
    backbone.pyramid.load_state_dict(head.pyramid.state_dict())
    image = noise(40, 64)
    with torch.no_grad():
        features = encoder.features(batch_images([image] * 2, 8, 64, (64, 64)))
        head(features, [(40, 64)] * 2)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(each)[:, None, None] for each in (backbone.image_mean, backbone.image_std))
        theirs = backbone(torch.nn.functional.pad((pixels - mean) / std, (0, 0, 0, 24)))
    for name, level in theirs.items():
        torch.testing.assert_close(head._maps.given[name][:1], level, atol=1e-5, rtol=1e-4)


def test_every_distance_of_fcos_has_a_gradient_at_the_start():
    """torchvision's begin on both sides of a ReLU: where all are 0, as after some steps on photos, they stay so."""
    encoder, batch = tiny_encoder(), batch_of()
    head = head_of(encoder, "FCOS")
    head.loss(encoder.features(batch["images"]), batch, encoder)  # leaves the maps
    towers = head.detector.head(list(head._maps.given.values()))
    assert (towers["bbox_regression"] > 0).all()


def test_crowds_and_flat_boxes_are_no_targets():
    encoder, batch = tiny_encoder(), batch_of()
    head = head_of(encoder, "FasterRCNN")
    batch["targets"]["crowd"].values[0] = True
    truth = head._truth(batch, 0)
    assert truth["labels"].tolist() == [3]  # class 2; 0 is the background
    batch["targets"]["boxes_xyxy"].values[1, 2] = 10.0
    assert head._truth(batch, 0)["boxes"].shape == (0, 4)
    assert head._truth(batch, 1)["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"detector": "FCOS", "out_channels": 48}, "out_channels: found 48; FCOS needs a multiple of 32"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        TorchvisionDetector(**({"num_classes": 3} | arguments))


def test_unknown_options_and_other_numbers_of_classes_are_one_line():
    head = TorchvisionDetector(num_classes=3, options={"box_nms": 1})
    with pytest.raises(
        ValueError,
        match="torchvision_detector.options: .* no option 'box_nms'; nearest is 'box_nms_thresh'",
    ):
        head.bind(tiny_encoder())
    with pytest.raises(ValueError, match="num_classes: found 3, expected 17"):
        head_of(tiny_encoder(), "FCOS").check({"data.train[0]": Mela(4, 32)}, {})


def coco(folder, count=6):
    """Scenes as COCO files."""
    (folder / "photos").mkdir()
    fair = Mela(num_scenes=count, size=48, people=0, kinds=["kite", "diya"])
    images, annotations = [], []
    for index in range(count):
        sample = fair[index]
        Image.fromarray(sample["image"]).save(folder / "photos" / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": 48, "height": 48})
        for x1, y1, x2, y2 in sample["boxes_xyxy"].tolist():
            box = [x1, y1, x2 - x1, y2 - y1]
            row = {"id": len(annotations) + 1, "image_id": index, "category_id": 1, "bbox": box, "iscrowd": 0}
            annotations.append(row | {"area": box[2] * box[3], "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    for name in ("train.json", "held_out.json"):
        (folder / name).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run to begin with."""
    return save_run(tiny_encoder(), tmp_path_factory.mktemp("run"))


SHORT = "--trainer.max_steps 2 --data.steps_per_epoch 1 --model.warmup_steps 0 --trainer.limit_val_batches 1"


def test_the_readmes_command_goes_from_a_run_to_a_detector(pretrained, tmp_path, monkeypatch):
    """In two steps; AP over time is in the report, and the folder opens as a torchvision detector."""
    coco(tmp_path)
    command = re.search(r"python tools/finetune_torchvision.py ((?:.*\\\n)*.*)", (ROOT / "README.md").read_text())[1]
    words = shlex.split(command.replace("\\\n", " "))
    words[words.index("--model") + 1] = pretrained
    monkeypatch.chdir(tmp_path)
    assert finetune_torchvision.main([*words, "--max_tokens", "64", *SHORT.split()]) == 0
    folder = tmp_path / "runs" / "fcos"
    history = [row for row in read(folder / "history.jsonl") if "val/torchvision_detector/ap" in row]
    assert [row["step"] for row in history] == [1, 2]
    assert "torchvision_detector" in (folder / "report.html").read_text()
    parity = json.loads((folder / "torchvision" / "parity.json").read_text())
    assert parity["torchvision"]["ap"] == pytest.approx(parity["run"]["ap"], abs=1e-3)  # nothing is resized here
    detector = load_detector(folder / "torchvision")
    assert detector([torch.rand(3, 40, 56)])[0].keys() >= {"boxes", "scores", "labels"}
    assert json.loads((folder / "torchvision" / "config.json").read_text())["detector"]["classes"] == ["thing"]


@pytest.mark.slow
def test_a_detector_stays_until_the_next_one_is_scored(pretrained, tmp_path, monkeypatch):
    """Ctrl-C while scoring and a full disk leave the old one; what a killed process left goes with the next."""
    coco(tmp_path, 2)
    words = f"--model {pretrained} --train {tmp_path}/train.json --images {tmp_path}/photos --max_tokens 36"
    words += f" --val {tmp_path}/held_out.json --runs {tmp_path}/runs --name x --ckpt_path last {SHORT}"
    assert finetune_torchvision.main(words.split()) == 0
    run = tmp_path / "runs" / "x"
    files = sorted(file.name for file in (run / "torchvision").iterdir())
    assert "parity.json" in files
    (run / "torchvision" / "old").touch()
    (run / ".torchvision-killed").mkdir()

    for error, status in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)):
        with monkeypatch.context() as patch:
            patch.setattr(finetune_torchvision, "score", raising(error))
            assert finetune_torchvision.main(words.split()) == status
        assert sorted(file.name for file in (run / "torchvision").iterdir()) == sorted([*files, "old"])
    assert finetune_torchvision.main(words.split()) == 0
    assert sorted(file.name for file in (run / "torchvision").iterdir()) == files
    assert not [*run.glob(".torchvision-*")]


def raising(error):
    def function(*_):
        raise error

    return function


def test_a_folder_takes_anothers_place_or_leaves_it(tmp_path, monkeypatch):
    place = tmp_path / "out"
    with new_folder(place, replaces=True) as part:
        (part / "first").touch()
    move = Path.replace

    def fails(own, to):
        return move(own, to) if own == place or own.name.endswith("-old") else raising(OSError(5, "I/O"))()

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="out"), new_folder(place, replaces=True):
        pass
    monkeypatch.undo()
    assert [file.name for file in place.iterdir()] == ["first"]
    with new_folder(place, replaces=True) as part:
        (part / "second").touch()
        assert [file.name for file in place.iterdir()] == ["first"]
    assert [file.name for file in place.iterdir()] == ["second"]
    assert [*tmp_path.iterdir()] == [place]


def test_files_that_are_missing_are_said_before_anything(tmp_path, capsys):
    with pytest.raises(SystemExit):
        finetune_torchvision.main(
            f"--model random --train {tmp_path / 'x.json'} --images {tmp_path} --val {tmp_path}".split()
        )
    assert "x.json: no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[1]", "{", '{"images": [], "annotations": []}', "\0"])
def test_files_of_another_kind_are_one_line(content, tmp_path, capsys):
    (tmp_path / "x.json").write_text(content)
    words = f"--model random --train {tmp_path / 'x.json'} --images {tmp_path} --val {tmp_path} --runs {tmp_path}/runs"
    with pytest.raises(SystemExit, match="2"):
        finetune_torchvision.main(words.split())
    with pytest.raises(SystemExit, match="2"):
        finetune_torchvision.main([*words.split(), "--config", "methods/ema"])
    first, second = capsys.readouterr().err.splitlines()
    assert "x.json: " in first
    assert "methods/ema.yaml: expected a page as conf/downstream/fcos.yaml" in second
    assert not (tmp_path / "runs").exists()


def test_an_image_model_trains_too_and_a_trial_leaves_nothing(tmp_path, capsys):
    coco(tmp_path, 2)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    words = f"--model timm:test_vit:{tmp_path}/vit.safetensors --train {tmp_path}/train.json --images {tmp_path}/photos"
    words += f" --val {tmp_path}/held_out.json --runs {tmp_path}/runs --max_tokens 36 --trainer.fast_dev_run true"
    assert finetune_torchvision.main(words.split()) == 0
    assert "tensors (image) from timm:test_vit" in " ".join(capsys.readouterr().out.split())
    assert not [*(tmp_path / "runs").glob("*")]


PAGES = [ROOT / "conf" / "downstream" / f"{name}.yaml" for name in ("fcos", "faster_rcnn", "mask_rcnn")]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_page_says_its_command(page):
    opening = [line for line in page.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config conf/downstream/{page.name} --model" in line for line in opening)
    assert yaml.safe_load(page.read_text())["model"]["layer_decay"] < 1


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda path: path.stem)
def test_every_other_page_trains_too(page, pretrained, tmp_path):
    """With averaged weights and adapters. Again with `last`, the detector is written anew."""
    coco(tmp_path, 2)
    narrow = yaml.safe_load(page.read_text())
    narrow["model"]["heads"][0]["init_args"] |= {"out_channels": 32, "options": FEW}
    (tmp_path / page.name).write_text(yaml.safe_dump(narrow))
    words = ["--config", str(tmp_path / page.name), "--model", str(pretrained), "--max_tokens", "36"]
    words += ["--train", str(tmp_path / "train.json"), "--images", str(tmp_path / "photos")]
    words += ["--val", str(tmp_path / "held_out.json"), "--runs", str(tmp_path / "runs"), "--name", "x"]
    words += ["--ckpt_path", "last", "--batch_size", "2", *SHORT.split()]
    words += ["--config", "methods/ema", "--model.encoder.lora.r", "2", "--model.heads.init_args.name", "own"]
    for _ in range(2 if page.stem == "faster_rcnn" else 1):
        assert finetune_torchvision.main(words) == 0
    assert [folder.name for folder in (tmp_path / "runs").iterdir() if folder.is_dir()] == ["x"]
    detector = load_detector(tmp_path / "runs" / "x" / "torchvision")
    assert "boxes" in detector([torch.rand(3, 48, 48)])[0]
    checkpoint = torch.load(tmp_path / "runs" / "x" / "checkpoints" / "last.ckpt", weights_only=True)
    name, averages = "rpn.head.bbox_pred.weight", checkpoint["averages"]["state_dict"]
    ours = f"heads.own.detector.{name}"
    assert torch.equal(detector.state_dict()[name], averages[ours])
    assert not torch.equal(averages[ours], checkpoint["state_dict"][ours])
    tower = indiclip.load(tmp_path / "runs" / "x").merged().backbone.vit
    assert torch.equal(detector.backbone.tower.vit.blocks[0].mlp.fc1.weight, tower.blocks[0].mlp.fc1.weight)


def test_the_benchmark_goes_on_and_does_nothing_twice(tmp_path, monkeypatch):
    """Arms of two steps: each pretraining once, a row each, the random arm from the same architecture."""
    started = []

    def fake_fit(config, folder, name, every):
        started.append((name, config))
        return {"step": 2, "metrics": {"val/torchvision_detector/ap": 0.1 * len(started)}}

    monkeypatch.setattr(bench_transfer, "fit", fake_fit)
    monkeypatch.setattr(bench_transfer, "finetuning", lambda *arguments: {"arm": arguments[1]})
    bench = bench_transfer.Bench(tmp_path, tmp_path)
    monkeypatch.setattr(bench_transfer, "on_scenes", lambda *_: {"head": {}, "train": {}, "val": {}})
    rows = [bench.finetune("scenes", arm, 64, 0, 1e-3) for arm in bench_transfer.ARMS]
    count = len(started)
    assert [name for name, _ in started if "scenes" not in name] == ["four_tasks-0", "contrastive-0", "four_tasks-0"]
    assert [bench.finetune("scenes", arm, 64, 0, 1e-3) for arm in bench_transfer.ARMS] == rows
    assert len(started) == count
    assert "| scenes | 64 | 0.001 |" in bench_transfer.table(bench.rows())


def test_the_random_arm_has_the_same_architecture_and_no_weights(tmp_path):
    run, changes = save_run(tiny_encoder(), tmp_path / "run"), {"head": {}, "train": {}, "val": {}}
    pretrained, random = (
        bench_transfer.finetuning(Path(run), arm, 0, 1e-3, changes)["model"]["encoder"]
        for arm in ("four_tasks", "random")
    )
    assert pretrained["init_from"][0]["weights"] == run
    assert random == tiny_encoder().to_config()


def test_a_variant_changes_only_what_it_says(tmp_path, monkeypatch):
    """Also deep in what the data set's changes say."""
    monkeypatch.setattr(bench_transfer, "fit", lambda *_: {"step": 2, "metrics": {}})
    monkeypatch.setattr(bench_transfer, "finetuning", lambda *arguments: given.append(arguments[-1]) or {})
    bench, given = bench_transfer.Bench(tmp_path, tmp_path), []
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "instances.json").write_text(json.dumps({"annotations": []}))
    for variant in ("", "tokens_576"):
        bench.finetune("photos", "random", 0, 0, 1e-3, variant)
    assert given[0]["train"]["max_tokens"] == 256
    for part in ("train", "val"):
        given[0][part]["max_tokens"] = 576
    assert given[0] == given[1]


def test_cpu_seconds_are_those_of_all_training_steps(tmp_path, monkeypatch):
    """Each step is one second; a validation of ten comes between two lines."""
    clock, now = bench_transfer.CPUClock(every_n_steps=4), [0.0]
    monkeypatch.setattr(bench_transfer.time, "process_time", lambda: now[0])
    monkeypatch.setattr(bench_transfer, "folder_of", lambda _: tmp_path)
    trainer = SimpleNamespace(global_step=0, max_steps=10)

    def validate():
        clock.on_validation_start(trainer, None)
        now[0] += 10
        clock.on_validation_end(trainer, None)

    validate()  # before training
    clock.on_train_start(trainer, None)
    for step in range(1, 11):
        now[0] += 1
        trainer.global_step = step
        clock.on_train_batch_end(trainer)
        if step in (3, 6, 10):
            validate()
    assert bench_transfer.cpu_seconds(tmp_path) == 10
    assert [row["step"] for row in read(tmp_path / "cpu_seconds.jsonl")] == [4, 8, 10]


def test_pretraining_never_sees_the_held_out_kinds():
    for arm, heads in (("four_tasks", 4), ("contrastive", 1)):
        config = bench_transfer.pretraining(arm, 0)
        assert len(config["model"]["heads"]) == heads
        for source in [*config["data"]["train"], *config["data"]["val"]]:
            kinds = source["dataset"]["init_args"]["kinds"]
            assert len(kinds) == 11
            assert not set(kinds) & set(bench_transfer.HELD_OUT)


def test_intervals_are_students():
    assert bench_transfer.interval([0.1, 0.2, 0.3]) == "0.200 ± 0.248"  # 4.30 * 0.1 / sqrt(3)
    assert bench_transfer.interval([0.5]) == "0.500"
