"""LSH attention against a loop over tokens, against full attention, and against Hugging Face's Reformer."""

# Shape letters: B = batch, T = tokens, D = model width, H = heads, d = head width, R = rounds.

import pytest
import torch
from mixers import DECODERS, V, close, decoder, tokens
from torch.utils.flop_counter import FlopCounterMode
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from lightning_slm.models import SLMCache, SLMConfig
from lightning_slm.models.registry import TOKEN_MIXERS
from lightning_slm.nn.lsh import LSHAttention, bucket_ids, usual_buckets
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.rope import naive_rotate, rope_angles

B, D, H, d = 2, 24, 4, 6


def lsh(**options):
    layer = LSHAttention(D, H, d, **{"hashes": 2, "buckets": 4, "chunk": 3, **options})
    torch.nn.init.normal_(layer.qv_proj.weight, std=0.5)
    layer.init_weights_(None)
    return layer


def heads(layer, x_BTD, rope=None):
    """Queries and values, (B, H, T, d)."""
    q, v = ((x_BTD @ w.T).unflatten(-1, (H, d)).transpose(1, 2) for w in layer.qv_proj.weight.split(H * d))
    return q if rope is None else naive_rotate(q, *rope), v


def naive_causal(layer, x_BTD, rope=None, starts=()):
    """The definition, token by token: in each round the last earlier ones of the bucket, rounds counted one by one."""
    q, v = heads(layer, x_BTD, rope)
    ids = layer.hash(q)
    k = q / q.norm(dim=-1, keepdim=True)
    found = []
    for b in range(len(x_BTD)):
        for h in range(H):
            for t in range(x_BTD.shape[1]):
                first = max((s for s in starts if s <= t), default=0)
                members = []
                for ids_S in ids[b, h]:
                    same = [s for s in range(first, t) if ids_S[s] == ids_S[t]]
                    members += same[-layer.chunk :]
                members = members or [t]
                probs = (k[b, h, members] @ q[b, h, t]).softmax(-1)
                found.append(probs @ v[b, h, members])
    return torch.stack(found).view_as(q).transpose(1, 2).flatten(2) @ layer.o_proj.weight.T


def same_with_gradients(fast, slow, *inputs, tolerance=1e-4):
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    pull = torch.randn_like(fast)
    for a, b in zip(torch.autograd.grad(fast, inputs, pull), torch.autograd.grad(slow, inputs, pull)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("T", [1, 2, 11, 20])
@pytest.mark.parametrize(
    "options",
    [{}, {"hashes": 1}, {"buckets": 2, "chunk": 1}, {"buckets": 8, "chunk": 30}, {"local": True}, {"buckets": 1}],
    ids=str,
)
def test_in_a_decoder_it_is_the_loop_over_tokens(options, T):
    layer, x_BTD = lsh(**options), torch.randn(B, T, D, requires_grad=True)
    rope = rope_angles(torch.arange(T)[None], d, 100.0)
    same_with_gradients(layer(x_BTD, Context(rope), 0), naive_causal(layer, x_BTD, rope), x_BTD, *layer.parameters())


def test_documents_keep_to_themselves():
    layer, x_BTD = lsh(), torch.randn(B, 14, D, requires_grad=True)
    starts_BT = torch.zeros(B, 14, dtype=torch.bool)
    starts_BT[:, [5, 6]] = True
    ours = layer(x_BTD, Context(starts_BT=starts_BT), 0)
    same_with_gradients(ours, naive_causal(layer, x_BTD, starts=(5, 6)), x_BTD, *layer.parameters())


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_with_one_bucket_it_is_full_attention_with_shared_queries_and_keys(causal):
    T = 9
    layer, x_BTD = lsh(buckets=1, chunk=T), torch.randn(B, T, D, requires_grad=True)
    q, v = heads(layer, x_BTD)
    scores = q @ torch.nn.functional.normalize(q, dim=-1).mT
    visible = torch.ones(T, T, dtype=torch.bool).tril() if causal else torch.ones(T, T, dtype=torch.bool)
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(torch.eye(T, dtype=torch.bool), -1e5)
    full = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ layer.o_proj.weight.T
    same_with_gradients(layer(x_BTD, Context(causal=causal), 0), full, x_BTD, *layer.parameters())


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_in_an_encoder_it_is_reformers(rounds):
    """But for the first and last chunk of the sorted text: Hugging Face lets them look at each other, around the end
    of the text and of a round.
    """
    T, chunk, buckets, seed = 64, 8, 8, 5
    names = {"attn_layers": ["lsh"], "hash_seed": seed, "is_decoder": False, "lsh_attention_probs_dropout_prob": 0.0}
    config = ReformerConfig(
        hidden_size=D, num_attention_heads=H, attention_head_size=d, num_hashes=rounds, num_buckets=buckets,
        lsh_attn_chunk_length=chunk, lsh_num_chunks_before=1, lsh_num_chunks_after=1, **names,
    )  # fmt: skip
    theirs, ours = LSHSelfAttention(config), lsh(hashes=rounds, buckets=buckets, chunk=chunk)
    with torch.no_grad():
        for linear, weight in zip((theirs.query_key, theirs.value), ours.qv_proj.weight.split(H * d)):
            linear.weight.copy_(weight)
        torch.manual_seed(seed)
        ours.rotations.copy_(torch.randn(H, d, rounds, buckets // 2).flatten(2).view(torch.int32))
        ours.o_proj.weight.copy_(torch.eye(D))
    x_BTD = torch.randn(B, T, D, requires_grad=True)
    place = ours.hash(heads(ours, x_BTD)[0]).argsort(stable=True, dim=-1).argsort(-1) // chunk  # chunk of each token
    inner = ((place > 0) & (place < T // chunk - 1)).all(2).transpose(1, 2)[..., None]
    assert 0.2 < inner.float().mean() < 0.8
    y_ours = ours(x_BTD, Context(causal=False), 0).unflatten(-1, (H, d)) * inner
    y_theirs = theirs(x_BTD).hidden_states.unflatten(-1, (H, d)) * inner
    torch.testing.assert_close(y_ours, y_theirs, rtol=1e-4, atol=1e-5)
    pull = torch.randn_like(y_ours)
    mine = torch.autograd.grad(y_ours, (x_BTD, ours.qv_proj.weight), pull)
    named = torch.autograd.grad(y_theirs, (x_BTD, theirs.query_key.weight, theirs.value.weight), pull)
    torch.testing.assert_close(mine[0], named[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine[1], torch.cat(named[1:]), rtol=1e-4, atol=1e-4)


def test_a_bucket_is_the_nearest_of_the_turned_axes():
    x_BHSd, rotations = torch.randn(B, H, 9, d), torch.randn(H, d, 2, 3)
    ids = bucket_ids(x_BHSd, rotations)
    for r in range(2):
        turned = x_BHSd @ rotations[:, :, r]
        assert torch.equal(ids[:, :, r], torch.cat((turned, -turned), -1).argmax(-1))
    few = bucket_ids(x_BHSd, rotations, torch.tensor([1, 2]))
    assert set(few[0].unique().tolist()) == {0, 3}
    assert set(few[1].unique().tolist()) == {0, 1, 3, 4}


def test_shorter_texts_of_an_encoder_use_fewer_buckets():
    sizes = {"hidden_size": D, "num_attention_heads": H, "max_position_embeddings": 256, "causal": False}
    layer = LSHAttention.from_config(SLMConfig(**sizes, pattern="lsh/mlp"), chunk=8)
    assert layer.buckets == usual_buckets(256, 8) == 64
    tokens_BS = torch.arange(100) < torch.tensor([[100], [39], [16], [7], [1]])
    expected = [usual_buckets(n, 8) // 2 for n in (100, 39, 16, 7, 1)]
    assert layer.halves(Context(tokens_BS=tokens_BS), 100).tolist() == expected == [8, 4, 2, 1, 1]
    assert layer.halves(Context(), 39).tolist() == [4]


def test_rotations_stay_in_float32_and_differ_from_layer_to_layer():
    model = decoder(DECODERS["lsh"])
    first, second = (block.token_mixer for block in model.model.layers)
    before = first.rotations.view(torch.float32).clone()
    assert not torch.equal(first.rotations, second.rotations)
    assert before.std() == pytest.approx(1, abs=0.2)
    assert torch.equal(model.bfloat16().model.layers[0].token_mixer.rotations.view(torch.float32), before)


def test_in_training_two_forward_passes_agree():
    model, ids_BT = decoder(DECODERS["lsh"]).train(), tokens()
    assert torch.equal(model(ids_BT).logits, model(ids_BT).logits)


def test_a_static_cache_of_transformers_works():
    model, ids_BT = decoder(DECODERS["lsh"]), tokens(2, 9)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    static = model.generate(ids_BT, cache_implementation="static", disable_compile=True, **how)
    assert torch.equal(static, model.generate(ids_BT, use_cache=False, **how))


@torch.no_grad()
def test_padding_may_fill_the_first_piece_of_a_cached_text():
    model, ids_BT = decoder(DECODERS["lsh"]), tokens(1, 9)
    padded, mask = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids_BT), 1), (torch.arange(14) >= 5).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, logits = SLMCache(model.config), []
    for end, part in zip((3, 7, 8, 14), padded.split([3, 4, 1, 6], 1)):
        at = positions[:, end - part.shape[1] : end]
        logits.append(model(part, attention_mask=mask[:, :end], position_ids=at, past_key_values=cache).logits)
    close(torch.cat(logits, 1)[:, 5:], model(ids_BT).logits)


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_cost_grows_with_the_text_and_not_with_its_square(causal):
    layer, cost = lsh(hashes=1, buckets=16, chunk=16), []
    for T in (512, 1024):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(1, T, D), Context(causal=causal), 0)
        cost.append(counter.get_total_flops())
    assert cost[1] == 2 * cost[0]


def test_flops_of_a_token_by_hand():
    layer = lsh(local=True, chunk=32)
    weights, hashing = 3 * D * D, H * d * 2 * 2
    assert layer.flops_per_token(1000) == 2 * (weights + hashing) + 4 * H * d * 3 * 32
    assert layer.flops_per_token(10) == 2 * (weights + hashing) + 4 * H * d * 3 * 10


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"num_key_value_heads": 2}, {}, "num_key_value_heads=2 must be num_attention_heads=4"),
        ({}, {"buckets": 5}, "buckets=5 must be even"),
        ({}, {"chunk": 0}, "chunk=0 must be at least 1"),
        ({}, {"hashes": 0}, "hashes=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(values, options, message):
    with pytest.raises(ValueError, match=message):
        TOKEN_MIXERS["lsh"].from_config(SLMConfig(vocab_size=V, pattern="lsh/mlp", **values), **options)
