"""Attention inside clusters that are learnt by online k-means: the Routing Transformer (Roy et al. 2020,
https://arxiv.org/abs/2003.05997).
"""

# Shape letters: B = batch, T = tokens of this call, S = tokens looked at, D = model width, H = heads, L = local ones,
# R = routed ones, d = head width, C = clusters, w = tokens of a cluster.

import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from lightning_slm.nn.attention import windowed_attention
from lightning_slm.nn.buckets import (
    ALONE,
    bucket_attention,
    cached,
    chunk_attention,
    decided_once,
    in_slots,
    looking_around,
    looking_back,
    own_slots,
    same_bucket,
    segments,
    slot_attention,
    slot_bias,
    take_rows,
    visible_slots,
)
from lightning_slm.nn.mixer import Context, Mixer, set_
from lightning_slm.nn.rope import rotate


class RoutingAttention(Mixer):
    """The first heads look at a window of near tokens, the others at tokens of the same cluster, wherever these are.

    Queries and keys of the routed heads have length one, and are not turned by positions: what belongs together is
    decided by content. In an encoder each centroid takes the ``window`` queries and as many keys that are nearest to
    it; a token that no centroid takes gets nothing from that head, and the mean where several do (the paper's form).
    In a decoder a token goes to the centroid nearest to it, its key is its query, and it looks at the last ``window``
    earlier tokens there, at itself only if there are none (see `lightning_slm.nn.buckets`).

    Args:
        hidden_size: width of input and output.
        num_heads: heads.
        head_dim: width of one head.
        causal: whether it is a decoder's.
        clusters: of each routed head.
        window: tokens of a cluster that are looked at; None (an encoder): those that let all clusters together hold
            each text once.
        local_heads: how many heads are local.
        local_window: tokens that these look back at, their own included; in an encoder as many on either side.
        decay: of the running means that the centroids are.
        commitment: weight of the squared distance between vectors and centroids in the loss.
    """

    bidirectional: ClassVar[bool] = True
    cache_type: ClassVar[str] = "full_attention"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        causal: bool,
        clusters: int,
        window: int | None,
        local_heads: int,
        local_window: int,
        decay: float = 0.999,
        commitment: float = 1e-4,
    ) -> None:
        super().__init__()
        if not 0 <= local_heads < num_heads:
            raise ValueError(f"local_heads={local_heads} must leave at least one of {num_heads} heads to route.")
        if min(clusters, local_window, window or 1) < 1:
            raise ValueError(f"{clusters=}, {window=} and {local_window=} must be at least 1.")
        self.num_heads, self.head_dim, self.shared_keys = num_heads, head_dim, causal
        self.window, self.local_heads, self.local_window = window, local_heads, local_window
        keys = local_heads if causal else num_heads
        self.qkv_proj = nn.Linear(hidden_size, (2 * num_heads + keys) * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.clusters = Clusters(num_heads - local_heads, clusters, head_dim, decay, commitment)

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        clusters: int | None = None,
        window: int | None = None,
        local_heads: int | None = None,
        local_window: int | None = None,
        decay: float = 0.999,
        commitment: float = 1e-4,
    ) -> Self:
        H, K, longest = config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings
        if H != K:
            raise ValueError(
                f"'routing' has clusters of keys for every head, so num_key_value_heads={K} must be "
                f"num_attention_heads={H}, or left out."
            )
        clusters = round(math.sqrt(longest)) if clusters is None else clusters
        usual = -(-longest // max(1, clusters))
        window = usual if window is None and config.causal else window
        local_heads = H // 2 if local_heads is None else local_heads
        local_window = window or usual if local_window is None else local_window
        sizes = (config.hidden_size, H, config.head_dim, config.causal)
        return cls(*sizes, clusters, window, local_heads, local_window, decay, commitment)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        heads = (self.num_heads, self.local_heads if self.shared_keys else self.num_heads, self.num_heads)
        return {"qkv_proj": tuple(n * self.head_dim for n in heads)}

    def flops_per_token(self, context: int) -> int:
        L, R, d = self.local_heads, self.num_heads - self.local_heads, self.head_dim
        routed = self.window or -(-context // self.clusters.number)
        looked_at = L * min(context, self.local_window) + R * min(context, routed)
        assigned = self.clusters.centroids.numel() * (1 if self.shared_keys else 2)
        return 2 * (self.qkv_proj.weight.numel() + self.o_proj.weight.numel() + assigned) + 4 * d * looked_at

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        B, T, _ = x_BTD.shape
        L = self.local_heads
        q, k, v = self.project(x_BTD, context)
        k, v = cached(k, v, context, layer_idx)
        if context.causal and in_slots(context, T, k.shape[2]):
            y_BHTd = self.look_in_slots(q, k, v, context)
        else:
            far_q, far_k, far_v = (t[:, L:] for t in (q, k, v))
            if context.causal:
                y_BHTd = self.look_back(far_q, far_k, far_v, context, layer_idx)
            else:
                y_BHTd = self.look_balanced(far_q, far_k, far_v, context, layer_idx)
            if L:
                y_BHTd = torch.cat((self.look_near(q[:, :L], k[:, :L], v[:, :L], context), y_BHTd), 1)
        return self.o_proj(y_BHTd.transpose(1, 2).reshape(B, T, -1))

    def project(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, (B, H, T, d)."""
        B, T, _ = x_BTD.shape
        L, R, d = self.local_heads, self.num_heads - self.local_heads, self.head_dim
        heads = self.qkv_proj(x_BTD).view(B, T, -1, d).transpose(1, 2)
        near_q, far_q, keys, v = heads.split((L, R, heads.shape[1] - 2 * (L + R), L + R), 1)
        near_k, far_k = keys[:, :L], keys[:, L:]
        if context.rope is not None and L:
            near_q, near_k = rotate(near_q, *context.rope), rotate(near_k, *context.rope)
        far_q = _unit(far_q)
        far_k = far_q if self.shared_keys else _unit(far_k)
        return torch.cat((near_q, far_q), 1), torch.cat((near_k, far_k), 1), v

    def look_near(self, q_BLTd: Tensor, k_BLSd: Tensor, v_BLSd: Tensor, context: Context) -> Tensor:
        """What the local heads find, (B, L, T, d)."""
        (B, L, T, d), S = q_BLTd.shape, k_BLSd.shape[2]
        if context.causal:
            q = F.pad(q_BLTd, (0, 0, S - T, 0))  # earlier queries are gone, and not needed
            return windowed_attention(q, k_BLSd, v_BLSd, self.local_window, segments(context, T, S))[:, :, S - T :]
        text_NT = _texts(context, q_BLTd)[:, None].expand(B, L, T).reshape(B * L, T)
        near_cm = looking_around(min(self.local_window, T), q_BLTd.device)
        q, k, v = (t.reshape(B * L, T, d) for t in (q_BLTd / math.sqrt(d), k_BLSd, v_BLSd))
        return chunk_attention(q, k, v, text_NT, near_cm)[0].view(B, L, T, d)

    def look_back(self, q_BRTd: Tensor, k_BRSd: Tensor, v_BRSd: Tensor, context: Context, layer_idx: int) -> Tensor:
        """What the routed heads find among the last earlier tokens of each token's cluster, (B, R, T, d)."""
        assert self.window is not None
        T, S = q_BRTd.shape[2], k_BRSd.shape[2]
        nearness_BRCS = self.clusters(k_BRSd, context.tokens_BS, context, layer_idx)
        key_BRS = decided_once(context, f"routes{layer_idx}", lambda: nearness_BRCS.mT.contiguous().argmax(-1))
        segments_BS = segments(context, T, S)
        if segments_BS is not None:
            key_BRS = key_BRS + self.clusters.number * segments_BS[:, None]
        near_cm = looking_back(min(self.window, S), k_BRSd.device)
        key_BR1S, q_BRSd = key_BRS[:, :, None], k_BRSd * math.sqrt(self.head_dim)
        return bucket_attention(q_BRSd, k_BRSd, v_BRSd, key_BR1S, key_BR1S, near_cm)[:, :, S - T :]

    def look_in_slots(self, q_BHTd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, context: Context) -> Tensor:
        """What all heads find in a cache: the local window is a cluster that all tokens belong to."""
        assert self.window is not None
        (B, H, T, d), S, L = q_BHTd.shape, k_BHSd.shape[2], self.local_heads
        visible = visible_slots(context, T, S)
        at_B1T = own_slots(visible, S, q_BHTd.device)
        same_BR1TS = same_bucket(nearness_to(self.clusters.centroids, k_BHSd[:, L:])[:, :, None], at_B1T)
        same_BH1TS = torch.cat((same_BR1TS.new_ones(B, L, 1, T, S), same_BR1TS), 1)
        local_H11 = (torch.arange(H, device=q_BHTd.device) < L)[:, None, None]
        window = torch.where(local_H11[..., None], self.local_window - 1, self.window)
        own = torch.where(local_H11, 0.0, ALONE)
        bias = slot_bias(same_BH1TS, at_B1T, visible, window, own)
        q = q_BHTd * torch.where(local_H11, 1 / math.sqrt(d), math.sqrt(d)).to(q_BHTd.dtype)
        return slot_attention(q, k_BHSd, v_BHSd, bias)

    def look_balanced(self, q_BRTd: Tensor, k_BRTd: Tensor, v_BRTd: Tensor, context: Context, layer_idx: int) -> Tensor:
        """What the routed heads of an encoder find: every centroid takes the same number of tokens."""
        (B, R, T, d), C = q_BRTd.shape, self.clusters.number
        text_BT = _texts(context, q_BRTd)
        real_BT = text_BT >= 0
        nearness = self.clusters(torch.cat((q_BRTd, k_BRTd), 2), real_BT.repeat(1, 2), context, layer_idx)
        nearness = nearness.masked_fill(~real_BT.repeat(1, 2)[:, None, None], -torch.inf)
        share_B111 = self.share(real_BT)[:, None, None, None]

        def take(nearness_BRCT: Tensor, name: str) -> tuple[Tensor, Tensor]:
            """The tokens of each cluster, nearest first, and their texts, -1 for those beyond its share; (M, C, w)."""
            w = min(T, self.window or -(-T // C))
            at = decided_once(context, f"{name}{layer_idx}", lambda: nearest(nearness_BRCT, w))
            text = text_BT[:, None, None].expand(B, R, C, T).gather(-1, at)
            text = torch.where(torch.arange(w, device=at.device) < share_B111, text, -1)
            return at.flatten(0, 1), text.flatten(0, 1)

        at_q, text_q = take(nearness[..., :T], "routes_q")
        at_k, text_k = take(nearness[..., T:], "routes_k")
        q = take_rows(q_BRTd.flatten(0, 1) * math.sqrt(d), at_q)
        k, v = (take_rows(t.flatten(0, 1), at_k) for t in (k_BRTd, v_BRTd))
        visible = (text_q[..., None] == text_k[:, :, None]) & (text_q >= 0)[..., None]
        scores = q @ k.transpose(-1, -2)
        probs = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1).to(v.dtype)
        return _mean_of_takers(probs @ v, at_q, visible.any(-1), T).view(B, R, T, d)

    def share(self, real_BT: Tensor) -> Tensor:
        """Tokens that a cluster takes of each row, (B,)."""
        length_B, C = real_BT.sum(-1), self.clusters.number
        return (length_B + C - 1) // C if self.window is None else torch.full_like(length_B, self.window)


class Clusters(nn.Module):
    """Centroids of unit vectors, which follow them in training as running means (online k-means).

    The first training batch gives them their places (`spread_centroids`). Each later one pulls them towards the means
    of the vectors nearest to them, after it has been read; on several ranks, towards the means over all of them. A
    forward pass works with the same centroids when it is run again for the backward pass, and pulls only once.

    Args:
        heads: each with centroids of its own.
        number: of centroids.
        width: of the vectors.
        decay: how much of a centroid stays in one step.
        commitment: weight of the vectors' mean squared distance to their centroids in the loss.
    """

    def __init__(self, heads: int, number: int, width: int, decay: float, commitment: float) -> None:
        super().__init__()
        self.number, self.decay, self.commitment = number, decay, commitment
        self.register_buffer("centroids", torch.zeros(heads, number, width, dtype=torch.float32))
        self.register_buffer("placed", torch.tensor(False))
        self.centroids: Tensor
        self.placed: Tensor
        self._placed = False  # the same, where looking does not wait for a GPU

    def init_weights_(self, config: Any) -> None:
        """Random directions, until the first training batch."""
        set_(self.centroids, F.normalize(torch.randn(self.centroids.shape, dtype=torch.float32), dim=-1))
        set_(self.placed, False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Steps of a thousandth would be rounded away in bfloat16, so they stay in float32."""
        super()._apply(fn, recurse)
        self.centroids = self.centroids.float()
        return self

    def forward(self, x_BRSd: Tensor, real_BS: Tensor | None, context: Context, layer_idx: int) -> Tensor:
        """How near each centroid is to the vectors, as a cosine, without gradient: (B, R, C, S)."""
        if not self.training:
            return nearness_to(self.centroids, x_BRSd).detach()
        centroids = self.follow(x_BRSd.detach(), real_BS, context, layer_idx)
        nearness_BRCS = nearness_to(centroids, x_BRSd)
        if self.commitment:
            distance_BRS = (2 - 2 * nearness_BRCS.amax(2)) / x_BRSd.shape[-1]
            if real_BS is not None:
                distance_BRS = distance_BRS * (real_BS / real_BS.float().mean())[:, None]
            context.losses.append(self.commitment * distance_BRS.mean())
        return nearness_BRCS.detach()

    @torch.compiler.disable
    @torch.no_grad()
    def follow(self, x_BRSd: Tensor, real_BS: Tensor | None, context: Context, layer_idx: int) -> Tensor:
        """The centroids for this forward pass; the buffer moves on."""
        name = f"centroids{layer_idx}"
        if name not in context.shared:
            x_RBSd = x_BRSd.transpose(0, 1).float()
            x_RNd = x_RBSd.flatten(1, 2) if real_BS is None else x_RBSd[:, real_BS]
            self._placed = self._placed or bool(self.placed)
            if not self._placed:
                self.centroids.copy_(spread_centroids(x_RNd, self.number))
                self.placed.fill_(True)
            context.shared[name] = self.centroids.clone()
            if self._placed:
                means, held = cluster_means(x_RNd, self.centroids)
                moved = F.normalize(self.centroids.lerp(means, 1 - self.decay), dim=-1)
                self.centroids.copy_(torch.where(held, moved, self.centroids))
            self._placed = True
        return context.shared[name]


def nearness_to(centroids_RCd: Tensor, x_BRSd: Tensor) -> Tensor:
    """The cosine of each unit vector with each centroid, (B, R, C, S), in float32 even under autocast."""
    with torch.autocast(x_BRSd.device.type, enabled=False):
        return centroids_RCd.float() @ x_BRSd.float().mT


def nearest(nearness_BRCT: Tensor, number: int) -> Tensor:
    """The tokens nearest to each centroid, of equal ones (the same word twice) the earlier; ``topk`` does not say."""
    T = nearness_BRCT.shape[-1]
    place = (nearness_BRCT.clamp(min=-2) * 2**30).long() * T
    return (place - torch.arange(T, device=place.device)).topk(number, -1).indices


def cluster_means(x_RNd: Tensor, centroids_RCd: Tensor) -> tuple[Tensor, Tensor]:
    """Of all ranks: the mean of the vectors nearest to each centroid, (R, C, d), and if there are any, (R, C, 1)."""
    with torch.autocast(x_RNd.device.type, enabled=False):
        nearest_RN = (x_RNd @ centroids_RCd.mT).argmax(-1)
        holds_RCN = (nearest_RN[:, None] == torch.arange(centroids_RCd.shape[1], device=x_RNd.device)[:, None]).float()
        sums = torch.cat((holds_RCN @ x_RNd, holds_RCN.sum(-1, keepdim=True)), -1)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    return sums[..., :-1] / sums[..., -1:].clamp(min=1), sums[..., -1:] > 0


def spread_centroids(x_RNd: Tensor, number: int, most: int = 4096, rounds: int = 5) -> Tensor:
    """Where centroids start: on vectors that are far from each other, each the farthest from those before, then some
    rounds of k-means; (R, number, d).

    Args:
        most: vectors that are looked at.
        rounds: of k-means.
    """
    x_RNd = x_RNd[:, :: -(-x_RNd.shape[1] // most)]
    chosen = [x_RNd[:, 0]]
    nearest_RN = x_RNd.new_full(x_RNd.shape[:2], -2.0)
    for _ in range(number - 1):
        nearest_RN = torch.maximum(nearest_RN, (x_RNd @ chosen[-1][..., None])[..., 0])
        chosen.append(x_RNd[torch.arange(len(x_RNd)), nearest_RN.argmin(-1)])
    centroids_RCd = torch.stack(chosen, 1)
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(centroids_RCd, 0)
    for _ in range(rounds):
        means, held = cluster_means(x_RNd, centroids_RCd)
        centroids_RCd = torch.where(held, F.normalize(means, dim=-1), centroids_RCd)
    return centroids_RCd


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)


def _texts(context: Context, x_BHTd: Tensor) -> Tensor:
    """The number of each token's text in its row, -1 for padding, (B, T)."""
    text_BT = context.segments_BT
    if text_BT is None:
        text_BT = torch.zeros(x_BHTd.shape[0], x_BHTd.shape[2], dtype=torch.long, device=x_BHTd.device)
    return text_BT if context.tokens_BS is None else torch.where(context.tokens_BS, text_BT, -1)


def _mean_of_takers(y_MCwd: Tensor, at_MCw: Tensor, found_MCw: Tensor, T: int) -> Tensor:
    """Every token's mean over the clusters that it was found in, zero if there is none: (M, T, d)."""
    M, _, _, d = y_MCwd.shape
    rows = (at_MCw + torch.arange(0, M * T, T, device=at_MCw.device)[:, None, None]).flatten()
    weight = found_MCw.to(y_MCwd.dtype)[..., None]
    y_and_weight = torch.cat((y_MCwd * weight, weight), -1).flatten(0, 2)
    total = y_MCwd.new_zeros(M * T, d + 1).index_add(0, rows, y_and_weight).view(M, T, d + 1)
    return total[..., :-1] / total[..., -1:].clamp(min=1)
