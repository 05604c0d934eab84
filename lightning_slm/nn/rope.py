"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), in Hugging Face's half-split layout."""

# Shape letters: B = batch, H = heads, T = tokens, d = head width.

import torch
from torch import Tensor


def rope_angles(positions_BT: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, each (B, 1, T, d/2) in float32.

    Computed anew in each forward pass: a table in a buffer would be rounded by ``model.to(torch.bfloat16)``, and be
    lost on the meta device.

    Args:
        theta: base of the wavelengths; the longest is about 2 pi theta tokens.
    """
    dims = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BT.device)
    frequencies = 1.0 / (theta ** (dims / head_dim))
    angles = positions_BT[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x_BHTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle, in ``x``'s own precision."""
    cos, sin = cos.to(x_BHTd.dtype), sin.to(x_BHTd.dtype)
    a, b = x_BHTd.chunk(2, -1)
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -1)


def naive_rotate(x_BHTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The twin of ``rotate``: complex multiplication by e^(i angle), in float32."""
    a, b = x_BHTd.float().chunk(2, -1)
    turned = torch.complex(a, b) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag), -1).to(x_BHTd.dtype)
