"""Meta tokens (Dong et al. 2024, https://arxiv.org/abs/2411.13676): learned vectors before every text, which all of its
tokens see, so that attention that has nothing to look for need not fall on the text's own first token.
"""

# Shape letters: B = batch, R = B or 1, M = meta tokens, T = tokens of this call, S = tokens seen so far and now,
# D = model width.

from typing import Any

import torch
from torch import Tensor, nn

from lightning_slm.nn.mixer import Context, set_


class MetaTokens(nn.Module):
    """The learned vectors, and where they stand: before the first token of each row, behind padding on its left.

    They are part of the first call of a text only. From then on they are in the cache: as the first keys of attention
    to everything, in the states of recurrences, and apart, as states, where a window would lose them
    (`lightning_slm.nn.attention.remember`).

    Args:
        count: M.
        hidden_size: D.
    """

    _slm_protected = ("weight",)

    def __init__(self, count: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, hidden_size))
        self.weight._no_weight_decay = True  # type: ignore[attr-defined]

    def init_weights_(self, config: Any) -> None:
        """As an embedding."""
        set_(self.weight, torch.empty(self.weight.shape).normal_(0, config.initializer_range))

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """The sequence with its meta tokens, (B, M + T, D)."""
        meta_BMD = self.weight.to(x_BTD.dtype).expand(len(x_BTD), -1, -1)
        return together(meta_BMD, x_BTD, context.meta_at_B)

    def place(self, context: Context, positions_RT: Tensor, past: int) -> Tensor:
        """Enter into the context where the meta tokens of this call are, and that they are no padding.

        Args:
            positions_RT: of the tokens, counted without meta tokens.
            past: tokens of earlier calls.

        Returns: positions of all, counted from the first meta token on.

        Raises:
            ValueError: padding between tokens, or a row whose first token comes after the first call.
        """
        M, tokens_BS = self.weight.shape[0], context.tokens_BS
        context.meta, at_B = 0 if past else M, None
        if tokens_BS is not None:
            at_B = _first_token(tokens_BS, past)
            context.tokens_BS = together(tokens_BS.new_ones(len(tokens_BS), M), tokens_BS, at_B)
        if past:
            return positions_RT + M
        context.meta_at_B = at_B
        if at_B is not None:
            positions_RT = positions_RT.expand(len(at_B), -1)
        meta_RM = torch.arange(M, device=positions_RT.device).expand(len(positions_RT), -1)
        return together(meta_RM, positions_RT + M, at_B)

    def flops_per_token(self, context: int) -> int:
        """They are looked up, not multiplied with."""
        return 0

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


def _first_token(tokens_BS: Tensor, past: int) -> Tensor | None:
    """How much padding each row begins with; None: there is none at the left."""
    texts_B = tokens_BS[:, 0] + (tokens_BS[:, 1:] & ~tokens_BS[:, :-1]).sum(-1)
    at_B = tokens_BS.int().argmax(-1)
    if (texts_B > 1).any():
        raise ValueError("meta_tokens stand before the first token of a row: padding between its tokens is refused.")
    if past and ((at_B >= past) & (texts_B > 0)).any():
        raise ValueError(
            "meta_tokens are read with a row's first token, which must be in the first call of a cached text: pad "
            "shorter rows on the left, up to the same end."
        )
    return at_B if at_B.any() else None


def together(meta: Tensor, rest: Tensor, at_B: Tensor | None, dim: int = 1) -> Tensor:
    """Meta tokens and the others as one sequence along ``dim``, in row b before its token number ``at_B[b]``."""
    both = torch.cat((meta, rest), dim)
    if at_B is None:
        return both
    M, at_B1 = meta.shape[dim], at_B[:, None]
    i_L = torch.arange(both.shape[dim], device=both.device)
    return _pick(both, torch.where(i_L < at_B1, i_L + M, torch.where(i_L < at_B1 + M, i_L - at_B1, i_L)), dim)


def apart(both: Tensor, count: int, at_B: Tensor | None, dim: int = 1) -> tuple[Tensor, Tensor]:
    """The inverse of ``together``: ``count`` meta tokens, and the others."""
    if at_B is not None:
        at_B1, i_L = at_B[:, None], torch.arange(both.shape[dim], device=both.device)
        rest_BL = torch.where(i_L - count < at_B1, i_L - count, i_L)
        both = _pick(both, torch.where(i_L < count, i_L + at_B1, rest_BL), dim)
    return both.narrow(dim, 0, count), both.narrow(dim, count, both.shape[dim] - count)


def _pick(x: Tensor, index_BL: Tensor, dim: int) -> Tensor:
    shape = [1] * x.ndim
    shape[0], shape[dim] = index_BL.shape
    return x.gather(dim, index_BL.view(shape).expand(*x.shape[:dim], -1, *x.shape[dim + 1 :]))


def causal_mask(T: int, S: int, tokens_BS: Tensor | None, device: torch.device) -> Tensor | None:
    """The last T of S tokens look at all before them but padding, (B or 1, 1, T, S); None where a kernel's own rule
    does the same: it lets T of T tokens look back, and one token look at everything.
    """
    if tokens_BS is None and T in (1, S):
        return None
    distance_TS = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    if tokens_BS is None:
        return (distance_TS >= 0)[None, None]
    mask_BTS = (distance_TS >= 0) & tokens_BS[:, None] | (distance_TS == 0)  # no row is empty
    return mask_BTS[:, None]
