"""Reversible residuals against the same equations with everything kept, and what training then keeps."""

# Shape letters: B = batch, T = tokens, D = model width.

import copy

import pytest
import torch
from mixers import DECODERS, Tiny, V, close, config_of, decoder, tokens
from support import on_two_ranks
from torch import nn

from lightning_slm.models import SLMCache, SLMConfig, SLMForCausalLM, SLMModel
from lightning_slm.models.decode import generate_stream
from lightning_slm.models.reversible import halves, naive_reversible
from lightning_slm.nn.mixer import Context

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

PATTERNS = {
    "attn/mlp": Tiny("attn/mlp*12"),
    "shared": Tiny("attn/mlp@one*12"),
    "everything shared": Tiny("attn@a/mlp@b*12"),
    "repeat": Tiny("attn/mlp*6", {"repeat": 2}),
    "no channel mixer": Tiny("attn/-*12"),
    "mixed": Tiny("attn/mlp attn/- swa/mlp*10", {"sliding_window": 4}),
    "lsh": Tiny("lsh/mlp*12", DECODERS["lsh"].values),
    "routing": Tiny("routing/mlp*12", DECODERS["routing"].values),
    "moe": Tiny("attn/moe*12", {"mixers": {"moe": {"experts": 4}}}),
}


def reversible(tiny, **values):
    return decoder(tiny, reversible=True, **{"initializer_range": 0.05, **values})


def plain(model):
    """The same model, with everything kept by autograd."""
    twin = copy.deepcopy(model)

    def run_blocks(x_BTD, context):
        return naive_reversible(halves(twin.model.layers, twin.model.shared, twin.config.repeat), x_BTD, context)

    twin.model.run_blocks = run_blocks
    return twin


def gradients(model, ids_BT):
    model.zero_grad()
    out = model(ids_BT, labels=ids_BT)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_loss_and_gradients_of_twelve_blocks_are_those_of_the_same_equations(name, training):
    model, ids_BT = reversible(PATTERNS[name]).train(training), tokens(2, 40)
    twin = plain(model)
    loss, ours = gradients(model, ids_BT)
    expected_loss, expected = gradients(twin, ids_BT)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    assert ours.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for key in ours:
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-4, atol=1e-4 * float(expected[key].abs().max()))


def test_it_computes_back_what_the_first_block_read():
    model = reversible(PATTERNS["attn/mlp"]).model
    x_BTD, context = torch.randn(2, 13, 32), Context(model.rope(torch.arange(13)[None]))
    with torch.no_grad():
        stack = halves(model.layers, model.shared, 1)
        a_BTD = b_BTD = x_BTD
        for half in stack:
            a_BTD, b_BTD = b_BTD, a_BTD + half(b_BTD, context)
        for half in reversed(stack):
            a_BTD, b_BTD = b_BTD - half(a_BTD, context), a_BTD
    torch.testing.assert_close(a_BTD, x_BTD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b_BTD, x_BTD, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_input():
    model = SLMModel(config_of(PATTERNS["attn/mlp"], reversible=True)).double().train()
    x_BTD = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    weight_BTD = torch.randn(2, 7, 32, dtype=torch.float64)
    context = Context(model.rope(torch.arange(7)[None]))

    def pull(y_BTD):
        return torch.autograd.grad(y_BTD.mul(weight_BTD).sum(), x_BTD)[0]

    ours = pull(model.run_blocks(x_BTD, context))
    torch.testing.assert_close(ours, pull(naive_reversible(halves(model.layers, model.shared, 1), x_BTD, context)))


def kept(blocks, **values):
    """Bytes and number of the tensors that autograd saves in the forward pass of the blocks."""
    model = SLMModel(config_of(Tiny(f"attn/mlp*{blocks}"), **values)).train()
    x_BTD, sizes = torch.randn(2, 13, 32, requires_grad=True), []
    context = Context(model.rope(torch.arange(13)[None]))

    def pack(t):
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.run_blocks(x_BTD, context)
    return sum(sizes), len(sizes)


def test_what_training_keeps_does_not_depend_on_the_depth():
    assert kept(2, reversible=True) == kept(8, reversible=True) == (2 * 2 * 13 * 32 * 4, 2)
    assert kept(8)[0] > 3 * kept(2)[0]


def test_dropout_is_the_same_in_both_runs():
    model, ids_BT = reversible(PATTERNS["attn/mlp"]).train(), tokens(2, 13)
    for block in model.model.layers:
        block.channel_mixer = WithDropout(block.channel_mixer)
    results = []
    for network in (model, plain(model)):
        torch.manual_seed(3)
        results.append(gradients(network, ids_BT))
        results[-1][1]["next random number"] = torch.rand(1)
    (loss, ours), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss)
    for key in ours:
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-4, atol=1e-5)


class WithDropout(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x_BTD, context, layer_idx):
        return nn.functional.dropout(self.mixer(x_BTD, context, layer_idx), 0.3)


@pytest.mark.parametrize("inside", [True, False], ids=["backward under autocast", "backward outside"])
def test_in_bfloat16_it_is_the_same_equations_too(inside):
    model, ids_BT = reversible(PATTERNS["shared"]).train(), tokens(2, 13)
    results = []
    for network in (model, plain(model)):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(ids_BT, labels=ids_BT).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.nn.functional.cosine_similarity(*results, dim=0) > 0.999


def test_frozen_parameters_get_no_gradient_and_the_others_theirs():
    model, ids_BT = reversible(PATTERNS["attn/mlp"]).train(), tokens()
    model.requires_grad_(False)
    chosen = [block.token_mixer.qkv_proj for block in model.model.layers[::2]]
    for linear in chosen:
        linear.requires_grad_()
    twin = plain(model)
    _, ours = gradients(model, ids_BT)
    _, expected = gradients(twin, ids_BT)
    assert len(ours) == len(expected) == 6
    for key in ours:
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-4, atol=1e-6)


def test_a_graph_that_is_kept_can_be_used_twice():
    model, ids_BT = reversible(PATTERNS["attn/mlp"]).train(), tokens()
    loss = model(ids_BT, labels=ids_BT).loss
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for a, p in zip(once, model.parameters(), strict=True):
        torch.testing.assert_close(2 * a, p.grad)


@pytest.mark.parametrize("name", ["attn/mlp", "repeat", "mixed", "lsh"])
def test_it_decodes_with_a_cache_as_without(name):
    model, ids_BT = reversible(PATTERNS[name], initializer_range=0.3), tokens(2, 20)
    with torch.no_grad():
        whole = model(ids_BT).logits
        cache = SLMCache(model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids_BT.split([11, 1, 8], 1)]
    close(torch.cat(parts, 1), whole)
    expected = model.generate(ids_BT[:1], max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0)
    assert list(generate_stream(model, ids_BT[:1], 8)) == expected[0, 20:].tolist()


@pytest.mark.slow
def test_it_decodes_compiled():
    model = reversible(Tiny("attn/mlp*2"), initializer_range=0.3)
    ids_1T = tokens(1, 7)
    assert list(generate_stream(model, ids_1T, 8, compile=True)) == list(generate_stream(model, ids_1T, 8))


def test_compiled_mixers_give_the_same():
    model, ids_BT = reversible(Tiny("attn/mlp*2")).train(), tokens()
    loss, expected = gradients(model, ids_BT)
    for block in model.model.layers:
        block.token_mixer.compile(backend="aot_eager")
        block.channel_mixer.compile(backend="aot_eager")
    compiled_loss, ours = gradients(model, ids_BT)
    close(compiled_loss, loss)
    for key in ours:
        close(ours[key], expected[key])


def test_what_would_have_no_effect_is_refused():
    model, ids_BT = reversible(Tiny("attn/mlp*2")).train(), tokens()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(ids_BT)
    model.gradient_checkpointing_disable()
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="watched by hooks"):
        model(ids_BT)
    handle.remove()
    handle = model.model.layers[0].token_mixer.qkv_proj.weight.register_hook(lambda g: g)
    with pytest.raises(ValueError, match="twice"):
        model(ids_BT)
    handle.remove()
    model.model.layers[1].compile(backend="aot_eager")
    with pytest.raises(ValueError, match="cannot be compiled"):
        model(ids_BT)


def test_a_layer_that_others_learn_through_is_refused():
    model, ids_BT = reversible(Tiny("attn/mlp*2")).train(), tokens()
    mixer = model.model.layers[0].channel_mixer
    forward = mixer.forward

    def leave(x_BTD, context, layer_idx):
        context.shared["mine"] = (forward(x_BTD, context, layer_idx),)
        return context.shared["mine"][0]

    mixer.forward = leave
    with pytest.raises(ValueError, match="'mine'"):
        model(ids_BT, labels=ids_BT).loss.backward()


def test_it_is_saved_with_the_model(tmp_path):
    model = reversible(Tiny("attn/mlp*2"))
    model.save_pretrained(tmp_path)
    again = SLMForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.reversible
    assert not SLMConfig().reversible
    assert torch.equal(again(tokens()).logits.detach()[:0], model(tokens()).logits.detach()[:0])


@pytest.mark.slow
def test_two_ranks_learn_from_the_mean_of_their_gradients(tmp_path):
    ids = torch.randint(1, V, (2, 2, 13))
    model = reversible(Tiny("attn/mlp@one*4", {"repeat": 2})).train()
    torch.save((model, ids), tmp_path / "start.pt")
    on_two_ranks(
        f"""
        model, ids = torch.load("{tmp_path}/start.pt", weights_only=False)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            parallel.zero_grad()
            parallel(input_ids=ids[rank], labels=ids[rank]).loss.backward()
        torch.save({{n: p.grad for n, p in model.named_parameters()}}, f"{tmp_path}/{{rank}}.pt")
        """,
        tmp_path,
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = [gradients(model, ids_BT)[1] for ids_BT in ids]
    for key in alone[0]:
        torch.testing.assert_close(ranks[0][key], ranks[1][key])
        torch.testing.assert_close(ranks[0][key], (alone[0][key] + alone[1][key]) / 2, rtol=1e-4, atol=1e-6)
