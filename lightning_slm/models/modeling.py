"""The backbone: blocks of interchangeable mixers, inside Hugging Face's shell.

``generate()``, ``save_pretrained``, the Auto classes, PEFT and every tool that knows ``PreTrainedModel`` work on it.
"""

# Shape letters: B = batch, T = tokens of this call, D = model width, V = vocabulary.

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.pattern import BlockSpec, MixerSpec
from lightning_slm.models.registry import CHANNEL_MIXERS, TOKEN_MIXERS
from lightning_slm.nn.cross_entropy import linear_cross_entropy
from lightning_slm.nn.mixer import Context, Mixer
from lightning_slm.nn.rms_norm import RMSNorm
from lightning_slm.nn.rope import rope_angles


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
        if self.token_norm is not None:
            mixer = self.token_mixer if self.token_mixer is not None else shared[_key(self.spec.token)]
            x_BTD = x_BTD + mixer(self.token_norm(x_BTD), context, layer_idx)
        if self.channel_norm is not None:
            mixer = self.channel_mixer if self.channel_mixer is not None else shared[_key(self.spec.channel)]
            x_BTD = x_BTD + mixer(self.channel_norm(x_BTD), context, layer_idx)
        return x_BTD


def _key(spec: MixerSpec | None) -> str:
    assert spec is not None
    return f"{spec.name}@{spec.label}"


def _norm(config: SLMConfig, spec: MixerSpec | None) -> RMSNorm | None:
    return None if spec is None else RMSNorm(config.hidden_size, config.rms_norm_eps)


def _own(config: SLMConfig, spec: MixerSpec | None, registry: dict[str, type[Mixer]]) -> Mixer | None:
    return None if spec is None or spec.label is not None else registry[spec.name].from_config(config)


def _shared(config: SLMConfig) -> nn.ModuleDict:
    specs = [(s, r) for b in config.blocks for s, r in ((b.token, TOKEN_MIXERS), (b.channel, CHANNEL_MIXERS))]
    labelled = {_key(s): (s, r) for s, r in specs if s is not None and s.label is not None}
    return nn.ModuleDict({key: r[s.name].from_config(config) for key, (s, r) in labelled.items()})


class SLMPreTrainedModel(PreTrainedModel):
    config_class = SLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (the forms of these are transformers')
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True


class SLMModel(SLMPreTrainedModel):
    """Embedding, blocks, final norm: token ids to hidden states."""

    def __init__(self, config: SLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, spec) for spec in config.blocks)
        self.shared = _shared(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
    ) -> BaseModelOutputWithPast:
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
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        context = self.context(x_BTD, attention_mask, position_ids, past_key_values)
        x_BTD = self.run_blocks(x_BTD, context)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BTD), past_key_values=past_key_values)

    def run_blocks(self, x_BTD: Tensor, context: Context) -> Tensor:
        """All blocks, each ``config.repeat`` times in place."""
        layer_idx = 0
        for block in self.layers:
            for _ in range(self.config.repeat):
                x_BTD = block(x_BTD, context, layer_idx, self.shared)
                layer_idx += 1
        return x_BTD

    def context(
        self, x_BTD: Tensor, attention_mask: Any = None, position_ids: Tensor | None = None, cache: Any = None
    ) -> Context:
        """Positions and masks of one forward pass, as ``run_blocks`` takes them."""
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
        rope = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        return Context(rope, self._masks(x_BTD, attention_mask, position_ids, cache), cache)

    def _masks(self, x_BTD: Tensor, attention_mask: Any, position_ids: Tensor | None, cache: Any) -> dict[str, Any]:
        if isinstance(attention_mask, dict):  # generate() with a static cache has made them already
            return attention_mask
        makers: Any = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
        return {
            kind: makers[kind](
                config=self.config,
                inputs_embeds=x_BTD,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
            )
            for kind in set(self.config.layer_types)
        }


class SLMForCausalLM(SLMPreTrainedModel, GenerationMixin):
    """The backbone with an output head: a language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SLMConfig) -> None:
        super().__init__(config)
        self.model = SLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_hf(cls, source: str | Path | PreTrainedModel) -> "SLMForCausalLM":
        """Our model with the weights of a Llama-format Hugging Face checkpoint (Llama, Mistral).

        Args:
            source: a folder, or the model itself.

        Raises:
            ValueError: an architecture, or a variant of it, that ours does not have.
        """
        from lightning_slm.models.convert import from_llama  # which builds this class

        model = source if isinstance(source, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(source)
        return model if isinstance(model, cls) else from_llama(model)

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
        if return_logits or (return_logits is None and (labels is None or not self.training)):
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
            )
            logits = self.lm_head(hidden_BTD if isinstance(kept, int) else hidden_BTD[:, kept])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)
