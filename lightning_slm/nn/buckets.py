"""Attention among tokens of one bucket: what locality-sensitive hashing and routing have in common.

Both give each token a bucket, by its own vector alone. Sorted by (bucket, position), the tokens that should see each
other lie next to each other, so that attention within blocks of the sorted text costs T times the block instead of
T times T.

In a decoder a token looks at the last ``window`` *earlier* tokens of its bucket, however the text goes on, and at
itself. That is exactly causal: which tokens these are depends on nothing that comes later. (In the published forms it
does: blocks are cut, or clusters filled, by a count over the whole text.)
"""

# Shape letters: B = batch, H = heads, T = tokens of this call, S = tokens looked at, d = head width, R = rounds of
# hashing, N = independent sequences (rows, heads and rounds as one axis), M = the same without rounds, c = chunk,
# n = chunks, m = keys that a chunk looks at.

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_slm.nn.mixer import Context

ALONE = -1e5  # score of a token's own key where queries are keys: what remains if there is nothing else to look at


def bucket_attention(
    q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, key_BHRS: Tensor, group_BHRS: Tensor, near_cm: Tensor
) -> Tensor:
    """Attention within chunks of the sorted text, rounds averaged with weights exp(logsumexp of their scores).

    Args:
        q_BHSd: queries, scaled as they should be.
        key_BHRS: what a round sorts by, for equal ones by position.
        group_BHRS: tokens see those of their own group only.
        near_cm: of what a chunk looks at, what each of its tokens does; see `chunk_attention`.
    """
    B, H, R, S = key_BHRS.shape
    d = q_BHSd.shape[-1]
    order_MRS = key_BHRS.reshape(B * H, R, S).argsort(stable=True, dim=-1)
    back_MRS = torch.empty_like(order_MRS).scatter_(
        -1, order_MRS, torch.arange(S, device=order_MRS.device).expand_as(order_MRS)
    )
    qkv = take_rows(torch.cat((q_BHSd, k_BHSd, v_BHSd), -1).reshape(B * H, S, 3 * d), order_MRS)
    q, k, v = qkv.view(B * H * R, S, 3 * d).split(d, -1)
    group_NS = group_BHRS.reshape(B * H, R, S).gather(-1, order_MRS).view(B * H * R, S)
    y_NSd, total_NS = chunk_attention(q, k, v, group_NS, near_cm, ALONE)
    if R == 1:
        return take_rows(y_NSd, back_MRS).view(B, H, S, d)
    y_BHRSd = take_rows(y_NSd, back_MRS.view(-1, 1, S)).view(B, H, R, S, d)
    total_BHRS = total_NS.view(B, H, R, S).gather(-1, back_MRS.view(B, H, R, S))
    return (total_BHRS.softmax(2).to(y_BHRSd.dtype)[..., None] * y_BHRSd).sum(2)


def chunk_attention(
    q_NTd: Tensor, k_NTd: Tensor, v_NTd: Tensor, group_NT: Tensor, near_cm: Tensor, own: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each chunk to itself, the one before and, if ``near_cm`` is so wide, the one after.

    Args:
        q_NTd: queries, scaled as they should be.
        group_NT: numbers from 0; tokens of other groups are not seen.
        near_cm: True where token i of a chunk may look at token j of the chunks looked at (`looking_back` and others).
        own: the score of a token with itself; None: as of any other.

    Returns: what is found, and the logsumexp of each token's scores.
    """
    (N, T, d), (c, m) = q_NTd.shape, near_cm.shape
    n, chunks = -(-T // c), m // c
    more = n * c - T

    def around(x: Tensor, value: int = 0) -> Tensor:  # (N, n, m, ...)
        sides = (0, 0) * (x.ndim - 2) + (c, more + (chunks - 2) * c)
        blocks = F.pad(x, sides, value=value).view(N, n + chunks - 1, c, *x.shape[2:])
        return torch.cat([blocks[:, i : i + n] for i in range(chunks)], 2)

    q = F.pad(q_NTd, (0, 0, 0, more)).view(N, n, c, d)
    group = F.pad(group_NT, (0, more), value=-1).view(N, n, c)
    scores = q @ around(k_NTd).transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    visible = near_cm & (group[..., None] == around(group_NT, -1)[:, :, None])
    scores = scores.masked_fill(~visible, -torch.inf)
    if own is not None:
        here = torch.arange(m, device=q.device) == torch.arange(c, 2 * c, device=q.device)[:, None]
        scores = scores.masked_fill(here, own)
    total = scores.logsumexp(-1, keepdim=True)
    y = (scores - total).exp().to(v_NTd.dtype) @ around(v_NTd)
    return y.view(N, n * c, d)[:, :T], total.view(N, n * c)[:, :T]


def looking_back(window: int, device: torch.device) -> Tensor:
    """For `chunk_attention` with chunks of ``window``: a token, and so many before it."""
    distance = _distance(window, 2, device)
    return (distance >= 0) & (distance <= window)


def looking_around(window: int, device: torch.device) -> Tensor:
    """The same, fewer than ``window`` away on either side."""
    return _distance(window, 3, device).abs() < window


def whole_chunks(chunk: int, device: torch.device) -> Tensor:
    """The chunk, the one before and the one after."""
    return torch.ones(chunk, 3 * chunk, dtype=torch.bool, device=device)


def _distance(c: int, chunks: int, device: torch.device) -> Tensor:
    return torch.arange(c, 2 * c, device=device)[:, None] - torch.arange(chunks * c, device=device)


def slot_attention(q_BHTd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, bias_BHTS: Tensor) -> Tensor:
    """Attention of few tokens to all that a cache holds: ``q`` scaled as it should be, and a bias on every score."""
    scores = q_BHTd @ k_BHSd.transpose(-1, -2) + bias_BHTS
    return scores.softmax(-1).to(v_BHSd.dtype) @ v_BHSd


def slot_bias(
    same_BHRTS: Tensor, at_B1T: Tensor, visible: Tensor | None, window: int | Tensor, own: float | Tensor = ALONE
) -> Tensor:
    """The bias that makes `slot_attention` look where `bucket_attention` looks, back only: (B, H, T, S).

    A key that is found in several rounds counts as often there, so its bias is the logarithm of their number.

    Args:
        same_BHRTS: which keys are of a token's own bucket (`same_bucket`).
        at_B1T: the slot that a token is in, the last that it may see (`own_slots`).
        visible: (B or 1, 1, T, S), where a token may look at all; None: everywhere.
        window: how many earlier tokens of its bucket it looks at; or (H, 1, 1, 1).
        own: the bias of a token with itself; or (H, 1, 1).
    """
    members = same_BHRTS if visible is None else same_BHRTS & visible[:, :, None]
    count = members.cumsum(-1)
    times_BHTS = (members & (count >= count[..., -1:] - window)).sum(2)
    here = torch.arange(same_BHRTS.shape[-1], device=same_BHRTS.device) == at_B1T[..., None]
    return torch.where(here, own, times_BHTS.to(torch.float32).log())


def own_slots(visible: Tensor | None, S: int, device: torch.device) -> Tensor:
    """The slots that tokens are in, (B or 1, 1, T): the last ones they see."""
    slots_S = torch.arange(S, device=device)
    return slots_S[None, None, -1:] if visible is None else torch.where(visible, slots_S, 0).amax(-1)


def same_bucket(nearness_BHRnS: Tensor, at_B1T: Tensor) -> Tensor:
    """Which keys are nearest to the same of n directions as the tokens in these slots are, (B, H, R, T, S).

    The other keys' buckets need no names: a key is of this bucket if no direction is nearer to it. That is far quicker
    than an ``argmax`` for each.
    """
    B, H, R, n, S = nearness_BHRnS.shape
    at = at_B1T[:, :, None, None].expand(B, H, R, n, -1)
    own_BHRT = nearness_BHRnS.gather(-1, at).argmax(-2)
    to_own_BHRTS = nearness_BHRnS.gather(-2, own_BHRT[..., None].expand(-1, -1, -1, -1, S))
    return to_own_BHRTS == nearness_BHRnS.amax(-2, keepdim=True)


def visible_slots(context: Context, T: int, S: int) -> Tensor | None:
    """Where the last T tokens may look in a cache of S slots, for `slot_bias`; boolean."""
    mask = context.masks.get("full_attention")
    visible = mask if mask is None or mask.dtype == torch.bool else mask == 0
    segments_BS = segments(context, T, S)
    if segments_BS is None:
        return visible
    same = segments_BS[:, None, -T:, None] == segments_BS[:, None, None]
    return same if visible is None else same & visible


def cached(k_BHTd: Tensor, v_BHTd: Tensor, context: Context, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Keys and values of earlier calls and this one. Without a mask, several tokens are the first ones, whatever room
    for later ones there is.
    """
    if context.cache is None:
        return k_BHTd, v_BHTd
    T = k_BHTd.shape[2]
    k_BHSd, v_BHSd = context.cache.update(k_BHTd, v_BHTd, layer_idx)
    first = T > 1 and context.masks.get("full_attention") is None
    return (k_BHSd[:, :, :T], v_BHSd[:, :, :T]) if first else (k_BHSd, v_BHSd)


def in_slots(context: Context, T: int, S: int) -> bool:
    """Whether keys lie in S slots to be looked through one by one: for a single token, and where some are empty."""
    mask = context.masks.get("full_attention")
    if T == 1:
        return True
    return T < S and mask is not None and not bool(visible_slots(context, T, S)[..., -1, -1].all())  # type: ignore[index]


def segments(context: Context, T: int, S: int) -> Tensor | None:
    """The number of each token's text within its row, (B, S), over the tokens of earlier calls, too; None: one text."""
    if S == T or context.tokens_BS is None:
        return None if context.segments_BT is None else F.pad(context.segments_BT, (S - T, 0))
    before = F.pad(context.tokens_BS, (1, 0), value=True)[:, :-1]
    return (context.tokens_BS & ~before).cumsum(-1)


def take_rows(x_MSd: Tensor, index_MRT: Tensor) -> Tensor:
    """Rows of each of M matrices, (M, R, T, d)."""
    M, S, d = x_MSd.shape
    first = torch.arange(0, M * S, S, device=index_MRT.device)[:, None, None]
    return x_MSd.reshape(M * S, d).index_select(0, (index_MRT + first).flatten()).view(*index_MRT.shape, d)


def decided_once(context: Context, name: str, decide: Callable[[], Tensor]) -> Tensor:
    """What ``decide`` says; where layers are run a second time from inputs that were computed back
    (`lightning_slm.models.reversible`), what it said the first time: rounding must not move a token to another bucket.
    """
    if "reversible" not in context.shared:
        return decide()
    if name not in context.shared:
        context.shared[name] = decide().to(torch.int32)
    return context.shared[name].long()
