"""Nyström attention (Xiong et al. 2021, https://arxiv.org/abs/2102.03902): softmax attention put together from that of
a few landmarks.
"""

# Shape letters: B = batch, T = tokens, M = landmarks, D = model width, H = query heads, K = key-value heads,
# R = query heads to a key-value head, d = head width, W = taps, C = tokens of a chunk, n = chunks.

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.attention import Attention
from lightning_slm.nn.linformer import refuse_packed, reordered, text_first
from lightning_slm.nn.mixer import Context, set_


class Nystrom(Attention):
    """softmax(Q K~') pinv(softmax(Q~ K~')) softmax(Q~ K') V + conv(V), all scores divided by sqrt(d), where the
    landmarks Q~ and K~ are means over M segments of the text.

    A text of at most M tokens is attended to exactly. Segments are counted from a text's first token and are of equal
    length up to one, whatever the padding; each text and head has a pseudo-inverse of its own.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key-value heads, each shared by ``num_heads // num_kv_heads`` query heads.
        head_dim: width of one head.
        landmarks: M.
        conv_size: W, odd: taps of the convolution of the values along the text, centred, one filter for a head; None:
            without.
        bias: whether the projections have one, as published.
    """

    causal: ClassVar[bool] = False
    bidirectional: ClassVar[bool] = True
    refusal: ClassVar[str] = "its landmarks are means over the whole text, later tokens too"
    cache_type: ClassVar[str | None] = None  # type: ignore[assignment]  # nothing is kept from call to call
    _slm_protected = ("conv_weight",)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        landmarks: int = 64,
        conv_size: int | None = 65,
        bias: bool = True,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim)
        if landmarks < 1:
            raise ValueError(f"nystrom: landmarks={landmarks} must be at least 1; 64 is usual.")
        if conv_size is not None and (conv_size < 1 or conv_size % 2 == 0):
            raise ValueError(f"nystrom: conv_size={conv_size} must be odd, to have a middle, or null for none.")
        self.landmarks = landmarks
        if bias:
            self.qkv_proj = nn.Linear(self.qkv_proj.in_features, self.qkv_proj.out_features)
            self.o_proj = nn.Linear(self.o_proj.in_features, self.o_proj.out_features)
        self.conv_weight = None if conv_size is None else nn.Parameter(torch.empty(num_kv_heads, conv_size))
        self.init_weights_()

    @classmethod
    def from_config(cls, config: Any, *, landmarks: int = 64, conv_size: int | None = 65, bias: bool = True) -> Self:
        sizes = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        return cls(*sizes, landmarks, conv_size, bias)

    def init_weights_(self, config: Any = None) -> None:
        """The filters are drawn like matrices."""
        if self.conv_weight is not None:
            set_(self.conv_weight, torch.randn_like(self.conv_weight) * getattr(config, "initializer_range", 0.02))

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        B, T, _ = x_BTD.shape
        refuse_packed("nystrom", context)
        q, k, v = self.project(x_BTD, context)
        order_BT, lengths_B = text_first(context), None
        if context.tokens_BS is not None:
            lengths_B = context.tokens_BS.sum(-1)
            v = v * context.tokens_BS[:, None, :, None]  # padding is nothing to the convolution, too
        if order_BT is not None:
            q, k, v = (reordered(t, order_BT) for t in (q, k, v))
        y_BHTd = nystrom_attention(q, k, v, self.landmarks, lengths_B)
        if self.conv_weight is not None:
            smooth = text_conv(v, self.conv_weight)
            y_BHTd = y_BHTd + smooth.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
        if order_BT is not None:
            y_BHTd = reordered(y_BHTd, order_BT.argsort(-1))
        return self.o_proj(y_BHTd.transpose(1, 2).reshape(B, T, -1))

    def flops_per_token(self, context: int) -> int:
        """Of the matrices, the convolution, and the two kernels of tokens and landmarks; that of the landmarks with
        each other, its pseudo-inverse, and the product with the values are paid once a text.
        """
        H, K, d, M = self.num_heads, self.num_kv_heads, self.head_dim, self.landmarks
        taps = 0 if self.conv_weight is None else self.conv_weight.shape[1]
        total = sum(2 * m.in_features * m.out_features for m in (self.qkv_proj, self.o_proj)) + 2 * taps * K * d
        if context <= M:
            return total + 4 * H * d * context
        return total + 8 * H * d * M + H * (4 * d * M**2 + ITERATIONS * 8 * M**3) // context


ITERATIONS = 6  # of the pseudo-inverse


def nystrom_attention(
    q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, landmarks: int, lengths_B: Tensor | None = None
) -> Tensor:
    """Nyström's approximation of softmax attention over all tokens, (B, H, T, d); exact for texts of at most
    ``landmarks`` tokens.

    Args:
        lengths_B: the first so many tokens of each row are its text; None: all. What follows gets arbitrary numbers.
    """
    T, M = q_BHTd.shape[2], landmarks
    mask = None
    if lengths_B is not None:
        lengths_B = lengths_B.clamp(min=1)  # a row of nothing but padding is no reason for NaN
        mask = (torch.arange(T, device=q_BHTd.device) < lengths_B[:, None])[:, None, None]
    if T <= M:
        return _attend(q_BHTd, k_BKTd, v_BKTd, mask)
    y_BHTd = approximated(q_BHTd, k_BKTd, v_BKTd, M, lengths_B)
    if mask is None or lengths_B is None:
        return y_BHTd
    exact = _attend(q_BHTd[:, :, :M], k_BKTd[:, :, :M], v_BKTd[:, :, :M], mask[..., :M])
    return torch.where((lengths_B <= M)[:, None, None, None], F.pad(exact, (0, 0, 0, T - M)), y_BHTd)


def approximated(
    q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, landmarks: int, lengths_B: Tensor | None = None
) -> Tensor:
    """The approximation, for texts of at least ``landmarks`` tokens. Both kernels of tokens and landmarks go through
    PyTorch's fused attention: the one finds values for the landmarks, the other takes those for its own.
    """
    R, d = q_BHTd.shape[1] // k_BKTd.shape[1], q_BHTd.shape[-1]
    q_BHMd, k_BKMd = (segment_means(t, landmarks, lengths_B) for t in (q_BHTd, k_BKTd))
    k_BHMd, mask = k_BKMd.repeat_interleave(R, 1), None
    if lengths_B is not None:
        mask = (torch.arange(q_BHTd.shape[2], device=q_BHTd.device) < lengths_B[:, None])[:, None, None]
    found_BHMd = _attend(q_BHMd, k_BKTd, v_BKTd, mask)
    with torch.autocast(q_BHTd.device.type, enabled=False):  # the iteration squares what rounding has left
        precise = torch.promote_types(q_BHTd.dtype, torch.float32)
        kernel_BHMM = (q_BHMd.to(precise) @ k_BHMd.to(precise).mT / d**0.5).softmax(-1)
        values_BHMd = (pseudo_inverse(kernel_BHMM) @ found_BHMd.to(precise)).to(v_BKTd.dtype)
    return _attend(q_BHTd, k_BHMd, values_BHMd, None)


def _attend(q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, mask: Tensor | None) -> Tensor:
    grouped = q_BHTd.shape[1] != k_BKSd.shape[1]
    return F.scaled_dot_product_attention(q_BHTd, k_BKSd, v_BKSd, mask, enable_gqa=grouped)


def segment_means(x_BHTd: Tensor, segments: int, lengths_B: Tensor | None = None) -> Tensor:
    """Means over M segments of each row's first ``lengths`` tokens, equally long up to one, (B, H, M, d)."""
    T, device = x_BHTd.shape[2], x_BHTd.device
    if lengths_B is None and T % segments == 0:
        return x_BHTd.unflatten(2, (segments, -1)).mean(3)
    lengths_B1 = torch.full((1, 1), T, device=device) if lengths_B is None else lengths_B[:, None]
    place_T, segment_M1 = torch.arange(T, device=device), torch.arange(segments, device=device)[:, None]
    segment_BT = torch.where(place_T < lengths_B1, place_T * segments // lengths_B1, -1)
    member_BMT = segment_BT[:, None] == segment_M1
    sizes_BM1 = member_BMT.sum(-1, keepdim=True).clamp(min=1)
    # Divided afterwards: ones, unlike thirds, are exact in bfloat16.
    return (member_BMT.to(x_BHTd.dtype)[:, None] @ x_BHTd) / sizes_BM1.to(x_BHTd.dtype)[:, None]


def pseudo_inverse(a_BHMM: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """An approximation of each matrix's Moore-Penrose inverse, of third order (Razavi et al. 2014).

    It starts from a'/(|a|_1 |a|_inf), which converges for any matrix, with the norms of that very matrix.
    """
    columns, rows = (a_BHMM.abs().sum(dim, keepdim=True).amax((-2, -1), keepdim=True) for dim in (-2, -1))
    z = a_BHMM.mT / (columns * rows)
    identity = torch.eye(a_BHMM.shape[-1], dtype=a_BHMM.dtype, device=a_BHMM.device)
    for _ in range(iterations):
        az = a_BHMM @ z
        z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
    return z


def text_conv(v_BKTd: Tensor, weight_KW: Tensor, chunk: int = 64) -> Tensor:
    """Each head's values convolved along the text with its filter, centred, zeros outside.

    As products of banded matrices with chunks of C + W - 1 tokens: on a CPU twice as fast as the convolution.
    """
    B, K, T, d = v_BKTd.shape
    W = weight_KW.shape[1]
    C = min(chunk, T)
    n = -(-T // C)
    chunks = F.pad(v_BKTd, (0, 0, W // 2, W // 2 + n * C - T)).unfold(2, C + W - 1, C)  # (B, K, n, d, C + W - 1)
    tap = torch.arange(C + W - 1, device=v_BKTd.device) - torch.arange(C, device=v_BKTd.device)[:, None]
    inside = (tap >= 0) & (tap < W)
    band = F.pad(weight_KW, (0, 1))[:, torch.where(inside, tap, W)]  # (K, C, C + W - 1)
    return (band[:, None].to(v_BKTd.dtype) @ chunks.mT).reshape(B, K, n * C, d)[:, :, :T]


def naive_text_conv(v_BKTd: Tensor, weight_KW: Tensor) -> Tensor:
    """The twin: PyTorch's own convolution."""
    K, W = weight_KW.shape
    return F.conv2d(v_BKTd, weight_KW[:, None, :, None], padding=(W // 2, 0), groups=K)
