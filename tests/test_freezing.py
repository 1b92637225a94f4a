"""What is frozen gets no gradient, changes nothing and draws nothing; the rest trains; also after a resume."""

import pytest
import torch
from experiments import config, fit
from helpers import ARCHITECTURE, caption_batch, tiny_encoder
from test_module import four_tasks, mela_data, trainer

from heads.contrastive import Contrastive
from heads.detection import Detection
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.module import MultiTask
from indiclip.parameter_groups import parameter_groups
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer
from indiclip.training.callbacks import gradient_numbers


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


def quiet(module):
    module.log = module.log_dict = lambda *_, **__: None
    return module


def dropping(**options):
    """Both towers drop activations, paths or tokens in training, and what is pooled is normalised over the batch."""
    torch.manual_seed(0)
    backbone = NaFlexViT(width=32, depth=2, num_heads=2, patch_size=8, options={"drop_path_rate": 0.5})
    text = TextTower(ByteTokenizer(), ARCHITECTURE | {"hidden_dropout_prob": 0.5})
    return quiet(MultiTask(Encoder(backbone, text, 32, (16,), **options), [Contrastive()]))


@pytest.mark.parametrize(
    ("words", "frozen"),
    [
        (["image"], ("encoder.backbone.", "encoder.image_pool.pool.")),
        (["text"], ("encoder.text.", "encoder.text_pool.pool.")),
        (["projections"], ("encoder.image_projection.", "encoder.text_projection.")),
        (["logit_scale"], ("heads.contrastive.criterion.logit_scale", "heads.contrastive.criterion.logit_bias")),
        (["encoder.backbone.vit.blocks.0", "encoder.text.model.embeddings"],) * 2,
        (["encoder.backbone.vit.embeds.pos_embed"],) * 2,
    ],
    ids=str,
)
def test_words_and_paths_name_what_is_frozen(words, frozen):
    module = MultiTask(tiny_encoder(), [Contrastive()], freeze=words)
    every = {name for name, _ in module.named_parameters()}
    expected = {name for name in every if name.startswith(tuple(frozen))}
    assert expected
    assert every - trained(module) == expected
    assert {name for group in parameter_groups(module) for name in group["param_names"]} == trained(module)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["imag"], "model.freeze: the model has no part or module 'imag'; nearest is 'image'"),
        (
            ["encoder.backbone.vit.block.0"],
            "'encoder.backbone.vit.block.0'; nearest is 'encoder.backbone.vit.blocks.0'",
        ),
        (["encoder", "heads"], "model.freeze: encoder, heads leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen_is_said(words, message):
    with pytest.raises(ValueError, match=message):
        MultiTask(tiny_encoder(), [Contrastive()], freeze=words)


def test_a_frozen_tower_is_in_evaluation_mode_and_builds_no_graph():
    module = quiet(MultiTask(dropping(pool="mean", batch_norm=True).encoder, [Contrastive()], freeze=["image"]))
    module.train()  # as after a validation
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        first = module.encoder.features(caption_batch(["a", "b"])["images"]).tokens_BND
    second = module.encoder.features(caption_batch(["a", "b"])["images"]).tokens_BND
    assert torch.equal(first, second)  # no path is dropped
    assert not first.requires_grad
    assert kept == []
    before = module.encoder.image_pool.norm.running_mean.clone()
    module.training_step({"contrastive": caption_batch(["a", "b"])}, 0).backward()
    assert not torch.equal(before, module.encoder.image_pool.norm.running_mean)  # the norm goes with the projection
    assert [name for name, p in module.named_parameters() if (p.grad is not None) != p.requires_grad] == []
    tokens = module.encoder.tokenize(["kite"])
    assert not torch.equal(module.encoder.text(*tokens), module.encoder.text(*tokens))  # this tower trains


def test_batch_norm_of_a_frozen_backbone_keeps_its_statistics():
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    backbone = TimmBackbone("resnet18", (32, 32), patch_size=8, options=options)
    text = TextTower(ByteTokenizer(), ARCHITECTURE)
    module = quiet(MultiTask(Encoder(backbone, text, 32, (16,)), [Contrastive()], freeze=["image"]))
    before = {name: buffer.clone() for name, buffer in module.encoder.backbone.named_buffers()}
    module.training_step({"contrastive": caption_batch(["a", "b"], side=32)}, 0).backward()
    after = dict(module.encoder.backbone.named_buffers())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("words", [["text", "projections"], ["image", "text"], ["heads.contrastive", "image"]])
def test_any_part_may_be_frozen_in_a_step(words):
    module = quiet(MultiTask(tiny_encoder(), [Contrastive()], freeze=words))
    module.training_step({"contrastive": caption_batch(["a", "b", "c"])}, 0).backward()
    assert [name for name, p in module.named_parameters() if (p.grad is not None) != p.requires_grad] == []


def test_a_frozen_logit_scale_is_not_clamped():
    """SigLIP's is 117 times the cosine; one that softmax CLIP trains is kept at 100, and may not begin above."""
    encoder = tiny_encoder()
    encoder.initial_logits = {"logit_scale": 4.765}
    frozen = MultiTask(encoder, [Contrastive(loss="softmax")], freeze=["logit_scale"])
    assert frozen.each_head()[0].criterion.logit_scale.item() == pytest.approx(4.765)
    with pytest.raises(ValueError, match=r"gives a logit_scale of 117.3; expected more, .* model.freeze"):
        MultiTask(encoder, [Contrastive(loss="softmax")])
    for words in ([], ["logit_scale"]):
        module = quiet(MultiTask(tiny_encoder(), [Contrastive(loss="softmax")], freeze=words))
        scale = module.each_head()[0].criterion.logit_scale
        torch.nn.init.constant_(scale, 4.77)
        module.each_head()[0].after_step(module.encoder, 1.0, torch.ones(()))
        assert scale.item() == pytest.approx(4.77 if words else 4.6052, abs=1e-4)


def test_only_the_rest_changes_in_a_run_that_goes_on_exactly(tmp_path):
    def fitted(steps, ckpt=None):
        module = four_tasks(freeze=["image", "logit_scale"])
        run = trainer(tmp_path / str(steps), max_steps=steps, enable_checkpointing=False)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        run.fit(module, datamodule=mela_data(), ckpt_path=ckpt, weights_only=True)
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module, {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}

    whole, changed = fitted(4)
    assert trained(whole) <= changed
    assert not any(name.startswith("encoder.backbone.") for name in changed)
    assert not any("logit_scale" in name for name in changed)
    fitted(2)
    resumed, _ = fitted(4, tmp_path / "2.ckpt")
    weights = resumed.state_dict()
    assert {name for name, value in whole.state_dict().items() if not torch.equal(value, weights[name])} == set()
    assert weights.keys() == torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"].keys()  # all of them


def test_task_gradients_of_a_backbone_that_is_frozen_or_trained_in_part():
    """Of a frozen one nothing; of one that is trained in its upper block, the gradients there."""
    numbers = {}
    for words in ((), ("encoder.backbone.vit.embeds", "encoder.backbone.vit.blocks.0"), ("image",)):
        heads = [Contrastive(), Contrastive(name="second", loss="softmax")]
        module = quiet(MultiTask(dropping().encoder.eval(), heads, freeze=list(words)))
        module.eval()
        module.training_step({"contrastive": caption_batch(["a", "b", "c"])}, 0)
        numbers[len(words)] = gradient_numbers(module)
        for p in module.parameters():
            p.requires_grad_(True)
    whole, part, frozen = numbers[0], numbers[2], numbers[1]
    assert frozen == {}
    assert part.keys() == whole.keys()
    for name in ("contrastive", "second"):
        assert 0 < part[f"train/{name}/backbone_grad_norm"] < whole[f"train/{name}/backbone_grad_norm"]


def test_a_head_frozen_on_a_frozen_backbone_has_no_gradient_to_measure():
    heads = [Contrastive(), Contrastive(name="second")]
    module = quiet(MultiTask(tiny_encoder(), heads, freeze=["text", "projections", "heads.second"]))
    module.training_step({"contrastive": caption_batch(["a", "b", "c"])}, 0)
    module.head_losses["second"] = module.head_losses["second"].detach()
    assert [*gradient_numbers(module)] == ["train/contrastive/backbone_grad_norm"]


def test_a_locked_image_tower_through_the_command(tmp_path, capsys):
    """LiT with task gradients; the start-up table says what is frozen."""
    tree = config()
    tree["model"]["freeze"] = ["image"]
    tree["trainer"]["callbacks"] = [
        {"class_path": "indiclip.training.callbacks.TaskGradients", "init_args": {"every_n_steps": 1}}
    ]
    with pytest.warns(UserWarning, match="TaskGradients: the backbone is frozen, so there is nothing to log") as said:
        assert fit(tmp_path, tree) == 0
    assert any(str(one.message).startswith("model.freeze: the weights of the image tower are random") for one in said)
    out = capsys.readouterr().out
    assert "frozen: encoder.backbone, encoder.image_pool.pool; " in out
    assert "parameters are trained" in out
    assert "backbone_grad_norm" not in (tmp_path / "runs" / "experiment" / "history.jsonl").read_text()


def test_parts_that_no_head_uses_are_said():
    heads = [Detection(num_classes=3, scales=[1.0], out_channels=16, num_convs=1)]
    module = MultiTask(tiny_encoder(), heads)
    unused = ["encoder.image_pool", "encoder.image_projection", "encoder.text", "encoder.text_pool"]
    assert module.unused == [*unused, "encoder.text_projection"]
    assert not any(name.startswith(tuple(unused)) for name in trained(module))


def test_lightnings_finetuning_is_refused(tmp_path, capsys):
    tree = config()
    tree["trainer"]["callbacks"] = [{"class_path": "lightning.pytorch.callbacks.BackboneFinetuning"}]
    assert fit(tmp_path, tree) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("indiclip:")]
    assert "BackboneFinetuning adds groups to the optimizer" in line
    assert "expected model.freeze" in line
