"""Text towers: token ids -> one vector per token.

Shape letters: T tokens of the longest text in the batch (never a constant), D width; B texts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from inspect import signature
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from indiclip.names import check_choice, did_you_mean, reason_of
from indiclip.packing import Packing, worth_packing
from indiclip.quiet import quiet_transformers
from indiclip.text_packing import packed_states
from indiclip.tokenizers import Tokenizer

# Of transformers configurations, beside the keys that their types declare.
_SHARED_KEYS = {"model_type", "is_encoder_decoder", "tie_word_embeddings", "dense_act_fn", "is_gated_act", "dtype"}
_SHARED_KEYS |= {"scale_decoder_outputs", "architectures", "transformers_version", "_sliding_window_pattern"}


class TextTower(nn.Module):
    """Any transformers text model.

    Args:
        tokenizer: Its vocabulary size is the model's, where the model is made from scratch.
        architecture: A transformers configuration as a dict, `model_type` and its fields, from scratch: e.g.
            `{model_type: bert, hidden_size: 192, num_hidden_layers: 4, num_attention_heads: 3,
            intermediate_size: 768}`.
        pretrained: A folder or hub name with a configuration and weights, instead of `architecture`. A model that
            has a text tower of its own (CLIP, SigLIP) gives that.
        pad: `longest` fills short texts up to the longest of the batch and reads no padding; `context` fills all to the
            tokenizer's context length and reads padding as any other token, as SigLIP does.

    Attributes:
        width: Width D of the vectors.
        compiled: As of `indiclip.backbone.Backbone`.
    """

    compiled: bool = False

    model: Any  # transformers models share no type that has a config

    def __init__(
        self,
        tokenizer: Tokenizer,
        architecture: dict[str, Any] | None = None,
        pretrained: str | None = None,
        pad: Literal["longest", "context"] = "longest",
    ) -> None:
        super().__init__()
        if (architecture is None) == (pretrained is None):
            raise ValueError("text: give exactly one of `architecture` (from scratch) and `pretrained`")
        check_choice("text.pad", pad, ("longest", "context"))
        self.tokenizer, self.pad = tokenizer, pad
        if pretrained is not None:
            self.model = _text_part(_pretrained_model(pretrained))
        else:
            self.model = _text_part(_new_model(dict(architecture or {}), tokenizer))
        config = self.model.config
        if config.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"text.tokenizer: has {tokenizer.vocab_size} ids but the model's vocabulary only {config.vocab_size}"
            )
        self.width = int(config.hidden_size)
        self._read_a_long_text()
        self.eval()
        self._first_position = self._where_positions_begin()
        self.train()

    def forward(self, ids_BT: Tensor, valid_BT: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Token vectors (B, T, D); anything on padding.

        Args:
            ids_BT: Of the tokens.
            valid_BT: False on padding.
            lengths: Tokens of each text, where the host knows them. Else transformers asks the device whether there is
                padding, and waits for it.
        """
        padded = None if lengths is None else len(set(lengths)) > 1
        if self.pad == "context":
            padded = False
        if lengths and self.pad == "longest" and worth_packing(lengths, self.compiled) and self._may_pack():
            packing = Packing(lengths, ids_BT.shape[1], ids_BT.device)
            return packed_states(self.model, ids_BT, packing, cast(int, self._first_position))
        with _mask_unread() if padded and not torch.compiler.is_compiling() else nullcontext():
            out = self.model(input_ids=ids_BT, attention_mask=None if padded is False else valid_BT.long())
        # A tensor of its own, as where texts are packed: shards gather weights as gradients reach what a part has
        # given, and in the order of this and of the last layer the ranks must not differ.
        states: Tensor = out.last_hidden_state
        return states.view_as(states)

    def padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """`(ids_BT, valid_BT)` of what the tokenizer's `encode` gives."""
        return self.tokenizer.pad(rows, self.tokenizer.context_length if self.pad == "context" else 0)

    def to_config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this tower without a network, weights aside."""
        architecture = architecture_of(self.model.config)
        return {"architecture": architecture, "tokenizer": describe(self.tokenizer), "pad": self.pad}

    def _may_pack(self) -> bool:
        # A layer that is run again in the backward pass is run alone.
        again = any(getattr(part, "gradient_checkpointing", False) for part in self.model.modules())
        return self._first_position is not None and not again and not torch.compiler.is_compiling()

    @torch.no_grad()
    def _where_positions_begin(self) -> int | None:
        """With which number of the first position the model gives packed texts what it gives padded ones, if any."""
        longest = self.tokenizer.context_length
        if (
            next(self.parameters()).is_meta
            or longest < 2
            or "position_ids" not in signature(self.model.forward).parameters
        ):
            return None
        row = [i % self.tokenizer.vocab_size for i in range(self.tokenizer.pad_id + 1, self.tokenizer.pad_id + 6)]
        # The short ones first: no packed row begins where a text does, but the first.
        rows = [row[:1], row[: min(2, longest)], row[: min(5, longest)]]
        ids_BT, valid_BT = self.tokenizer.pad(rows)
        expected = self(ids_BT, valid_BT)[valid_BT]
        packing = Packing([*map(len, rows)], ids_BT.shape[1], ids_BT.device)
        for first in (0, self.tokenizer.pad_id + 1):
            try:
                found = packed_states(self.model, ids_BT, packing, first)[valid_BT]
            except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):  # it takes no positions
                return None
            if (found - expected).abs().max() < 1e-4 * expected.abs().max():
                return first
        return None

    @torch.no_grad()
    def _read_a_long_text(self) -> None:
        """Raise ValueError unless a text of `context_length` tokens goes through."""
        if next(self.parameters()).is_meta:
            return
        length = self.tokenizer.context_length
        ids_1T = torch.full((1, length), (self.tokenizer.pad_id + 1) % self.tokenizer.vocab_size)
        self.eval()
        try:
            self(ids_1T, torch.ones_like(ids_1T, dtype=torch.bool))
        except (IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"text: {self.model.config.model_type} cannot read texts of the tokenizer's context_length {length} "
                f"({error}); is text.architecture.max_position_embeddings too small?"
            ) from error
        self.train()


@contextmanager
def _mask_unread() -> Iterator[None]:
    """Let transformers apply the mask without reading it before, as it does where it traces.

    A private part of it, the only one that is touched. Tried with transformers 5.23.0; a text tower in a version
    without it fails here at once, with an AttributeError.
    """
    masking_utils: Any = import_module("transformers.masking_utils")
    is_tracing = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: True
    try:
        yield
    finally:
        masking_utils.is_tracing = is_tracing


def describe(part: Any) -> dict[str, Any]:
    """`{class_path, init_args}` of an object that has a `to_config()`, in the words a YAML uses."""
    return {"class_path": f"{type(part).__module__}.{type(part).__qualname__}", "init_args": part.to_config()}


def architecture_of(config: Any) -> dict[str, Any]:
    """What `TextTower.architecture` says of a transformers configuration.

    Released folders have many keys more, of older versions and of text generation.
    """
    found = {name: getattr(config, name, None) for name in ("model_type", "vocab_size", "pad_token_id")}
    known = architecture_keys(config.model_type)
    with quiet_transformers():  # it compares with its own defaults, and warns of those: SigLIP's end token is no word
        found |= config.to_diff_dict()
    return {name: value for name, value in found.items() if name in known}


def architecture_keys(model_type: str) -> set[str]:
    """The keys that a transformers configuration declares itself, and plain ones that several types share."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    own = signature(CONFIG_MAPPING[model_type]).parameters.keys() - signature(PreTrainedConfig).parameters.keys()
    return own | _SHARED_KEYS


def _new_model(architecture: dict[str, Any], tokenizer: Tokenizer) -> Any:
    import transformers
    from transformers import CONFIG_MAPPING, AutoModel

    model_type = architecture.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(str(model_type), CONFIG_MAPPING.keys())
        raise ValueError(f"text.architecture.model_type: transformers has no {model_type!r}{near}")
    architecture.setdefault("vocab_size", tokenizer.vocab_size)
    architecture.setdefault("pad_token_id", tokenizer.pad_id)
    config = CONFIG_MAPPING[model_type](**architecture)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and 0 < longest < tokenizer.context_length:  # XLNet's -1 is no bound
        raise ValueError(
            f"text.architecture.max_position_embeddings: {longest} is less than the tokenizer's context_length "
            f"{tokenizer.context_length}"
        )
    # AutoModel knows whole models only. A text tower's class is called as its configuration: SiglipTextModel.
    own = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
    model = own(config) if own else AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    _spread_as_openai(model)
    return model


def _spread_as_openai(model: Any) -> None:
    """Give attention in a CLIP from scratch the initial weights that `CLIP.initialize_parameters` of OpenAI gives it.

    transformers (5.23.0) has the two standard deviations the other way round, and its towers learn much slower: the
    queries and keys are so small that all tokens are attended to alike.
    """
    if "clip" not in model.config.model_type:
        return  # the next line takes 0.2 s
    from transformers.models.clip.modeling_clip import CLIPAttention

    for attention in (part for part in model.modules() if isinstance(part, CLIPAttention)):
        std = attention.embed_dim**-0.5 * attention.config.initializer_factor
        for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
            nn.init.normal_(matrix.weight, std=std)
        nn.init.normal_(attention.out_proj.weight, std=std * (2 * attention.config.num_hidden_layers) ** -0.5)


def _pretrained_model(name: str) -> Any:
    from transformers import AutoModel

    try:
        return AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"text.pretrained: {name!r} is no folder with a transformers model in safetensors, and not found on the hub"
        ) from error
    except ValueError as error:
        reason = reason_of(error)
        raise ValueError(
            f"text.pretrained: transformers cannot load {name!r} (code that comes with it is not run): {reason}"
        ) from error


def _text_part(model: Any) -> Any:
    """The text tower of a two-tower model, the encoder of two; another as it is, without a pooler nobody reads."""
    model = getattr(model, "text_model", model)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    # Parameters that would never get a gradient: BERT's pooler, SigLIP's projection.
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if isinstance(getattr(model, "head", None), nn.Linear):
        model.head = nn.Identity()
    return model
