"""Attention by locality-sensitive hashing, as in Reformer (Kitaev et al. 2020, https://arxiv.org/abs/2001.04451)."""

# Shape letters: B = batch, T = tokens of this call, S = tokens looked at, D = model width, H = heads, d = head width,
# R = rounds of hashing, h = half the buckets.

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.buckets import (
    bucket_attention,
    cached,
    decided_once,
    in_slots,
    looking_back,
    own_slots,
    same_bucket,
    segments,
    slot_attention,
    slot_bias,
    visible_slots,
    whole_chunks,
)
from lightning_slm.nn.mixer import Context, Mixer, set_
from lightning_slm.nn.rope import rotate


class LSHAttention(Mixer):
    """Attention among tokens whose vectors point the same way. Queries and keys are the same vectors, keys of length
    one; a token looks at itself only where there is nothing else.

    A round of hashing turns a vector at random and takes the axis that it is then nearest to as its bucket
    (`bucket_ids`). In an encoder the text is sorted by (bucket, position) and cut into chunks, and a token looks at
    its own chunk and the two beside it, whatever bucket they are of: the paper's form. In a decoder it looks at the
    last ``chunk`` earlier tokens of its bucket (see `lightning_slm.nn.buckets`).

    Args:
        hidden_size: width of input and output.
        num_heads: heads, each with rotations of its own.
        head_dim: width of one head.
        hashes: rounds of hashing.
        buckets: in each round; an even number, or 1 for no hashing at all.
        chunk: tokens of a chunk, or earlier ones looked at.
        local: whether one more round has everything in one bucket, so that the nearest tokens are looked at.
        by_length: whether a text that is shorter than what ``buckets`` is meant for uses fewer of them (an encoder).
    """

    bidirectional: ClassVar[bool] = True
    cache_type: ClassVar[str] = "full_attention"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        hashes: int,
        buckets: int,
        chunk: int,
        local: bool = False,
        by_length: bool = False,
    ) -> None:
        super().__init__()
        if buckets != 1 and (buckets < 2 or buckets % 2):
            raise ValueError(f"buckets={buckets} must be even (a direction and its opposite), or 1.")
        if min(hashes, chunk) < 1:
            raise ValueError(f"hashes={hashes} and chunk={chunk} must be at least 1.")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.hashes, self.buckets, self.chunk, self.local, self.by_length = hashes, buckets, chunk, local, by_length
        self.qv_proj = nn.Linear(hidden_size, 2 * num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        # The bits of float32 numbers, as integers: model.to(torch.bfloat16) leaves those alone.
        self.register_buffer("rotations", torch.zeros(num_heads, head_dim, hashes * (buckets // 2), dtype=torch.int32))
        self.rotations: Tensor

    @classmethod
    def from_config(
        cls, config: Any, *, hashes: int = 2, buckets: int | None = None, chunk: int = 32, local: bool = False
    ) -> Self:
        H, K, longest = config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings
        if H != K:
            raise ValueError(
                f"'lsh' uses queries as keys, so it needs as many of each: num_key_value_heads={K} must be "
                f"num_attention_heads={H}, or left out."
            )
        if buckets is not None:
            return cls(config.hidden_size, H, config.head_dim, hashes, buckets, chunk, local)
        # Half as many in a decoder, where on average half of a bucket is earlier than a token.
        usual = usual_buckets(longest // 2 if config.causal else longest, max(1, chunk))
        return cls(config.hidden_size, H, config.head_dim, hashes, usual, chunk, local, by_length=not config.causal)

    def init_weights_(self, config: Any) -> None:
        """New random rotations; they are saved with the weights."""
        set_(self.rotations, torch.randn(self.rotations.shape, dtype=torch.float32).view(torch.int32))

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        return {"qv_proj": (self.num_heads * self.head_dim,) * 2}

    def flops_per_token(self, context: int) -> int:
        H, d, rounds = self.num_heads, self.head_dim, 1 if self.buckets == 1 else self.hashes + self.local
        weights = self.qv_proj.weight.numel() + self.o_proj.weight.numel()
        return 2 * (weights + self.rotations.numel()) + 4 * H * d * rounds * min(context, self.chunk)

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        B, T, _ = x_BTD.shape
        q, v = self.qv_proj(x_BTD).view(B, T, 2 * self.num_heads, self.head_dim).transpose(1, 2).chunk(2, 1)
        if context.rope is not None:
            q = rotate(q, *context.rope)
        seen, v = cached(q, v, context, layer_idx)
        if not context.causal:
            y_BHTd = self.look_around(q, v, context, layer_idx)
        elif in_slots(context, T, seen.shape[2]):
            y_BHTd = self.look_in_slots(q, seen, v, visible_slots(context, T, seen.shape[2]))
        else:
            y_BHTd = self.look_back(seen, v, context, layer_idx, T)[:, :, -T:]
        return self.o_proj(y_BHTd.transpose(1, 2).reshape(B, T, -1))

    def look_in_slots(self, q_BHTd: Tensor, seen_BHSd: Tensor, v_BHSd: Tensor, visible: Tensor | None) -> Tensor:
        """The same for few tokens, among all that a cache holds."""
        at_B1T = own_slots(visible, seen_BHSd.shape[2], q_BHTd.device)
        same = [same_bucket(axis_nearness(seen_BHSd, self.turns()), at_B1T)] if self.buckets > 1 else []
        if self.local or not same:
            shape = (*q_BHTd.shape[:2], 1, q_BHTd.shape[2], seen_BHSd.shape[2])
            same.append(torch.ones(shape, dtype=torch.bool, device=q_BHTd.device))
        bias_BHTS = slot_bias(torch.cat(same, 2), at_B1T, visible, self.chunk)
        return slot_attention(q_BHTd, F.normalize(seen_BHSd, dim=-1), v_BHSd, bias_BHTS)

    def look_back(self, q_BHSd: Tensor, v_BHSd: Tensor, context: Context, layer_idx: int, T: int) -> Tensor:
        """What every token finds among the last ``chunk`` earlier ones of its bucket."""
        S = q_BHSd.shape[2]
        key_BHRS = decided_once(context, f"lsh{layer_idx}", lambda: self.hash(q_BHSd))
        segments_BS = segments(context, T, S)
        if segments_BS is not None:
            key_BHRS = key_BHRS + self.buckets * segments_BS[:, None, None]
        near_cm = looking_back(min(self.chunk, S), q_BHSd.device)
        return bucket_attention(q_BHSd, F.normalize(q_BHSd, dim=-1), v_BHSd, key_BHRS, key_BHRS, near_cm)

    def look_around(self, q_BHTd: Tensor, v_BHTd: Tensor, context: Context, layer_idx: int) -> Tensor:
        """What every token finds in its chunk of the sorted text and the two beside it; padding is sorted to the end
        and not seen.
        """
        B, H, T, _ = q_BHTd.shape
        group_BT = q_BHTd.new_zeros(B, T, dtype=torch.long) if context.segments_BT is None else context.segments_BT
        if context.tokens_BS is not None:
            group_BT = torch.where(context.tokens_BS, group_BT, T + 1)
        if self.chunk >= T:  # sees everything in any order
            ids_BHRT = group_BT.new_zeros(B, H, 1, T)
        else:
            ids_BHRT = decided_once(context, f"lsh{layer_idx}", lambda: self.hash(q_BHTd, self.halves(context, T)))
        group_BHRT = group_BT[:, None, None].expand_as(ids_BHRT)
        key_BHRT = ids_BHRT + self.buckets * group_BHRT
        near_cm = whole_chunks(min(self.chunk, T), q_BHTd.device)
        return bucket_attention(q_BHTd, F.normalize(q_BHTd, dim=-1), v_BHTd, key_BHRT, group_BHRT, near_cm)

    def halves(self, context: Context, T: int) -> Tensor | None:
        """Half the buckets that suit each row's length without padding, (B or 1,); None: always the same number."""
        if not self.by_length:
            return None
        if context.tokens_BS is None:
            return torch.tensor([usual_buckets(T, self.chunk) // 2], device=self.rotations.device)
        chunks_B = (context.tokens_BS.sum(-1) // self.chunk).clamp(1, self.buckets // 2)
        return 2 ** (torch.frexp(chunks_B.float()).exponent - 1)

    def hash(self, x_BHSd: Tensor, halves_B: Tensor | None = None) -> Tensor:
        """The buckets of vectors in each round, (B, H, R, S)."""
        B, H, S, _ = x_BHSd.shape
        local = torch.zeros(B, H, int(self.local or self.buckets == 1), S, dtype=torch.long, device=x_BHSd.device)
        if self.buckets == 1:
            return local
        return torch.cat((bucket_ids(x_BHSd, self.turns(), halves_B), local), 2)

    def turns(self) -> Tensor:
        """The rotations of each round, (H, d, R, h)."""
        return self.rotations.view(torch.float32).unflatten(-1, (self.hashes, -1))


@torch.no_grad()
def axis_nearness(x_BHSd: Tensor, rotations_HdRh: Tensor) -> Tensor:
    """How near vectors are to the axes of turned spaces and to their opposites, (B, H, R, 2 h, S), in float32 even
    under autocast.
    """
    with torch.autocast(x_BHSd.device.type, enabled=False):
        turned = rotations_HdRh.flatten(2).mT @ x_BHSd.float().mT
    turned_BHRhS = turned.unflatten(2, rotations_HdRh.shape[2:])
    return torch.cat((turned_BHRhS, -turned_BHRhS), -2)


def bucket_ids(x_BHSd: Tensor, rotations_HdRh: Tensor, halves_B: Tensor | None = None) -> Tensor:
    """The bucket of each vector in each round, (B, H, R, S): of the axes of a turned space and their opposites, the
    one that is nearest (Andoni et al. 2015, https://arxiv.org/abs/1509.02897).

    Args:
        halves_B: use only so many of the axes in each row.
    """
    nearness_BHRnS = axis_nearness(x_BHSd, rotations_HdRh)
    if halves_B is not None:
        h = rotations_HdRh.shape[-1]
        unused = torch.arange(h, device=x_BHSd.device).repeat(2) >= halves_B[:, None]
        nearness_BHRnS = nearness_BHRnS.masked_fill(unused[:, None, None, :, None], -torch.inf)
    return nearness_BHRnS.mT.contiguous().argmax(-1)


def usual_buckets(length: int, chunk: int) -> int:
    """As many as the paper takes for a text: two for each chunk, rounded down to a power of two."""
    return 2 ** max(1, (2 * (length // chunk)).bit_length() - 1)
