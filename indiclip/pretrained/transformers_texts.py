"""Text towers of transformers alone: folders of any encoder, of the encoder of two, or of a decoder."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from indiclip.pooling import Projection
from indiclip.pretrained.transformers_files import read_tokenizer, read_transformers_tensors
from indiclip.pretrained.weights import Weights
from indiclip.text import TextTower, architecture_of, describe

# Of the towers of dual encoders; other encoders pool as BERT does where they can, else the mean, and decoders the end.
_POOLS = {"siglip_text_model": "last", "siglip2_text_model": "last", "clip_text_model": "eos"}
_POOLS |= {"metaclip_2_text_model": "eos"}
_PROJECTIONS = {"head.": "text_projection.", "text_projection.": "text_projection."}
# Of no use to anybody's encoder: heads of language models, the decoder of two, tables of numbers.
LEFT_OUT = re.compile(
    r"(cls\.|lm_head|(model\.)?decoder\.|(model\.)?shared\.|classifier\.|qa_outputs\.|vocab_|generator_|"
    r"mlm_head|predictions\.|logits)|.*position_ids$|.*(sim|relative)_attn_bias$"
)
_LONGEST = 512  # tokens, of a tokenizer or tower that names no limit
_SHORTEST = 8  # tokens, that hold the start and end of any tokenizer and that any tower reads


def read_text_model(folder: Path, origin: str) -> Weights:
    """A folder whose `config.json` is that of a text model.

    Raises:
        FileNotFoundError: It lacks a file.
        ValueError: Its tensors are not those of the model that it names.
    """
    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = config.model_type
    tensors = read_transformers_tensors(folder)
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    architecture = architecture_of(config)
    if transformers.CONFIG_MAPPING[kind]().is_encoder_decoder:  # the folder of an encoder alone says that it is none
        architecture |= {"is_encoder_decoder": True}
    pads = kind.startswith("siglip")
    tokenizer = read_tokenizer(folder, _SHORTEST, any_side=causal)
    with torch.device("meta"):
        tower = TextTower(tokenizer, dict(architecture), pad="context" if pads else "longest")
    tokenizer = read_tokenizer(folder, _context_length(folder, tower.model), any_side=causal)
    moved, left = tower_tensors(tower.model, tensors)
    pool = _POOLS.get(kind) or ("eos" if causal else "mean")
    if "text_pool.dense.weight" in moved:
        pool = "pooler"
    found: dict[str, Any] = {"text_pool": pool}
    if "text_projection.weight" in moved:
        embed_dim = len(moved["text_projection.weight"])
        projection = Projection(bias="text_projection.bias" in moved)
        found |= {"text_projection": asdict(projection), "embed_dim": embed_dim, "lengths": [embed_dim]}
    text = describe(tower)
    text["init_args"]["tokenizer"] = describe(tokenizer)
    ignored = [name for name in left if LEFT_OUT.match(name)]
    return Weights(origin, {"text": text} | found, moved, [n for n in left if n not in ignored], ignored)


def tower_tensors(model: Any, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a text tower's model by our names, and the names of those that are none of its."""
    tensors = {_new_name(name): tensor for name, tensor in tensors.items()}
    wanted = model.state_dict().keys()
    prefix = _prefix(wanted, tensors)
    moved = {f"text.model.{name}": tensors[prefix + name] for name in wanted if prefix + name in tensors}
    taken = {prefix + name for name in wanted}
    embedding = next((name for name in wanted if name.endswith("embed_tokens.weight")), None)
    shared = [name for name in tensors if name.endswith("shared.weight")]
    if embedding and prefix + embedding not in tensors and shared:  # the table of an encoder and its decoder
        moved[f"text.model.{embedding}"] = tensors[shared[0]]
        taken.add(shared[0])
    for name in tensors.keys() - taken:
        inner = name.removeprefix(prefix)
        if inner.startswith("pooler.dense."):
            moved[inner.replace("pooler.", "text_pool.", 1)] = tensors[name]
            taken.add(name)
        for theirs, ours in _PROJECTIONS.items():
            if inner.startswith(theirs):
                moved[inner.replace(theirs, ours, 1)] = tensors[name]
                taken.add(name)
    return moved, [name for name in tensors if name not in taken]


def _prefix(wanted: Any, tensors: dict[str, Tensor]) -> str:
    """What stands before the tower's names: nothing, `bert.`, `encoder.`, ... That with the most of them."""
    names = list(wanted)
    found = {name.removesuffix(one) for one in (names[0], names[-1]) for name in tensors if name.endswith(one)}
    by_rank = sorted(found, key=lambda prefix: ("decoder" in prefix, len(prefix), prefix))
    return max(by_rank, key=lambda prefix: sum(prefix + name in tensors for name in names), default="")


def _new_name(name: str) -> str:
    """BERT's checkpoints of 2018 call the parameters of a norm gamma and beta."""
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def _context_length(folder: Path, model: Any) -> int:
    """The shortest of what the tokenizer, the table of positions and we allow."""
    reader: Any = transformers.AutoTokenizer
    tokenizer = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    longest = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if (padding := getattr(table, "padding_idx", None)) is not None:  # RoBERTa's positions begin behind it
        longest -= padding + 1
    return int(min(longest, tokenizer.model_max_length, _LONGEST))
