"""Longformer's attention (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150): a band around every token, and a few
tokens that look at everything and are seen by everyone.
"""

# Shape letters: B = batch, R = B, or 1 where all rows are alike, T = tokens, S = tokens looked at, D = model width,
# W = window, w = W / 2, n = blocks of w tokens, G = global tokens, H = query heads, K = key-value heads,
# d = head width.

from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.mixer import Context, Mixer
from lightning_slm.nn.rope import rotate

_NOBODY = -1  # the text of keys that must not be seen


class Longformer(Mixer):
    """Every token looks at ``window / 2`` tokens on either side and at the first ``global_tokens`` of its text; those
    look at all of it, with projections of their own.

    Args:
        hidden_size: width of input and output.
        num_heads: query heads.
        num_kv_heads: key-value heads, each shared by ``num_heads // num_kv_heads`` query heads.
        head_dim: width of one head.
        window: W, tokens of the band beside the own one; even.
        global_tokens: G, how many at the beginning of each text are global: 1 is [CLS].
        bias: whether the projections have one.
    """

    causal: ClassVar[bool] = False
    bidirectional: ClassVar[bool] = True
    refusal: ClassVar[str] = "its band looks both ways; 'swa' is its causal form"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int = 512,
        global_tokens: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if window < 2 or window % 2:
            raise ValueError(f"window={window} of 'longformer' must be even: half of it on either side of a token.")
        if global_tokens < 0:
            raise ValueError(f"global_tokens={global_tokens} of 'longformer' must be 0 or more.")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.window, self.global_tokens = window, global_tokens
        q, kv = num_heads * head_dim, 2 * num_kv_heads * head_dim
        self.qkv_proj = nn.Linear(hidden_size, q + kv, bias=bias)
        self.q_global_proj = nn.Linear(hidden_size, q, bias=bias) if global_tokens else None
        self.kv_global_proj = nn.Linear(hidden_size, kv, bias=bias) if global_tokens else None
        self.o_proj = nn.Linear(q, hidden_size, bias=bias)

    @classmethod
    def from_config(cls, config: Any, *, window: int = 512, global_tokens: int = 1, bias: bool = True) -> Self:
        sizes = (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        return cls(*sizes, window, global_tokens, bias)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        rows: dict[str, tuple[int, ...]] = {"qkv_proj": (q, kv, kv)}
        return rows if self.kv_global_proj is None else {**rows, "kv_global_proj": (kv, kv)}

    def flops_per_token(self, context: int) -> int:
        """Of a token in a text of ``context`` tokens, on average: few are global, and those look at all."""
        G, each = min(self.global_tokens, context), 4 * self.num_heads * self.head_dim
        D, rows = self.o_proj.out_features, sum(self.fused_rows()["qkv_proj"]) + self.o_proj.in_features
        if self.kv_global_proj is not None:
            rows += self.kv_global_proj.out_features + self.o_proj.in_features * G // context
        return 2 * D * rows + each * (min(context, self.window + 1 + G) + G)

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        B, T, _ = x_BTD.shape
        H, K, d = self.num_heads, self.num_kv_heads, self.head_dim
        heads = self.qkv_proj(x_BTD).view(B, T, H + 2 * K, d).transpose(1, 2)
        qk, v = heads.split((H + K, K), 1)
        if context.rope is not None:
            qk = rotate(qk, *context.rope)
        q, k = qk.split((H, K), 1)
        who = Who.of(x_BTD, context, self.global_tokens)
        y_BHTd = band_attention(q, k, v, self.window // 2, who)
        if who.globals_BG is not None:
            y_BHTd = who.put(y_BHTd, self.look_at_all(x_BTD, context, who))
        return self.o_proj(y_BHTd.transpose(1, 2).reshape(B, T, -1))

    def look_at_all(self, x_BTD: Tensor, context: Context, who: "Who") -> Tensor:
        """What the global tokens find, (B, H, G, d)."""
        assert self.q_global_proj is not None
        assert self.kv_global_proj is not None
        (B, T, _), K, d = x_BTD.shape, self.num_kv_heads, self.head_dim
        k, v = self.kv_global_proj(x_BTD).view(B, T, 2 * K, d).transpose(1, 2).split(K, 1)
        q = self.q_global_proj(who.take(x_BTD[:, None])[:, 0]).view(B, -1, self.num_heads, d).transpose(1, 2)
        if context.rope is not None:
            k = rotate(k, *context.rope)
            q = rotate(q, *(who.take(angles.expand(B, -1, T, -1)) for angles in context.rope))
        mask = None
        if not who.alike:  # a column that stands for no global token finds nothing that is used
            nobody = who.globals_RG == _NOBODY
            mask = ((who.globals_RG[..., None] == who.seen_RT[:, None]) | nobody[..., None])[:, None]
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != K)


class Who(NamedTuple):
    """Which tokens see which, by the number of the text that each belongs to.

    Attributes:
        alike: whether every row is one text from its first to its last token.
        query_RT: of the tokens that look.
        seen_RT: of the tokens as seen: `_NOBODY` for padding.
        band_RT: the same, without global tokens, which are seen by all of a text, not by the band.
        globals_BG: where the global tokens are; None: nowhere.
        globals_RG: their texts; `_NOBODY` where a row has fewer of them than others.
    """

    alike: bool
    query_RT: Tensor
    seen_RT: Tensor
    band_RT: Tensor
    globals_BG: Tensor | None
    globals_RG: Tensor

    @classmethod
    def of(cls, x_BTD: Tensor, context: Context, global_tokens: int) -> Self:
        (B, T, _), device = x_BTD.shape, x_BTD.device
        where_T = torch.arange(T, device=device)
        query = torch.zeros(1, T, dtype=torch.long, device=device)
        lead = (where_T < global_tokens)[None]
        if context.starts_BT is not None:
            query = context.starts_BT.cumsum(-1)
            lead = where_T - torch.where(context.starts_BT, where_T, 0).cummax(-1).values < global_tokens
        seen = query
        if context.tokens_BS is not None:
            seen, lead = seen.masked_fill(~context.tokens_BS, _NOBODY), lead & context.tokens_BS
        G, index = min(global_tokens, T), where_T.expand(B, T)
        if G and context.starts_BT is not None:
            G, index = int(lead.sum(-1).max()), lead.byte().argsort(dim=-1, descending=True, stable=True)
        band, index = seen.masked_fill(lead, _NOBODY), index[:, :G]
        alike = context.starts_BT is None and context.tokens_BS is None
        chosen = index[: len(lead)]
        leaders = seen.expand_as(lead).gather(1, chosen).masked_fill(~lead.gather(1, chosen), _NOBODY)
        return cls(alike, query, seen, band, index if G else None, leaders)

    def take(self, x_BHTd: Tensor) -> Tensor:
        """What belongs to the global tokens, (B, H, G, d)."""
        assert self.globals_BG is not None
        B, H, _, d = x_BHTd.shape
        return x_BHTd.gather(2, self.globals_BG[:, None, :, None].expand(B, H, -1, d))

    def put(self, x_BHTd: Tensor, new_BHGd: Tensor) -> Tensor:
        """``x`` with the global tokens' part replaced."""
        assert self.globals_BG is not None
        if self.alike:
            return torch.cat((new_BHGd, x_BHTd[:, :, new_BHGd.shape[2] :]), 2)
        kept = (self.globals_RG == _NOBODY)[:, None, :, None]
        index = self.globals_BG[:, None, :, None].expand_as(new_BHGd)
        return x_BHTd.scatter(2, index, torch.where(kept, self.take(x_BHTd), new_BHGd))


def band_attention(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, half: int, who: Who) -> Tensor:
    """Attention to the ``half`` tokens before and after, the own and the global ones, in time and memory proportional
    to T: folded into blocks of ``half`` tokens, each of which looks at itself and its two neighbours.

    Returns: (B, H, T, d); rows of padding and of global tokens have no meaning.
    """
    (B, H, T, d), K, grouped = q_BHTd.shape, k_BKTd.shape[1], k_BKTd.shape[1] != q_BHTd.shape[1]
    heads = (k_BKTd, v_BKTd)
    leaders = (None, None) if who.globals_BG is None else tuple(who.take(t) for t in heads)
    if 3 * half >= T:
        i_T = torch.arange(T, device=q_BHTd.device)
        mask_R1TS = _mask(i_T, i_T, half, who.query_RT, who.band_RT, who.globals_RG)[:, None]
        k, v = (t if g is None else torch.cat((g, t), 2) for t, g in zip(heads, leaders))
        return F.scaled_dot_product_attention(q_BHTd, k, v, mask_R1TS, enable_gqa=grouped)

    n = -(-T // half)
    more = n * half - T
    q = F.pad(q_BHTd, (0, 0, 0, more)).view(B, H, n, half, d).transpose(1, 2).reshape(B * n, H, half, d)

    def neighbourhoods(t_BKTd: Tensor, g_BKGd: Tensor | None) -> Tensor:
        blocks = F.pad(t_BKTd, (0, 0, half, half + more)).reshape(B, K, n + 2, half, d)
        parts = [blocks[:, :, :-2], blocks[:, :, 1:-1], blocks[:, :, 2:]]
        if g_BKGd is not None:
            parts.insert(0, g_BKGd[:, :, None].expand(-1, -1, n, -1, -1))
        return torch.cat(parts, 3).transpose(1, 2).reshape(B * n, K, -1, d)

    k, v = (neighbourhoods(t, g) for t, g in zip(heads, leaders))
    query_Rnw = F.pad(who.query_RT, (0, more)).unflatten(1, (n, half))
    band_Rn = F.pad(who.band_RT, (half, half + more), value=_NOBODY).unflatten(1, (n + 2, half))
    band_Rn3w = torch.cat((band_Rn[:, :-2], band_Rn[:, 1:-1], band_Rn[:, 2:]), 2)
    i, j = (torch.arange(start, stop, device=q.device) for start, stop in ((0, half), (-half, 2 * half)))
    mask_RnwS = _mask(i, j, half, query_Rnw, band_Rn3w, who.globals_RG[:, None].expand(-1, n, -1))
    mask = mask_RnwS.expand(B, -1, -1, -1).reshape(B * n, 1, half, -1)
    y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)
    return y.view(B, n, H, half, d).transpose(1, 2).reshape(B, H, n * half, d)[:, :, :T]


def _mask(i: Tensor, j: Tensor, half: int, query: Tensor, band: Tensor, leaders: Tensor) -> Tensor:
    """True where the token at ``i`` looks: at global tokens of its text first, then at near ones of it; and always at
    itself, so that no row of padding is empty. (..., i, G + j).
    """
    distance = j - i[:, None]
    near = (distance.abs() <= half) & (query[..., None] == band[..., None, :]) | (distance == 0)
    return torch.cat((query[..., None] == leaders[..., None, :], near), -1)


def naive_longformer(layer: Longformer, x_TD: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The twin: one text without padding, token by token.

    Args:
        rope: cosine and sine, each (T, d/2).
    """
    (T, _), G, half, H, K = x_TD.shape, layer.global_tokens, layer.window // 2, layer.num_heads, layer.num_kv_heads

    def project(linear: nn.Linear, heads: int) -> Tensor:
        return linear(x_TD).view(T, heads, -1).transpose(0, 1)

    def turn(t_HTd: Tensor) -> Tensor:
        return t_HTd if rope is None else rotate(t_HTd[None], *(angles[None, None] for angles in rope))[0]

    q, k, v = project(layer.qkv_proj, H + 2 * K).split((H, K, K))
    sets = {False: (turn(q), turn(k), v)}
    if layer.q_global_proj is not None and layer.kv_global_proj is not None:
        k, v = project(layer.kv_global_proj, 2 * K).split(K)
        sets[True] = (turn(project(layer.q_global_proj, H)), turn(k), v)
    rows = []
    for t in range(T):
        q, k, v = sets[t < G]
        seen = [s for s in range(T) if t < G or s < G or abs(s - t) <= half]
        k, v = (x[:, seen].repeat_interleave(H // K, 0) for x in (k, v))
        weights = (torch.einsum("hd,hsd->hs", q[:, t], k) / layer.head_dim**0.5).softmax(-1)
        rows.append(torch.einsum("hs,hsd->hd", weights, v).flatten())
    return layer.o_proj(torch.stack(rows))
