"""Linformer (Wang et al. 2020, https://arxiv.org/abs/2006.04768): attention over a fixed number of mixtures of all keys
and values.
"""

# Shape letters: B = batch, T = tokens, L = longest text, P = projected positions, D = model width, H = query heads,
# K = key-value heads, d = head width.

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.attention import Attention
from lightning_slm.nn.mixer import Context, set_

SHARINGS = ("headwise", "kv")


class Linformer(Attention):
    """softmax(Q (E K)' / sqrt(d)) (F V), with E and F learnt matrices from the L positions of a text to P.

    A shorter text uses the first columns. Padding is left out: what counts is a token's place in its text, wherever
    the padding stands. With rotary positions, queries and keys are turned before the keys are mixed, so that a score is
    a mixture of scores that each depend on a distance.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key-value heads, each shared by ``num_heads // num_kv_heads`` query heads.
        head_dim: width of one head.
        length: L, tokens of the longest text.
        projected: P, at most L.
        sharing: "headwise": E for the keys and F for the values of all heads; "kv": E for both.
    """

    causal: ClassVar[bool] = False
    bidirectional: ClassVar[bool] = True
    refusal: ClassVar[str] = (
        "each row of its projections mixes every position, later ones too, so no mask can hide them"
    )
    cache_type: ClassVar[str | None] = None  # type: ignore[assignment]  # nothing is kept from call to call
    _slm_protected = ("key_mixture", "value_mixture")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        length: int,
        projected: int = 128,
        sharing: str = "headwise",
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim)
        if projected < 1:
            raise ValueError(f"linformer: projected={projected} must be at least 1; 128 is usual.")
        if sharing not in SHARINGS:
            raise ValueError(
                f"linformer: sharing={sharing!r} must be one of {', '.join(map(repr, SHARINGS))}; a whole layer is "
                "shared by a label in the pattern, 'linformer@shared/mlp'."
            )
        size = (min(projected, length), length)
        self.key_mixture = nn.Parameter(torch.empty(size))
        self.value_mixture = nn.Parameter(torch.empty(size)) if sharing == "headwise" else None
        self.init_weights_()

    @classmethod
    def from_config(cls, config: Any, *, projected: int = 128, sharing: str = "headwise") -> Self:
        sizes = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        return cls(*sizes, config.max_position_embeddings, projected, sharing)

    def init_weights_(self, config: Any = None) -> None:
        """Normal with variance 1/P, under which a random projection preserves lengths (Johnson & Lindenstrauss)."""
        for mixture in (self.key_mixture, self.value_mixture):
            if mixture is not None:
                set_(mixture, torch.randn_like(mixture) * len(mixture) ** -0.5)

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        B, T, _ = x_BTD.shape
        refuse_packed("linformer", context)
        q, k, v = self.project(x_BTD, context)
        if context.tokens_BS is not None:
            k, v = (t * context.tokens_BS[:, None, :, None] for t in (k, v))
        order_BT = text_first(context)
        if order_BT is not None:
            k, v = reordered(k, order_BT), reordered(v, order_BT)
        values = self.key_mixture if self.value_mixture is None else self.value_mixture
        k, v = self.key_mixture[:, :T] @ k, values[:, :T] @ v
        y_BHTd = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.num_heads != self.num_kv_heads)
        return self.o_proj(y_BHTd.transpose(1, 2).reshape(B, T, -1))

    def flops_per_token(self, context: int) -> int:
        """Of the matrices, of mixing a key and a value into P others, and of looking at those."""
        H, K, d, P = self.num_heads, self.num_kv_heads, self.head_dim, len(self.key_mixture)
        matrices = sum(2 * m.in_features * m.out_features for m in (self.qkv_proj, self.o_proj))
        return matrices + 4 * P * K * d + 4 * P * H * d


def refuse_packed(name: str, context: Context) -> None:
    """Rows of several texts cannot be told apart by what mixes all positions.

    Raises:
        ValueError: texts begin within rows, and not because of padding.
    """
    if context.starts_BT is not None and context.tokens_BS is None:
        raise ValueError(
            f"{name!r} mixes all tokens of a row, so that packed documents would see each other: one document a row, "
            "with padding, or document_mask=False."
        )


def text_first(context: Context) -> Tensor | None:
    """The order that puts each row's tokens before its padding, (B, T); None: they are there already."""
    if context.tokens_BS is None or context.starts_BT is None:
        return None
    return context.tokens_BS.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)


def reordered(x_BHTd: Tensor, order_BT: Tensor) -> Tensor:
    """Token ``order[t]`` at place t."""
    return x_BHTd.gather(2, order_BT[:, None, :, None].expand_as(x_BHTd))


def naive_linformer(
    q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, keys_PL: Tensor, values_PL: Tensor, tokens_BT: Tensor
) -> Tensor:
    """The twin: text by text, without its padding, head by head."""
    y_BHTd = torch.zeros_like(q_BHTd)
    for b, tokens_T in enumerate(tokens_BT):
        for h in range(q_BHTd.shape[1]):
            kv = h * k_BKTd.shape[1] // q_BHTd.shape[1]
            k_Pd, v_Pd = (
                torch.einsum("pt,td->pd", mixture[:, : int(tokens_T.sum())], x[b, kv, tokens_T])
                for mixture, x in ((keys_PL, k_BKTd), (values_PL, v_BKTd))
            )
            scores_TP = torch.einsum("td,pd->tp", q_BHTd[b, h], k_Pd) / q_BHTd.shape[-1] ** 0.5
            y_BHTd[b, h] = scores_TP.softmax(-1) @ v_Pd
    return y_BHTd
