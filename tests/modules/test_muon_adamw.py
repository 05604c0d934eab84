"""MuonAdamW against torch.optim.Muon and torch.optim.AdamW, step by step."""

import copy

import pytest
import torch
from support import ForeignLlama, differences, kill_and_resume, learned, on_two_ranks
from torch import nn

from lightning_slm.errors import NoEffectWarning
from lightning_slm.modules import muon_adamw
from lightning_slm.modules.muon_adamw import MuonAdamW, orthogonalize
from lightning_slm.modules.parameter_groups import parameter_groups


class Net(nn.Module):
    """Tall, wide and square matrices, two of one shape, an embedding, a norm, biases and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(24, 8)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 13, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.norm(x))


def backward(net, step):
    ids = torch.randint(13, (4, 6), generator=torch.Generator().manual_seed(step))
    net.zero_grad()
    loss = nn.functional.cross_entropy(net(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss


@pytest.fixture
def bf16(monkeypatch):
    """Newton-Schulz in bf16, as torch.optim.Muon always does it, also where the processor is slow at that."""
    monkeypatch.setattr(muon_adamw, "fast_dtype", lambda device: torch.bfloat16)


def test_five_steps_equal_those_of_torch_muon_and_torch_adamw(bf16):
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    optimizer = MuonAdamW(parameter_groups(ours), lr=1e-2, muon_lr=0.05, weight_decay=0.1)
    matrices = [layer.weight for layer in theirs.layers]
    undecayed = [p for p in theirs.parameters() if p.ndim == 1] + [theirs.embed.weight]
    adam = [{"params": undecayed, "weight_decay": 0.0}, {"params": [theirs.head.weight]}]
    muon = torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1)
    adamw = torch.optim.AdamW(adam, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(5):
        backward(ours, step)
        optimizer.step()
        backward(theirs, step)
        muon.step()
        adamw.step()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=f"{name} after step {step}")


def test_one_muon_step_equals_torch_muon_to_the_bit(bf16):
    weights = [torch.randn(shape) for shape in [(8, 8), (8, 24), (24, 8), (8, 8)]]
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    for a, b in zip(ours, theirs):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    MuonAdamW(ours, muon_lr=0.05, weight_decay=0.1).step()
    torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)], ids=str)
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    U, _, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = U @ torch.diag(torch.linspace(0.3, 3, 8 if 8 in shape else 16)) @ Vh
    (result,) = orthogonalize([matrix], dtype=torch.float32)
    values = torch.diag(U.T @ result @ Vh.T)
    assert 0.6 < values.min() < values.max() < 1.3
    torch.testing.assert_close(U @ torch.diag(values) @ Vh, result, atol=1e-4, rtol=0)


def test_matrices_of_one_shape_get_the_same_together_as_alone(monkeypatch):
    matrices = [torch.randn(8, 24) for _ in range(3)] + [torch.randn(24, 8), torch.randn(8, 8)]
    alone = [orthogonalize([m], dtype=torch.float32)[0] for m in matrices]
    for limit in (2**24, 8 * 24 * 2, 1):
        monkeypatch.setattr(muon_adamw, "_BATCH_ELEMENTS", limit)
        for a, b in zip(orthogonalize(matrices, dtype=torch.float32), alone):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_an_interrupted_run_continues_to_the_same_bits(tmp_path):
    net = Net()
    optimizer = MuonAdamW(parameter_groups(net))
    for step in range(6):
        if step == 3:
            torch.save((net.state_dict(), optimizer.state_dict()), tmp_path / "state")
        backward(net, step)
        optimizer.step()
    again = Net()
    resumed = MuonAdamW(parameter_groups(again), lr=1.0)  # the state brings the learning rate
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for step in range(3, 6):
        backward(again, step)
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))


def test_the_closure_runs_first_with_gradients_on_and_its_loss_is_returned():
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    loss = MuonAdamW(parameter_groups(net)).step(lambda: backward(net, 0))
    backward(twin, 0)
    MuonAdamW(parameter_groups(twin)).step()
    assert loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))


def test_plain_parameters_are_split_by_dimension_and_named_ones_also_by_name():
    net = Net()
    plain, named = MuonAdamW(net.parameters()), MuonAdamW(net.named_parameters())
    assert [len(g["params"]) for g in plain.param_groups] == [6, 6]
    assert named.param_groups[0]["param_names"] == [f"layers.{i}.weight" for i in range(4)]
    assert [g["lr"] for g in named.param_groups] == [0.02, 1e-2]


def test_parameters_without_gradient_stay_and_get_no_state():
    net = Net()
    net.layers[0].weight.requires_grad_(False)
    optimizer = MuonAdamW(net.named_parameters())
    before = copy.deepcopy(net.layers[0].weight)
    backward(net, 0)
    optimizer.step()
    assert torch.equal(net.layers[0].weight, before)
    assert net.layers[0].weight not in optimizer.state


def test_norms_biases_embeddings_and_marked_parameters_do_not_decay_and_tied_heads_are_embeddings():
    net = Net()
    net.layers[1].weight._no_weight_decay = True
    groups = {g["name"]: g for g in parameter_groups(net)}
    names = {id(p): name for name, p in net.named_parameters()}
    chosen = {key: {names[id(p)] for p in g["params"]} for key, g in groups.items()}
    assert chosen["matrices"] == {"layers.0.weight", "layers.2.weight", "layers.3.weight"}
    assert chosen["others"] == {"head.weight"}
    assert groups["no_decay"]["weight_decay"] == 0.0
    assert sum(map(len, chosen.values())) == len(names)
    net.head.weight = net.embed.weight
    assert "others" not in {g["name"] for g in parameter_groups(net)}


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"momentum": 1.0}, {"betas": (0.9, 1.0)}], ids=str)
def test_values_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MuonAdamW(Net().parameters(), **wrong)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"use_muon is for matrices.*\(8,\)"):
        MuonAdamW([{"params": [nn.Parameter(torch.ones(8))], "use_muon": True}])


def test_on_shards_of_two_ranks_it_does_the_same_as_on_whole_matrices(tmp_path):
    """fully_shard on gloo: every step of both ranks equals the step of one process; uneven shards included."""
    on_two_ranks(
        """
        import torch
        from torch import nn
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor
        from lightning_slm.modules.muon_adamw import MuonAdamW

        torch.manual_seed(0)
        make = lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
        whole, sharded = make(), make()
        sharded.load_state_dict(whole.state_dict())
        fully_shard(sharded, mesh=mesh)
        for step in range(3):
            if step == 0:
                optimizers = [MuonAdamW(net.named_parameters()) for net in (whole, sharded)]
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            for net, optimizer in zip((whole, sharded), optimizers):
                optimizer.zero_grad()
                net(x).square().mean().backward()
                optimizer.step()
        for a, b in zip(whole.parameters(), sharded.parameters()):
            assert isinstance(b, DTensor)
            torch.testing.assert_close(b.full_tensor(), a, atol=1e-6, rtol=0)
        """,
        tmp_path,
    )


# Stochastic rounding of bfloat16 weights.


def run(net, steps=60, batch=None, **kwargs):
    optimizer = MuonAdamW(parameter_groups(net), weight_decay=0.0, **kwargs)
    for step in range(steps):
        loss = backward(net, step if batch is None else batch)
        optimizer.step()
    return loss.item()


def twins(n=2):
    """Of one net, whose weights bfloat16 can hold, the first in float32 and the others in bfloat16."""
    first = Net().bfloat16().float()
    return [first, *(copy.deepcopy(first).bfloat16() for _ in range(n - 1))]


def test_after_one_step_each_weight_is_a_neighbour_of_what_float32_gives():
    exact, rounded = twins()
    for net in (exact, rounded):
        torch.manual_seed(0)
        for p in net.parameters():
            p.grad = torch.randn(p.shape).bfloat16().to(p.dtype)
    MuonAdamW(parameter_groups(exact)).step()
    MuonAdamW(parameter_groups(rounded), stochastic_rounding=True).step()
    moved = 0
    for a, b in zip(exact.parameters(), rounded.parameters()):
        away = 2.0 ** (torch.frexp(a).exponent - 8)  # one step of bfloat16
        assert ((b.float() - a).abs() <= away).all()
        moved += (b.float() != a.bfloat16().float()).sum()
    assert moved > 50, "some were not rounded to the nearest"


@pytest.mark.parametrize("shape", [(64, 64), (4096,)], ids=["muon", "adamw"])
def test_updates_too_small_for_the_nearest_arrive_on_average(shape):
    def after(dtype, **kwargs):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(shape, dtype=dtype))
        optimizer = MuonAdamW([weight], lr=1e-5, muon_lr=1e-3, weight_decay=0.0, **kwargs)
        for _ in range(40):
            weight.grad = torch.randn(shape).bfloat16().to(dtype) + 1
            optimizer.step()
        return weight.detach().float() - 1

    exact, stochastic = after(torch.float32), after(torch.bfloat16, stochastic_rounding=True)
    assert (after(torch.bfloat16) == 0).all()
    step = 2**-8  # of bfloat16 below one; each element's path is a walk of a few such steps
    error = step * (exact.abs().mean() / step / exact.numel()).sqrt()
    assert (stochastic.mean() - exact.mean()).abs() < 4 * error
    assert exact.mean().abs() > 10 * error


def test_a_run_in_bfloat16_learns_like_one_in_float32_and_more_than_rounded_to_the_nearest():
    exact, nearest, stochastic = twins(3)
    rates = {"lr": 2e-4, "muon_lr": 2e-4, "steps": 200, "batch": 0}
    losses = run(exact, **rates), run(nearest, **rates), run(stochastic, **rates, stochastic_rounding=True)
    first = backward(twins()[0], 0).item()
    assert losses[1] > losses[2] + 0.2 * (first - losses[0])
    assert losses[2] == pytest.approx(losses[0], abs=0.2 * (first - losses[0]))


def test_replicas_round_alike_whatever_their_generators_did_and_leave_those_alone():
    _, one, other = twins(3)
    torch.manual_seed(1)
    run(one, 5, stochastic_rounding=True)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    run(other, 5, stochastic_rounding=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_moments_of_bfloat16_weights_are_in_float32_also_from_a_checkpoint_of_the_nearest():
    _, net = twins()
    nearest = MuonAdamW(parameter_groups(net))
    backward(net, 0)
    nearest.step()
    assert {v.dtype for s in nearest.state.values() for k, v in s.items() if k != "step"} == {torch.bfloat16}
    optimizer = MuonAdamW(parameter_groups(net), stochastic_rounding=True)
    optimizer.load_state_dict(nearest.state_dict())
    optimizer.step()
    assert {v.dtype for s in optimizer.state.values() for v in s.values()} == {torch.float32}


class InBfloat16(ForeignLlama):
    def configure_optimizers(self):
        return MuonAdamW(parameter_groups(self), muon_lr=1e-3, lr=1e-3, stochastic_rounding=True)


def test_a_killed_run_in_bfloat16_goes_on_bit_identically(tmp_path):
    straight, resumed = kill_and_resume(InBfloat16, list, tmp_path, precision="bf16-true")
    assert differences(learned(straight), learned(resumed)) == []
    state = straight["optimizer_states"][0]
    assert [group["rounded"] for group in state["param_groups"]] == [8, 8]
    assert state["state"][0]["momentum_buffer"].dtype == torch.float32


def test_without_bfloat16_weights_it_says_that_it_has_no_effect():
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    with pytest.warns(NoEffectWarning, match="bfloat16 parameters, and this model has none"):
        run(net, 3, stochastic_rounding=True)
    run(twin, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))
