"""Criteria that look at training steps, each against its paper's formula by hand.

Shape letters: B = batch, N = rows, O = outputs, I = inputs.
"""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from support import on_two_ranks, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

from lightning_slm.callbacks import GradualPruning
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning.criteria import CRITERIA, criterion_named
from lightning_slm.pruning.movement import movement_step, taylor_step


def net():
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def train(model, name, steps=5, lr=0.1):
    """Some steps of SGD with a criterion looking on; returns it, and (weight, gradient, input) of layer 0 by step."""
    criterion = criterion_named(name)(weight_targets(model))
    off, optimizer, seen = criterion.watch(), torch.optim.SGD(model.parameters(), lr), []
    for _ in range(steps):
        x_BI = torch.randn(16, 8)
        model(x_BI).square().mean().backward()
        criterion.see()
        seen.append((model[0].weight.detach().clone(), model[0].weight.grad.clone(), x_BI))
        optimizer.step()
        optimizer.zero_grad()
    off()
    return criterion, seen


def test_movement_is_what_sgd_on_the_papers_learned_scores_comes_to():
    """Scores that are parameters, a straight-through mask, and SGD with learning rate 0.5: 1/0.5 times as large."""
    weight, x_NI = torch.randn(6, 10, dtype=torch.float64), torch.randn(20, 10, dtype=torch.float64)
    scores = torch.zeros(6, 10, dtype=torch.float64, requires_grad=True)
    optimizer, summed = torch.optim.SGD([scores], lr=0.5), torch.zeros(6, 10)
    for _ in range(4):
        weight = (weight + 0.1 * torch.randn_like(weight)).requires_grad_()
        straight_through = 1.0 + scores - scores.detach()  # a mask of ones whose gradient goes to the scores
        (x_NI @ (weight * straight_through).T).tanh().square().sum().backward()
        summed += movement_step(weight.detach(), weight.grad)
        optimizer.step()
        optimizer.zero_grad()
        weight = weight.detach()
    assert torch.allclose(summed, scores.detach().float() / 0.5, rtol=1e-4, atol=1e-4)


def test_movement_tells_weights_that_grow_from_weights_that_shrink():
    weight, grad = torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([-1.0, 1.0, 1.0, -1.0])
    moved = (weight - 0.1 * grad).abs() - weight.abs()
    assert torch.equal(movement_step(weight, grad).sign(), moved.sign())


def test_taylor_is_the_squared_change_of_a_linear_loss():
    """Where the loss is linear in a weight, the first order is all there is: equation 8 against equation 4."""
    weight, slope = torch.randn(20), torch.randn(20)
    loss = lambda w: (slope * w).sum()  # noqa: E731
    changes = [loss(weight) - loss(weight * (torch.arange(20) != i)) for i in range(20)]
    assert torch.allclose(taylor_step(weight, slope), torch.stack(changes).square(), rtol=1e-4, atol=1e-6)


def test_movement_sums_over_all_steps_and_forgets_nothing():
    criterion, seen = train(net(), "movement")
    criterion.forget()
    expected = sum(-w * g for w, g, _ in seen)
    assert torch.allclose(criterion.scores(criterion.targets[0]), expected, rtol=1e-5, atol=1e-8)


def test_taylor_is_the_mean_since_weights_last_went():
    model = net()
    criterion, first = train(model, "taylor")
    expected = sum((w * g).square() for w, g, _ in first)
    assert torch.allclose(criterion.scores(criterion.targets[0]), expected, rtol=1e-5, atol=1e-12)
    criterion.forget()
    assert not criterion.is_ready(1)


@pytest.mark.parametrize("conv1d", [False, True])
def test_wanda_is_size_times_norm_of_the_inputs_of_training(conv1d):
    model = net()
    if conv1d:
        model[0] = Conv1D(12, 8)
    criterion, seen = train(model, "wanda")
    norm_I = torch.cat([x for _, _, x in seen]).norm(dim=0) / math.sqrt(5 * 16)
    weight = model[0].weight.detach().abs()
    expected = weight * (norm_I[:, None] if conv1d else norm_I)
    assert torch.allclose(criterion.scores(criterion.targets[0]), expected, rtol=1e-5)


def test_wanda_leaves_evaluation_out_and_takes_inputs_by_name():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 12)

        def forward(self, x):
            return self.layer(input=x)

    model = ByName()
    criterion = criterion_named("wanda")(weight_targets(model))
    criterion.watch()
    x_NI = torch.randn(7, 8)
    model(x_NI)
    model.eval()(100 * x_NI)
    criterion.see()
    expected = model.layer.weight.detach().abs() * (x_NI.norm(dim=0) / math.sqrt(7))
    assert torch.allclose(criterion.scores(criterion.targets[0]), expected, rtol=1e-5)


def test_wanda_says_which_layer_it_judges_by_magnitude_alone_and_refuses_broken_inputs():
    model = nn.TransformerEncoderLayer(8, 2, 16)  # its attention reads out_proj.weight without calling out_proj
    criterion = criterion_named("wanda")(weight_targets(model))
    criterion.watch()
    model(torch.randn(5, 3, 8))
    criterion.see()
    target = next(t for t in criterion.targets if "out_proj" in t.name)
    with pytest.warns(UserWarning, match=r"'self_attn.out_proj.weight': read without being called"):
        assert torch.equal(criterion.scores(target), target.weight.abs())
    in_proj = next(t for t in criterion.targets if "in_proj" in t.name)
    assert not torch.equal(criterion.scores(in_proj), in_proj.weight.abs())

    model = net()
    criterion = criterion_named("wanda")(weight_targets(model))
    criterion.watch()
    model(torch.full((2, 8), math.nan))
    criterion.see()
    with pytest.raises(ValueError, match=r"'0.weight': its inputs are not finite"):
        criterion.scores(criterion.targets[0])


def test_weights_without_a_gradient_are_refused_with_the_way_out():
    model = net()
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'2.weight' is frozen.* skip it, or choose the criterion 'magnitude'"):
        criterion_named("movement")(weight_targets(model))
    criterion = criterion_named("taylor")(weight_targets(model, skip="2"))
    criterion.see()
    with pytest.raises(ValueError, match=r"'0.weight' had no gradient in 1 optimizer steps"):
        criterion.scores(criterion.targets[0])


def test_a_step_that_fp16_leaves_out_leaves_no_trace():
    model = net()
    criterion, _ = train(model, "movement")
    before = criterion.scores(criterion.targets[0]).clone()
    model[0].weight.grad = torch.full_like(model[0].weight, math.inf)
    criterion.see()
    assert torch.equal(criterion.scores(criterion.targets[0]), before)


@pytest.mark.parametrize("name", CRITERIA)
def test_what_is_saved_goes_on_where_it_was_and_is_plain(name):
    model = net()
    criterion, _ = train(model, name)
    state = criterion.state_dict()
    tensors = state.pop("sums", {})
    assert all(type(x) is torch.Tensor and x.dtype == torch.float32 for x in tensors.values())
    again = criterion_named(name)(weight_targets(model))
    again.load_state_dict({**state, "sums": tensors})
    for target in criterion.targets:
        assert torch.equal(criterion.scores(target), again.scores(target))


def test_of_shards_and_on_two_ranks_the_scores_are_those_of_one(tmp_path):
    """To 1e-6: the sums of the ranks are added in another order."""
    on_two_ranks(
        """
        import copy
        from torch import nn
        from torch.distributed.fsdp import fully_shard
        from lightning_slm.nn.targets import weight_targets
        from lightning_slm.pruning.criteria import CRITERIA

        torch.manual_seed(0)
        alone = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4))
        start, x = copy.deepcopy(alone), torch.randn(3, 16, 8)
        for name, kind in CRITERIA.items():
            sharded, alone = copy.deepcopy(start), copy.deepcopy(start)
            fully_shard(sharded, mesh=mesh)
            found = {}
            # Wanda adds up over ranks, for the model alone too: a mean over the same inputs twice.
            for model, part in ((sharded, slice(rank, None, 2)), (alone, slice(None))):
                criterion = kind(weight_targets(model))
                criterion.watch()
                for step in x:
                    model(step[part]).square().mean().backward()
                    criterion.see()
                    for p in model.parameters():
                        p.data.sub_(p.grad, alpha=0.1)
                        p.grad = None
                again = kind(weight_targets(model))
                again.load_state_dict(criterion.state_dict())
                found[model] = [criterion.scores(t) for t in criterion.targets]
                assert all(torch.equal(a, again.scores(t)) for a, t in zip(found[model], again.targets))
            for a, b in zip(found[sharded], found[alone]):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name
        """,
        tmp_path,
    )


class TwoTasks(LightningModule):
    """A small network and two classifications: one reads the first half of its inputs, one the second."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.out, self.lr = nn.Linear(64, 4), 3e-3

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.out(self.body(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


def task(half, seed, n=4096):
    generator = torch.Generator().manual_seed(99)
    rules = [torch.randn(16, 16, generator=generator), torch.randn(16, 4, generator=generator)]
    x_NI = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x_NI, ((x_NI[:, half] @ rules[0]).relu() @ rules[1]).argmax(1))


def fit(module, data, folder, steps, *callbacks):
    loader = DataLoader(data, 64, shuffle=True, generator=torch.Generator().manual_seed(0))
    trainer(folder, callbacks, steps=steps).fit(module, loader)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_at_a_high_sparsity_movement_beats_magnitude_on_a_task_that_moves_the_weights(tmp_path):
    """The paper's case: large weights are those of the task before, and the task at hand has not made its own yet."""
    first, second = slice(0, 16), slice(16, 32)
    trained = TwoTasks()
    fit(trained, task(first, 1), tmp_path, 1500)
    right = {}
    for criterion in CRITERIA:
        module = TwoTasks()
        module.load_state_dict(trained.state_dict())
        module.lr = 1e-3
        fit(module, task(second, 2), tmp_path, 800, GradualPruning(0.9, end=0.7, criterion=criterion, targets="body*"))
        x_NI, y_N = task(second, 3).tensors
        right[criterion] = (module.out(module.body(x_NI)).argmax(1) == y_N).float().mean().item()
    print(right)  # for the card
    assert right["movement"] > right["magnitude"] + 0.08


def test_an_unknown_criterion_is_told_which_there_are():
    with pytest.raises(ValueError, match=r"criterion='wnda' is unknown. Near names: 'wanda'"):
        criterion_named("wnda")
    with pytest.raises(ValueError, match=r"There are: 'magnitude', 'movement', 'taylor', 'wanda'"):
        criterion_named("xyz")
