"""SparseGPT against the published loop, written out again column by column in float64.

Shape letters: O = outputs of a layer, I = its inputs, N = rows.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from support import tiny_llama, tiny_slm
from torch import nn

from lightning_slm.calibration import InputGram
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import prune_mask, sparsegpt_
from lightning_slm.pruning.least_squares import OncePerInput, cholesky_damped
from lightning_slm.pruning.selection import lowest, lowest_of_groups
from lightning_slm.pruning.sparsegpt import factorised, sparsegpt_weights
from lightning_slm.pruning.wanda import wanda_


def gram_of(x_NI):
    gram = InputGram(x_NI.shape[1], x_NI.device)
    gram.update(x_NI)
    return gram


def correlated(rows, inputs):
    return torch.randn(rows, inputs) @ torch.randn(inputs, inputs) / inputs**0.5 + torch.randn(inputs)


def solved(weight_OI, gram, sparsity=0.5, damping=0.01, **kwargs):
    return sparsegpt_weights(weight_OI.clone(), factorised(gram, "layer", damping), sparsity, **kwargs)


def naive_sparsegpt(weight_OI, hessian_II, sparsity, group=None, block_size=128, damping=0.01, given=None):
    """The paper's algorithm 1: the inverse's Cholesky factor, one column at a time, lazy updates of later blocks.

    It prunes round(sparsity * size) weights of a block; the published loop, whose comparison is <=, one more.

    Args:
        given: the zeros, in place of those it chooses.
    """
    w, h = weight_OI.double(), hessian_II.double()
    inputs = w.shape[1]
    dead = h.diagonal() == 0
    w = w.masked_fill(dead, 0)
    share = damping * h.diagonal()[~dead].mean()
    h = h + torch.diag(dead.double()) + share * torch.eye(inputs)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for start in range(0, inputs, block_size):
        stop = min(start + block_size, inputs)
        pivots = upper.diagonal()[start:stop]
        errors = torch.zeros(len(w), stop - start, dtype=w.dtype)
        scores = (w[:, start:stop] / pivots) ** 2
        mask = prune_mask(scores, sparsity) if given is None else given[:, start:stop]
        for i in range(stop - start):
            if given is None and group is not None and i % group == 0:
                columns = slice(start + i, start + i + group)
                mask[:, i : i + group] = prune_mask((w[:, columns] / upper.diagonal()[columns]) ** 2, sparsity, group)
            column = start + i
            kept = w[:, column].masked_fill(mask[:, i], 0)
            errors[:, i] = (w[:, column] - kept) / upper[column, column]
            w[:, column + 1 : stop] -= errors[:, i, None] * upper[column, column + 1 : stop]
            w[:, column] = kept
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w.float()


@pytest.mark.parametrize("group", [None, 4, 8], ids=["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize(
    ("outputs", "inputs", "block_size"), [(24, 64, 128), (96, 256, 128), (200, 160, 64), (8, 320, 128), (1, 64, 16)]
)
def test_the_weights_are_those_of_the_published_loop(outputs, inputs, block_size, group):
    """To 1e-4, where weights are about 1. Of two equal scores, rounding may have chosen the other one: 1 in 500."""
    x = correlated(4 * inputs, inputs)
    weight = torch.randn(outputs, inputs)
    gram = gram_of(x)
    found = solved(weight, gram, group=group, block_size=block_size)
    chosen = naive_sparsegpt(weight, gram.gram_II, 0.5, group, block_size) == 0
    assert int(chosen.sum()) == int((found == 0).sum()) == weight.numel() / 2
    assert ((found == 0) != chosen).sum() <= weight.numel() / 500
    wanted = naive_sparsegpt(weight, gram.gram_II, 0.5, group, block_size, given=found == 0)
    assert (found - wanted).abs().max() < 1e-4


def test_the_unit_of_the_inputs_and_their_number_do_not_matter():
    x, weight = correlated(256, 64), torch.randn(16, 64)
    plain = solved(weight, gram_of(x))
    for scale in (1e-3, 1e3):
        assert (solved(weight, gram_of(scale * x)) - plain).abs().max() < 1e-4
    assert (solved(weight, gram_of(torch.cat([x, x]))) - plain).abs().max() < 1e-4


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("block_size", [7, 32, 500])
def test_the_count_of_zeros_is_exact_whatever_the_blocks_are(sparsity, block_size):
    weight, gram = torch.randn(33, 100), gram_of(correlated(300, 100))
    found = solved(weight, gram, sparsity, block_size=block_size)
    assert int((found == 0).sum()) == round(sparsity * weight.numel())
    by_row = solved(weight, gram, sparsity, block_size=block_size, budget="row")
    assert ((by_row == 0).sum(1) == round(sparsity * 100)).all()


def test_what_stays_makes_up_for_what_goes():
    x, weight = correlated(512, 128), torch.randn(64, 128)
    gram = gram_of(x)
    masked = weight.masked_fill(solved(weight, gram) == 0, 0)
    errors = [((weight - w) @ x.T).square().sum() for w in (solved(weight, gram), masked)]
    assert errors[0] < 0.5 * errors[1]


def test_dead_inputs_lose_their_weights_and_disturb_no_other():
    x, weight = correlated(256, 64), torch.randn(16, 64)
    x[:, 10:20] = 0
    gram = gram_of(x)
    found = solved(weight, gram, block_size=16)
    assert (found[:, 10:20] == 0).all()
    assert (found - naive_sparsegpt(weight, gram.gram_II, 0.5, block_size=16)).abs().max() < 1e-4
    assert (solved(weight, gram_of(torch.zeros(8, 64))) == 0).all()


@pytest.mark.parametrize("x", [torch.ones(64, 32), torch.randn(3, 32), torch.randn(64, 1).expand(64, 32) * 1e3])
@pytest.mark.parametrize("group", [None, 4])
def test_inputs_that_depend_on_each_other_are_damped_further_and_it_is_said(x, group):
    weight, gram = torch.randn(8, 32), gram_of(x)
    with pytest.warns(UserWarning, match=r"'layer': damping=0 is too little.*; 1e-0\d was taken"):
        found = solved(weight, gram, group=group, damping=0.0)
    assert found.isfinite().all()
    assert (found == 0).sum() == 128
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        damped = solved(weight, gram, group=group)
    lost = ((weight - damped) @ x.T).square().sum() / (weight @ x.T).square().sum()
    assert lost < 0.1  # so few directions are easy to keep


def test_a_factor_is_of_the_damped_matrix():
    gram = gram_of(correlated(200, 50)).gram_II
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(50)
    factor = cholesky_damped(gram.clone(), 0.01, "layer")
    assert ((factor @ factor.T - damped).abs().max() / damped.abs().max()) < 1e-6


def test_layers_that_share_inputs_share_the_factor_and_the_last_one_is_let_go_with_its_statistic():
    made = []
    factors = OncePerInput(lambda inputs, name: made.append(name) or object())
    first, second = gram_of(torch.randn(4, 2)), gram_of(torch.randn(4, 2))
    tasks = [SimpleNamespace(name=n, inputs=i) for n, i in (("q", first), ("k", first), ("v", first), ("o", second))]
    found = [factors(task) for task in tasks]
    assert made == ["q", "o"]
    assert found[0] is found[2] is not found[3]
    assert list(factors._last) == [second]
    del second, tasks
    assert not factors._last


@pytest.mark.parametrize("count", [0, 1, 77, 500, 999, 1000])
@pytest.mark.parametrize("kind", ["random", "few values", "equal", "infinite", "tiny"])
def test_the_lowest_are_those_of_a_stable_sort(count, kind):
    scores = torch.rand(25, 40)
    scores = {
        "random": scores,
        "few values": (scores * 4).round(),
        "equal": torch.ones_like(scores),
        "infinite": scores.masked_fill(scores > 0.4, torch.inf),
        "tiny": scores * 1e-42,
    }[kind]
    order = scores.flatten().sort(stable=True).indices[:count]
    wanted = torch.zeros(1000, dtype=torch.bool).index_fill_(0, order, True).view(scores.shape)
    assert torch.equal(lowest(scores, count), wanted)


@pytest.mark.parametrize(("count", "group"), [(1, 2), (2, 4), (1, 4), (3, 8), (16, 32)])
@pytest.mark.parametrize("distinct", [True, False])
def test_the_lowest_of_groups_are_those_of_a_stable_sort(count, group, distinct):
    scores_IO = torch.rand(64, 13) if distinct else torch.randint(3, (64, 13)).float()
    wanted = prune_mask(scores_IO.T.contiguous(), count / group, group).T
    assert torch.equal(lowest_of_groups(scores_IO, count, group), wanted)
    assert torch.equal(lowest_of_groups(scores_IO[:group], count, group), wanted[:group])


def some_batches(n=4):
    return [{"input_ids": torch.randint(96, (2, 24))} for _ in range(n)]


@pytest.mark.parametrize("make", [tiny_llama, tiny_slm])
@pytest.mark.parametrize("group", [None, 4])
def test_a_model_is_pruned_exactly_and_loses_less_than_by_wanda(make, group):
    batches, errors = some_batches(16), {}
    for prune in (sparsegpt_, wanda_):
        torch.manual_seed(1)
        model = make().requires_grad_(False)
        before = [model(**b).logits for b in batches]
        results = prune(model, batches, sparsity=0.5, group=group, progress=False)
        assert {t.name: (t.weight == 0).float().mean().item() for t in weight_targets(model)} == {
            name: 0.5 for name in results
        }
        errors[prune] = sum(float((model(**b).logits - x).square().sum()) for b, x in zip(batches, before))
    assert errors[sparsegpt_] < 0.9 * errors[wanda_]


def test_the_first_block_of_a_llama_is_pruned_as_the_published_loop_prunes_it():
    """Whose layers see what the dense block gives them: to 1e-4 where weights are about 1."""
    model, batches, seen = tiny_llama().requires_grad_(False), some_batches(), {}
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    block = model.model.layers[0]
    dense = {name: m.weight.clone() for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, n=name: seen.setdefault(n, []).append(args[0].flatten(0, 1)))
        for name, m in block.named_modules()
        if name in dense
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    results = sparsegpt_(model, batches, sparsity=0.5, block_size=32, damping=0.02, progress=False)
    for name, weight in dense.items():
        x = torch.cat(seen[name])
        found = block.get_submodule(name).weight
        wanted = naive_sparsegpt(weight, x.T @ x, 0.5, block_size=32, damping=0.02, given=found == 0)
        assert (found - wanted).abs().max() < 1e-4
        lost = ((weight - found) @ x.T).square().sum() / (weight @ x.T).square().sum()
        assert results[f"model.layers.0.{name}.weight"].error == pytest.approx(float(lost), rel=1e-3)


def test_bf16_weights_stay_bf16_with_exact_zeros():
    model = tiny_llama().bfloat16()
    results = sparsegpt_(model, some_batches(), sparsity=0.5, group=4, progress=False)
    for target in weight_targets(model):
        assert target.weight.dtype == torch.bfloat16
        assert ((target.weight.view(-1, 4) == 0).sum(1) >= 2).all()
        assert results[target.name].error < 0.5


def test_layers_of_one_row_and_of_one_input():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 8), nn.Linear(8, 40), nn.Linear(40, 3))
    shares = sparsegpt_(model, [torch.randn(64, 8) for _ in range(4)], sparsity=0.5, progress=False)
    assert {name: result.sparsity for name, result in shares.items()} == {f"{i}.weight": 0.5 for i in range(4)}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"damping": -0.1}, "damping=-0.1 must be a share"),
        ({"group": 5}, r"'model.layers.0.self_attn.q_proj.weight': sparsity=0.5 of group=5"),
        ({"targets": "*q_prj"}, r"Near names: .*q_proj"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_weight_is_touched(asked, complaint):
    model = tiny_llama()
    with pytest.raises(ValueError, match=complaint):
        sparsegpt_(model, some_batches(), **asked)
    assert all((t.weight != 0).all() for t in weight_targets(model))
