"""Hymba against its slow twin, which part takes what from whom, and the published size and cache."""

# Shape letters: B = batch, T = tokens, D = model width, H = query heads, K = key-value heads, M = meta tokens.

import pytest
import torch

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMCache, SLMConfig, SLMForCausalLM
from lightning_slm.nn.attention import naive_attention
from lightning_slm.nn.hymba import Hymba, HymbaReuse, HymbaSliding, HymbaSlidingReuse, naive_hymba
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.rope import rope_angles

B, D, H, K, d, C = 2, 24, 4, 2, 6, 48
LAYERS = [Hymba, HymbaReuse, HymbaSliding, HymbaSlidingReuse]
PAIR = "hymba_swa/mlp hymba_swa_reuse/mlp"
PUBLISHED = {
    "pattern": f"hymba/mlp ({PAIR})*7 hymba/mlp {PAIR} hymba_swa_reuse/mlp ({PAIR})*6 hymba/mlp",
    "vocab_size": 32001,
    "hidden_size": 1600,
    "intermediate_size": 5504,
    "num_attention_heads": 25,
    "num_key_value_heads": 5,
    "sliding_window": 1024,
    "meta_tokens": 128,
    "max_position_embeddings": 8192,
}


def layer_of(kind=HymbaSliding, window=3, channels=C):
    window = window if issubclass(kind, HymbaSliding) else None
    layer = kind(D, H, K, d, channels, window, lends=True, state_size=5, dt_rank=3)
    layer.ssm.init_weights_()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.normal_(p, 1, 0.1)
    return layer.double()


def context_of(length, meta=0):
    return Context(rope_angles(torch.arange(length)[None], d, 100.0), meta=meta)


def same_with_gradients(fast, slow, inputs):
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)  # angles are float32
    pull = torch.randn_like(fast)
    ours, theirs = (
        torch.autograd.grad(out, inputs, pull, allow_unused=True, materialize_grads=True) for out in (fast, slow)
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [24, 48, 96])
@pytest.mark.parametrize("M", [0, 3])
@pytest.mark.parametrize("T", [1, 3, 17])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_the_naive_twins(kind, T, M, channels):
    lender, layer = layer_of(kind.__mro__[kind.reuses], channels=channels), layer_of(kind, channels=channels)
    x_BTD = torch.randn(B, M + T, D, dtype=torch.float64, requires_grad=True)
    context = context_of(M + T, M)
    _, lent = naive_hymba(lender, x_BTD, context.rope, M)
    naive, _ = naive_hymba(layer, x_BTD, context.rope, M, lent if layer.reuses else None)
    if layer.reuses:
        lender(x_BTD, context, 0)
    parameters = (*layer.parameters(), *(lender.parameters() if layer.reuses else ()))
    same_with_gradients(layer(x_BTD, context, 1), naive, (x_BTD, *parameters))


def test_the_attention_half_is_naive_attention():
    layer, x_BTD = layer_of(window=4), torch.randn(B, 15, D, dtype=torch.float64)
    q, k, v, _, _ = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part, heads in zip(layer.in_proj(x_BTD).split(layer.rows, -1), (H, K, K, 1, 1))
    )
    found = layer.look(q, layer.remember(k, v, Context(), 0), Context())
    torch.testing.assert_close(found, naive_attention(q, k, v, 4))


def test_keys_and_values_come_from_the_nearest_earlier_layer_of_the_same_reach_that_has_its_own():
    kinds = [Hymba, HymbaSliding, HymbaReuse, HymbaSliding, HymbaSlidingReuse, HymbaSlidingReuse]
    layers, context, x_BTD = [layer_of(kind) for kind in kinds], context_of(9), torch.randn(B, 9, D).double()
    lenders = [None, None, 0, None, 3, 3]
    for index, (layer, lender) in enumerate(zip(layers, lenders)):
        lent = None if lender is None else naive_hymba(layers[lender], x_BTD, context.rope)[1]
        naive, _ = naive_hymba(layer, x_BTD, context.rope, lent=lent)
        torch.testing.assert_close(layer(x_BTD, context, index), naive, rtol=1e-6, atol=1e-6)
    assert set(context.shared) == {"hymba.0", "hymba_swa.1", "hymba_swa.3"}


def test_a_layer_that_reuses_has_neither_weights_nor_cache_for_keys_and_values():
    own, reuse = layer_of(HymbaSliding), layer_of(HymbaSlidingReuse)
    assert own.fused_rows() == {"in_proj": (H * d, K * d, K * C // H, C, C)}
    assert reuse.fused_rows() == {"in_proj": (H * d, C, C)}
    config = tiny(f"hymba/mlp ({PAIR})*2", sliding_window=4, repeat=2)
    assert config.layer_types == [
        *["hybrid"] * 2, *(["hybrid_sliding"] * 2 + ["linear_attention"] * 2) * 2,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
def test_a_deeper_stack_compiles_no_more_code_though_layers_know_whom_they_take_from():
    frames, ids_BT = [], torch.randint(0, 61, (1, 9))
    for depth in (4, 12):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = SLMForCausalLM(tiny(f"({PAIR})*{depth}", sliding_window=4)).train()
        for block in model.model.layers:
            block.compile(backend="eager")
        model(ids_BT, labels=ids_BT).loss.backward()
        frames.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert frames[0] == frames[1] > 0


def tiny(pattern, **values):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return SLMConfig(**{"vocab_size": 61, **sizes, "pattern": pattern, **values})


def cache_bytes(config, length, item):
    """Keys and values of every layer that has its own, over what it looks at, and the states of all."""
    C, d = 2 * config.hidden_size, config.head_dim
    width = config.num_key_value_heads * (d + C // config.num_attention_heads)
    near = min(length, config.sliding_window - 1)  # of the window, the newest token comes with the next call
    tokens = {"hybrid": length, "hybrid_sliding": near, "linear_attention": None}
    seen = [tokens[kind] for kind in config.layer_types]
    keys = sum(width * (n + config.meta_tokens) for n in seen if n is not None)
    return item * keys + len(seen) * (item * C * 3 + 4 * C * 16)


@pytest.mark.parametrize("meta", [0, 5])
@pytest.mark.parametrize("length", [5, 40])
def test_the_cache_has_the_bytes_of_the_formula(length, meta):
    config = tiny(f"hymba/mlp ({PAIR} hymba_swa_reuse/mlp)*2 {PAIR}", sliding_window=8, meta_tokens=meta)
    cache = SLMCache(config)
    with torch.no_grad():
        SLMForCausalLM(config)(torch.randint(0, 61, (1, length)), past_key_values=cache)
    assert cache.nbytes() == cache_bytes(config, length, 4)


def test_the_published_sizes_give_the_published_numbers():
    config = SLMConfig(**PUBLISHED)
    reuses = [i for i, block in enumerate(config.blocks) if block.token.name.endswith("reuse")]
    assert reuses == [2, 4, 6, 8, 10, 12, 14, 17, 18, 20, 22, 24, 26, 28, 30]
    assert [i for i, kind in enumerate(config.layer_types) if kind == "hybrid"] == [0, 15, 31]
    with torch.device("meta"):
        model = SLMForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 1_522_797_824  # published: 1.52 B
    # The paper's abstract: 11.67 times less cache than Llama-3.2-3B, which at 8192 tokens in 16 bits has this:
    llama = 28 * 2 * 8 * 128 * 8192 * 2
    assert 10.5 < llama / cache_bytes(config, 8192, 2) < 12.0


def test_it_costs_what_mamba_costs_and_the_attention():
    window, context = 16, 100
    with torch.device("meta"):
        hymba, mamba = (
            SLMForCausalLM(tiny(f"{name}/mlp*2", sliding_window=w))
            for name, w in (("hymba_swa", window), ("mamba", None))
        )
    q, kv, values = 4 * 8, 2 * (8 + 16), 4 * 16  # rows for queries, for keys and values, and width found
    per_layer = 2 * 32 * (q + kv) + 2 * (q + values) * window
    assert flops_per_token(hymba, context) - flops_per_token(mamba, context) == 2 * per_layer


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "hymba_reuse/mlp hymba/mlp"}, "'hymba_reuse' takes keys and values from an earlier 'hymba'"),
        ({"pattern": "hymba/mlp hymba_reuse/mlp", "mixers": {"hymba": {"expand": 1}}}, "expand=2, but must have"),
        ({"pattern": "hymba/mlp", "mixers": {"hymba": {"expand": 0.3}}}, "expand=0.3 times hidden_size=32"),
        ({"pattern": "hymba/mlp", "mixers": {"hymba": {"conv_size": 1}}}, "conv_size=1 must be at least 2"),
        ({"pattern": "hymba/mlp", "mixers": {"hymba": {"state_size": 0}}}, "state_size=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        SLMForCausalLM(tiny(**values))
