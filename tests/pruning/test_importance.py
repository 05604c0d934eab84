"""Scores of units: each criterion's formula by hand, on models with random weights.

Shape letters: B = batch, T = tokens, U = units.
"""

import copy

import pytest
import torch
from pruning_families import HF
from support import on_two_ranks, tiny_llama, tiny_slm

from lightning_slm.pruning import gated, scores_of, shape_of, shrink_, structure_of
from lightning_slm.pruning.importance import CRITERIA
from lightning_slm.pruning.importance_gradients import next_token_loss


@pytest.fixture
def llama():
    """Two query heads to each of four key-value heads, in evaluation mode."""
    torch.manual_seed(0)
    return HF["llama"]().eval()


@pytest.fixture
def data():
    torch.manual_seed(1)
    return [{"input_ids": (ids := torch.randint(96, (2, 7))), "labels": ids} for _ in range(3)]


def close(scores, by_hand):
    assert scores.keys() == by_hand.keys()
    for name, scores_U in scores.items():
        torch.testing.assert_close(scores_U, by_hand[name], rtol=2e-4, atol=1e-7)


def ffn_matrices(block, numbers=lambda p: p.detach()):
    """Numbers of a gated block's three matrices, a row for each unit."""
    mlp = block.mlp
    return [numbers(mlp.gate_proj.weight), numbers(mlp.up_proj.weight), numbers(mlp.down_proj.weight).T]


def of_each_layer(model, function):
    return {f"model.layers.{i}.mlp/ffn": function(block) for i, block in enumerate(model.model.layers)}


def gradients(model, data):
    """Of the mean loss of each batch, by parameter."""
    found = {p: [] for p in model.parameters()}
    for batch in data:
        model.zero_grad()
        model(**batch).loss.backward()
        for p, of_batches in found.items():
            of_batches.append(p.grad.clone())
    model.zero_grad()
    return {p: torch.stack(of_batches) for p, of_batches in found.items()}


def test_magnitude_is_the_norm_of_all_weights_of_a_unit(llama):
    by_hand = of_each_layer(llama, lambda block: torch.cat(ffn_matrices(block), 1).norm(dim=1))
    close(scores_of(llama, criterion="magnitude"), by_hand)


def test_magnitude_of_a_layer_is_that_of_all_its_weights(llama):
    blocks = llama.model.layers
    norms = [torch.cat([p.detach().flatten() for p in block.parameters()]).norm() for block in blocks]
    close(scores_of(llama, criterion="magnitude", units="layer"), {"layer": torch.stack(norms)})


def test_random_scores_follow_the_seed(llama):
    first, again, other = (scores_of(llama, criterion="random", seed=seed) for seed in (0, 0, 1))
    name = next(iter(first))
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("frozen", [False, True])
def test_taylor_is_gradient_times_weight_summed_over_the_unit(llama, data, frozen):
    g = gradients(llama, data)
    terms = lambda p: (g[p].mean(0) * p.detach()).abs()  # noqa: E731
    by_hand = of_each_layer(llama, lambda block: sum(m.sum(1) for m in ffn_matrices(block, terms)))
    llama.requires_grad_(not frozen)
    close(scores_of(llama, data, "taylor"), by_hand)
    assert all(p.requires_grad != frozen and p.grad is None for p in llama.parameters())


def test_the_second_order_takes_half_the_fisher_information_off(llama, data):
    g = gradients(llama, data)

    def terms(p):
        w = p.detach()
        return (g[p].mean(0) * w - 0.5 * (g[p] * w).square().mean(0)).abs()

    by_hand = of_each_layer(llama, lambda block: sum(m.sum(1) for m in ffn_matrices(block, terms)))
    close(scores_of(llama, data, "taylor2"), by_hand)


def test_vectors_are_summed_before_the_absolute_value_and_matrices_after_it(llama, data):
    g = gradients(llama, data)
    terms = lambda p: g[p].mean(0) * p.detach()  # noqa: E731
    by_hand = of_each_layer(llama, lambda block: sum(m.sum(1).abs() for m in ffn_matrices(block, terms)))
    close(scores_of(llama, data, "taylor_vector"), by_hand)


def inputs_of(model, modules, data, mask=None):
    """What modules are called with, for each batch."""
    seen = {module: [] for module in modules}
    hooks = [m.register_forward_pre_hook(lambda m, args: seen[m].append(args[0].detach())) for m in modules]
    for batch in data:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def norm_over_texts(batches_BU):
    return torch.cat(batches_BU).norm(dim=0)


def test_a_head_is_as_active_as_its_output_is_long_and_a_unit_as_it_is_large(llama, data):
    blocks = llama.model.layers
    seen = inputs_of(llama, [m for b in blocks for m in (b.self_attn.o_proj, b.mlp.down_proj)], data)
    by_hand = {}
    for i, b in enumerate(blocks):
        heads = [x.unflatten(-1, (4, 2 * 8)).norm(dim=-1).mean(1) for x in seen[b.self_attn.o_proj]]
        by_hand[f"model.layers.{i}.self_attn/kv_group"] = norm_over_texts(heads)
        by_hand[f"model.layers.{i}.mlp/ffn"] = norm_over_texts([x.abs().mean(1) for x in seen[b.mlp.down_proj]])
    close(scores_of(llama, data, "activation", ["kv_group", "ffn"]), by_hand)


def test_a_channel_is_as_active_as_the_outputs_of_all_norms_together(llama, data):
    norms = [n for b in llama.model.layers for n in (b.input_layernorm, b.post_attention_layernorm)]
    norms.append(llama.model.norm)
    outputs = {norm: [] for norm in norms}
    hooks = [n.register_forward_hook(lambda n, args, y: outputs[n].append(y.detach())) for n in norms]
    for batch in data:
        llama(**batch)
    for hook in hooks:
        hook.remove()
    by_hand = sum(norm_over_texts([y.abs().mean(1) for y in ys]) for ys in outputs.values())
    close(scores_of(llama, data, "activation", "hidden"), {"hidden": by_hand})


@pytest.mark.parametrize("criterion", ["activation", "taylor", "block_influence", "loss", "michel"])
def test_padding_counts_for_nothing(llama, criterion):
    """A text behind which there is padding scores as the text alone."""
    unit = "layer" if criterion in ("block_influence", "loss") else "ffn"
    ids = torch.randint(96, (1, 5))
    padded = torch.nn.functional.pad(ids, (0, 3), value=9)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    alone = scores_of(llama, [{"input_ids": ids}], criterion, unit)
    behind = scores_of(llama, [{"input_ids": padded, "attention_mask": mask}], criterion, unit)
    close(behind, alone)


def test_the_influence_of_a_block_is_one_minus_the_cosine_of_its_input_and_output(llama, data):
    ids = data[0]["input_ids"]
    states = llama(ids, output_hidden_states=True).hidden_states
    scores = scores_of(llama, [ids], "block_influence", "layer")["layer"]
    for i in range(2):  # of the last block the model tells the output behind a norm
        x, y = states[i], states[i + 1]
        cosine = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
        assert scores[i].item() == pytest.approx(1 - cosine.mean().item(), rel=1e-4)
    close(scores_of(llama, [ids], "activation", "layer"), {"layer": scores})


def test_the_loss_of_a_block_is_that_of_the_model_without_it(llama, data):
    loss = lambda model: sum(model(**batch).loss.item() for batch in data) / len(data)  # noqa: E731
    rises = []
    for i in range(3):
        without = copy.deepcopy(llama)
        shrink_(without, {"layer": [j for j in range(3) if j != i]})
        rises.append(loss(without) - loss(llama))
    scores = scores_of(llama, data, "loss", "layer")["layer"]
    torch.testing.assert_close(scores, torch.tensor(rises), rtol=0, atol=2e-5)  # differences of losses of about 4.6


@pytest.mark.parametrize("unit", ["head", "kv_group", "ffn"])
def test_michels_scores_are_gradients_of_gates_text_by_text_over_the_norm_of_the_layer(llama, data, unit):
    groups = structure_of(llama, unit)
    sums = {group.name: torch.zeros(group.size) for group in groups}
    for batch in data:
        for text in range(2):
            gates = {group.name: torch.ones(group.size, requires_grad=True) for group in groups}
            with gated(llama, gates):
                llama(**{key: value[text : text + 1] for key, value in batch.items()}).loss.backward()
            for name, gate in gates.items():
                sums[name] += gate.grad.abs()
    llama.zero_grad()
    close(scores_of(llama, data, "michel", unit), {name: total / total.norm() for name, total in sums.items()})


def test_the_orders_of_sajjad(llama):
    """First to go: the top; the bottom; every other one from the top."""
    order = lambda criterion: scores_of(llama, (), criterion, "layer")["layer"].argsort().tolist()  # noqa: E731
    assert order("top") == [2, 1, 0]
    assert order("bottom") == [0, 1, 2]
    assert order("alternate") == [2, 0, 1]


@pytest.mark.parametrize("kind", [tiny_slm, *HF.values()], ids=["slm", *HF])
def test_every_criterion_scores_every_unit_of_every_family(kind, data):
    torch.manual_seed(0)
    model = kind().eval()
    batch = {"input_ids": torch.randint(2, 90, (2, 6))}
    for criterion in CRITERIA:
        units = ["kv_group", "ffn", *(["hidden", "layer"] if criterion != "michel" else [])]
        if criterion in ("block_influence", "loss", "top", "bottom", "alternate"):
            units = ["layer"]
        loss = lambda output, batch: output[0].float().square().mean()  # noqa: E731 (any head)
        scores = scores_of(model, [batch], criterion, units, loss=loss)
        groups = structure_of(model, units)
        assert {name: len(scores_U) for name, scores_U in scores.items()} == {g.name: g.size for g in groups}
        assert all(scores_U.dtype == torch.float32 for scores_U in scores.values())


def test_modes_gradients_and_weights_are_as_before(llama, data):
    llama.train()
    llama.model.layers[1].eval()
    modes = [m.training for m in llama.modules()]
    llama(**data[0]).loss.backward()
    before = {name: (p.clone(), p.grad.clone()) for name, p in llama.named_parameters()}
    for criterion in ("taylor2", "michel", "activation"):
        scores_of(llama, data, criterion, "ffn")
    assert [m.training for m in llama.modules()] == modes
    for name, p in llama.named_parameters():
        assert torch.equal(p, before[name][0])
        assert torch.equal(p.grad, before[name][1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


@torch.no_grad()
def test_gradients_can_be_had_where_someone_has_switched_them_off():
    scores = scores_of(tiny_llama(), [torch.randint(96, (1, 5))], "taylor")
    assert all((scores_U > 0).all() for scores_U in scores.values())


def test_the_loss_is_that_of_the_next_tokens(llama, data):
    batch = {**data[0], "labels": data[0]["labels"].clone()}
    batch["labels"][0, 3:] = -100
    logits = llama(batch["input_ids"])
    assert next_token_loss(logits, batch).item() == pytest.approx(llama(**batch).loss.item(), rel=1e-6)
    ids = batch["input_ids"]
    assert next_token_loss(logits, ids).item() == pytest.approx(llama(ids, labels=ids).loss.item(), rel=1e-6)


def test_ranks_agree_on_the_mean_of_their_scores(tmp_path):
    on_two_ranks(
        """
        from unittest import mock
        import torch.distributed as dist
        from transformers import LlamaConfig, LlamaForCausalLM
        from lightning_slm.pruning import scores_of
        torch.manual_seed(0)
        sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
        model, batches = LlamaForCausalLM(LlamaConfig(**sizes)), [torch.randint(96, (2, 6)) for _ in range(2)]
        together = scores_of(model, [batches[rank]], "taylor")
        with mock.patch.object(dist, "is_initialized", lambda: False):
            apart = [scores_of(model, [batch], "taylor") for batch in batches]
        for name, scores in together.items():
            torch.testing.assert_close(scores, (apart[0][name] + apart[1][name]) / 2)
        """,
        tmp_path,
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"criterion": "tailor"}, "criterion='tailor' is unknown. Near names: 'taylor'"),
        (
            {"criterion": "michel", "units": "hidden"},
            "is about 'head', 'kv_group', 'ffn' and says nothing about 'hidden'",
        ),
        ({"criterion": "loss", "units": "ffn"}, "is about 'layer' and says nothing about 'ffn'"),
        ({"criterion": "activation"}, "no calibration data"),
        ({"criterion": "taylor"}, "no calibration data"),
        ({"units": "neuron"}, "unit='neuron' must be one of"),
        ({"criterion": "taylor", "batches": [(torch.zeros(1, 2).long(), 0)]}, "There is no next-token loss"),
    ],
)
def test_what_cannot_be_scored_is_refused(llama, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        scores_of(llama, **arguments)


def test_an_encoder_has_no_next_tokens_and_says_what_to_give():
    with pytest.raises(ValueError, match="BertForMaskedLM predicts no next tokens: give loss=lambda"):
        scores_of(HF["bert masked"](), [torch.ones(1, 4).long()], "taylor")


def test_scores_that_are_not_finite_name_the_layer(llama, data):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp/ffn': its scores are not finite"):
        scores_of(llama, data)
    assert shape_of(llama)["ffn"] == 128
