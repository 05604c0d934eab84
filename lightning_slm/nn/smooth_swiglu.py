"""Smooth-SwiGLU: SwiGLU whose product is levelled, channel by channel, before a low-bit down projection rounds it.

The product silu(gate) * up is quadratic in the layer's input, and late in long trainings single channels of it grow by
orders of magnitude; one scale for all channels then rounds the others to nothing (Fishman et al. 2024,
https://arxiv.org/abs/2409.12517). Each channel i gets a factor s_i, and the down projection multiplies
(s_i x_i) by (W_oi / s_i): the same numbers before rounding, and less lost by it.
"""

# Shape letters: B = batch, T = tokens, D = model width, N = any leading shape, O = outputs, I = inputs (channels).

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_slm.nn.mixer import Context
from lightning_slm.nn.swiglu import SwiGLU

# Exponents stay within this, so that a factor and its inverse are numbers in float16 too.
_MOST = 14


def smoothed(x_NI: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from operands of less spread: ``x * s`` and ``weight / s``, one factor per channel.

    The factors are powers of two, so nothing is rounded here, and no gradient flows through them. They bring the
    largest magnitudes of a channel in ``x`` and of its column in ``weight`` together (both become their geometric mean,
    as in SmoothQuant with a migration strength of one half, Xiao et al. 2022, https://arxiv.org/abs/2211.10438): where
    both operands are rounded, all that one gives away the other has to bear.

    Returns: the smoothed ``x`` and the smoothed ``weight``, in their shapes and dtypes.
    """
    scale_I = _factors(_largest(x_NI), _largest(weight_OI))
    return x_NI * scale_I.to(x_NI.dtype), weight_OI * scale_I.reciprocal().to(weight_OI.dtype)


class SmoothSwiGLU(SwiGLU):
    """SwiGLU for low-bit training; the weights and their names are SwiGLU's, and in high precision so is the output.

    A down projection that rounds its operands says so by an attribute ``smooths = True`` and takes ``smooth=True`` in
    its forward (``Float8Linear`` does). Any other, a plain ``nn.Linear`` for example, is called as in SwiGLU: there is
    nothing to smooth for it.
    """

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        gate, up = self.gate_up_proj(x_BTD).chunk(2, -1)
        product = F.silu(gate) * up
        if getattr(self.down_proj, "smooths", False):
            return self.down_proj(product, smooth=True)
        return self.down_proj(product)


def _largest(rows_NI: Tensor) -> Tensor:
    return rows_NI.detach().flatten(0, -2).abs().amax(0).float()


def _factors(x_I: Tensor, weight_I: Tensor) -> Tensor:
    """Powers of two next to sqrt(weight / x), float32; 1 for a channel that is zero on either side."""
    exponent_I = ((weight_I.log2() - x_I.log2()) / 2).round_().clamp_(-_MOST, _MOST)
    exponent_I = torch.where((x_I > 0) & (weight_I > 0), exponent_I, 0).int()
    return ((exponent_I + 127) << 23).view(torch.float32)  # by its bits: exp2 need not be exact everywhere
