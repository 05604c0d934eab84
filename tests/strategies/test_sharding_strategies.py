"""FSDP2Strategy and ZeRO1Strategy: what several processes learn is what one learns, in as little memory as promised."""

import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from contract import EVERY_CALLBACK, flat
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import StrategyRegistry
from ranks import BUILT, OPTIONS, STEPS, ShardedLlama, data, make, resume, run_of
from support import ForeignLlama, Notes, differences, run_on_ranks
from torch import nn

import lightning_slm  # noqa: F401 (registers the strategies' names)
from lightning_slm.models import SLMForCausalLM
from lightning_slm.nn.blocks import repeated_blocks
from lightning_slm.nn.targets import weight_targets
from lightning_slm.strategies import FSDP2Strategy, ZeRO1Strategy

RANKS = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Runs a job of ranks.py, once, and returns what it returned."""

    @functools.cache
    def result(name, processes=2, folder=None, timeout=240):
        folder = folder or tmp_path_factory.mktemp(name)
        run_on_ranks(RANKS, folder, processes, name, timeout=timeout)
        return torch.load(folder / f"{name}.pt")

    return result


@functools.cache
def one_process(built, extra, folder):
    """The same run in this process: losses of all steps, and the weights."""
    notes = Notes()
    module = make(**BUILT.get(built, {}))
    run_of(Path(folder), 1, "auto", logger=notes, **dict(extra)).fit(module, data(1))
    return [v["train_loss"] for v in notes.steps.values()], flat(module)


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["plain", "accumulate_grad_batches", "gradient_clip_val"])
@pytest.mark.parametrize("option", OPTIONS)
def test_two_processes_learn_what_one_learns_over_20_steps(job, tmp_path_factory, option, extra):
    clip = (("gradient_clip_val", 0.1),) if extra == "gradient_clip_val" else ()
    losses, weights = one_process(option if option in BUILT else None, clip, str(tmp_path_factory.getbasetemp()))
    found = job("losses")[f"{option}, {extra}"]
    assert len(losses) == len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(losses, abs=2e-5)
    assert (found["weights"] - weights).norm() < 1e-4 * weights.norm()


@pytest.mark.slow
def test_each_process_holds_half_of_every_parameter(job):
    for name, shape in job("losses")["sharded"].items():
        whole = dict(make().named_parameters())[name].shape
        assert shape == (whole[0] // 2, *whole[1:])


@pytest.mark.slow
def test_the_bytes_of_each_stage_are_those_of_the_formula(job):
    """Of P bytes of weights, N = 2 processes, AdamW: 1: P + P + 2P/N. 2 and 3: (P + P + 2P) / N at rest; what lies
    gathered between forward and backward: 2: P, 3: what belongs to no block.
    """
    found = job("memory")
    for stage, P in ((stage, values["whole"]) for stage, values in found.items()):
        held = {kind: torch.tensor(found[stage][kind]) for kind in ("gathered", "parameters", "gradients", "states")}
        at_rest = P if stage == "1" else P / 2
        assert (held["parameters"] == at_rest).all()
        assert (held["gradients"] == at_rest).all()
        if stage == "1":  # parameters go as a whole, so that the halves are not quite alike
            assert held["states"].sum() == 2 * P
            assert held["states"].max() < 1.01 * P
        else:
            assert (held["states"] == P).all()
        gathered = P if stage != "3" else P - found[stage]["blocks"] / 2
        assert (held["gathered"] == gathered).all()


@pytest.mark.slow
def test_a_run_goes_on_from_two_processes_to_one_and_back_to_two(tmp_path, job):
    """6 steps on two, 6 on one, 6 on two; from one file, from a folder of shards, from other strategies."""
    job("on_two_first", folder=tmp_path)
    resume(tmp_path, 1, FSDP2Strategy(), 6, 12, "file")
    resume(tmp_path, 1, FSDP2Strategy(save_distributed_checkpoint=True), 6, 12, "shards")
    resume(tmp_path, 1, "auto", 6, 12, "zero1")
    resume(tmp_path, 1, "auto", 0, 12, "single")
    found = job("on_two_last", folder=tmp_path)
    straight = found.pop("straight")
    start = flat(make())
    assert len(found) == 4
    for name, weights in found.items():
        assert (weights - straight).norm() < 0.01 * (straight - start).norm(), name
    assert (tmp_path / "shards.18.ckpt").is_dir()
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


@pytest.mark.slow
def test_a_checkpoint_of_shards_is_a_checkpoint_of_one_process(tmp_path, job):
    job("on_two_first", folder=tmp_path)
    sharded = torch.load(tmp_path / "file.6.ckpt", weights_only=True)
    resume(tmp_path, 1, "auto", 0, 6, "plain")
    plain = torch.load(tmp_path / "plain.6.ckpt", weights_only=True)
    assert sharded["state_dict"].keys() == plain["state_dict"].keys()
    states = [c["optimizer_states"][0] for c in (sharded, plain)]
    assert differences(states[0]["param_groups"], states[1]["param_groups"]) == []
    for i, values in states[1]["state"].items():
        assert states[0]["state"][i]["exp_avg"].shape == values["exp_avg"].shape
        torch.testing.assert_close(states[0]["state"][i]["exp_avg"], values["exp_avg"], atol=1e-4, rtol=1e-2)


@pytest.mark.slow
def test_validate_test_predict_a_second_fit_and_a_folder_work_from_shards(job, tmp_path):
    found, module = job("everything_else"), make()
    run = run_of(tmp_path, 1, "auto", steps=4)
    run.fit(module, data(1))
    (expected,) = run.test(module, data(1, n=8), verbose=False)
    assert found["test"]["test_loss"] == pytest.approx(expected["test_loss"], abs=1e-5)
    assert found["validate"]["val_loss"] == pytest.approx(expected["test_loss"], abs=1e-5)
    nats = torch.cat(run.predict(module, data(1, n=8)))
    torch.testing.assert_close(found["predict"], nats[::2], atol=1e-5, rtol=0)  # the first process's half
    torch.testing.assert_close(found["folder"], flat(module.model), atol=1e-5, rtol=0)
    assert found["second fit"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bf16 weights", "bf16-mixed"])
def test_in_bf16_the_losses_stay_near_those_of_float32(job, tmp_path_factory, how):
    losses, _ = one_process(False, (), str(tmp_path_factory.getbasetemp()))
    assert job("everything_else")[how] == pytest.approx(losses, abs=0.03)
    assert job("everything_else")[how] != losses


@pytest.mark.slow
def test_values_of_gradients_are_clipped_in_shards_as_in_whole(job, tmp_path):
    module = make()
    clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    run_of(tmp_path, 1, "auto", steps=4, **clip).fit(module, data(1))
    torch.testing.assert_close(job("everything_else")["clipped by value"], flat(module), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_model_built_without_memory_gets_its_first_weights_block_by_block(job):
    found = job("everything_else")["meta"]
    assert found.pop("was meta")
    assert job("everything_else")["meta in parts"]  # its logits are made chunk by chunk, as any other's
    plain = make().state_dict()
    assert found.keys() == plain.keys()
    for name, weight in found.items():
        assert torch.isfinite(weight).all()
        if "norm" in name:
            assert (weight - 1).abs().max() < 0.05  # a step of training is behind it
        else:
            assert float(weight.std()) == pytest.approx(float(plain[name].std()), rel=0.15)
    halves = found["model.model.layers.0.channel_mixer.down_proj.weight"].chunk(2)
    assert (halves[0] - halves[1]).abs().max() > 0.01  # not twice what one process drew
    torch.testing.assert_close(found["model.lm_head.weight"], found["model.model.embed_tokens.weight"])


@pytest.mark.slow
def test_a_teacher_is_sharded_as_its_student_and_masks_lie_on_shards(job):
    found = job("everything_else")
    assert found["teacher"]
    assert found["masks"]
    assert all(here * 2 == whole for here, whole in found["teacher"] + found["masks"])


@pytest.mark.slow
def test_when_a_process_is_killed_the_other_says_so_and_the_run_goes_on_bit_identically(tmp_path, job):
    found = job("killed", folder=tmp_path, timeout=120)
    assert "Rank 0 of 2 lost another process" in found["notes"][0]
    assert "ckpt_path=" in found["notes"][0]
    assert job("after_the_kill", folder=tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW8bit", "AdamW4bit", "AdamWFp8", "MuonAdamW"])
@pytest.mark.parametrize("strategy", ["ddp", "slm_fsdp2", "slm_zero1"])
def test_low_bit_states_and_stochastic_rounding_resume_bit_identically_on_two_processes(job, strategy, optimizer):
    found = job("optimizers")[strategy, optimizer]
    assert found["differences"] == []
    assert optimizer == "MuonAdamW" or {"torch.uint8", "torch.int8"} & set(found["dtypes"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*EVERY_CALLBACK, "BitNetPrecision", "Float8Precision", "Int8Precision", "Int4Precision"]
)
def test_a_module_that_shards_itself_for_lightnings_own_strategy_resumes_bit_identically(job, name):
    found = job("lightnings_own")[name]
    assert found["differences"] == []
    assert list(found["state_dict"]) == list(ForeignLlama().state_dict())
    if name != "GradualPruning":
        return
    weights = [found["state_dict"][t.name] for t in weight_targets(ForeignLlama())]
    assert all(((weight.reshape(-1, 4) == 0).sum(1) == 2).all() for weight in weights)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_on_four_processes_two_replicas_of_two_shards_learn_what_one_process_learns(job, tmp_path_factory):
    _, weights = one_process(False, (), str(tmp_path_factory.getbasetemp()))
    found = job("hybrid", processes=4)
    assert (found["weights"] - weights).norm() < 1e-4 * weights.norm()
    assert all(here * 2 == whole and dimensions == 2 for here, whole, dimensions in found["shapes"].values())


# Refusals, and what needs no second process.


def test_both_are_known_by_name():
    assert {"slm_fsdp2", "slm_zero1"} <= set(StrategyRegistry)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 1}, 'strategy="slm_zero1"'),
        ({"zero_stage": 4}, "must be 2 or 3"),
        ({"param_dtype": "fp8"}, "param_dtype='fp8' must be None or one of float32, bfloat16, float16"),
        ({"replicas": 0}, "at least 1"),
    ],
)
def test_impossible_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FSDP2Strategy(**options)


def fit_sharded(tmp_path, module, strategy=None, **kwargs):
    run = run_of(tmp_path, 1, strategy or FSDP2Strategy(), steps=2, **kwargs)
    run.fit(module, data(1))
    return run


def test_replicas_must_divide_the_processes(tmp_path):
    with pytest.raises(ValueError, match="replicas=2 must divide the 1 processes"):
        fit_sharded(tmp_path, make(), FSDP2Strategy(replicas=2))


def test_a_pattern_of_blocks_that_matches_nothing_lists_near_names(tmp_path):
    with pytest.raises(ValueError, match=r"blocks='\*layer' matches no module. Near names"):
        fit_sharded(tmp_path, make(), FSDP2Strategy(blocks="*layer"))


def test_a_module_that_shards_itself_is_not_sharded_again(tmp_path):
    with pytest.raises(ValueError, match="ShardedLlama shards itself in configure_model"):
        fit_sharded(tmp_path, ShardedLlama())


def test_manual_optimization_is_refused_with_the_way_out(tmp_path):
    module = Small()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r'Small optimises manually.*strategy="slm_zero1"'):
        fit_sharded(tmp_path, module)


def test_a_file_of_another_model_is_refused_with_the_layer(tmp_path):
    fit_sharded(tmp_path, make()).save_checkpoint(tmp_path / "small.ckpt")
    other = make()
    other.model = SLMForCausalLM(type(other.model.config)(vocab_size=64, hidden_size=64, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"is of another model: 'model.model.embed_tokens.weight' is \(64, 32\)"):
        run_of(tmp_path, 1, "slm_fsdp2").fit(other, data(1), ckpt_path=tmp_path / "small.ckpt")


def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "half.ckpt"
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(RuntimeError, match=r"PytorchStreamReader|zip|central directory"):
        run_of(tmp_path, 1, "slm_fsdp2").fit(make(), data(1), ckpt_path=path)
    assert path.read_bytes() == b"PK\x03\x04 cut off"


def test_an_optimizer_without_states_is_saved_and_restored(tmp_path):
    plain = functools.partial(torch.optim.SGD, lr=0.1)  # no momentum: its state dict is empty
    fit_sharded(tmp_path, make(optimizer=plain)).save_checkpoint(tmp_path / "end.ckpt")
    run = run_of(tmp_path, 1, "slm_fsdp2", steps=4)
    run.fit(make(optimizer=plain), data(1), ckpt_path=tmp_path / "end.ckpt")
    assert run.global_step == 4


class NoRule(nn.Module):
    """Its table is made by the constructor alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(8, 64))

    def forward(self, ids):
        return self.table[ids % 8]


class Small(LightningModule):
    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = NoRule()

    def training_step(self, batch):
        return self.net(batch["input_ids"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_nothing_initialises_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'net.table' of NoRule was built on the meta device.*reset_parameters"):
        fit_sharded(tmp_path, Small(), FSDP2Strategy(meta_init=True))


def test_any_module_trains_without_blocks_and_without_configure_model(tmp_path):
    run = fit_sharded(tmp_path, Small())
    assert run.global_step == 2
    assert repeated_blocks(run.lightning_module) == []


def test_the_strategies_stand_in_yaml(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    from lightning.pytorch.cli import LightningCLI

    args = [
        "--trainer.strategy=lightning_slm.FSDP2Strategy",
        "--trainer.strategy.zero_stage=2",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
    ]
    settings = {"run": False, "save_config_callback": None, "seed_everything_default": 0}
    cli = LightningCLI(Small, args=args, **settings)
    assert cli.trainer.strategy.zero_stage == 2
    cli = LightningCLI(Small, args=["--trainer.strategy=slm_zero1", *args[2:]], **settings)
    assert isinstance(cli.trainer.strategy, ZeRO1Strategy)
