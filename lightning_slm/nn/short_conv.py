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
        return y_BTC, padded[:, T:].detach() if T >= W else padded[:, -(W - 1) :].detach()


def naive_short_conv(x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> Tensor:
    """The twin: PyTorch's depthwise convolution."""
    C, W = weight_CW.shape
    padded_BCT = F.pad(x_BTC.transpose(1, 2), (W - 1, 0))
    return F.conv1d(padded_BCT, weight_CW[:, None], bias_C, groups=C).transpose(1, 2)
