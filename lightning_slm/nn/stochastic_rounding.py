"""Stochastic rounding: float32 to bfloat16, up or down so that the mean is the value itself.

A weight in bfloat16 keeps 8 bits: an update below 1/256 of it is lost when rounded to the nearest, every time. Rounded
up with the probability of the part cut off, it arrives on average (Gupta et al. 2015, https://arxiv.org/abs/1502.02551;
for language models Zamirai et al. 2020, https://arxiv.org/abs/2010.06192).
"""

import torch
from torch import Tensor


@torch.no_grad()
def stochastic_round_(target: Tensor, source: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Write ``source`` into ``target``, each element rounded to one of its two neighbours in bfloat16.

    What bfloat16 can hold stays as it is, infinities and NaN too. Between its largest number and infinity, those are
    the neighbours.

    Args:
        target: bfloat16.
        source: float32, of the same shape.
        generator: where the random bits come from, of the device; None: the global one.

    Returns: ``target``.

    >>> weight = torch.full((1000,), 1 + 2**-9)  # a quarter of the way from 1 to its neighbour, 1 + 2^-7
    >>> rounded = stochastic_round_(torch.empty(1000, dtype=torch.bfloat16), weight, torch.Generator().manual_seed(0))
    >>> sorted(set(rounded.tolist()))
    [1.0, 1.0078125]
    >>> round((rounded == 1).float().mean().item(), 1)   # three quarters
    0.8
    """
    if target.dtype != torch.bfloat16 or source.dtype != torch.float32 or target.shape != source.shape:
        raise ValueError(
            f"From float32 to bfloat16 of one shape, not from {source.dtype} {tuple(source.shape)} to {target.dtype} "
            f"{tuple(target.shape)}."
        )
    # bfloat16 is the upper half of float32. A random lower half, added, carries over with just that probability: for
    # either sign, as magnitudes lie beside the sign bit.
    noise = torch.randint(2**16, source.shape, dtype=torch.int32, device=source.device, generator=generator)
    rounded = (noise.add_(source.contiguous().view(torch.int32)) & -(2**16)).view(torch.float32)
    return target.copy_(torch.where(source.isfinite(), rounded, source))
