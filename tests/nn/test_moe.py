"""Experts: what Mixtral's and Jamba's blocks compute, three ways to run them, and the router's losses by hand."""

# Shape letters: B = batch, T = tokens of a row, N = tokens, D = model width, E = experts, k = experts of a token.

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import JambaConfig, MixtralConfig
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from lightning_slm.measure import flops_per_token
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.modules.parameter_groups import parameter_groups
from lightning_slm.nn.mixer import Context
from lightning_slm.nn.moe import (
    MoE,
    all_experts,
    balance_loss,
    naive_experts,
    smooth_load,
    sorted_experts,
    squared_variation,
    within_capacity,
)
from lightning_slm.nn.swiglu import SwiGLU
from lightning_slm.nn.targets import weight_targets
from lightning_slm.quantization import prepare_qat_
from lightning_slm.quantization.bitnet import bitnet_
from lightning_slm.quantization.float8 import float8_
from lightning_slm.quantization.int4 import int4_
from lightning_slm.quantization.int8 import int8_

B, T, D, I = 2, 20, 16, 32
SIZES = {"hidden_size": D, "intermediate_size": I, "num_attention_heads": 2, "num_key_value_heads": 2}


def moe(seed=0, **options):
    torch.manual_seed(seed)
    mixer = MoE(D, I, **{"experts": 4, **options})
    for p in mixer.parameters():
        nn.init.normal_(p, std=0.4)
    return mixer


def run(mixer, x_BTD, **context):
    """Output, and the sum of losses."""
    context = Context(**context)
    return mixer(x_BTD, context, 0), sum(context.losses)


def theirs_like(ours, kind):
    E, k = len(ours.experts), ours.top_k
    if kind == "mixtral":
        config = MixtralConfig(**SIZES, num_local_experts=E, num_experts_per_tok=k)
    else:
        config = JambaConfig(**SIZES, num_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config) if kind == "mixtral" else JambaSparseMoeBlock(config)
    router = block.gate if kind == "mixtral" else block.router
    with torch.no_grad():
        router.weight.copy_(ours.router.weight)
        for i, expert in enumerate(ours.experts):
            block.experts.gate_up_proj[i] = expert.gate_up_proj.weight
            block.experts.down_proj[i] = expert.down_proj.weight
    return block, router


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("E", "k"), [(4, 2), (3, 1), (3, 3), (16, 2)], ids=str)
@pytest.mark.parametrize("shape", [(B, T), (1, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "jamba"])
def test_outputs_and_gradients_are_those_of_transformers(kind, shape, E, k, training):
    ours = moe(experts=E, top_k=k, normalize_topk=kind == "mixtral").train(training)
    theirs, their_router = theirs_like(ours, kind)
    x_BTD, grad_BTD = torch.randn(*shape, D, requires_grad=True), torch.randn(*shape, D)
    y_BTD, _ = run(ours, x_BTD)
    expected_BTD = theirs(x_BTD)
    torch.testing.assert_close(y_BTD, expected_BTD, rtol=1e-5, atol=1e-5)
    (mine,) = torch.autograd.grad(y_BTD, x_BTD, grad_BTD, retain_graph=True)
    (expected,) = torch.autograd.grad(expected_BTD, x_BTD, grad_BTD, retain_graph=True)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    y_BTD.backward(grad_BTD)
    expected_BTD.backward(grad_BTD)
    torch.testing.assert_close(ours.router.weight.grad, their_router.weight.grad, rtol=1e-5, atol=1e-5)
    for name in ("gate_up_proj", "down_proj"):
        grads = torch.stack([getattr(expert, name).weight.grad for expert in ours.experts])
        torch.testing.assert_close(grads, getattr(theirs.experts, name).grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", [sorted_experts, all_experts])
@pytest.mark.parametrize(("N", "k"), [(1, 2), (3, 1), (24, 2), (24, 4)], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_every_way_to_run_experts_equals_token_by_token(way, N, k, grad):
    experts, x_ND = moe().experts, torch.randn(N, D, requires_grad=True)
    gate_Nk = torch.rand(N, k, requires_grad=True)
    chosen_Nk = torch.stack([torch.randperm(4)[:k] for _ in range(N)])
    if grad:
        chosen_Nk[::3, 0] = 4  # goes to none
    with torch.set_grad_enabled(grad):
        mine, naive = (f(experts, x_ND, gate_Nk, chosen_Nk) for f in (way, naive_experts))
    torch.testing.assert_close(mine, naive, rtol=1e-5, atol=1e-5)
    if grad:
        wanted, weight_ND = [x_ND, gate_Nk, *experts.parameters()], torch.randn(N, D)
        grads = [torch.autograd.grad(y, wanted, weight_ND, materialize_grads=True) for y in (mine, naive)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_one_expert_is_an_mlp(normalize):
    ours = moe(experts=1, top_k=1, normalize_topk=normalize)
    x_BTD = torch.randn(B, T, D)
    torch.testing.assert_close(run(ours, x_BTD)[0], ours.experts[0](x_BTD, Context(), 0), rtol=1e-6, atol=1e-6)


def test_shared_experts_are_added():
    ours = moe(shared=2)
    assert ours.shared_expert.down_proj.in_features == 2 * I
    plain = moe()
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if "shared" not in k})
    x_BTD = torch.randn(B, T, D)
    expected = run(plain, x_BTD)[0] + ours.shared_expert(x_BTD, Context(), 0)
    torch.testing.assert_close(run(ours, x_BTD)[0], expected, rtol=1e-6, atol=1e-6)


def lonely(**options):
    """Everyone goes to experts 0 and 1, nobody to 2 and 3."""
    ours = moe(**options)
    with torch.no_grad():
        ours.router.weight.copy_(torch.tensor([3.0, 2.0, 1.0, 0.0])[:, None])
    return ours, torch.rand(B, T, D)


EXCHANGES = {
    "plain": lambda model: None,
    "int8": int8_,
    "int4": int4_,
    "float8": lambda model: float8_(model, emulate=True),
    "bitnet": bitnet_,
    "qat": lambda model: prepare_qat_(model, group=8, embedding=None),
    "lora": lambda model: inject_adapter_in_model(LoraConfig(r=2, target_modules=r".*down_proj"), model),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_an_expert_without_tokens_has_gradients_of_zero_and_not_none(exchange):
    ours, x_BTD = lonely(balance=0.0, z_loss=0.0)
    EXCHANGES[exchange](ours)
    run(ours.train(), x_BTD)[0].sum().backward()
    for expert, touched in ((ours.experts[0], True), (ours.experts[3], False)):
        trained = [p for p in expert.parameters() if p.requires_grad]
        assert all(torch.isfinite(p.grad).all() for p in trained)
        assert any(p.grad.abs().sum() > 0 for p in trained) == touched


@pytest.mark.parametrize("rows", [1, 2])
def test_decoding_runs_the_chosen_experts_only(rows):
    ours, ran = moe(experts=16, top_k=2).eval(), []
    for i, expert in enumerate(ours.experts):
        expert.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad():
        run(ours, torch.randn(1, 1, D).expand(rows, 1, D))
    assert len(ran) == 2


# The router's losses.


def test_the_balance_loss_is_one_at_balance_and_the_number_of_experts_at_worst():
    even, one = torch.full((4,), 0.25), torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert balance_loss(even, even) == 1
    assert balance_loss(one, one) == 4


def losses_by_hand(ours, x_ND):
    """Token by token."""
    E, k, N = len(ours.experts), ours.top_k, len(x_ND)
    load, probability, z = [0.0] * E, [0.0] * E, 0.0
    for x_D in x_ND:
        scores = ours.router.weight @ x_D
        probs = scores.softmax(0)
        for e in probs.topk(k).indices:
            load[e] += 1 / (N * k)
        probability = [p + float(q) / N for p, q in zip(probability, probs)]
        z += float(scores.exp().sum().log()) ** 2 / N
    return E * sum(f * p for f, p in zip(load, probability)), z, load


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_losses_are_those_by_hand_and_the_load_is_noted(k):
    ours, x_BTD = moe(top_k=k, balance=0.5, z_loss=0.25).train(), torch.randn(B, T, D)
    with torch.no_grad():
        balance, z, load = losses_by_hand(ours, x_BTD.view(-1, D))
    assert ours.last_load is None
    _, loss = run(ours, x_BTD)
    torch.testing.assert_close(loss.item(), 0.5 * balance + 0.25 * z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.last_load, torch.tensor(load), rtol=1e-5, atol=1e-6)
    assert "last_load" not in ours.state_dict()


@pytest.mark.parametrize("options", [{}, {"cv_loss": 0.1}, {"capacity": 1.0}], ids=str)
def test_padding_has_no_part_in_the_losses_and_takes_no_place(options):
    ours, x_BTD = moe(**options).train(), torch.randn(1, T, D)
    y_BTD, loss = run(ours, x_BTD)
    # Twice as long, but with the same capacity for each expert.
    if ours.capacity is not None:
        ours.capacity /= 2
    padded = torch.cat((torch.randn(1, T, D), x_BTD), 1)
    tokens_BS = torch.arange(3 + 2 * T)[None] >= 3 + T  # three tokens stand in a cache
    padded_BTD, padded_loss = run(ours, padded, tokens_BS=tokens_BS)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded_BTD[:, T:], y_BTD, rtol=1e-5, atol=1e-5)


def test_only_training_has_losses_and_they_reach_the_models():
    config = SLMConfig(vocab_size=32, pattern="attn/moe*2", mixers={"moe": {"experts": 4, "balance": 3.0}}, **SIZES)
    model, ids_BT = SLMForCausalLM(config), torch.randint(32, (B, T))
    plain = model.eval()(ids_BT, labels=ids_BT).loss
    loss = model.train()(ids_BT, labels=ids_BT).loss
    assert 6 < loss - plain < 7  # two layers, near balance as initialised; and z of (ln 4)^2 / 1000
    loss.backward()
    assert all(block.channel_mixer.router.weight.grad.abs().sum() > 0 for block in model.model.layers)


def test_the_variation_of_loads_is_by_hand():
    assert squared_variation(torch.full((4,), 3.0)) == 0
    torch.testing.assert_close(squared_variation(torch.tensor([1.0, 3.0])), torch.tensor(1 / 4))
    ours, x_BTD = moe(top_k=2, balance=0.0, z_loss=0.0, cv_loss=1.0).train(), torch.randn(B, T, D)
    importance = torch.zeros(4)
    for x_D in x_BTD.view(-1, D):
        best = (ours.router.weight @ x_D).topk(2)
        importance[best.indices] += best.values.softmax(0)
    expected = importance.var(unbiased=False) / importance.mean() ** 2
    torch.testing.assert_close(run(ours, x_BTD)[1], expected, rtol=1e-5, atol=1e-6)


# Noise.


def test_noise_is_in_training_only_and_its_size_is_learned():
    ours, x_BTD = moe(noisy=True, cv_loss=0.1), torch.randn(B, T, D)
    ours.eval()
    assert torch.equal(run(ours, x_BTD)[0], run(ours, x_BTD)[0])
    ours.train()
    (y_BTD, loss), (other_BTD, _) = run(ours, x_BTD), run(ours, x_BTD)
    assert not torch.allclose(y_BTD, other_BTD)
    loss.backward()
    assert ours.router.noise_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_smooth_load_is_the_chance_of_being_chosen_in_another_draw(k):
    clean_NE, std_NE = torch.randn(3, 4), torch.rand(3, 4) + 0.2
    noisy_NE = clean_NE + std_NE * torch.randn(3, 4)
    draws = 40_000
    chance = torch.zeros(3, 4)
    for n in range(3):
        for e in range(4):  # only this expert's noise is drawn anew
            scores = noisy_NE[n].expand(draws, 4).clone()
            scores[:, e] = clean_NE[n, e] + std_NE[n, e] * torch.randn(draws)
            chance[n, e] = (scores.topk(k, -1).indices == e).any(-1).float().mean()
    torch.testing.assert_close(smooth_load(clean_NE, noisy_NE, std_NE, k), chance, rtol=0, atol=0.01)


# Capacity.


def test_the_first_of_a_row_have_a_place():
    slots_BS, tokens_BT = torch.randint(3, (B, 2 * T)), torch.rand(B, T) > 0.3
    fits = within_capacity(slots_BS, 3, 5, tokens_BT)
    for b in range(B):
        taken = [0, 0, 0]
        for s, e in enumerate(slots_BS[b].tolist()):
            taken[e] += int(tokens_BT[b, s // 2])
            assert fits[b, s] == (tokens_BT[b, s // 2] and taken[e] <= 5)


def test_in_training_tokens_beyond_the_capacity_go_past_the_experts_and_in_evaluation_none():
    ours, x_BTD = lonely(capacity=1.0)  # of 20 tokens with two slots each, all to two of four experts
    full_BTD, _ = run(ours.eval(), x_BTD)
    y_BTD, _ = run(ours.train(), x_BTD)
    assert not torch.allclose(y_BTD, full_BTD)
    assert (y_BTD[:, 10:] == 0).all(-1).any()
    torch.testing.assert_close(y_BTD[:, 0], full_BTD[:, 0])
    ours.capacity = 4.0
    torch.testing.assert_close(run(ours, x_BTD)[0], full_BTD)


def test_with_a_capacity_too_no_token_sees_a_later_one_nor_another_row():
    ours, x_BTD = moe(capacity=0.7).train(), torch.randn(B, T, D)
    changed_BTD = x_BTD.clone()
    changed_BTD[0, 12:] = torch.randn(T - 12, D)
    before, after = run(ours, x_BTD)[0], run(ours, changed_BTD)[0]
    torch.testing.assert_close(before[0, :12], after[0, :12])
    torch.testing.assert_close(before[1], after[1])


# Precision, compilation, and what sees the matrices.


def test_the_router_works_in_float32_and_outputs_stay_in_the_models_precision():
    ours, seen = moe().to(torch.bfloat16), []
    ours.router.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x_BTD = torch.randn(B, T, D, dtype=torch.bfloat16)
    assert run(ours, x_BTD)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        run(moe(), x_BTD.float())
    assert seen == [torch.float32]
    scores = nn.functional.linear(x_BTD.float(), ours.router.weight.float())
    assert torch.equal(ours.router(x_BTD), scores)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
@pytest.mark.parametrize("options", [{}, {"capacity": 1.0, "shared": 1, "cv_loss": 0.1}], ids=str)
@pytest.mark.parametrize("length", [8, 40])  # all experts in the graph; sorted, outside it
def test_compiled_it_gives_the_same_and_does_not_compile_anew_for_another_load(options, length):
    eager, graphs = moe(**options).train(), []
    compiled = copy.deepcopy(eager)

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    forward = torch.compile(run, backend=backend, dynamic=False)
    for seed in range(3):
        torch.manual_seed(seed)
        x_BTD = torch.randn(B, length, D)
        results = [run(eager, x_BTD), forward(compiled, x_BTD)]
        for y_BTD, loss in results:
            (y_BTD.square().sum() + loss).backward()
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
        if seed == 0:
            compiled_at_first = len(graphs)
    assert len(graphs) == compiled_at_first
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eager.last_load, compiled.last_load)


def test_experts_are_plain_matrices_and_the_router_is_left_alone():
    ours = moe(noisy=True)
    assert {type(m) for m in ours.experts[0].children()} == {nn.Linear}
    names = [t.name for t in weight_targets(ours)]
    assert len(names) == 2 * 4
    assert not any("router" in name for name in names)
    groups = {group["name"]: group["params"] for group in parameter_groups(ours)}
    assert {id(p) for p in groups["others"]} == {id(p) for p in ours.router.parameters()}


@pytest.mark.parametrize("options", [{}, {"shared": 1, "top_k": 1}], ids=str)
def test_the_arithmetic_is_that_of_the_chosen_experts(options):
    mixers = {"moe": {"experts": 8, **options}}
    model = SLMForCausalLM(SLMConfig(vocab_size=32, pattern="attn/moe*2", mixers=mixers, **SIZES)).eval()
    ids_BT = torch.randint(32, (1, T))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids_BT, use_cache=False)
    assert flops_per_token(model, context=T) * T == counter.get_total_flops()


def test_the_router_begins_as_the_model_does_and_noise_alike_for_all():
    config = SLMConfig(
        vocab_size=32, pattern="attn/moe", hidden_size=64, initializer_range=0.3,
        mixers={"moe": {"experts": 32, "noisy": True, "intermediate_size": 8}},
    )  # fmt: skip
    mixer = SLMForCausalLM(config).model.layers[0].channel_mixer
    assert abs(mixer.router.weight.std() - 0.3) < 0.03
    assert not mixer.router.noise_weight.any()
    assert type(mixer.experts[0]) is SwiGLU
    assert mixer.experts[0].down_proj.in_features == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k=5 must be between 1 and experts=4"),
        ({"top_k": 0}, "top_k=0"),
        ({"capacity": 0.0}, "capacity=0.0 must be above 0"),
        ({"shared": -1}, "shared=-1"),
    ],
)
def test_numbers_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        moe(**options)


def test_experts_of_a_shared_layer_are_no_blocks_of_the_model():
    from lightning_slm.nn.blocks import repeated_blocks

    values = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = SLMForCausalLM(SLMConfig(vocab_size=61, pattern="attn/moe@one*2", **values))
    assert [name for name, _ in repeated_blocks(model)] == ["model.layers.0", "model.layers.1"]
