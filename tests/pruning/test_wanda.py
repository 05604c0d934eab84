"""Wanda, against the arithmetic of its authors' loop (locuslab/wanda, derived again here)."""

import copy

import pytest
import torch
from calibrated import data, make
from support import tiny_llama
from torch import nn

from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import magnitude_, prune_masks, wanda_, wanda_scores


class Running:
    """The authors' statistic: a running mean, over the texts seen, of each feature's squared norm."""

    def __init__(self, inputs):
        self.mean_I, self.texts = torch.zeros(inputs), 0

    def add(self, x_BTI):
        texts = len(x_BTI)
        self.mean_I *= self.texts / (self.texts + texts)
        self.texts += texts
        columns = x_BTI.reshape(-1, x_BTI.shape[-1]).T.float()
        self.mean_I += torch.norm(columns, p=2, dim=1) ** 2 / self.texts


def reference_mask(weight_OI, mean_I, sparsity, group=None):
    """The authors' choice: the lowest of each row by a stable sort, int(I * sparsity) of them; or of each group."""
    metric = weight_OI.abs() * torch.sqrt(mean_I.reshape(1, -1))
    mask = torch.zeros_like(metric, dtype=torch.bool)
    if group is None:
        indices = torch.sort(metric, dim=-1, stable=True)[1]
        mask.scatter_(1, indices[:, : int(metric.shape[1] * sparsity)], True)
        return mask
    for first in range(0, metric.shape[1], group):
        part = metric[:, first : first + group]
        mask.scatter_(1, first + torch.topk(part, round(sparsity * group), dim=1, largest=False)[1], True)
    return mask


@torch.no_grad()
def reference_wanda_(model, batches, sparsity, group=None):
    """The authors' loop over the blocks of a Llama: statistics with the dense block, prune, run the pruned block."""
    model.config.use_cache = False
    layers, caught = model.model.layers, []

    class Stop(Exception):
        pass

    def catch(module, args, kwargs):
        caught.append((args[0], kwargs))
        raise Stop

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        with pytest.raises(Stop):
            model(**batch)
    handle.remove()
    hidden = [x for x, _ in caught]
    for layer in layers:
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        seen = {m: Running(m.in_features) for m in linears}
        handles = [m.register_forward_pre_hook(lambda m, args, seen=seen: seen[m].add(args[0])) for m in linears]
        for x, (_, kwargs) in zip(hidden, caught):
            layer(x, **kwargs)
        for handle in handles:
            handle.remove()
        for m in linears:
            m.weight[reference_mask(m.weight, seen[m].mean_I, sparsity, group)] = 0
        outputs = [layer(x, **kwargs) for x, (_, kwargs) in zip(hidden, caught)]
        hidden = [out[0] if isinstance(out, tuple) else out for out in outputs]
    return model


@pytest.mark.parametrize(("sparsity", "group"), [(0.5, None), (0.25, None), (0.5, 4), (0.5, 8), (0.75, 4)])
@pytest.mark.parametrize("shape", [(24, 32), (7, 64), (1, 16)], ids=str)
def test_the_masks_of_a_layer_are_the_authors_bit_for_bit(shape, sparsity, group):
    for seed in range(5):
        torch.manual_seed(seed)
        layer = nn.Linear(shape[1], shape[0])
        batches = [torch.randn(2, 9, shape[1]) * torch.rand(shape[1]) * 3 for _ in range(4)]
        running = Running(shape[1])
        for batch in batches:
            running.add(batch)
        expected = reference_mask(layer.weight, running.mean_I, sparsity, group)
        dense = layer.weight.detach().clone()
        results = wanda_(layer, batches, sparsity=sparsity, group=group, progress=False)
        assert torch.equal(layer.weight == 0, expected)
        assert torch.equal(layer.weight[~expected], dense[~expected])
        assert results["weight"].sparsity == pytest.approx(sparsity)


@pytest.mark.parametrize(("sparsity", "group"), [(0.5, None), (0.5, 4), (0.75, 8)])
def test_block_after_block_a_llama_becomes_the_authors_bit_for_bit(sparsity, group):
    ours, theirs, batches = make("llama"), make("llama"), data("llama", 4)
    wanda_(ours, batches, sparsity=sparsity, group=group, progress=False)
    reference_wanda_(theirs, batches, sparsity, group)
    for (name, p), q in zip(ours.named_parameters(), theirs.named_parameters()):
        assert torch.equal(p, q[1]), name


def test_counts_are_rounded_where_the_authors_cut_off():
    layer = nn.Linear(10, 4)
    wanda_(layer, [torch.randn(8, 10)], sparsity=0.58, progress=False)
    assert ((layer.weight == 0).sum(1) == 6).all()  # theirs: int(5.8)


def test_a_budget_of_layers_lets_rows_differ_and_a_global_one_layers():
    for budget in ("row", "layer", "global"):
        model = make("llama")
        results = wanda_(model, data("llama"), sparsity=0.5, budget=budget, progress=False)
        zeros = {t.name: t.weight == 0 for t in weight_targets(model)}
        total = sum(int(z.sum()) for z in zeros.values())
        assert total == sum(z.numel() for z in zeros.values()) / 2
        assert all(results[name].sparsity == pytest.approx(z.float().mean().item()) for name, z in zeros.items())
        rows_differ = any(len(set(z.sum(1).tolist())) > 1 for z in zeros.values())
        layers_differ = len({z.float().mean().item() for z in zeros.values()}) > 1
        assert (rows_differ, layers_differ) == (budget != "row", budget == "global")


def test_global_shares_are_those_of_the_dense_scores():
    model, dense = make("llama"), make("llama")
    batches = data("llama")
    results = wanda_(model, batches, sparsity=0.4, budget="global", progress=False)
    squares = {}
    handles = [
        t.module.register_forward_pre_hook(
            lambda m, args, n=t.name: squares.update({n: squares.get(n, 0) + args[0].square().sum((0, 1))})
        )
        for t in weight_targets(dense)
    ]
    for batch in batches:
        dense(**batch)
    for handle in handles:
        handle.remove()
    scores = {t.name: t.weight.detach().abs() * squares[t.name].sqrt() for t in weight_targets(dense)}
    flat = torch.cat([s.flatten() for s in scores.values()])
    cut = flat.sort().values[round(0.4 * flat.numel()) - 1]
    for name, s in scores.items():
        assert results[name].sparsity == pytest.approx((s <= cut).float().mean().item(), abs=2 / s.numel())


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"sparsity": {"*": 0.5}}, r"settles how much of each layer goes, so it cannot stand beside sparsity=\{'\*'"),
        ({"group": 4}, "cannot stand beside group=4"),
    ],
)
def test_a_global_budget_stands_alone(asked, complaint):
    with pytest.raises(ValueError, match=complaint):
        wanda_(make("llama"), data("llama"), budget="global", progress=False, **asked)


def test_a_layer_without_known_inputs_cannot_compete_with_others_but_within_itself():
    with pytest.raises(ValueError, match=r"out_proj.weight' is read without being called.*budget=\"layer\""):
        wanda_(make("torch's encoder"), data("torch's encoder"), budget="global", progress=False)
    model, dense = make("torch's encoder"), make("torch's encoder")
    results = wanda_(model, data("torch's encoder"), progress=False)
    unseen = [name for name, result in results.items() if not result.seen]
    assert unseen == ["layers.0.self_attn.out_proj.weight", "layers.1.self_attn.out_proj.weight"]
    magnitude_(dense, sparsity=0.5, budget="row", targets="*out_proj")
    for name in unseen:
        assert torch.equal(model.get_parameter(name), dense.get_parameter(name))


def test_scores_are_size_times_norm():
    weight_OI, norm_I = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([2.0, 0.5])
    assert wanda_scores(weight_OI, norm_I).tolist() == [[2.0, 1.0], [6.0, 0.25]]
    (mask,) = prune_masks([wanda_scores(weight_OI, norm_I)], 0.5, budget="row")
    assert mask.tolist() == [[False, True], [False, True]]


def trained(width=48, seed=0):
    """A model that has learned a function of correlated inputs of very different sizes, in 100 steps."""
    torch.manual_seed(seed)
    mixing = torch.randn(8, width) * torch.logspace(-1.5, 1.5, width)
    truth = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def draw(n):
        hidden = torch.randn(n, 8)
        return hidden @ mixing + 0.1 * torch.randn(n, width), truth(hidden).detach()

    model = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        x, y = draw(256)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, draw


@pytest.mark.parametrize("group", [None, 4])
def test_on_held_out_inputs_a_trained_model_loses_less_than_by_magnitude(group):
    for seed in range(3):
        model, draw = trained(seed=seed)
        by_wanda, by_size = copy.deepcopy(model), copy.deepcopy(model)
        wanda_(by_wanda, [draw(64)[0] for _ in range(8)], sparsity=0.5, group=group, progress=False)
        magnitude_(by_size, sparsity=0.5, group=group, budget="row")
        x, _ = draw(1024)
        errors = [(m(x) - model(x)).square().mean().item() for m in (by_wanda, by_size)]
        assert errors[0] < (0.95 if group else 0.8) * errors[1]


def test_a_killed_run_goes_on_and_a_folder_of_another_sparsity_is_refused(tmp_path):
    straight, killed, again = tiny_llama(), tiny_llama(), tiny_llama()
    for model in (killed, again):
        model.load_state_dict(straight.state_dict())
    batches = data("llama")
    wanda_(straight, batches, progress=False)
    names = iter(range(100))

    def dies(batch):
        if next(names) > 3:
            raise RuntimeError("killed")
        return killed(**batch)

    with pytest.raises(RuntimeError, match="killed"):
        wanda_(killed, [*batches, batches[0]], run=dies, folder=tmp_path, progress=False)
    results = wanda_(again, batches, folder=tmp_path, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), straight.parameters()))
    assert {result.sparsity for result in results.values()} == {0.5}
    with pytest.raises(ValueError, match="something else was done"):
        wanda_(again, batches, sparsity=0.6, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="something else was done"):
        wanda_(again, batches, budget="layer", folder=tmp_path, progress=False)
