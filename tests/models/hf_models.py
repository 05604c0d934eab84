"""Small models of every architecture in ``transformers`` that ours can take over, and how near ours comes to each."""

# Shape letters: B = batch, T = tokens, V = vocabulary.

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from mixers import V
from torch import nn
from transformers import PreTrainedModel

Tolerance = tuple[float, float]  # relative, absolute


def _uneven_norms_(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)  # ones would not show a norm in the wrong place


def _uneven_states_(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.ndim == 1 or "A_log" in name:  # in matrices, so much would be more than float32 can compare
            p.add_(torch.randn_like(p) / 4)


def _uneven_rwkv_(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if "time" in name:  # where the bonus would be all ones
            p.copy_(torch.rand_like(p) if "mix" in name else torch.randn_like(p))
        else:
            p.add_(torch.randn_like(p) / 5)


@dataclass(frozen=True)
class Kind:
    """One architecture.

    Args:
        name: as in ``LlamaConfig`` and ``LlamaForCausalLM``.
        values: of the configuration, of every shape.
        shapes: what differs from that, and the pattern of ours that it is.
        refused: variants that ours lacks, and what the message has to say.
        logits: how near ours comes.
        loss: how near ours comes, relative and absolute.
        gradients: how near ours comes, absolute.
        weights_: makes all of them matter.
        ours: further values that our configuration gets.
        how: arguments with which theirs is right.
        pads: whether theirs reads the mask of padding on the left.
        modes: of training, in which its gradients are those of its weights.
    """

    name: str
    values: dict[str, Any]
    shapes: dict[str, tuple[dict[str, Any], str]]
    refused: list[tuple[dict[str, Any], str]]
    logits: Tolerance = (1e-5, 1e-5)
    loss: float = 1e-5
    gradients: float = 1e-5
    weights_: Callable[[nn.Module], None] = _uneven_norms_
    ours: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)
    pads: bool = True
    modes: tuple[bool, ...] = (False, True)


TOKENS = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
STATES = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "initializer_range": 0.3}
TRANSFORMER = {**TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "initializer_range": 0.1,
               "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
NO_END = {"positions": "none", "max_position_embeddings": 1_048_576}
JAMBA = "mamba/mlp mamba/moe attn/mlp mamba/moe"
KINDS = {
    "llama": Kind(
        "Llama",
        TRANSFORMER,
        {
            "heads alone, tied": ({"num_key_value_heads": 4, "tie_word_embeddings": True}, "attn/mlp*3"),
            "heads grouped, tied": ({"tie_word_embeddings": True}, "attn/mlp*3"),
            "heads grouped, untied": ({"num_key_value_heads": 1, "tie_word_embeddings": False}, "attn/mlp*3"),
            "wide heads": (
                {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
                "attn/mlp*3",
            ),
        },
        [
            ({"attention_bias": True}, "attention_bias.*True"),
            ({"mlp_bias": True}, "mlp_bias.*True"),
            ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
            ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type.*linear"),
        ],
        logits=(0, 1e-5),
        gradients=1e-6,
        loss=1e-6,
    ),
    "mistral": Kind(
        "Mistral",
        TRANSFORMER,
        {
            "whole": ({"sliding_window": None}, "attn/mlp*3"),
            "window": ({"sliding_window": 4}, "swa/mlp*3"),
        },
        [({"hidden_act": "gelu"}, "hidden_act.*gelu")],
    ),
    "mixtral": Kind(
        "Mixtral",
        {**TRANSFORMER, "num_local_experts": 3},
        {
            "grouped": ({}, "attn/moe*3"),
            "tied, window": (
                {"num_key_value_heads": 4, "tie_word_embeddings": True, "sliding_window": 4},
                "swa/moe*3",
            ),
            "wide heads, one of three": ({"head_dim": 16, "num_experts_per_tok": 1}, "attn/moe*3"),
        },
        [({"router_jitter_noise": 0.1}, "router_jitter_noise"), ({"hidden_act": "gelu"}, "hidden_act.*gelu")],
        gradients=1e-6,
    ),
    "jamba": Kind(
        "Jamba",
        {
            **TRANSFORMER,
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "num_experts": 4,
            "mamba_d_state": 8,
        },
        {
            "experts in every other": ({}, JAMBA),
            "two periods, tied": ({"num_hidden_layers": 8, "tie_word_embeddings": True}, f"({JAMBA})*2"),
            "no experts": ({"num_experts": 1}, "mamba/mlp mamba/mlp attn/mlp mamba/mlp"),
            "attention only": ({"attn_layer_period": 1, "attn_layer_offset": 0}, "(attn/mlp attn/moe)*2"),
            "other sizes": (
                {
                    "mamba_d_conv": 3,
                    "mamba_expand": 3,
                    "mamba_dt_rank": 5,
                    "mamba_conv_bias": False,
                    "num_experts_per_tok": 3,
                },
                JAMBA,
            ),
        },
        [({"mamba_proj_bias": True}, "mamba_proj_bias.*True"), ({"hidden_act": "gelu"}, "hidden_act.*gelu")],
        ours={"positions": "none"},
    ),
    "mamba": Kind(
        "Mamba",
        STATES,
        {
            "tied": ({"tie_word_embeddings": True}, "mamba/-*3"),
            "untied, narrow state": (
                {"tie_word_embeddings": False, "state_size": 5, "time_step_rank": 3},
                "mamba/-*3",
            ),
            "no bias of the convolution": ({"use_conv_bias": False, "conv_kernel": 3}, "mamba/-*3"),
            "other width and epsilon": (
                {"expand": 3, "layer_norm_epsilon": 1e-3, "residual_in_fp32": False},
                "mamba/-*3",
            ),
        },
        [({"use_bias": True}, "use_bias.*True"), ({"hidden_act": "gelu"}, "hidden_act.*gelu")],
        logits=(5e-5, 5e-5),
        weights_=_uneven_states_,
        ours=NO_END,
    ),
    "mamba2": Kind(
        "Mamba2",
        {**STATES, "head_dim": 16, "num_heads": 4, "state_size": 8, "chunk_size": 8, "n_groups": 1},
        {
            "one group, tied": ({"tie_word_embeddings": True}, "mamba2/-*3"),
            "two groups, untied": ({"n_groups": 2, "tie_word_embeddings": False}, "mamba2/-*3"),
            "no bias of the convolution": ({"use_conv_bias": False, "conv_kernel": 3}, "mamba2/-*3"),
            "other width and epsilon": (
                {"n_groups": 4, "expand": 3, "num_heads": 12, "head_dim": 8, "layer_norm_epsilon": 1e-3},
                "mamba2/-*3",
            ),
        },
        [
            ({"use_bias": True}, "use_bias.*True"),
            ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
            ({"time_step_limit": (0.0, 0.5)}, "time_step_limit.*0.5"),
        ],
        logits=(5e-5, 5e-5),
        weights_=_uneven_states_,
        ours=NO_END,
    ),
    "rwkv": Kind(
        "Rwkv",
        {**TOKENS, "hidden_size": 32, "num_hidden_layers": 5, "rescale_every": 2, "intermediate_size": 48},
        {
            "plain": ({}, "rwkv4/rwkv4_ffn*5"),
            "tied": ({"tie_word_embeddings": True}, "rwkv4/rwkv4_ffn*5"),
            "not rescaled": ({"rescale_every": 0}, "rwkv4/rwkv4_ffn*5"),
        },
        [({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06")],
        logits=(1e-4, 1e-4),  # in evaluation, theirs halves what its norms read, but not their epsilon
        gradients=1e-6,
        weights_=_uneven_rwkv_,
        how={"use_cache": False},  # with a cache, transformers 5.23 mixes up the rows of a batch
        pads=False,
        modes=(True,),  # in evaluation, theirs are of the weights that it has rescaled
    ),
}
SHAPES = [(name, shape) for name, kind in KINDS.items() for shape in kind.shapes]


def hf_model(name: str, shape: str | None = None, **values: Any) -> PreTrainedModel:
    """One of these models, with random weights that all matter.

    Args:
        shape: None: the first.
        values: of its configuration, before all others.
    """
    kind = KINDS[name]
    differs, _ = kind.shapes[shape or next(iter(kind.shapes))]
    config = getattr(transformers, f"{kind.name}Config")(**{**kind.values, **differs, **values})
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{kind.name}ForCausalLM")(config).eval()
    with torch.no_grad():
        kind.weights_(model)
    return model
