"""StructuredPruning: when what goes, and the callback contract (DESIGN.md) for a model that becomes smaller."""

import itertools
import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from contract import MODULES, calibration, comparable, fit, flat, muon_in_float32, teacher_of
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from support import (
    ForeignLlama,
    Killed,
    Notes,
    SaveAndDie,
    batches,
    checkpoint,
    differences,
    kill_and_resume,
    leave_together,
    run_on_ranks,
    trainer,
)
from torch.optim import AdamW

from lightning_slm.callbacks import (
    CompressionReport,
    GradualPruning,
    KnowledgeDistillation,
    MagnitudePruning,
    QuantizationAwareTraining,
    StructuredPruning,
    ThroughputMonitor,
)
from lightning_slm.errors import NoEffectWarning
from lightning_slm.models import load_causal_lm
from lightning_slm.modules import CausalLM, muon_adamw
from lightning_slm.pruning import shape_of, structure_of, structured_

KINDS = ("foreign", "ours")
WHEN = {"at the start": {}, "gradually": {"begin": 0.25, "end": 0.9, "unit": ["ffn", "layer"], "ratio": 0.5}}
both = pytest.mark.parametrize("kind", KINDS)
cut_at = pytest.mark.parametrize("when", [{}, {"begin": 0.25, "end": 0.9}], ids=["at the start", "gradually"])


@pytest.fixture(autouse=True)
def _comparable_numbers(monkeypatch):
    monkeypatch.setattr(muon_adamw, "fast_dtype", muon_adamw.fast_dtype)  # put back afterwards
    muon_in_float32()


def pruning(kind, **arguments):
    """The same data whatever the batch size of a run, and on each of several ranks."""
    return StructuredPruning(**{"unit": ["ffn", "hidden"], "calibration": calibration(kind), **arguments})


def apart(first, second):
    return float((flat(first) - flat(second)).norm() / flat(first).norm())


@both
@cut_at
@pytest.mark.parametrize("unit", ["ffn", "layer", ["hidden", "ffn"]])
def test_a_run_killed_between_two_cuts_resumes_bit_identically_with_the_right_shapes(tmp_path, kind, when, unit):
    make = lambda: [pruning(kind, unit=unit, ratio=0.5, **when)]  # noqa: E731
    straight, resumed = kill_and_resume(MODULES[kind].make, make, tmp_path)
    assert differences(comparable(straight), comparable(resumed)) == []
    assert straight["notes"]
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
    count = lambda weights: sum(w.numel() for w in weights.values())  # noqa: E731
    sizes = [count(weights) for weights in (MODULES[kind].make().state_dict(), saved, straight["state_dict"])]
    assert sizes[0] > sizes[2]
    if unit == "layer" and when:  # the one of two layers that goes goes late
        assert sizes[0] == sizes[1]
    else:
        assert sizes[0] > sizes[1] >= sizes[2]
        assert (sizes[1] > sizes[2]) == bool(when)


@both
def test_a_checkpoint_is_tested_with_us_and_loads_without_a_trainer(tmp_path, kind):
    module, _, run = fit(kind, [pruning(kind)], tmp_path)
    path = tmp_path / "end.ckpt"
    checkpoint(run)
    (with_us,) = trainer(tmp_path, [pruning(kind)]).test(
        MODULES[kind].make(), batches(n=4), ckpt_path=path, verbose=False
    )
    (same,) = run.test(module, batches(n=4), verbose=False)
    assert with_us == same
    fresh = MODULES[kind].make()
    StructuredPruning.load_(fresh, path)
    assert differences(dict(fresh.state_dict()), dict(module.state_dict())) == []
    assert shape_of(fresh) == shape_of(module)
    if kind == "ours":
        loaded = CausalLM.load_from_checkpoint(path)
        assert differences(dict(loaded.state_dict()), dict(module.state_dict())) == []


@both
def test_what_comes_out_is_a_plain_folder(tmp_path, kind):
    module, _, _ = fit(kind, [pruning(kind)], tmp_path)
    network = getattr(module, MODULES[kind].network)
    network.save_pretrained(tmp_path / "small")
    loaded = load_causal_lm(tmp_path / "small")
    assert differences(dict(loaded.state_dict()), dict(network.state_dict())) == []


@both
@cut_at
def test_accumulated_gradients_do_what_the_large_batch_does(tmp_path, kind, when):
    large, _, run = fit(kind, [pruning(kind, **when)], tmp_path, batch_size=4)
    parts, _, in_parts = fit(kind, [pruning(kind, **when)], tmp_path, batch_size=2, accumulate_grad_batches=2)
    assert run.global_step == in_parts.global_step == 8
    assert apart(large, parts) < 0.01


@both
def test_bf16_mixed_resumes_with_the_weights_in_fp32(tmp_path, kind):
    make = lambda: [pruning(kind, begin=0.25, end=0.9)]  # noqa: E731
    ends = kill_and_resume(MODULES[kind].make, make, tmp_path, precision="bf16-mixed")
    assert differences(*map(comparable, ends)) == []
    assert {value.dtype for value in ends[0]["state_dict"].values()} == {torch.float32}


class NormAtTheStep(Callback):
    """The norm of all gradients as the optimizer sees them."""

    def __init__(self):
        self.norms = []

    def on_train_start(self, trainer, pl_module):
        def look(optimizer, *_):
            grads = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.norms.append(float(torch.stack(grads).norm()))

        trainer.optimizers[0].register_step_post_hook(look)


@both
def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path, kind):
    watch = NormAtTheStep()
    fit(kind, [pruning(kind, begin=0.25, end=0.9), watch], tmp_path, gradient_clip_val=0.01)
    assert watch.norms == pytest.approx([0.01] * 8, rel=1e-3)


def test_a_callback_can_be_used_again_on_the_module_that_it_made_smaller(tmp_path):
    ends = []
    for again in (True, False):
        first = pruning("foreign")
        module, _, _ = fit("foreign", [first], tmp_path)
        middle = shape_of(module)
        run = trainer(tmp_path, [first if again else pruning("foreign")])
        run.fit(module, batches(), batches())
        assert shape_of(module)["ffn"] < middle["ffn"]
        ends.append(comparable(checkpoint(run)))
    assert differences(*ends) == []


def test_a_run_broken_off_leaves_no_hooks(tmp_path):
    torch.manual_seed(0)
    module, callback = ForeignLlama(), pruning("foreign", begin=0.2, end=0.9)
    run = trainer(tmp_path, [callback, SaveAndDie(tmp_path / "saved.ckpt", 3)], enable_checkpointing=True)
    with pytest.raises(Killed):
        run.fit(module, batches(), batches())
    assert "on_load_checkpoint" not in vars(module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_two_instances_cut_in_turn_and_resume(tmp_path):
    pair = ({"unit": "ffn", "end": 0.8}, {"unit": "layer", "ratio": 0.5, "begin": 0.5, "end": 0.5})
    make = lambda: [pruning("foreign", **arguments) for arguments in pair]  # noqa: E731
    straight, resumed = kill_and_resume(ForeignLlama, make, tmp_path)
    assert differences(comparable(straight), comparable(resumed)) == []
    assert len([key for key in straight["callbacks"] if key.startswith("StructuredPruning")]) == 2
    assert not any(".layers.1." in key for key in straight["state_dict"])


class EagerLlama(ForeignLlama):
    """Has its optimizer before the Trainer has it, as LightningCLI does."""

    def __init__(self):
        super().__init__()
        self.optimizer = AdamW(self.parameters(), lr=1e-2)

    def configure_optimizers(self):
        return self.optimizer


def test_an_optimizer_that_was_there_before_resumes_too(tmp_path):
    make = lambda: [pruning("foreign", unit="layer", ratio=0.5)]  # noqa: E731
    straight, resumed = kill_and_resume(EagerLlama, make, tmp_path)
    assert differences(comparable(straight), comparable(resumed)) == []


@pytest.mark.parametrize("strategy", ["slm_fsdp2", "slm_zero1"])
def test_shards_of_the_old_shapes_are_refused_before_anything_happens(tmp_path, strategy):
    run = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r'StructuredPruning makes the model smaller.*use strategy="ddp"'):
        pruning("foreign").setup(run, ForeignLlama(), "fit")


def test_compiled_blocks_are_refused_with_the_way_out(tmp_path):
    def compile_block(module):
        module.net.model.layers[0].compile(backend="eager")

    with pytest.raises(ValueError, match=r"'net.model.layers.0' would go on as it was: train without compile"):
        fit("foreign", [pruning("foreign")], tmp_path, prepare=compile_block)


def test_an_average_of_the_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="EMAWeightAveraging keeps copies of its weights' shapes"):
        fit("foreign", [pruning("foreign"), EMAWeightAveraging(decay=0.7)], tmp_path)


# With other callbacks.


@pytest.fixture
def no_fresh_process(monkeypatch):
    """Without the measure of peak memory, which takes seconds."""
    monkeypatch.setattr("lightning_slm.measure.measured._measure_memory", lambda *args: None)


def teacher_and_student(**arguments):
    """One of each that may stand beside it."""
    return {
        "teacher": KnowledgeDistillation(teacher=teacher_of("foreign")),
        "rounding": QuantizationAwareTraining(group=16, begin=0.3),
        "zeros": GradualPruning(0.5, end=0.75, every=2),
        "pattern": MagnitudePruning(0.25, targets="*q_proj"),
        "smaller": pruning("foreign", **{"unit": ["ffn", "layer"], "ratio": 0.5, **arguments}),
        "speed": ThroughputMonitor(window=4, warmup=1),
    }


def test_in_any_order_of_the_list_the_same_comes_out(tmp_path):
    ends = []
    for order in list(itertools.permutations(range(6)))[::45]:
        callbacks = list(teacher_and_student().values())
        _, _, run = fit("foreign", [callbacks[i] for i in order], tmp_path)
        ends.append(comparable(checkpoint(run)))
    assert all(differences(ends[0], end) == [] for end in ends[1:])
    assert ends[0]["state_dict"]["net.model.layers.0.mlp.up_proj.weight"].shape == (32, 32)


def test_all_together_resume_bit_identically(tmp_path):
    straight, resumed = kill_and_resume(ForeignLlama, lambda: list(teacher_and_student().values()), tmp_path)
    assert differences(comparable(straight), comparable(resumed)) == []


def test_a_model_that_is_rounded_may_become_smaller_step_by_step(tmp_path):
    def make():
        chosen = teacher_and_student(begin=0.25, end=0.9, cuts=2)  # over 48 units, which are groups of 16
        return [chosen[name] for name in ("rounding", "teacher", "smaller")]

    straight, resumed = kill_and_resume(ForeignLlama, make, tmp_path)
    assert differences(comparable(straight), comparable(resumed)) == []


def test_rows_that_no_longer_go_into_the_groups_of_the_rounding_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"down_proj.*group"):
        fit("foreign", [pruning("foreign", shape={"ffn": 40}), QuantizationAwareTraining(group=32)], tmp_path)


@pytest.mark.parametrize("name", ["zeros", "pattern"])
def test_masks_and_gradual_cuts_are_refused_together(tmp_path, name):
    callbacks = teacher_and_student(begin=0.25, end=0.9)
    kind = type(callbacks[name]).__name__
    with pytest.raises(ValueError, match=f"{kind} keeps copies of its weights' shapes"):
        fit("foreign", [callbacks[name], callbacks["smaller"]], tmp_path)


@pytest.mark.usefixtures("no_fresh_process")
def test_a_report_that_stands_behind_it_has_the_large_model_as_before(tmp_path):
    report = CompressionReport(batches=1, prompt_tokens=2, new_tokens=2, runs=1)
    module, start, _ = fit("foreign", [pruning("foreign"), report], tmp_path)
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert rows["parameters"]["before"] == len(start)
    assert rows["parameters"]["after"] == len(flat(module)) < len(start)


# When, and what.


def parameters_by_step(folder, **arguments):
    notes = Notes()
    fit("foreign", [pruning("foreign", **arguments)], folder, logger=notes)
    return [int(values["slm/parameters"]) for values in notes.steps.values()]


def test_all_goes_at_once_or_in_equal_parts_from_begin_to_end(tmp_path):
    whole, unit = len(flat(ForeignLlama())), 2 * 3 * 32  # weights of a feed-forward unit in both layers
    assert parameters_by_step(tmp_path, unit="ffn", ratio=0.5) == [whole - 32 * unit] * 8
    counts = parameters_by_step(tmp_path, unit="ffn", ratio=0.5, begin=0.25, end=0.75, cuts=3)  # steps 2, 4 and 6
    left = [(count - whole) // unit + 64 for count in counts]
    assert left == [64, 64, 56, 56, 40, 40, 32, 32]


@pytest.mark.parametrize("target", [{"parameters": 12000}, {"flops": 26000, "context": 8}, {"shape": {"ffn": 20}}])
def test_other_targets_are_met_by_the_last_cut(tmp_path, target):
    module, _, _ = fit("foreign", [pruning("foreign", unit="ffn", begin=0.1, end=0.8, **target)], tmp_path)
    by_hand = ForeignLlama().net
    structured_(by_hand, criterion="magnitude", unit="ffn", **target)
    assert shape_of(module) == shape_of(by_hand)


def test_at_the_start_the_function_is_called_on_the_model_as_it_came(tmp_path):
    torch.manual_seed(0)
    by_hand = ForeignLlama()
    record = structured_(by_hand, calibration("foreign"), unit="ffn", criterion="taylor", ratio=0.5)
    _, _, run = fit("foreign", [pruning("foreign", unit="ffn", criterion="taylor", ratio=0.5)], tmp_path)
    (state,) = checkpoint(run)["callbacks"].values()
    assert state["structure"] == [[0, entry] for entry in record]


def test_states_of_the_optimizer_are_cut_along(tmp_path):
    module, _, run = fit("foreign", [pruning("foreign", unit=["ffn", "layer"], ratio=0.5, end=0.8)], tmp_path)
    (optimizer,) = run.optimizers
    parameters = list(module.parameters())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in parameters}
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in parameters)


def test_scores_can_be_overridden(tmp_path):
    class First(StructuredPruning):
        """Keeps the first ones."""

        def scores(self, pl_module, batches, run):
            return {group.name: -torch.arange(float(group.size)) for group in structure_of(pl_module, "ffn")}

    _, _, run = fit("foreign", [First(ratio=0.75)], tmp_path)
    (state,) = checkpoint(run)["callbacks"].values()
    assert set(map(tuple, state["structure"][0][1]["kept"].values())) == {tuple(range(16))}


def test_calibration_batches_are_drawn_from_the_training_data_and_change_no_random_number(tmp_path):
    ends = [fit("foreign", [pruning("foreign", calibration=3, seed=seed)], tmp_path)[2] for seed in (0, 0)]
    assert differences(*[comparable(checkpoint(run)) for run in ends]) == []


def test_a_run_that_ends_before_the_last_cut_says_so(tmp_path):
    for begin, kind in ((0.0, UserWarning), (0.8, NoEffectWarning)):
        run = trainer(tmp_path, [pruning("foreign", begin=begin, end=0.9), Stop()])
        with pytest.warns(kind, match=r"StructuredPruning made . of 4 cuts"):
            run.fit(ForeignLlama(), batches(), batches())


class Stop(Callback):
    """Ends the run after four steps."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.should_stop = trainer.global_step >= 4


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"begin": 0.7, "end": 0.6}, "must be 0 <= begin <= end < 1"),
        ({"cuts": 0}, "cuts=0 and calibration="),
        ({"calibration": 0}, "must be at least 1"),
        ({"ratio": 0.5, "shape": {"ffn": 3}}, "exactly one of"),
        ({"criterion": "tailor"}, "criterion='tailor' is unknown. Near names: 'taylor'"),
        ({"criterion": "loss"}, "is about 'layer' and says nothing about 'ffn'"),
        ({"shape": {"ffn": 100}}, "shape has ffn=100, but the model has 64"),
        ({"parameters": 10}, "cannot be reached by removing ffn, hidden"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_step(tmp_path, asked, complaint):
    with pytest.raises(ValueError, match=complaint):
        fit("foreign", [pruning("foreign", **asked)], tmp_path)


def test_a_module_without_a_known_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no model whose heads, feed-forward units"):
        fit("demo", [StructuredPruning()], tmp_path)


def test_a_run_of_unknown_length_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="give it one"):
        fit("foreign", [pruning("foreign", end=0.5)], tmp_path, steps=-1, max_epochs=-1, max_time="00:00:00:30")


def test_it_survives_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    wanted = {"unit": ["ffn", "layer"], "criterion": "taylor", "shape": {"ffn": 40, "layers": 1}, "end": 0.5, "cuts": 3}
    text = {"trainer": {"callbacks": [{"class_path": "StructuredPruning", "init_args": wanted}]}}
    made = []
    for _ in range(2):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(text))
        settings = {"run": False, "save_config_callback": None, "seed_everything_default": 0}
        args = [f"--config={tmp_path / 'run.yaml'}", "--trainer.logger=false"]
        cli = LightningCLI(ForeignLlama, args=args, **settings)
        made.append(next(c for c in cli.trainer.callbacks if isinstance(c, StructuredPruning)))
        text = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    for callback in made:
        assert {key: getattr(callback, key) for key in wanted} == wanted
    assert made[0].state_key == made[1].state_key


@pytest.mark.slow
def test_on_two_ranks_it_resumes_bit_identically_and_learns_what_one_process_learns(tmp_path):
    run_on_ranks(Path(__file__), tmp_path, timeout=600)
    for (kind, when), (found, agree, weights) in torch.load(tmp_path / "results.pt").items():
        assert found == []
        assert agree
        alone, _, _ = fit(kind, [pruning(kind, **WHEN[when])], tmp_path, batch_size=4)
        assert float((flat(alone) - weights).norm() / weights.norm()) < 0.01


def _on_two_ranks(folder):
    part = slice(int(os.environ.get("LOCAL_RANK", 0)), None, 2)
    pair = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    results = {}
    for kind, when in itertools.product(KINDS, WHEN):
        make = lambda: [pruning(kind, **WHEN[when])]  # noqa: B023, E731 (called at once)
        ends = kill_and_resume(MODULES[kind].make, make, folder, lambda: batches(part=part), **pair)
        module, _, run = fit(kind, make(), folder, part=part, **pair)
        ranks = run.strategy.all_gather(flat(module))
        results[kind, when] = (differences(*map(comparable, ends)), torch.equal(ranks[0], ranks[1]), ranks[0])
    torch.save(results, folder / "results.pt") if run.is_global_zero else None
    leave_together()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    muon_in_float32()
    _on_two_ranks(Path(sys.argv[1]))
