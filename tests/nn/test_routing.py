"""Routing attention against loops over tokens and clusters, against full attention, and how its centroids move."""

# Shape letters: B = batch, T = tokens, D = model width, H = heads, L = local heads, R = routed heads, d = head width,
# C = clusters, w = tokens of a cluster.

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mixers import DECODERS, ENCODERS, V, close, config_of, decoder, tokens
from support import on_two_ranks
from torch.utils.flop_counter import FlopCounterMode

from lightning_slm.models import SLMCache, SLMConfig, SLMModel
from lightning_slm.models.registry import TOKEN_MIXERS
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.rope import naive_rotate, rope_angles
from lightning_slm.nn.routing import RoutingAttention, nearest, spread_centroids

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")

B, D, H, d, L = 2, 24, 4, 6, 1


def routing(causal=True, **options):
    sizes = {"clusters": 3, "window": 3, "local_heads": L, "local_window": 3}
    layer = RoutingAttention(D, H, d, causal, **{**sizes, **options}).eval()
    torch.nn.init.normal_(layer.qkv_proj.weight, std=0.5)
    layer.clusters.init_weights_(None)
    return layer


def heads(layer, x_BTD, rope=None):
    """Queries, keys and values of all heads, (B, H, T, d)."""
    weights = layer.qkv_proj.weight.split(layer.fused_rows()["qkv_proj"])
    q, k, v = ((x_BTD @ w.T).unflatten(-1, (-1, d)).transpose(1, 2) for w in weights)
    n = layer.local_heads
    far_q = F.normalize(q[:, n:], dim=-1)
    far_k = far_q if layer.shared_keys else F.normalize(k[:, n:], dim=-1)
    near_q, near_k = q[:, :n], k[:, :n]
    if rope is not None and n:
        near_q, near_k = naive_rotate(near_q, *rope), naive_rotate(near_k, *rope)
    return torch.cat((near_q, far_q), 1), torch.cat((near_k, far_k), 1), v


def naive_causal(layer, x_BTD, rope=None, starts=()):
    """Token by token: the window of a local head; of a routed one the last earlier tokens of the cluster."""
    q, k, v = heads(layer, x_BTD, rope)
    found = []
    for b in range(len(x_BTD)):
        for h in range(H):
            for t in range(x_BTD.shape[1]):
                first = max((s for s in starts if s <= t), default=0)
                if h < layer.local_heads:
                    seen, scale = range(max(first, t + 1 - layer.local_window), t + 1), d**-0.5
                else:
                    ids = (q[b, h] @ layer.clusters.centroids[h - layer.local_heads].T).argmax(-1)
                    seen, scale = [s for s in range(first, t) if ids[s] == ids[t]][-layer.window :] or [t], d**0.5
                seen = list(seen)
                found.append((k[b, h, seen] @ q[b, h, t] * scale).softmax(-1) @ v[b, h, seen])
    return torch.stack(found).view_as(q).transpose(1, 2).flatten(2) @ layer.o_proj.weight.T


def naive_balanced(layer, x_BTD, rope=None):
    """Cluster by cluster, as the paper has it: top-w queries, top-w keys, the mean of what a token is given."""
    q, k, v = heads(layer, x_BTD, rope)
    T = x_BTD.shape[1]
    w = min(T, layer.window or math.ceil(T / layer.clusters.number))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    near = (q @ k.mT * d**-0.5).masked_fill(distance.abs() >= layer.local_window, -torch.inf).softmax(-1) @ v
    y, none = [], 0
    for h in range(H):
        if h < layer.local_heads:
            y.append(near[:, h])
            continue
        rows = []
        for b in range(len(x_BTD)):
            total, count = torch.zeros(T, d), torch.zeros(T, 1)
            for centroid in layer.clusters.centroids[h - layer.local_heads]:
                at_q = (q[b, h] @ centroid).topk(w).indices
                at_k = (k[b, h] @ centroid).topk(w).indices
                found = (q[b, h, at_q] @ k[b, h, at_k].T * d**0.5).softmax(-1) @ v[b, h, at_k]
                total, count = total.index_add(0, at_q, found), count.index_add(0, at_q, torch.ones(w, 1))
            none += int((count == 0).sum())
            rows.append(total / count.clamp(min=1))
        y.append(torch.stack(rows))
    return torch.stack(y, 1).transpose(1, 2).flatten(2) @ layer.o_proj.weight.T, none


def same_with_gradients(fast, slow, *inputs, tolerance=1e-4):
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    pull = torch.randn_like(fast)
    for a, b in zip(torch.autograd.grad(fast, inputs, pull), torch.autograd.grad(slow, inputs, pull)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


OPTIONS = [{}, {"clusters": 1}, {"window": 1}, {"window": 30, "local_window": 30}, {"local_heads": 0}, {"clusters": 7}]


@pytest.mark.parametrize("T", [2, 11, 20])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_in_a_decoder_it_is_the_loop_over_tokens(options, T):
    layer, x_BTD = routing(**options), torch.randn(B, T, D, requires_grad=True)
    rope = rope_angles(torch.arange(T)[None], d, 100.0)
    same_with_gradients(layer(x_BTD, Context(rope), 0), naive_causal(layer, x_BTD, rope), x_BTD, *layer.parameters())


def test_documents_keep_to_themselves():
    layer, x_BTD = routing(), torch.randn(B, 14, D, requires_grad=True)
    starts_BT = torch.zeros(B, 14, dtype=torch.bool)
    starts_BT[:, [5, 6]] = True
    ours = layer(x_BTD, Context(starts_BT=starts_BT), 0)
    same_with_gradients(ours, naive_causal(layer, x_BTD, starts=(5, 6)), x_BTD, *layer.parameters())


@pytest.mark.parametrize("T", [1, 2, 11, 20])
@pytest.mark.parametrize("options", [*OPTIONS, {"window": None}], ids=str)
def test_in_an_encoder_every_cluster_takes_the_same_number(options, T):
    layer, x_BTD = routing(causal=False, **options), torch.randn(B, T, D, requires_grad=True)
    rope = rope_angles(torch.arange(T)[None], d, 100.0)
    expected, _ = naive_balanced(layer, x_BTD, rope)
    same_with_gradients(layer(x_BTD, Context(rope, causal=False), 0), expected, x_BTD, *layer.parameters())


def test_what_no_cluster_takes_gets_nothing():
    layer, x_BTD = routing(causal=False, local_heads=0, window=1), torch.randn(B, 20, D)
    layer.o_proj.weight.data = torch.eye(D)
    y_BTHd = layer(x_BTD, Context(causal=False), 0).unflatten(-1, (H, d))
    _, none = naive_balanced(layer, x_BTD)
    assert int((y_BTHd == 0).all(-1).sum()) == none >= B * H * (20 - 3)


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_with_one_cluster_it_is_full_attention(causal):
    T = 9
    layer = routing(causal, clusters=1, window=T, local_heads=0)
    x_BTD = torch.randn(B, T, D, requires_grad=True)
    q, k, v = heads(layer, x_BTD)
    scores = q @ k.mT * d**0.5
    if causal:
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf).masked_fill(torch.eye(T, dtype=torch.bool), -1e5)
    full = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ layer.o_proj.weight.T
    same_with_gradients(layer(x_BTD, Context(causal=causal), 0), full, x_BTD, *layer.parameters())


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_the_first_batch_places_the_centroids_and_the_next_ones_pull_them(causal):
    layer = routing(causal, decay=0.9).train()
    one, two = torch.randn(2, B, 20, D)
    layer(one, Context(causal=causal), 0)
    placed = layer.clusters.centroids.clone()
    torch.testing.assert_close(placed.norm(dim=-1), torch.ones(H - L, 3))
    layer(two, Context(causal=causal), 0)
    q, k, _ = (t[:, L:] for t in heads(layer, two))
    for h in range(H - L):
        vectors = q[:, h].reshape(-1, d) if causal else torch.cat((q[:, h], k[:, h]), 1).reshape(-1, d)
        ids = (vectors @ placed[h].T).argmax(-1)
        for c in range(3):
            mean = vectors[ids == c].mean(0) if (ids == c).any() else placed[h, c]
            expected = F.normalize(0.9 * placed[h, c] + 0.1 * mean, dim=0)
            torch.testing.assert_close(layer.clusters.centroids[h, c], expected)
    moved = layer.clusters.centroids.clone()
    layer.eval()(one, Context(causal=causal), 0)
    assert torch.equal(layer.clusters.centroids, moved)


def test_centroids_start_far_from_each_other():
    x_RNd = F.normalize(torch.eye(4, 6).repeat(1, 50, 1) + 0.05 * torch.randn(2, 200, 6), dim=-1)
    centroids = spread_centroids(x_RNd, 4)
    assert ((centroids[..., :4] > 0.95).sum(1) == 1).all()


def test_of_equally_near_tokens_the_earlier_is_taken():
    assert nearest(torch.tensor([0.5, 0.25, 0.5, -torch.inf, 0.5]), 4).tolist() == [0, 2, 4, 1]


def test_padding_does_not_pull():
    ends = []
    for extra in (0, 5):
        torch.manual_seed(1)
        layer = routing().train()
        x_BTD, more = torch.randn(B, 20, D), torch.randn(B, extra, D)
        real = None if not extra else (torch.arange(20 + extra) < 20).expand(B, -1)
        for _ in range(2):
            context = Context(tokens_BS=real)
            layer(torch.cat((x_BTD, more), 1), context, 0)
        ends.append((layer.clusters.centroids, context.losses[0]))
    torch.testing.assert_close(ends[0], ends[1])


def test_vectors_are_drawn_to_their_centroids():
    layer, x_BTD, context = routing(commitment=0.5), torch.randn(B, 20, D, requires_grad=True), Context()
    layer(x_BTD, context, 0)
    assert context.losses == []
    layer.train()(x_BTD, context, 0)
    layer(x_BTD, again := Context(), 1)
    vectors = heads(layer, x_BTD)[0][:, L:]
    centroids = context.shared["centroids0"]
    ids = (vectors @ centroids.mT).argmax(-1)
    own = torch.stack([centroids[h][ids[:, h]] for h in range(H - L)], 1)
    expected = 0.5 * F.mse_loss(vectors, own)
    same_with_gradients(context.losses[0], expected, x_BTD)
    assert len(context.losses) == len(again.losses) == 1


@pytest.mark.parametrize("tiny", [DECODERS["routing"], ENCODERS["routing"]], ids=["decoder", "encoder"])
def test_a_second_run_for_the_backward_pass_moves_nothing_and_sees_the_same_centroids(tiny):
    ids, ends = torch.randint(1, V, (4, 2, 40)), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = SLMModel(config_of(tiny, causal=tiny is DECODERS["routing"], initializer_range=0.05)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for ids_BT in ids:
            model.zero_grad()
            out = model(ids_BT)
            (out.last_hidden_state.square().mean() + out.aux_loss).backward()
        ends.append(({n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_centroids_stay_in_float32_and_are_saved_with_what_they_have_learnt(tmp_path):
    model = decoder(DECODERS["routing"]).train()
    model(tokens(2, 40))
    clusters = model.model.layers[0].token_mixer.clusters
    assert bool(clusters.placed)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).model.layers[0].token_mixer.clusters
    assert bool(again.placed)
    assert torch.equal(again.centroids, clusters.centroids)
    before = clusters.centroids.clone()
    model.bfloat16()(tokens(2, 40))
    assert clusters.centroids.dtype == torch.float32
    assert 0 < (clusters.centroids - before).abs().max() < 0.1


@pytest.mark.slow
def test_on_two_ranks_the_centroids_follow_the_texts_of_both(tmp_path):
    layer, x = routing(decay=0.5).train(), torch.randn(2, 2, B, 20, D)
    torch.save((layer, x), tmp_path / "start.pt")
    on_two_ranks(
        f"""
        from lightning_slm.nn.mixer import Context
        layer, x = torch.load("{tmp_path}/start.pt", weights_only=False)
        for step in range(2):
            layer(x[step, rank], context := Context(), 0)
        torch.save((context.shared["centroids0"], layer.clusters.centroids), f"{tmp_path}/{{rank}}.pt")
        """,
        tmp_path,
    )
    (placed, moved), other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close((placed, moved), other)
    alone = copy.deepcopy(layer)
    alone.clusters.centroids.copy_(placed)
    alone.clusters.placed.fill_(True)
    alone(x[1].flatten(0, 1), Context(), 0)
    torch.testing.assert_close(alone.clusters.centroids, moved)


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_cost_grows_with_the_text_and_not_with_its_square(causal):
    layer, cost = routing(causal, clusters=8, window=16, local_window=16), []
    for T in (512, 1024):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(1, T, D), Context(causal=causal), 0)
        cost.append(counter.get_total_flops())
    assert cost[1] < 2.1 * cost[0]


def test_a_static_cache_of_transformers_works():
    model, ids_BT = decoder(DECODERS["routing"]), tokens(2, 9)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    static = model.generate(ids_BT, cache_implementation="static", disable_compile=True, **how)
    assert torch.equal(static, model.generate(ids_BT, use_cache=False, **how))


@torch.no_grad()
def test_padding_may_fill_the_first_piece_of_a_cached_text():
    model, ids_BT = decoder(DECODERS["routing"]), tokens(1, 9)
    padded, mask = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids_BT), 1), (torch.arange(14) >= 5).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, logits = SLMCache(model.config), []
    for end, part in zip((3, 7, 8, 14), padded.split([3, 4, 1, 6], 1)):
        at = positions[:, end - part.shape[1] : end]
        logits.append(model(part, attention_mask=mask[:, :end], position_ids=at, past_key_values=cache).logits)
    close(torch.cat(logits, 1)[:, 5:], model(ids_BT).logits)


def test_sizes_follow_from_the_longest_text():
    values = {"hidden_size": D, "num_attention_heads": H, "max_position_embeddings": 1024, "pattern": "routing/mlp"}
    layer = RoutingAttention.from_config(SLMConfig(**values))
    assert (layer.clusters.number, layer.window, layer.local_heads, layer.local_window) == (32, 32, 2, 32)
    assert RoutingAttention.from_config(SLMConfig(**values, causal=False)).window is None


def test_flops_of_a_token_by_hand():
    layer = routing()
    weights, assigned = D * (2 * H + L) * d + D * D, (H - L) * 3 * d
    assert layer.flops_per_token(1000) == 2 * (weights + assigned) + 4 * d * (L * 3 + (H - L) * 3)
    two_sided = routing(causal=False, window=None)
    assert two_sided.flops_per_token(9) == 2 * (4 * D * D + 2 * assigned) + 4 * d * (L * 3 + (H - L) * 3)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"num_key_value_heads": 2}, {}, "num_key_value_heads=2 must be num_attention_heads=4"),
        ({}, {"local_heads": 4}, "local_heads=4 must leave at least one of 4"),
        ({}, {"clusters": 0}, "clusters=0"),
        ({}, {"window": -1}, "window=-1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(values, options, message):
    with pytest.raises(ValueError, match=message):
        TOKEN_MIXERS["routing"].from_config(SLMConfig(vocab_size=V, pattern="routing/mlp", **values), **options)
