"""The short causal convolution in front of state-space scans (Gu & Dao 2023, https://arxiv.org/abs/2312.00752)."""

# Shape letters: B = batch, T = tokens of this call, C = channels, W = taps.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConv(nn.Module):
    """Each channel's weighted sum of its last ``taps`` values, the own included, plus a bias.

    Args:
        channels: C.
        taps: W.
        bias: whether there is one.
    """

    _slm_protected = ("weight",)

    def __init__(self, channels: int, taps: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))  # the last tap is of the token itself
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.weight._no_weight_decay = True  # type: ignore[attr-defined]
        self.init_weights_()

    def init_weights_(self, config: Any = None) -> None:
        """Uniform within 1/sqrt(taps), as ``nn.Conv1d``."""
        bound = self.weight.shape[1] ** -0.5
        for p in self.parameters():
            nn.init.uniform_(p, -bound, bound)

    def forward(
        self, x_BTC: Tensor, before_BWC: Tensor | None = None, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sums, and what the next call needs as ``before_BWC``.

        Args:
            before_BWC: the W - 1 values before these; None: zeros.
            segments_BT: values of other segments are not seen (see `Context.segments_BT`).

        Returns: (B, T, C), and the last W - 1 values, (B, W - 1, C).
        """
        W, T = self.weight.shape[1], x_BTC.shape[1]
        if before_BWC is None:
            padded = F.pad(x_BTC, (0, 0, W - 1, 0))
        else:
            padded = torch.cat((before_BWC.to(x_BTC.dtype), x_BTC), 1)
        taps = [padded[:, i : i + T] for i in range(W)]
        if segments_BT is not None:  # the first segment goes on from what came before
            numbers = F.pad(segments_BT, (W - 1, 0))
            taps = [
                tap * (numbers[:, i : i + T] == segments_BT).unsqueeze(-1) if i < W - 1 else tap
                for i, tap in enumerate(taps)
            ]
        weight_WC = self.weight.t().to(x_BTC.dtype)
        y_BTC = taps[-1] * weight_WC[-1]
        if self.bias is not None:
            y_BTC = y_BTC + self.bias.to(x_BTC.dtype)
        for tap, weight_C in zip(taps[:-1], weight_WC):
            y_BTC = torch.addcmul(y_BTC, tap, weight_C)
        return y_BTC, padded[:, T:].detach()

    def silu(
        self, x_BTC: Tensor, before_BWC: Tensor | None = None, segments_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Silu of the sums, and what the next call needs: arguments and results as of ``forward``.

        Texts from their beginning take a faster way in eager mode on a CPU, see `_ConvSiLU`.
        """
        plain = torch.compiler.is_compiling() or x_BTC.device.type != "cpu"
        if plain or before_BWC is not None or segments_BT is not None:
            y_BTC, last_BWC = self(x_BTC, before_BWC, segments_BT)
            return F.silu(y_BTC), last_BWC
        before, T = self.weight.shape[1] - 1, x_BTC.shape[1]
        last_BWC = F.pad(x_BTC.detach()[:, max(T - before, 0) :], (0, 0, max(before - T, 0), 0))
        return _ConvSiLU.apply(x_BTC, self.weight, self.bias), last_BWC


class _ConvSiLU(torch.autograd.Function):
    """Silu of the short convolution of whole texts. Nothing but the input is kept for the backward pass, and the
    convolution is oneDNN's for images one pixel high with the channels last, which are what texts are: many times
    faster than ``F.conv1d``. The backward pass can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BTC, weight_CW, bias_C)
        return F.silu(_convolved(x_BTC, weight_CW, bias_C)[:, : x_BTC.shape[1]])

    @staticmethod
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, weight_CW, bias_C = ctx.saved_tensors
        T, W = x_BTC.shape[1], weight_CW.shape[1]
        grad_BTC = _silu_backward(grad_BTC, _convolved(x_BTC, weight_CW, bias_C)[:, :T])
        grad_x_BTC = _convolved(grad_BTC, weight_CW.flip(1))[:, W - 1 :]
        grad_weight_CW = torch.zeros_like(weight_CW)
        for back in range(min(W, T)):  # the tap that sees so many tokens back
            product = grad_BTC[:, back:] * x_BTC[:, : T - back]
            grad_weight_CW[:, W - 1 - back] = product.sum((0, 1), dtype=weight_CW.dtype)
        return grad_x_BTC, grad_weight_CW, None if bias_C is None else grad_BTC.sum((0, 1), dtype=bias_C.dtype)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, x)
    share = torch.sigmoid(x)  # in operations that have derivatives
    return grad * share * (1 + x * (1 - share))


def _convolved(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """With W - 1 zeros before and behind: (B, T + W - 1, C)."""
    C, W = weight_CW.shape
    weight = weight_CW.to(x_BTC.dtype).view(C, 1, 1, W)
    bias_C = None if bias_C is None else bias_C.to(x_BTC.dtype)
    pixels = x_BTC.transpose(1, 2).unsqueeze(2)
    with torch.autocast(x_BTC.device.type, enabled=False):
        return F.conv2d(pixels, weight, bias_C, padding=(0, W - 1), groups=C).squeeze(2).transpose(1, 2)


def naive_short_conv(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
    """The twin: PyTorch's depthwise convolution."""
    C, W = weight_CW.shape
    padded_BCT = F.pad(x_BTC.transpose(1, 2), (W - 1, 0))
    return F.conv1d(padded_BCT, weight_CW[:, None], bias_C, groups=C).transpose(1, 2)
