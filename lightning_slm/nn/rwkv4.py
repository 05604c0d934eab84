"""RWKV-4: a decaying mean of values in place of attention (Peng et al. 2023, https://arxiv.org/abs/2305.13048)."""

# Shape letters: B = batch, T = tokens of this call, D = model width, C = channels of the recurrence.

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_slm.nn.mixer import Context, Mixer, set_
from lightning_slm.nn.token_shift import interpolate, last_token, previous_tokens
from lightning_slm.nn.wkv import wkv

_DEPTH = 0.5  # first values depend on how deep a layer lies, from 0 to 1; a mixer does not know: the middle for all


class RWKV4(Mixer):
    """output(sigmoid(receptance(x_r)) * wkv(key(x_k), value(x_v))), each x mixed of a token and the one before.

    Args:
        hidden_size: width of input and output.
        attention_hidden_size: channels of the recurrence.
    """

    cache_type: ClassVar[str] = "linear_attention"
    _slm_protected = ("time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance")

    def __init__(self, hidden_size: int, attention_hidden_size: int) -> None:
        super().__init__()
        self.attention_hidden_size = attention_hidden_size
        self.time_decay, self.time_first = _parameter(attention_hidden_size), _parameter(attention_hidden_size)
        self.time_mix_key, self.time_mix_value = _parameter(hidden_size), _parameter(hidden_size)
        self.time_mix_receptance = _parameter(hidden_size)
        self.key = nn.Linear(hidden_size, attention_hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, attention_hidden_size, bias=False)
        self.receptance = nn.Linear(hidden_size, attention_hidden_size, bias=False)
        self.output = nn.Linear(attention_hidden_size, hidden_size, bias=False)

    @classmethod
    def from_config(cls, config: Any, *, attention_hidden_size: int | None = None) -> Self:
        return cls(config.hidden_size, attention_hidden_size or config.hidden_size)

    def init_weights_(self, config: Any) -> None:
        """Decay rates from e^-5 to e^3 over the channels; the first ones look back more than the last."""
        C = self.attention_hidden_size
        channel_C = torch.arange(C)
        spread_C = (channel_C / max(C - 1, 1)) ** (0.7 + 1.3 * _DEPTH)
        set_(self.time_decay, 8 * spread_C - 5)
        set_(self.time_first, math.log(0.3) + 0.5 * ((channel_C + 1) % 3 - 1))
        share_D = first_shares(len(self.time_mix_key))
        set_(self.time_mix_key, share_D)
        set_(self.time_mix_value, share_D + 0.3 * _DEPTH)
        set_(self.time_mix_receptance, share_D**0.5)

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        kept = context.state(layer_idx)
        previous_BTD = previous_tokens(x_BTD, kept.get("rwkv_shift"), context.starts_BT)
        mixes = (self.time_mix_receptance, self.time_mix_key, self.time_mix_value)
        r, k, v = interpolate(previous_BTD, x_BTD, *mixes)
        k, v = self.key(k), self.value(v)
        y_BTC, state_B3C = wkv(self.time_decay, self.time_first, k, v, kept.get("wkv"), context.starts_BT)
        if context.cache is not None:
            context.keep(layer_idx, rwkv_shift=last_token(x_BTD), wkv=state_B3C.detach())
        return self.output(torch.sigmoid(self.receptance(r)) * y_BTC)


class RWKV4FFN(Mixer):
    """sigmoid(receptance(x_r)) * value(relu(key(x_k))^2), each x mixed of a token and the one before.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width between.
    """

    _slm_protected = ("time_mix_key", "time_mix_receptance")

    cache_type: ClassVar[str] = "linear_attention"

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.time_mix_key = _parameter(hidden_size)
        self.time_mix_receptance = _parameter(hidden_size)
        self.key = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(intermediate_size, hidden_size, bias=False)

    @classmethod
    def from_config(cls, config: Any) -> Self:
        return cls(config.hidden_size, config.intermediate_size)

    def init_weights_(self, config: Any) -> None:
        """As in the token mixer."""
        for mix in (self.time_mix_key, self.time_mix_receptance):
            set_(mix, first_shares(len(mix)))

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        before_B1D = context.state(layer_idx).get("rwkv_ffn_shift")
        previous_BTD = previous_tokens(x_BTD, before_B1D, context.starts_BT)
        r, k = interpolate(previous_BTD, x_BTD, self.time_mix_receptance, self.time_mix_key)
        if context.cache is not None:
            context.keep(layer_idx, rwkv_ffn_shift=last_token(x_BTD))
        return torch.sigmoid(self.receptance(r)) * self.value(torch.relu(self.key(k)).square())


def first_shares(size: int) -> Tensor:
    """First shares of a token itself, rising over the channels from 0 to 1, (D,)."""
    return (torch.arange(size) / size) ** (1 - _DEPTH)


def _parameter(size: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(size))
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter
