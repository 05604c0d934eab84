"""Meta tokens: where they stand, who sees them, and that no cache loses them or counts them twice.

That every way to read a text gives the same with them, too, is tested in ``test_decoder_mixers.py``.
"""

# Shape letters: B = batch, T = tokens, M = meta tokens, W = window, H = query heads, K = key-value heads,
# d = head width.

import pytest
import torch
from mixers import META, V, close, decoder, tokens

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMCache, SLMConfig, SLMModel
from lightning_slm.models.decode import make_decoder
from lightning_slm.modules.parameter_groups import parameter_groups
from lightning_slm.nn.attention import windowed_attention
from lightning_slm.nn.meta_tokens import apart, together
from lightning_slm.nn.targets import weight_targets

B, H, K, d = 2, 4, 2, 6
ATTN, SWA, HYMBA = META["attn+meta"], META["swa+meta"], META["hymba_swa_reuse+meta"]


def plain(model):
    """The same weights without meta tokens."""
    other = type(model)(SLMConfig(**{**model.config.to_dict(), "meta_tokens": 0})).eval()
    state = {k: v for k, v in model.state_dict().items() if "meta_tokens" not in k}
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("values", [{}, {"embedding_norm": True}, {"positions": "none"}, {"repeat": 2}], ids=str)
@pytest.mark.parametrize("name", ["attn+meta", "mamba+meta", "hymba+meta"])
def test_where_everything_is_seen_they_are_a_text_before_the_text(name, values):
    model, ids_BT = decoder(META[name], **values), tokens(B, 11)
    inner = model.model
    both = torch.cat((inner.meta_tokens.weight.expand(B, -1, -1), inner.embed_tokens(ids_BT)), 1)
    close(model(ids_BT).logits, plain(model)(inputs_embeds=both).logits[:, 3:])


def test_within_the_window_they_are_a_text_before_the_text_too():
    model, ids_BT = decoder(HYMBA, sliding_window=16), tokens(B, 11)
    both = torch.cat((model.model.meta_tokens.weight.expand(B, -1, -1), model.model.embed_tokens(ids_BT)), 1)
    close(model(ids_BT).logits, plain(model)(inputs_embeds=both).logits[:, 3:])


def test_learned_positions_count_the_tokens_only():
    model, ids_BT = decoder(ATTN, positions="learned"), tokens(B, 11)
    inner, others = model.model, plain(model)
    text = inner.embed_tokens(ids_BT) + inner.embed_positions(torch.arange(11))
    both = torch.cat((inner.meta_tokens.weight.expand(B, -1, -1), text), 1)
    with torch.no_grad():
        others.model.embed_positions.weight.zero_()
    close(model(ids_BT).logits, others(inputs_embeds=both).logits[:, 3:])


def dense(q, k, v, window, segments, meta):
    """Scores of every token with every meta token and every token, and a mask."""
    T, M = q.shape[2], meta[0].shape[2]
    k, v = (torch.cat((m, t), 2).repeat_interleave(H // K, 1) for m, t in zip(meta, (k, v)))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    near = ((distance >= 0) & (distance < window)).expand(B, T, T)
    if segments is not None:
        near = near & (segments[:, :, None] == segments[:, None])
    mask = torch.cat((torch.ones(B, T, M, dtype=torch.bool), near), 2)[:, None]
    return (q @ k.mT / d**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("segmented", [False, True], ids=["one text", "texts"])
@pytest.mark.parametrize("width", [d, 2 * d], ids=["equal values", "wide values"])
@pytest.mark.parametrize("T", [2, 5, 12, 23])
@pytest.mark.parametrize(("W", "M"), [(1, 2), (5, 1), (5, 7), (30, 3)])
def test_blocks_of_a_window_and_meta_tokens_are_dense_attention_with_a_mask(W, M, T, width, segmented):
    q, k, v = torch.randn(B, H, T, d), torch.randn(B, K, T, d), torch.randn(B, K, T, width)
    meta = (torch.randn(B, K, M, d), torch.randn(B, K, M, width))
    inputs = [t.requires_grad_() for t in (q, k, v, *meta)]
    segments = torch.randint(0, 2, (B, T)).cumsum(-1) if segmented else None
    fast, slow = windowed_attention(q, k, v, W, segments, meta), dense(q, k, v, W, segments, meta)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    pull = torch.randn_like(fast)
    for a, b in zip(torch.autograd.grad(fast, inputs, pull), torch.autograd.grad(slow, inputs, pull)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at", [None, (2, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("dim", [1, 2])
def test_together_and_apart_are_inverse_and_leave_padding_first(at, dim):
    at_B = None if at is None else torch.tensor(at)
    meta, rest = torch.randn(B, 3, 3, 4), torch.randn(B, 3, 3, 4)
    rest = torch.cat((rest, rest + 1), dim)
    both = together(meta, rest, at_B, dim)
    for got, want in zip(apart(both, 3, at_B, dim), (meta, rest)):
        assert torch.equal(got, want)
    for row, first in enumerate(at or (0, 0)):
        assert torch.equal(both[row].narrow(dim - 1, first, 3), meta[row])
        assert torch.equal(both[row].narrow(dim - 1, 0, first), rest[row].narrow(dim - 1, 0, first))


@pytest.mark.parametrize("name", META)
@torch.no_grad()
def test_they_are_seen_far_behind_the_window_and_with_a_cache(name):
    model, ids_BT = decoder(META[name], pattern=META[name].pattern.removesuffix("*2")), tokens(B, 30)

    def last_logits():
        cache = SLMCache(model.config)
        for part in ids_BT.split([20, 9, 1], 1):
            logits = model(part, past_key_values=cache).logits
        return logits[:, -1]

    before = last_logits()
    close(before, model(ids_BT).logits[:, -1])
    model.model.meta_tokens.weight.neg_()
    assert not torch.allclose(last_logits(), before, atol=1e-2)
    close(last_logits(), model(ids_BT).logits[:, -1])


@torch.no_grad()
def test_a_full_window_has_room_for_the_tokens_alone():
    """A token beyond the window changes nothing, one within does: meta tokens take no place of it."""
    model, ids_BT = decoder(SWA, pattern="swa/mlp"), tokens(B, 20)
    for distance, matters in ((3, True), (4, False)):
        changed = ids_BT.clone()
        changed[:, -1 - distance] = (changed[:, -1 - distance] + 7) % V
        same = torch.allclose(model(changed).logits[:, -1], model(ids_BT).logits[:, -1], atol=1e-5)
        assert same != matters


@pytest.mark.parametrize("name", ["attn+meta", "swa+meta"])
@torch.no_grad()
def test_the_buffers_of_the_static_decoder_and_the_cache_hold_them_once(name):
    model, M, length = decoder(META[name]), 3, 20
    config = model.config
    seen = length + M if name == "attn+meta" else 3 + M  # a rolling cache holds all but the newest of the window
    cache, each = SLMCache(config), 2 * config.num_key_value_heads * config.head_dim * 4
    model(tokens(1, length), past_key_values=cache)
    assert cache.nbytes() == config.num_hidden_layers * each * seen
    assert cache.get_seq_length() == length
    static = make_decoder(model, 1, length)
    static(tokens(1, 7))
    held = [*static.cache.keys, *static.cache.values, *(t for s in static.cache.states for t in s.values())]
    room = length + M if name == "attn+meta" else 4 + M
    assert sum(t.numel() * 4 for t in held) == config.num_hidden_layers * each * room


def test_tokens_alone_count_for_the_longest_text_and_for_the_loss():
    model = decoder(HYMBA, max_position_embeddings=12)
    ids_BT = tokens(B, 12)
    out = model(ids_BT, labels=ids_BT)
    assert out.logits.shape == (B, 12, V)
    targets = ids_BT[:, 1:].flatten()
    close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets))
    with pytest.raises(ValueError, match="13 tokens are more than max_position_embeddings=12"):
        model(tokens(B, 13))


def test_they_neither_decay_nor_are_they_compressed():
    model = decoder(ATTN)
    groups = {g["name"]: g["params"] for g in parameter_groups(model)}
    assert any(p is model.model.meta_tokens.weight for p in groups["no_decay"])
    assert not [t.name for t in weight_targets(model) if "meta" in t.name]
    assert flops_per_token(model, 16) == flops_per_token(plain(model), 16)


def test_padding_between_tokens_and_texts_that_begin_later_are_refused():
    model, ids_BT = decoder(HYMBA), tokens(B, 6)
    with pytest.raises(ValueError, match="padding between its tokens"):
        model(ids_BT, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]] * B))
    cache = SLMCache(model.config)
    model(ids_BT, attention_mask=torch.tensor([[1] * 6, [0] * 6]), past_key_values=cache)
    with pytest.raises(ValueError, match="first call of a cached text"):
        model(ids_BT, attention_mask=torch.tensor([[1] * 12, [0] * 6 + [1] * 6]), past_key_values=cache)


def test_masks_of_pairs_and_static_caches_of_transformers_are_refused():
    model, ids_BT = decoder(ATTN), tokens(B, 6)
    with pytest.raises(ValueError, match="not of pairs"):
        model(ids_BT, attention_mask={"full_attention": None})
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids_BT, max_new_tokens=2, pad_token_id=0, cache_implementation="static")


@pytest.mark.parametrize("values", [{"meta_tokens": -1}, {"meta_tokens": 2, "causal": False}], ids=str)
def test_what_cannot_be_is_refused_by_name(values):
    with pytest.raises(ValueError, match=f"meta_tokens={values['meta_tokens']}"):
        SLMModel(SLMConfig(**values))
