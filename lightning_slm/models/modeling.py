"""The backbone: blocks of interchangeable mixers, inside Hugging Face's shell.

``generate()``, ``save_pretrained``, the Auto classes, PEFT and every tool that knows ``PreTrainedModel`` work on it.
"""

# Shape letters: B = batch, T = tokens of this call, D = model width, V = vocabulary.

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lightning_slm.models.cache import SLMCache
from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.pattern import BlockSpec, MixerSpec
from lightning_slm.models.registry import CHANNEL_MIXERS, TOKEN_MIXERS
from lightning_slm.models.reversible import halves, run_reversible
from lightning_slm.nn.cross_entropy import linear_cross_entropy
from lightning_slm.nn.meta_tokens import MetaTokens, apart, causal_mask
from lightning_slm.nn.mixer import Context, Mixer
from lightning_slm.nn.rms_norm import RMSNorm
from lightning_slm.nn.rope import rope_angles


@dataclass
class SLMOutput(BaseModelOutputWithPast):
    """The backbone's output.

    Attributes:
        aux_loss: what mixers add to the training loss (routers that balance their experts), a mean over tokens; None:
            nothing.
    """

    aux_loss: Tensor | None = None


class Block(GradientCheckpointingLayer):
    """Token mixer and channel mixer, each behind a norm and around it the residual stream.

    A shared mixer is not stored here but comes with each call, so that it exists once in the state dict.
    """

    def __init__(self, config: SLMConfig, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        self.token_norm = _norm(config, spec.token)
        self.token_mixer = _own(config, spec.token, TOKEN_MIXERS)
        self.channel_norm = _norm(config, spec.channel)
        self.channel_mixer = _own(config, spec.channel, CHANNEL_MIXERS)

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int, shared: nn.ModuleDict) -> Tensor:
        for norm, mixer in self.halves(shared):
            x_BTD = x_BTD + mixer(norm(x_BTD), context, layer_idx)
        return x_BTD

    def halves(self, shared: nn.ModuleDict) -> list[tuple[nn.Module, nn.Module]]:
        """What it has of token mixer and channel mixer, each with its norm."""
        token = (self.token_norm, self.token_mixer, self.spec.token)
        channel = (self.channel_norm, self.channel_mixer, self.spec.channel)
        return [(n, shared[_key(s)] if m is None else m) for n, m, s in (token, channel) if n is not None]


def _key(spec: MixerSpec | None) -> str:
    assert spec is not None
    return f"{spec.name}@{spec.label}"


def make_norm(config: SLMConfig) -> nn.Module:
    """A norm of the configured kind, over the model's width."""
    return {"rms": RMSNorm, "layer": nn.LayerNorm}[config.norm](config.hidden_size, eps=config.rms_norm_eps)


def _norm(config: SLMConfig, spec: MixerSpec | None) -> nn.Module | None:
    return None if spec is None else make_norm(config)


def _make(config: SLMConfig, spec: MixerSpec, registry: dict[str, type[Mixer]]) -> Mixer:
    return registry[spec.name].from_config(config, **config.options(spec.name))


def _own(config: SLMConfig, spec: MixerSpec | None, registry: dict[str, type[Mixer]]) -> Mixer | None:
    return None if spec is None or spec.label is not None else _make(config, spec, registry)


def _shared(config: SLMConfig) -> nn.ModuleDict:
    specs = [(s, r) for b in config.blocks for s, r in ((b.token, TOKEN_MIXERS), (b.channel, CHANNEL_MIXERS))]
    labelled = {_key(s): (s, r) for s, r in specs if s is not None and s.label is not None}
    return nn.ModuleDict({key: _make(config, s, r) for key, (s, r) in labelled.items()})


class SLMPreTrainedModel(PreTrainedModel):
    config_class = SLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (the forms of these are transformers')
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Transformers' rule, unless a module has one of its own (see `Mixer`)."""
        own = getattr(module, "init_weights_", None)
        if own is None or isinstance(module, PreTrainedModel):
            super()._init_weights(module)
        else:
            own(self.config)


class SLMModel(SLMPreTrainedModel):
    """Embedding, blocks, final norm: token ids to hidden states."""

    def __init__(self, config: SLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.positions == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.embed_norm = make_norm(config) if config.embedding_norm else None
        self.meta_tokens = MetaTokens(config.meta_tokens, config.hidden_size) if config.meta_tokens else None
        self.layers = nn.ModuleList(Block(config, spec) for spec in config.blocks)
        self.shared = _shared(config)
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SLMOutput:
        """Hidden states after the last norm, ``.last_hidden_state`` of shape (B, T, D).

        Args:
            attention_mask: 1 for tokens, 0 for padding, over cached and new tokens.
            position_ids: (B or 1, T); where they restart within a row (without mask and cache), documents are packed
                and none looks at another.
            past_key_values: cache of the tokens before these.
            use_cache: whether to make and return a cache.

        Raises:
            ValueError: more tokens than ``max_position_embeddings``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        if not self.config.causal:
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = SLMCache(self.config)
        context, positions = self.context(x_BTD, attention_mask, position_ids, past_key_values)
        x_BTD = self.run_blocks(self.enter(x_BTD, positions, context), context)
        if context.meta:
            _, x_BTD = apart(x_BTD, context.meta, context.meta_at_B)
        x_BTD = self.norm(x_BTD)
        if isinstance(past_key_values, SLMCache):
            past_key_values.advance(x_BTD.shape[1])
        aux_loss = torch.stack(context.losses).sum() if context.losses else None
        return SLMOutput(last_hidden_state=x_BTD, past_key_values=past_key_values, aux_loss=aux_loss)

    def enter(self, x_BTD: Tensor, positions_BT: Tensor, context: Context) -> Tensor:
        """From embedded tokens to what the first block reads: where the context has meta tokens, these, too."""
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(positions_BT)
        if self.meta_tokens is not None and context.meta:
            x_BTD = self.meta_tokens(x_BTD, context)
        return x_BTD if self.embed_norm is None else self.embed_norm(x_BTD)

    def run_blocks(self, x_BTD: Tensor, context: Context) -> Tensor:
        """All blocks, each ``config.repeat`` times in place."""
        if self.config.reversible:
            if self.gradient_checkpointing and self.training:
                raise ValueError("reversible=True keeps no activations anyway; call gradient_checkpointing_disable().")
            return run_reversible(halves(self.layers, self.shared, self.config.repeat), x_BTD, context)
        layer_idx = 0
        for block in self.layers:
            for _ in range(self.config.repeat):
                x_BTD = block(x_BTD, context, layer_idx, self.shared)
                layer_idx += 1
        return x_BTD

    def context(
        self, x_BTD: Tensor, attention_mask: Any = None, position_ids: Tensor | None = None, cache: Any = None
    ) -> tuple[Context, Tensor]:
        """What ``enter`` and ``run_blocks`` take for one forward pass, and the tokens' positions, (B or 1, T)."""
        past = cache.get_seq_length() if cache is not None else 0
        T, longest = x_BTD.shape[1], self.config.max_position_embeddings
        if past + T > longest:
            raise ValueError(
                f"{past + T} tokens are more than max_position_embeddings={longest}; shorten the input, or build the "
                "model with a larger max_position_embeddings."
            )
        positions = position_ids
        if positions is None:
            positions = (torch.arange(T, device=x_BTD.device) + past)[None]
        context = Context(self.rope(positions), cache=cache, causal=self.config.causal)
        if isinstance(attention_mask, dict):  # generate() with a static cache has made them already
            if self.meta_tokens is not None:
                raise ValueError("With meta_tokens, attention_mask must be of tokens, (B, S), not of pairs.")
            context.masks = attention_mask
            return context, positions
        given = position_ids if cache is None and attention_mask is None else None
        context.tokens_BS = _tokens(attention_mask)
        if self.meta_tokens is not None:
            context.rope = self.rope(self.meta_tokens.place(context, positions, past))
            if _starts(T, None, given) is not None:
                raise ValueError(
                    "meta_tokens stand before the first token of a row, so that documents packed into one cannot be "
                    "kept apart; leave out position_ids (TextData: document_mask=False)."
                )
        context.starts_BT = _starts(T + context.meta, context.tokens_BS, given)
        context.masks = self._masks(x_BTD, attention_mask, position_ids, context)
        return context, positions

    def rope(self, positions_BT: Tensor) -> tuple[Tensor, Tensor] | None:
        """The angles of these positions, if the model turns by them."""
        config = self.config
        return rope_angles(positions_BT, config.head_dim, config.rope_theta) if config.positions == "rope" else None

    def _masks(
        self, x_BTD: Tensor, attention_mask: Any, position_ids: Tensor | None, context: Context
    ) -> dict[str, Any]:
        types, past = set(self.config.layer_types), 0 if context.cache is None else context.cache.get_seq_length()
        if not self.config.causal:
            return {"full_attention": _two_sided(context)}
        makers, masks = {}, {}
        if types & {"full_attention", "hybrid"}:
            if self.meta_tokens is None:
                makers["full_attention"] = create_causal_mask
            else:
                T, S = x_BTD.shape[1] + context.meta, past + x_BTD.shape[1] + self.config.meta_tokens
                masks["full_attention"] = causal_mask(T, S, context.tokens_BS, x_BTD.device)
        if types & {"sliding_attention", "hybrid_sliding"} and past:
            makers["sliding_attention"] = create_sliding_window_causal_mask  # else: see `windowed_attention`
        return masks | {
            kind: maker(
                config=self.config,
                inputs_embeds=x_BTD,
                attention_mask=attention_mask,
                past_key_values=context.cache,
                position_ids=position_ids,
            )
            for kind, maker in makers.items()
        }


def _tokens(attention_mask: Tensor | None) -> Tensor | None:
    """Where there is no padding, (B, S); None if there is none at all."""
    if attention_mask is None:
        return None
    tokens_BS = attention_mask.bool()
    return None if tokens_BS.all() else tokens_BS


def _starts(T: int, tokens_BS: Tensor | None, positions_BT: Tensor | None) -> Tensor | None:
    """Where, among the last T tokens, padding ends or positions restart; None: nowhere."""
    if tokens_BS is not None:
        padded = torch.nn.functional.pad(tokens_BS, (1, 0), value=True)
        starts_BT = (padded[:, 1:] & ~padded[:, :-1])[:, -T:]
    elif positions_BT is not None:
        starts_BT = torch.nn.functional.pad(positions_BT[:, 1:] != positions_BT[:, :-1] + 1, (1, 0))
    else:
        return None
    return starts_BT if starts_BT.any() else None


def _two_sided(context: Context) -> Tensor | None:
    """An encoder's mask: every token of the same text, and no padding."""
    mask = None if context.tokens_BS is None else context.tokens_BS[:, None, None, :]
    if context.segments_BT is not None:
        same = context.segments_BT[:, None, :, None] == context.segments_BT[:, None, None, :]
        mask = same if mask is None else same & mask
    return mask


class SLMForCausalLM(SLMPreTrainedModel, GenerationMixin):
    """The backbone with an output head: a language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SLMConfig) -> None:
        super().__init__(config)
        if not config.causal:
            raise ValueError("causal=False makes an encoder, which predicts no next token; use SLMForMaskedLM.")
        self.model = SLMModel(config)
        kept = {CHANNEL_MIXERS[b.channel.name].cache_type for b in config.blocks if b.channel} - {None}
        kept |= set(config.layer_types or ()) - {"full_attention", "sliding_attention"}
        self._is_stateful = bool(config.meta_tokens or kept)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Hand ``generate`` a cache of ours instead of transformers', which has slots for its own states only."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if type(model_kwargs.get("past_key_values")) is DynamicCache:
            model_kwargs["past_key_values"] = SLMCache(self.config)
        elif self._is_stateful and isinstance(model_kwargs.get("past_key_values"), StaticCache | QuantizedCache):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} holds keys and values only, but the "
                f"pattern {self.config.pattern!r} keeps states, too; leave it out, or use "
                "lightning_slm.models.decode.generate_stream, which has static states."
            )

    @classmethod
    def from_hf(cls, source: str | Path | PreTrainedModel) -> "SLMForCausalLM":
        """Our model with the weights of a Hugging Face checkpoint (``CONVERTERS`` lists the architectures).

        Args:
            source: a folder, or the model itself.

        Raises:
            ValueError: an architecture, or a variant of it, that ours does not have.
        """
        from lightning_slm.models.convert import from_hf  # which builds this class

        model = source if isinstance(source, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(source)
        return model if isinstance(model, cls) else from_hf(model)

    def to_hf(self) -> PreTrainedModel:
        """The same model as ``LlamaForCausalLM``, for runtimes that know only that.

        Raises:
            ValueError: the pattern holds more than plain attn/mlp blocks; says which.
        """
        from lightning_slm.models.convert import to_llama

        return to_llama(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and the loss if ``labels`` are given.

        Args:
            labels: (B, T), not shifted (position t predicts ``labels[t + 1]``); -100 = no loss.
            logits_to_keep: logits of the last so many positions only, or of these positions; 0 = all.
            return_logits: whether ``.logits`` is filled; None: unless in training with labels, where they would be
                the largest tensor of the step and the loss is computed without them.
            num_items_in_batch: what the summed loss is divided by; None: the number of labels.
        """
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        hidden_BTD = out.last_hidden_state
        loss, logits = None, None
        if labels is not None:
            targets = labels[:, 1:].reshape(-1)
            loss = linear_cross_entropy(hidden_BTD[:, :-1].flatten(0, 1), self.lm_head, targets)
            loss = loss / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
            if out.aux_loss is not None and self.training:
                loss = loss + out.aux_loss
        if return_logits or (return_logits is None and (labels is None or not self.training)):
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
            )
            logits = self.lm_head(hidden_BTD if isinstance(kept, int) else hidden_BTD[:, kept])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)
