"""Linformer against its definition, text by text."""

# Shape letters: B = batch, T = tokens, D = model width, H = query heads, K = key-value heads, d = head width.

import pytest
import torch
import torch.nn.functional as F

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMConfig, SLMModel
from lightning_slm.nn.attention import Attention
from lightning_slm.nn.linformer import Linformer, naive_linformer
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.rope import naive_rotate, rope_angles

B, D, d, LONGEST = 3, 24, 6, 16


def same_with_gradients(fast, slow, *inputs, tolerance=1e-5):
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    pull = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad(fast, inputs, pull), torch.autograd.grad(slow, inputs, pull)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def naive_layer(layer, x_BTD, tokens_BT, rope=None):
    q, k, v = (
        (x_BTD @ w.T).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for w in layer.qkv_proj.weight.split(layer.fused_rows()["qkv_proj"])
    )
    if rope is not None:
        q, k = naive_rotate(q, *rope), naive_rotate(k, *rope)
    values = layer.key_mixture if layer.value_mixture is None else layer.value_mixture
    y_BHTd = naive_linformer(q, k, v, layer.key_mixture, values, tokens_BT)
    return y_BHTd.transpose(1, 2).flatten(2) @ layer.o_proj.weight.T


@pytest.mark.parametrize("turned", [False, True], ids=["none", "rope"])
@pytest.mark.parametrize("sharing", ["headwise", "kv"])
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("T", [1, 5, 16])
def test_it_is_attention_over_mixtures_written_out_by_hand(T, H, K, sharing, turned):
    layer, x_BTD = Linformer(D, H, K, d, LONGEST, 4, sharing), torch.randn(B, T, D, requires_grad=True)
    rope = rope_angles(torch.arange(T)[None], d, 100.0) if turned else None
    slow = naive_layer(layer, x_BTD, torch.ones(B, T, dtype=torch.bool), rope)
    fast = layer(x_BTD, Context(rope, causal=False), 0)
    same_with_gradients(fast, slow, x_BTD, *layer.parameters())


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_anywhere_is_left_out(side):
    T = 9
    layer, x_BTD = Linformer(D, 4, 2, d, LONGEST, 4), torch.randn(B, T, D, requires_grad=True)
    place, length = torch.arange(T), torch.tensor([9, 4, 1])[:, None]
    begin = {"left": T - length, "right": 0 * length, "both": (T - length) // 2}[side]
    tokens_BT = (place >= begin) & (place < begin + length)
    starts_BT = None if side == "right" else F.pad(tokens_BT[:, 1:] & ~tokens_BT[:, :-1], (1, 0))
    fast = layer(x_BTD, Context(tokens_BS=tokens_BT, starts_BT=starts_BT, causal=False), 0)
    slow = naive_layer(layer, x_BTD, tokens_BT)
    same_with_gradients(fast[tokens_BT], slow[tokens_BT], x_BTD, *layer.parameters())


def test_as_many_mixtures_as_positions_each_of_one_is_attention_itself():
    T = LONGEST
    layer, plain = Linformer(D, 4, 2, d, T, T, "kv"), Attention(D, 4, 2, d)
    with torch.no_grad():
        layer.key_mixture.copy_(torch.eye(T))
    plain.load_state_dict({name: p for name, p in layer.state_dict().items() if name != "key_mixture"})
    x_BTD, context = torch.randn(B, T, D), Context(rope_angles(torch.arange(T)[None], d, 100.0), causal=False)
    assert torch.equal(layer(x_BTD, context, 0), plain(x_BTD, context, 0))


def test_more_mixtures_than_positions_are_not_made():
    layer = Linformer(D, 4, 2, d, LONGEST, 128)
    assert layer.key_mixture.shape == layer.value_mixture.shape == (LONGEST, LONGEST)
    assert Linformer(D, 4, 2, d, LONGEST, 128, "kv").value_mixture is None


def test_first_mixtures_preserve_lengths_on_average():
    layer, x_Td = Linformer(D, 4, 2, d, 512, 128), torch.randn(512, 50)
    for mixture in (layer.key_mixture, layer.value_mixture):
        ratio = (mixture @ x_Td).square().sum() / x_Td.square().sum()
        assert abs(ratio - 1) < 0.1


def test_what_is_mixed_does_not_grow_with_the_text():
    layer = Linformer(64, 4, 2, 16, 512, 32)
    matrices = 2 * 64 * (4 + 2 * 2) * 16 + 2 * 4 * 16 * 64
    mixing = 2 * 2 * 32 * 2 * 16 + 4 * 32 * 4 * 16
    assert layer.flops_per_token(5) == layer.flops_per_token(500) == matrices + mixing
    options = {"mixers": {"linformer": {"projected": 32}}, "num_key_value_heads": 2, "causal": False}
    sizes = {"vocab_size": 10, "hidden_size": 64, "intermediate_size": 8, "max_position_embeddings": 512}
    model = SLMModel(SLMConfig(**sizes, **options, pattern="linformer/mlp"))
    assert flops_per_token(model, 100) == matrices + mixing + 3 * 2 * 64 * 8


def test_packed_documents_are_refused_with_a_way_out():
    layer, starts_BT = Linformer(D, 4, 2, d, LONGEST, 4), torch.zeros(B, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="document_mask=False"):
        layer(torch.randn(B, 9, D), Context(starts_BT=starts_BT, causal=False), 0)


@pytest.mark.parametrize(
    ("options", "message"), [({"projected": 0}, "projected=0"), ({"sharing": "layerwise"}, "linformer@shared")], ids=str
)
def test_options_that_make_no_sense_are_refused_by_name(options, message):
    config = SLMConfig(pattern="linformer/mlp", causal=False, mixers={"linformer": options})
    with pytest.raises(ValueError, match=message):
        SLMModel(config)


def test_a_label_shares_the_whole_layer():
    model = SLMModel(SLMConfig(pattern="linformer@shared/mlp*2", causal=False, hidden_size=64))
    assert len([name for name, _ in model.named_parameters() if "key_mixture" in name]) == 1
