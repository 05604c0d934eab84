"""What one layer costs, from its shapes: weights, attention, recurrent states, experts. Nothing is run.

Layers are known by what they hold (``A_log``, ``head_k_dim``, ...), and attention by "Attention" in its class name, as
in every Hugging Face model; so a sharded, compiled, empty or low-bit model costs what the plain one does.
"""

# Shape letters: H = heads, d = head width, k and v = width of a key and a value, N = states of a channel, E = experts.

from typing import Any

from torch import Tensor, nn

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_HEAD_DIM = ("head_dim", "attention_head_size", "head_size")
_ACTIVE = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "num_selected_experts")
_FULL = ("full_attention", "hybrid", None)
_SLIDING = ("sliding_attention", "hybrid_sliding")


def weight_flops(module: nn.Module, parent: nn.Module | None, config: Any) -> int:
    """Of the weights that ``module`` itself holds, for one token: two for each element that it is multiplied with.

    Packed and quantised layers tell their logical size; of a stack of experts only the chosen ones count; a
    convolution has stride 1.
    """
    if isinstance(module, nn.Embedding):
        return 0
    if hasattr(module, "in_features") and hasattr(module, "out_features") and next(module.children(), None) is None:
        return 2 * int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
    weights = [p for name, p in module.named_parameters(recurse=False) if name != "A_log" and "bias" not in name]
    if "Expert" not in type(module).__name__:
        return sum(2 * p.numel() for p in weights if sum(size > 1 for size in p.shape) > 1)
    stacked = [p for p in weights if p.ndim == 3]
    held = stacked[0].shape[0] if stacked else getattr(module, "moe_num_experts", 1)
    elements = sum(p.numel() for p in stacked or weights)
    return 2 * elements * (active_experts(module, parent, config) if held > 1 else 1) // held


def active_experts(experts: nn.Module, block: nn.Module | None, config: Any) -> int:
    """Experts that one token is sent to: as the block says, its router, or the configuration.

    Raises:
        ValueError: none of them says so.
    """
    owners = [experts, *([block, *block.children()] if block is not None else ()), config]
    said = [getattr(owner, name, None) for owner in owners for name in _ACTIVE]
    for number in said:
        if isinstance(number, int):
            return number
    raise ValueError(
        f"{type(block or experts).__name__} has experts, but neither it nor its configuration says to how many of them "
        f"a token goes (one of {', '.join(_ACTIVE)}); give the block a method flops_per_token(context)."
    )


def attention(module: nn.Module, config: Any) -> tuple[int, int | None] | None:
    """(FLOPs for each token that is looked at, window or None) of a layer of softmax attention; else None.

    Queries times keys and probabilities times values: ``2 H (k + v)``. Grouped queries save memory and no arithmetic.

    Raises:
        ValueError: a kind of attention whose cost is not known here.
    """
    inside = [m for m in module.modules() if "Attention" in type(m).__name__]
    if inside != [module]:  # BertAttention holds BertSelfAttention, which is the one
        return None
    heads, width = _first(module, config, _HEADS), _first(module, config, _HEAD_DIM)
    if heads is None:
        raise ValueError(f"{type(module).__name__} does not say how many heads it has (one of {', '.join(_HEADS)}).")
    width = width or config.hidden_size // heads
    k, v = getattr(module, "qk_head_dim", width), getattr(module, "v_head_dim", width)
    return 2 * heads * (k + v), _window(module, config)


def recurrence(module: nn.Module) -> int | None:
    """FLOPs of one step of a recurrent state, by hand, in the recurrent form; None for a layer that has none.

    A multiply-add is two, an exponential none, and what is done once per channel is left out. For each element of the
    state:

    - selective scan, h = exp(dt A) h + (dt x) B, y = C h (Mamba, Gu & Dao 2023, https://arxiv.org/abs/2312.00752):
      dt A 1, decay 1, (dt x) B 1, sum 1, C h 2 = 6;
    - the same with one decay per head (Mamba-2, Dao & Gu 2024, https://arxiv.org/abs/2405.21060): 5;
    - linear attention with decay, S = a S + k v', y = S q (MiniMax-01, https://arxiv.org/abs/2501.08313): 1+2+2 = 5;
    - gated delta rule, which also subtracts S k before it writes (Yang et al. 2024, https://arxiv.org/abs/2412.06464;
      Kimi Linear, https://arxiv.org/abs/2510.26692): 7;
    - RWKV-4 (Peng et al. 2023, https://arxiv.org/abs/2305.13048), numerator 3, denominator 2, output 4 = 9;
    - RG-LRU (De et al. 2024, https://arxiv.org/abs/2402.19427), h = a h + b (i x): 4.

    Kernels that work on chunks multiply more; the difference is no use, so it does not count as utilisation.
    """
    has: Any = module
    a_log = getattr(module, "A_log", None)
    if "Delta" in type(module).__name__:
        width = getattr(module, "head_dim", 0)
        heads = getattr(module, "num_v_heads", None) or has.num_heads
        return 7 * heads * getattr(module, "head_k_dim", width) * getattr(module, "head_v_dim", width)
    if isinstance(a_log, Tensor) and hasattr(module, "ssm_state_size"):
        return 6 * a_log.numel() if a_log.ndim > 1 else 5 * has.intermediate_size * has.ssm_state_size
    if hasattr(module, "slope_rate"):
        return 5 * has.num_attention_heads * has.head_dim**2
    if hasattr(module, "time_decay") and hasattr(module, "attention_hidden_size"):
        return 9 * has.attention_hidden_size
    if hasattr(module, "recurrent_param"):
        return 4 * has.recurrent_param.numel()
    return None


def _first(module: nn.Module, config: Any, names: tuple[str, ...]) -> int | None:
    said = (getattr(owner, name, None) for owner in (module, config) for name in names)
    return next((number for number in said if isinstance(number, int)), None)


def _window(module: Any, config: Any) -> int | None:
    """Tokens that a layer looks back at, its own included; None: all."""
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    kind = getattr(module, "cache_type", None)
    if kind is None and types and index is not None:
        kind = types[index]
    if kind is None:
        return getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    if kind not in (*_FULL, *_SLIDING):
        raise ValueError(
            f"{type(module).__name__} has a layer of {kind!r}, and only full and sliding attention have a cost known "
            "here; give it a method flops_per_token(context)."
        )
    return config.sliding_window if kind in _SLIDING else None
