"""Mamba against its definition written out, and what is its own: first values, protection, cost, options."""

# Shape letters: B = batch, T = tokens, D = model width, C = channels, N = states of a channel, R = rank, W = taps.

import pytest
import torch
import torch.nn.functional as F
from mixers import close, config_of, decoder, tokens
from transformers import MambaConfig, MambaForCausalLM

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMCache, SLMConfig, SLMForCausalLM
from lightning_slm.models.registry import TOKEN_MIXERS
from lightning_slm.nn.mamba import Mamba
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.selective_scan import naive_selective_scan
from lightning_slm.nn.short_conv import naive_short_conv
from lightning_slm.nn.targets import weight_targets

TINY = {"pattern": "mamba/-*2", "hidden_size": 32, "positions": "none"}


def mamba(**options):
    model = SLMForCausalLM(SLMConfig(**TINY, initializer_range=0.3, mixers={"mamba": options} if options else None))
    return model.model.layers[0].token_mixer


def naive_mamba(mixer, x_BTD):
    """The definition, with PyTorch's own convolution and the recurrence token by token."""
    ssm = mixer.ssm
    u, gate = mixer.in_proj(x_BTD).chunk(2, -1)
    u = F.silu(naive_short_conv(u, ssm.conv.weight, ssm.conv.bias))
    dt, b, c = ssm.x_proj(u).split((ssm.dt_rank, ssm.ssm_state_size, ssm.ssm_state_size), -1)
    if ssm.dt_norm is not None:
        norms = (ssm.dt_norm, ssm.b_norm, ssm.c_norm)
        dt, b, c = (F.rms_norm(t, t.shape[-1:], n.weight, n.eps) for t, n in zip((dt, b, c), norms))
    y, _ = naive_selective_scan(u, ssm.dt_proj(dt), -ssm.A_log.exp(), b, c, ssm.D, gate)
    return mixer.out_proj(y)


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize(
    "options",
    [{}, {"norms": True}, {"state_size": 5, "conv_size": 2, "expand": 1.5, "dt_rank": 3}, {"conv_bias": False}],
    ids=str,
)
def test_outputs_and_gradients_are_the_definitions(options, length):
    mixer = mamba(**options).double()
    x_BTD = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 32, dtype=torch.float64)
    wanted = [x_BTD, *mixer.parameters()]
    y, expected = mixer(x_BTD, Context(), 0), naive_mamba(mixer, x_BTD)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    a, b = (torch.autograd.grad((t * weight).sum(), wanted) for t in (y, expected))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_with_norms_pieces_and_packed_documents_are_the_whole():
    tiny = type("Tiny", (), {"pattern": "mamba/mlp*2", "values": {"mixers": {"mamba": {"norms": True}}}})
    model, ids_1T = decoder(tiny).eval(), tokens(1, 21)
    with torch.no_grad():
        whole, cache, pieces = model(ids_1T).logits, SLMCache(model.config), []
        for part in ids_1T.split([7, 1, 1, 12], 1):
            pieces.append(model(part, past_key_values=cache).logits)
        close(torch.cat(pieces, 1), whole)
        positions = torch.cat([torch.arange(n) for n in (5, 16)])[None]
        packed = model(ids_1T, position_ids=positions).logits
        close(packed, torch.cat([model(part).logits for part in ids_1T.split([5, 16], 1)], 1))


def test_a_text_that_starts_at_a_single_token_forgets_what_was_before():
    mixer, x_BTD = mamba().eval(), torch.randn(2, 6, 32)
    cache = SLMCache(SLMConfig(**TINY))
    with torch.no_grad():
        mixer(x_BTD[:, :5], Context(cache=cache), 0)
        starts = torch.tensor([[True], [False]])
        y = mixer(x_BTD[:, 5:], Context(cache=cache, starts_BT=starts), 0)
        close(y[:1], mixer(x_BTD[:1, 5:], Context(), 0), 1e-5)
        close(y[1:], mixer(x_BTD[1:], Context(), 0)[:, 5:], 1e-5)


@pytest.mark.parametrize("on_meta", [False, True])
def test_first_values_are_the_papers(on_meta):
    config = SLMConfig(**{**TINY, "pattern": "mamba/-*4", "hidden_size": 128}, mixers={"mamba": {"dt_rank": 16}})
    with torch.device("meta" if on_meta else "cpu"):
        model = SLMForCausalLM(config)
    if on_meta:
        model.to_empty(device="cpu").init_weights()
    ssm, out = model.model.layers[0].token_mixer.ssm, model.model.layers[0].token_mixer.out_proj
    torch.testing.assert_close(ssm.A_log.exp(), torch.arange(1.0, 17).expand(256, 16))
    assert torch.equal(ssm.D, torch.ones(256))
    steps = F.softplus(ssm.dt_proj.bias)
    assert 0.9e-3 < steps.min() < 2e-3
    assert 0.05 < steps.max() < 0.101
    assert 0.7 < (steps.log10() + 2).abs().mean() * 2 < 1.3  # drawn evenly on a logarithmic scale
    assert ssm.dt_proj.weight.abs().max() <= 16**-0.5
    assert ssm.dt_proj.weight.std() > 0.8 * 16**-0.5 / 3**0.5
    assert out.weight.abs().max() <= 256**-0.5 / 4**0.5
    assert 0.015 < model.model.layers[0].token_mixer.in_proj.weight.std() < 0.025


def test_time_steps_are_exact_under_autocast():
    ssm = mamba().ssm
    with torch.autocast("cpu", torch.bfloat16):
        dt, b, c = ssm.select(torch.zeros(1, 1, 64))
    assert (dt.dtype, b.dtype, c.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(dt[0, 0], ssm.dt_proj.bias, rtol=0, atol=0)


def test_what_compression_may_touch_and_what_decays():
    model = SLMForCausalLM(SLMConfig(**TINY))
    names = {target.module_name.rpartition("layers.0.")[2] for target in weight_targets(model, "*layers.0.*")}
    projections = ("in_proj", "ssm.x_proj", "ssm.dt_proj", "out_proj")
    assert names == {f"token_mixer.{name}" for name in projections}
    still = {n for n, p in mamba().named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert still == {"ssm.A_log", "ssm.D", "ssm.dt_proj.bias", "ssm.conv.weight"}
    assert mamba().fused_rows() == {"in_proj": (64, 64)}


def test_flops_are_those_of_its_matrices_convolution_and_scan():
    model = SLMForCausalLM(config_of(type("Tiny", (), {"pattern": "mamba/-", "values": {"positions": "none"}})))
    D, C, N, R, W, V = 32, 64, 16, 2, 4, model.config.vocab_size
    matrices = D * 2 * C + C * (R + 2 * N) + R * C + C * D + C * W + D * V
    assert flops_per_token(model, 100) == 2 * matrices + 6 * C * N


@pytest.mark.parametrize(("hidden", "layers"), [(768, 24), (1024, 48)])
def test_published_sizes_have_the_published_number_of_parameters(hidden, layers):
    with torch.device("meta"):
        theirs = MambaForCausalLM(MambaConfig(hidden_size=hidden, num_hidden_layers=layers, vocab_size=50280))
        ours = SLMForCausalLM(
            SLMConfig(vocab_size=50280, hidden_size=hidden, pattern=f"mamba/-*{layers}", positions="none")
        )
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand": 0.3}, r"expand=0.3 times hidden_size=32 .*choose an expand"),
        ({"expand": 0}, "expand=0"),
        ({"state_size": 0}, "state_size=0 must be at least 1"),
        ({"conv_size": 1}, "conv_size=1 must be at least 2"),
        ({"dt_rank": 0}, "dt_rank=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        mamba(**options)


def test_its_options_are_known_by_name():
    assert TOKEN_MIXERS["mamba"] is Mamba
    assert set(Mamba.options()) == {"state_size", "conv_size", "expand", "dt_rank", "norms", "conv_bias"}
