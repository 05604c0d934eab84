"""OWL, against its formula by hand."""

import pytest
import torch
from calibrated import MODELS, data, make
from torch import nn

from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import owl_sparsities, sparsegpt_, wanda_
from lightning_slm.pruning.owl import owl_shares


def uneven(name="llama"):
    """Blocks with more outliers the later they come."""
    model = make(name)
    with torch.no_grad():
        for i, t in enumerate(weight_targets(model)):
            t.weight.view(-1)[:: max(40 - 3 * i, 2)] *= 12
    return model


def test_shares_of_equal_blocks_are_the_authors_formula():
    model, batches = uneven(), data("llama")
    seen = {t.name: [] for t in weight_targets(model)}
    handles = [
        t.module.register_forward_pre_hook(lambda m, args, n=t.name: seen[n].append(args[0]))
        for t in weight_targets(model)
    ]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    ratios = []
    for block in range(2):
        scores = []
        for t in (t for t in weight_targets(model) if f"layers.{block}." in t.name):
            x = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen[t.name]])
            scores.append((t.weight.abs() * x.norm(dim=0)).flatten())
        scores = torch.cat(scores)
        ratios.append((scores > 5 * scores.mean()).double().mean() * 100)
    ratios = torch.stack(ratios)
    kept = (ratios - ratios.min()) / (ratios.max() - ratios.min()) * 2 * 0.08
    kept = kept - kept.mean() + (1 - 0.6)
    found = owl_sparsities(model, batches, 0.6, progress=False)
    assert list(found) == ["model.layers.0.*", "model.layers.1.*"]
    assert list(found.values()) == pytest.approx((1 - kept).tolist(), abs=1e-6)
    assert found["model.layers.1.*"] < 0.6 < found["model.layers.0.*"]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_any_model_gets_shares_whose_mean_over_weights_is_what_was_asked_and_stays_as_it_is(name):
    model = uneven(name)
    before = [p.clone() for p in model.parameters()]
    shares = owl_sparsities(model, data(name), 0.5, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    results = wanda_(model, data(name), sparsity=shares, budget="layer", progress=False)
    sizes = {t.name: t.weight.numel() for t in weight_targets(model)}
    pruned = sum(results[n].sparsity * sizes[n] for n in sizes)
    assert pruned / sum(sizes.values()) == pytest.approx(0.5, abs=len(sizes) / sum(sizes.values()))


def test_every_solver_takes_them():
    shares = owl_sparsities(uneven(), data("llama"), 0.5, progress=False)
    for prune in (wanda_, sparsegpt_):
        model = uneven()
        results = prune(model, data("llama", 40), sparsity=shares, progress=False)
        for name, result in results.items():
            asked = next(share for pattern, share in shares.items() if pattern[:-1] in name)
            assert result.sparsity == pytest.approx(asked, abs=1 / 64)


def test_blocks_alike_get_the_same_share():
    assert owl_shares({"a": 0.1, "b": 0.1}, {"a": 5, "b": 7}, 0.5, 0.08) == {"a": 0.5, "b": 0.5}
    assert owl_sparsities(nn.Linear(8, 8), [torch.randn(4, 8)], 0.5, progress=False) == {"*": 0.5}


def test_large_blocks_weigh_more_in_the_mean():
    shares = owl_shares({"a": 0.0, "b": 0.02, "c": 0.04}, {"a": 10, "b": 10, "c": 60}, 0.5, 0.1)
    assert 10 * shares["a"] + 10 * shares["b"] + 60 * shares["c"] == pytest.approx(80 * 0.5)
    assert shares["a"] - shares["c"] == pytest.approx(0.2)
    assert shares["a"] - shares["b"] == pytest.approx(0.1)


def test_a_spread_too_wide_is_refused():
    with pytest.raises(ValueError, match=r"sparsity=0.95 and spread=0.2 give 'a' a share of 1.150.*a smaller spread"):
        owl_shares({"a": 0.0, "b": 0.1}, {"a": 1, "b": 1}, 0.95, 0.2)
