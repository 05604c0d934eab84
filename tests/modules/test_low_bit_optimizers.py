"""AdamW in few bits, against torchao's own and torch's AdamW; checkpoints; and how many bytes it takes."""

import subprocess
import sys

import pytest
import torch
import torchao.optim
from lightning.pytorch.cli import LightningCLI
from support import ForeignLlama, batches, differences, kill_and_resume, learned, on_two_ranks, tiny_slm, trainer
from torch import nn

from lightning_slm.measure import weight_bytes
from lightning_slm.modules import CausalLM, low_bit_optimizers
from lightning_slm.modules.low_bit_optimizers import AdamW4bit, AdamW8bit, AdamWFp8
from lightning_slm.modules.parameter_groups import parameter_groups

ALL = [AdamW8bit, AdamW4bit, AdamWFp8]


def net(dtype=torch.float32):
    """Two matrices that are kept in few bits, and biases that are not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)


def backward(model, step):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
    model.zero_grad()
    loss = (model(x) - x).square().mean()
    loss.backward()
    return loss


def run(model, optimizer, steps):
    for step in steps:
        loss = backward(model, step)
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("kind", ALL)
def test_without_the_compiler_it_steps_as_torchao_does_to_the_bit(kind):
    ours, theirs = net(), net()
    run(ours, kind(ours.parameters(), lr=1e-2), range(4))
    with torch.compiler.set_stance("force_eager"):
        run(theirs, getattr(torchao.optim, kind.__name__)(theirs.parameters(), lr=1e-2), range(4))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.slow  # 12 s of compiling
@pytest.mark.filterwarnings("ignore")  # the compiler hides warnings of its own, but not once they are errors
def test_compiled_as_on_a_gpu_it_does_the_same(monkeypatch):
    low_bit_optimizers._compiled()  # of the original
    monkeypatch.setattr(low_bit_optimizers, "single_param_adam", low_bit_optimizers._compiled_adam)
    ours, theirs = net()[:1], net()[:1]
    for model in (ours, theirs):
        optimizer = (AdamW8bit if model is ours else torchao.optim.AdamW8bit)(model.parameters(), lr=1e-2)
        for step in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "tolerance"), [(AdamW8bit, 0.05), (AdamWFp8, 0.05), (AdamW4bit, 0.15)])
def test_it_learns_nearly_as_adamw_of_torch(kind, tolerance):
    ours, theirs = net(), net()
    first = backward(net(), 0).item()
    a = run(ours, kind(ours.parameters(), lr=3e-3), range(60))
    b = run(theirs, torch.optim.AdamW(theirs.parameters(), lr=3e-3), range(60))
    assert b < first / 2
    assert a == pytest.approx(b, abs=tolerance * (first - b))


@pytest.mark.parametrize(("kind", "expected"), [(AdamW8bit, 2.03), (AdamW4bit, 1.06), (AdamWFp8, 2.03)])
def test_the_state_takes_so_many_bytes_per_parameter(kind, expected):
    class Held(nn.Module):
        """The moments as buffers, to be counted by their storages."""

        def __init__(self, optimizer):
            super().__init__()
            for i, state in enumerate(optimizer.state.values()):
                for name in ("exp_avg", "exp_avg_sq"):
                    self.register_buffer(f"{name}_{i}", state[name])

    def per_parameter(kind):
        weight = nn.Parameter(torch.randn(1024, 1024))
        weight.grad = torch.randn_like(weight)
        optimizer = kind([weight])
        optimizer.step()
        return weight_bytes(Held(optimizer)) / weight.numel()

    assert per_parameter(kind) == pytest.approx(expected, abs=0.01)
    assert per_parameter(torch.optim.AdamW) == 8


@pytest.mark.parametrize("kind", ALL)
def test_small_tensors_keep_moments_in_their_own_dtype(kind):
    model = net()
    optimizer = kind(model.parameters())
    run(model, optimizer, range(1))
    kinds = [type(optimizer.state[p]["exp_avg"]) is torch.Tensor for p in model.parameters()]
    assert kinds == [False, True, False, True]


def test_the_closure_runs_first_with_gradients_on_and_its_loss_is_returned():
    model, twin = net(), net()
    loss = AdamW8bit(model.parameters()).step(lambda: backward(model, 0))
    run(twin, AdamW8bit(twin.parameters()), range(1))
    assert loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_hooks_after_the_step_run_once():
    model, calls = net(), []
    torchao.optim.AdamW8bit(model.parameters())  # whose step torch has wrapped now, too
    optimizer = AdamW8bit(model.parameters())
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    run(model, optimizer, range(3))
    assert len(calls) == 3


# Checkpoints.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ALL)
def test_an_interrupted_run_continues_to_the_same_bits_from_plain_tensors(tmp_path, kind, dtype):
    model = net(dtype)
    optimizer = kind(model.parameters(), lr=1e-2, bf16_stochastic_round=True)
    run(model, optimizer, range(3))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state")
    run(model, optimizer, range(3, 6))
    again = net(dtype)
    resumed = kind(again.parameters(), lr=1.0, bf16_stochastic_round=True)
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert state["state"][0]["exp_avg"].keys() == {"codes", "scale"}
    run(again, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert differences(optimizer.state_dict()["state"], resumed.state_dict()["state"]) == []


def test_a_checkpoint_is_read_where_torchao_was_never_imported(tmp_path):
    model = net()
    optimizer = AdamWFp8(model.parameters())
    run(model, optimizer, range(1))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    code = "import sys, torch; torch.load(sys.argv[1], weights_only=True); assert 'torchao' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "state"], check=False).returncode == 0


def test_moments_in_other_bits_or_blocks_are_refused():
    model = net()
    eight = AdamW8bit(model.parameters())
    run(model, eight, range(1))
    others = AdamW4bit(model.parameters()), AdamWFp8(model.parameters()), AdamW8bit(model.parameters(), block_size=128)
    for other in others:
        with pytest.raises(
            ValueError, match="exp_avg of a parameter was saved by another optimizer or with another block_size"
        ):
            other.load_state_dict(eight.state_dict())


class Small(ForeignLlama):
    """Wide enough for matrices in few bits."""

    kind, options = AdamW8bit, {}

    def __init__(self):
        super().__init__(hidden=64)

    def configure_optimizers(self):
        optimizer = self.kind(parameter_groups(self), lr=1e-2, **self.options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_killed_run_goes_on_bit_identically_its_schedule_too(tmp_path, kind, precision):
    made = type("Made", (Small,), {"kind": kind, "options": {"bf16_stochastic_round": precision == "bf16-true"}})
    straight, resumed = kill_and_resume(made, list, tmp_path, precision=precision)
    assert differences(learned(straight), learned(resumed)) == []
    group = straight["optimizer_states"][0]["param_groups"][0]
    assert float(group["lr"]) == pytest.approx(1e-2 / 9)
    assert (group["name"], group["use_muon"]) == ("matrices", True)


# Rounding of bfloat16 weights.


def test_replicas_round_alike_and_the_global_generator_is_left_alone():
    one, other = net(torch.bfloat16), net(torch.bfloat16)
    for model, seed in ((one, 1), (other, 2)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        run(model, AdamW8bit(model.parameters(), bf16_stochastic_round=True), range(3))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_torchao_s_own_replicas_drift_apart_where_their_generators_differ():
    """What the test above is for."""
    one, other = net(torch.bfloat16), net(torch.bfloat16)
    for model, seed in ((one, 1), (other, 2)):
        torch.manual_seed(seed)
        with torch.compiler.set_stance("force_eager"):
            run(model, torchao.optim.AdamW8bit(model.parameters(), bf16_stochastic_round=True), range(3))
    assert not torch.equal(one[0].weight, other[0].weight)


def test_updates_too_small_for_the_nearest_arrive_on_average():
    def moved(dtype, **kwargs):
        weight = nn.Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = AdamW8bit([weight], lr=1e-5, weight_decay=0.0, **kwargs)
        for _ in range(40):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return (weight.detach().float() - 1).mean().item()

    assert moved(torch.bfloat16) == 0
    exact = moved(torch.float32)
    error = 2**-8 * (abs(exact) * 2**8 / 4096) ** 0.5  # of the mean of 4096 walks of steps of 1/256
    assert abs(moved(torch.bfloat16, bf16_stochastic_round=True) - exact) < 4 * error < abs(exact) / 3


# With a LightningModule and from YAML.


def test_it_trains_causal_lm_from_yaml_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["test"])
    path = "lightning_slm.modules.low_bit_optimizers.AdamW8bit"
    (tmp_path / "run.yaml").write_text(
        f"model:\n  optimizer:\n    class_path: {path}\n    init_args: {{lr: 1.0e-3, bf16_stochastic_round: true}}\n"
    )
    quiet = {"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path), "max_steps": 3}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    cli = LightningCLI(
        CausalLM, trainer_defaults=quiet, run=False, seed_everything_default=0, args=[f"--config={tmp_path}/run.yaml"]
    )
    module = CausalLM(model=tiny_slm().train(), optimizer=cli.model._make_optimizer)
    cli.trainer.fit(module, batches())
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is AdamW8bit
    assert optimizer.bf16_stochastic_round
    assert len(optimizer.param_groups) == 2
    assert cli.trainer.callback_metrics["train_loss"] > 0


def test_gradients_in_micro_batches_and_clipping_work(tmp_path):
    torch.manual_seed(0)
    module = Small()
    run_ = trainer(tmp_path, steps=6, accumulate_grad_batches=2, gradient_clip_val=1.0)
    run_.fit(module, batches())
    assert run_.global_step == 6
    assert {int(s["step"]) for s in run_.optimizers[0].state.values()} == {6}


@pytest.mark.slow
def test_states_of_one_process_load_on_two_and_back(tmp_path):
    """fully_shard on gloo: parts in few bits, parts that are too small for them there, and rows that do not divide."""
    on_two_ranks(
        """
        import torch
        from torch import nn
        from torch.distributed.fsdp import fully_shard
        from lightning_slm.modules.low_bit_optimizers import AdamW4bit, AdamW8bit, AdamWFp8
        from lightning_slm.nn.sharded import as_shard_of, gathered, local, whole


        def make():
            torch.manual_seed(0)
            last = nn.Linear(32, 256, bias=False), nn.Linear(256, 129, bias=False)
            return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 32), *last)

        def step(net, optimizer, i):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

        def numbers(optimizer):
            for param, state in optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    moment = local(state[name])
                    in_few_bits = hasattr(moment, "codes")
                    plain = moment.dequantize() if in_few_bits else moment
                    yield whole(as_shard_of(plain, param)), in_few_bits

        for kind in (AdamW8bit, AdamW4bit, AdamWFp8):
            one, two = make(), make()
            first = kind(one.parameters())
            step(one, first, 0)
            fully_shard(two, mesh=mesh)
            second = kind(two.parameters())
            second.load_state_dict(first.state_dict())
            pairs = list(zip(numbers(first), numbers(second)))
            assert all(torch.equal(a, b) for (a, _), (b, _) in pairs)
            assert [x for (_, x), _ in pairs[::2]] == [True, False, True, False, True, True]
            assert [x for _, (_, x) in pairs[::2]] == [True, False, False, False, True, False]
            back = kind(make().parameters())
            back.load_state_dict(gathered(second.state_dict(), keep=True))
            before, after = list(numbers(first)), list(numbers(back))
            assert torch.equal(before[0][0], after[0][0])
            # What was plain in between is rounded once more.
            for (a, few), (b, still) in zip(before, after):
                assert few is still
                assert (a - b).abs().max() <= a.abs().max() / 7
            step(two, second, 1)
            again = kind(two.parameters())
            again.load_state_dict(second.state_dict())
            assert all(torch.equal(a, b) for (a, _), (b, _) in zip(numbers(second), numbers(again)))
        """,
        tmp_path,
    )
