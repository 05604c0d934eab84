"""Hard-concrete gates: the paper's formulas by hand, and the expectations against many samples."""

import math

import pytest
import torch
from support import tiny_llama

from lightning_slm.pruning import HardConcrete, L0Gates, structure_of

LOG_ALPHAS = torch.tensor([-4.0, -1.5, -0.3, 0.0, 0.7, 2.0, 4.6])


def by_hand(log_alpha, u, temperature=2 / 3, low=-0.1, high=1.1):
    """Equations 10 and 11 of Louizos et al. 2018, in plain floats."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / temperature))
    return min(1.0, max(0.0, s * (high - low) + low))


def test_a_gate_is_what_the_paper_s_formula_gives():
    u = torch.linspace(0.001, 0.999, 41)
    for log_alpha in LOG_ALPHAS:
        ours = HardConcrete().sample(log_alpha.expand(41), u)
        assert ours.tolist() == pytest.approx([by_hand(float(log_alpha), float(x)) for x in u], abs=1e-5)
    other = HardConcrete(temperature=0.4, low=-0.3, high=1.2)
    assert float(other.sample(torch.tensor([0.5]), torch.tensor([0.6]))) == pytest.approx(
        by_hand(0.5, 0.6, 0.4, -0.3, 1.2), abs=1e-6
    )


def test_the_probability_to_be_open_is_that_of_many_samples():
    """200 000 samples each: a standard error of 0.0011 at most; four of them."""
    gate, random = HardConcrete(), torch.Generator().manual_seed(0)
    for log_alpha in LOG_ALPHAS:
        sampled = gate.sample(log_alpha.expand(200_000), torch.rand(200_000, generator=random))
        assert float((sampled > 0).float().mean()) == pytest.approx(float(gate.open(log_alpha)), abs=0.0045)


def test_the_probability_to_be_open_has_the_gradient_of_its_formula():
    log_alpha = LOG_ALPHAS.clone().requires_grad_()
    HardConcrete().open(log_alpha).sum().backward()
    p = [1 / (1 + math.exp(-(a - 2 / 3 * math.log(0.1 / 1.1)))) for a in LOG_ALPHAS.tolist()]
    assert HardConcrete().open(LOG_ALPHAS).tolist() == pytest.approx(p, abs=1e-6)
    assert log_alpha.grad.tolist() == pytest.approx([x * (1 - x) for x in p], abs=1e-6)


def test_the_gradient_of_a_sampled_gate_is_that_of_the_mean_over_samples():
    """Against finite differences of the mean over common random numbers; exact zeros and ones have none."""
    gate, u = HardConcrete(), torch.rand(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for value in LOG_ALPHAS.double():
        log_alpha = value.clone().requires_grad_()
        gate.sample(log_alpha.expand(len(u)), u).mean().backward()
        up, down = (gate.sample((value + h).expand(len(u)), u).mean() for h in (1e-3, -1e-3))
        assert float(log_alpha.grad) == pytest.approx(float((up - down) / 2e-3), rel=0.02, abs=1e-4)


def test_in_evaluation_a_gate_is_the_stretched_sigmoid():
    wanted = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in LOG_ALPHAS.tolist()]
    assert HardConcrete().middle(LOG_ALPHAS).tolist() == pytest.approx(wanted, abs=1e-6)


def test_impossible_distributions_are_refused():
    for wrong in ({"temperature": 1.5}, {"low": 0.0}, {"high": 0.9}):
        with pytest.raises(ValueError, match=r"there must be 0 < temperature < 1, low < 0 and high > 1"):
            HardConcrete(**wrong)


@pytest.fixture
def gates():
    return L0Gates(structure_of(tiny_llama(), ["head", "ffn", "hidden"]), seed=3)


def test_at_first_all_gates_are_open(gates):
    assert all((gate == 1).all() for gate in gates.middle().values())
    assert gates.expected()["hidden"].item() == pytest.approx(64, rel=0.003)


def test_samples_are_a_function_of_seed_and_step_and_move_nobody_s_random_numbers(gates):
    state = torch.get_rng_state()
    first, again, later = gates.sample(5), gates.sample(5), gates.sample(6)
    assert torch.equal(torch.get_rng_state(), state)
    for log_alpha in gates.log_alpha:
        log_alpha.data.zero_()
    first, again, later = gates.sample(5), gates.sample(5), gates.sample(6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], later[name]) for name in first if len(first[name]) > 2)
    other = L0Gates(gates.groups, seed=4)
    other.load_state_dict(gates.state_dict())
    assert not torch.equal(other.sample(5)["hidden"], first["hidden"])


def test_the_best_units_are_the_most_open_ones_as_many_from_each_run():
    import transformers

    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2)
    gates = L0Gates(structure_of(transformers.LlamaForCausalLM(config), ["head"]))
    gates.log_alpha[0].data = torch.tensor([3.0, 1.0, 2.0, 0.0, -1.0, -2.0, -3.0, -0.5])
    assert gates.best(gates.groups[0], 4).nonzero().flatten().tolist() == [0, 2, 4, 7]


def test_a_gate_that_is_all_but_shut_can_come_back(gates):
    for log_alpha in gates.log_alpha:
        log_alpha.data.fill_(-50)
    gates.hold_in_bounds_()
    gates.sample(0)["hidden"].sum().backward()
    sum(gates.expected().values()).backward()
    assert all((log_alpha.grad > 0.01).all() for log_alpha in gates.log_alpha)
