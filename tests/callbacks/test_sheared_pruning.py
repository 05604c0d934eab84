"""`ShearedPruning` and `L0Pruning` in a Trainer: the exact shape, resumed in both phases. As a script: on two ranks.

``python tests/callbacks/test_sheared_pruning.py FOLDER`` lets Lightning start a second process.
"""

import itertools
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from contract import fit, flat, our_module, teacher_of, without_fresh_processes
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from support import (
    ForeignLlama,
    Notes,
    batches,
    checkpoint,
    differences,
    kill_and_resume,
    learned,
    leave_together,
    run_on_ranks,
    trainer,
)
from transformers import LlamaForCausalLM

from lightning_slm.callbacks import (
    CompressionReport,
    GradualPruning,
    KnowledgeDistillation,
    L0Pruning,
    NMSparseTraining,
    ShearedPruning,
)
from lightning_slm.callbacks._structure import structure_in
from lightning_slm.errors import NoEffectWarning
from lightning_slm.measure import measured
from lightning_slm.models import SLMForCausalLM
from lightning_slm.modules import CausalLM
from lightning_slm.pruning import replay_, shape_of

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create")
SHAPE = {"layers": 1, "heads": 1, "ffn": 24, "hidden": 24}
MAKE = {
    "ShearedPruning": partial(ShearedPruning, SHAPE, end=0.5),
    "L0Pruning": partial(L0Pruning, ["head", "ffn"], strength=1.0, end=0.5, lr=2.0),
}
MODULES = {"foreign": ForeignLlama, "ours": our_module}
every = pytest.mark.parametrize("name", MAKE)
both = pytest.mark.parametrize("kind", MODULES)


def shape(module, *keys):
    sizes = shape_of(module)
    return {key: sizes[key] for key in keys or SHAPE}


def test_the_model_comes_out_in_exactly_the_shape_and_loads_without_us(tmp_path):
    module, _, run = fit("foreign", [ShearedPruning(SHAPE, end=0.5)], tmp_path)
    assert run.global_step == 8
    assert shape(module) == SHAPE
    V, D, F, d = 64, 24, 24, 16  # vocabulary, channels, feed-forward units, width of the head
    assert sum(p.numel() for p in module.parameters()) == V * D + 4 * D * d + 3 * D * F + 3 * D
    module.net.save_pretrained(tmp_path / "small")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    ids = torch.randint(64, (2, 8))
    torch.testing.assert_close(loaded(ids).logits, module.net.eval()(ids).logits, atol=0, rtol=0)


def test_a_module_of_ours_saves_checkpoints_that_load_without_us(tmp_path):
    module, _, run = fit("ours", [ShearedPruning({"layers": 1, "ffn": 32}, end=0.5)], tmp_path)
    end = checkpoint(run)
    loaded = CausalLM.load_from_checkpoint(tmp_path / "end.ckpt")
    assert shape(loaded, "layers", "ffn") == {"layers": 1, "ffn": 32}
    assert differences(dict(loaded.state_dict()), end["state_dict"]) == []
    module.save_pretrained(tmp_path / "small")
    assert SLMForCausalLM.from_pretrained(tmp_path / "small").config.intermediate_size == 32
    (with_us,) = trainer(tmp_path, [ShearedPruning({"layers": 1, "ffn": 32})]).test(
        our_module(), batches(n=4), ckpt_path=tmp_path / "end.ckpt", verbose=False
    )
    (without_us,) = trainer(tmp_path).test(loaded, batches(n=4), verbose=False)
    assert with_us == without_us


def test_anyone_s_module_loads_a_checkpoint_after_the_record_was_replayed(tmp_path):
    _, _, run = fit("foreign", [ShearedPruning(SHAPE, end=0.5)], tmp_path)
    end, fresh = checkpoint(run), ForeignLlama()
    replay_(fresh, structure_in(end))
    fresh.load_state_dict(end["state_dict"])
    assert shape(fresh) == SHAPE


@pytest.mark.parametrize("saved_at", [2, 4, 6], ids=["while masks are learned", "right after the cut", "later"])
@both
@every
def test_a_killed_and_resumed_run_is_bit_identical(tmp_path, name, kind, saved_at):
    ends = kill_and_resume(MODULES[kind], lambda: [MAKE[name]()], tmp_path, saved_at=saved_at)
    assert differences(*map(learned, ends)) == []
    assert ends[0]["notes"]
    assert structure_in(ends[0])


def test_two_that_learn_masks_at_once_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Two callbacks learn masks from the first step on"):
        fit("foreign", [ShearedPruning({"ffn": 24}), L0Pruning()], tmp_path)


def test_cuts_are_replayed_in_the_order_of_their_steps():
    states = {"B": {"structure": [[3, {"b": 3}], [7, {"b": 7}]]}, "A": {"structure": [[5, {"a": 5}]]}, "C": {"x": 1}}
    assert structure_in({"callbacks": states}) == [{"b": 3}, {"a": 5}, {"b": 7}]


@both
@every
def test_accumulated_gradients_do_what_the_large_batch_does(tmp_path, name, kind):
    """Up to the order of sums: 1 % of the way; the same units stay."""
    large, _, _ = fit(kind, [MAKE[name]()], tmp_path, batch_size=4)
    parts, _, run = fit(kind, [MAKE[name]()], tmp_path, batch_size=2, accumulate_grad_batches=2)
    assert run.global_step == 8
    assert shape_of(large) == shape_of(parts)
    assert float((flat(large) - flat(parts)).norm() / flat(large).norm()) < 0.01


@every
def test_bf16_mixed_keeps_the_weights_in_fp32_and_resumes(tmp_path, name):
    ends = kill_and_resume(ForeignLlama, lambda: [MAKE[name]()], tmp_path, saved_at=2, precision="bf16-mixed")
    assert differences(*map(learned, ends)) == []
    assert {value.dtype for value in ends[0]["state_dict"].values()} == {torch.float32}


@every
def test_a_second_run_with_the_old_object_is_one_with_a_new_object(tmp_path, name):
    ends = []
    for again in (True, False):
        first = MAKE[name]()
        module, _, _ = fit("foreign", [first], tmp_path)
        run = trainer(tmp_path, [first if again else MAKE[name]()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)  # of a shape that is there already
            run.fit(module, batches(), batches())
        ends.append(learned(checkpoint(run)))
    assert differences(*ends) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_expected_counts_come_near_the_shape_and_are_logged(tmp_path):
    """150 steps of the masks: within 10 % before the cut."""
    notes = Notes()
    run = trainer(tmp_path, [ShearedPruning({"ffn": 24, "hidden": 24}, end=0.95)], steps=160, logger=notes)
    torch.manual_seed(0)
    run.fit(ForeignLlama(), batches(n=64, words=8))
    assert notes.steps[0]["slm/l0/ffn"] > 60
    assert notes.steps[150]["slm/l0/ffn"] == pytest.approx(24, rel=0.1)
    assert notes.steps[150]["slm/l0/hidden"] == pytest.approx(24, rel=0.1)
    assert notes.steps[159]["slm/l0/ffn"] == 24
    assert "slm/lagrangian" in notes.steps[150]


def test_training_sees_a_sample_and_validation_the_gates_without_randomness(tmp_path):
    callback, seen = ShearedPruning({"ffn": 24}, end=1.0), []
    module = ForeignLlama()

    def look(layer, args):
        if callback._view is not None:
            name = "model.layers.0.mlp/ffn"
            middle = callback._masks.gates.middle()[name]
            seen.append((torch.is_grad_enabled(), torch.equal(callback._gates[name], middle)))

    module.net.model.layers[0].mlp.down_proj.register_forward_pre_hook(look)
    run = trainer(tmp_path, [callback], steps=16, val_check_interval=8)
    callback_make = callback.make_masks

    def half_open(pl_module):
        masks = callback_make(pl_module)
        for log_alpha in masks.gates.log_alpha:
            log_alpha.data.zero_()
        return masks

    callback.make_masks = half_open
    run.fit(module, batches(), batches(n=4))
    assert set(seen) == {(True, False), (False, True)}


def test_every_order_with_distillation_and_a_report_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "peak_memory", measured.peak_memory)  # put back afterwards
    without_fresh_processes()
    ends = []
    for order in itertools.permutations(range(3)):
        report = CompressionReport(batches=1, prompt_tokens=2, new_tokens=2, runs=1)
        callbacks = [ShearedPruning(SHAPE, end=0.5), KnowledgeDistillation(teacher_of("foreign")), report]
        module, _, _ = fit("foreign", [callbacks[i] for i in order], tmp_path)
        assert shape(module) == SHAPE
        ends.append(dict(module.state_dict()))
    assert all(differences(ends[0], end) == [] for end in ends[1:])


@pytest.mark.parametrize(
    "other",
    [lambda: GradualPruning(0.5), NMSparseTraining, lambda: EMAWeightAveraging(decay=0.5)],
    ids=["GradualPruning", "NMSparseTraining", "EMA"],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_keeps_the_old_shapes_is_refused(tmp_path, other, first):
    callbacks = [ShearedPruning(SHAPE), other()] if first else [other(), ShearedPruning(SHAPE)]
    with pytest.raises(ValueError, match=r"ShearedPruning makes the model smaller while it trains, and .* second run"):
        fit("foreign", callbacks, tmp_path)


def test_what_would_not_survive_the_cut_is_refused_before_anything_happens(tmp_path):
    with pytest.raises(ValueError, match=r"what was compiled of 'net.model.layers.0' would go on as it was"):
        fit(
            "foreign",
            [MAKE["L0Pruning"]()],
            tmp_path,
            prepare=lambda m: m.net.model.layers[0].compile(backend="aot_eager"),
        )
    for strategy, what in (("slm_fsdp2", "keeps weights in shards"), ("slm_zero1", "optimizer's states in shards")):
        run = trainer(tmp_path, strategy=strategy)
        with pytest.raises(ValueError, match=what):
            ShearedPruning(SHAPE).setup(run, ForeignLlama(), "fit")


def test_a_shape_that_cannot_be_is_refused_in_setup(tmp_path):
    for kind, wrong in (("foreign", {"ffn": 65}), ("ours", {"ffn": 65}), ("foreign", {"hidden": 31})):
        with pytest.raises(ValueError, match=r"shape has ffn=65|LlamaConfig cannot say"):
            fit(kind, [ShearedPruning(wrong)], tmp_path)
    for wrong in ({"shape": {}}, {"shape": SHAPE, "end": 0}, {"shape": SHAPE, "warmup": 2}, {"shape": SHAPE, "lr": 0}):
        with pytest.raises(ValueError, match=r"names nothing|fraction of|must be above 0"):
            ShearedPruning(**wrong)


def test_a_shape_that_is_there_already_has_no_effect_and_a_run_that_ends_early_says_so(tmp_path):
    with pytest.warns(NoEffectWarning, match="nothing shall go"):
        fit("foreign", [ShearedPruning({"ffn": 64})], tmp_path)
    run = trainer(tmp_path, [ShearedPruning(SHAPE, end=1.0)], steps=100, limit_train_batches=4, max_epochs=1)
    callback = next(c for c in run.callbacks if isinstance(c, ShearedPruning))
    callback._steps = lambda total: 100
    with pytest.warns(UserWarning, match="cuts the model after step 100"):
        run.fit(ForeignLlama(), batches())


def test_heads_at_no_price_all_stay_and_at_a_high_one_only_one_of_a_layer(tmp_path):
    for strength, left in ((0.0, 2), (100.0, 1)):
        module, _, _ = fit("foreign", [L0Pruning(strength=strength, lr=3.0, end=0.9)], tmp_path)
        assert shape(module, "heads") == {"heads": left}


@every
def test_yaml_in_yaml_out_is_the_same_callback(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    wanted = {"shape": {"ffn": 32, "layers": 2}, "end": 0.3} if name == "ShearedPruning" else {"unit": ["head"]}
    settings = {"run": False, "save_config_callback": None, "seed_everything_default": 0}
    callbacks = [{"class_path": f"lightning_slm.{name}", "init_args": wanted}]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "logger": False}}))
    cli = LightningCLI(ForeignLlama, args=[f"--config={tmp_path / 'short.yaml'}"], **settings)
    made = next(c for c in cli.trainer.callbacks if type(c).__name__ == name)
    assert {key: getattr(made, key) for key in wanted} == wanted


# Two ranks.


@pytest.mark.slow
def test_on_two_ranks_both_have_the_same_model_resume_bit_identically_and_learn_what_one_learns(tmp_path):
    run_on_ranks(Path(__file__), tmp_path, timeout=300)
    for name, kind in itertools.product(MAKE, MODULES):
        found = [torch.load(tmp_path / f"{name}-{kind}.{rank}.pt") for rank in range(2)]
        assert found[0]["differences"] == {2: [], 6: []}
        assert differences(found[0]["weights"], found[1]["weights"]) == []
        alone, _, _ = fit(kind, [MAKE[name]()], tmp_path, batch_size=4)
        theirs = torch.cat([w.flatten() for w in found[0]["weights"].values()])
        assert theirs.shape == flat(alone).shape
        assert float((flat(alone) - theirs).norm() / flat(alone).norm()) < 0.01


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ.get("LOCAL_RANK", 0))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    part = slice(rank, None, 2)
    pair = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    for name, kind in itertools.product(MAKE, MODULES):
        found = {}
        for saved_at in (2, 6):
            make = partial(lambda name: [MAKE[name]()], name)
            ends = kill_and_resume(MODULES[kind], make, folder, partial(batches, part=part), saved_at, **pair)
            found[saved_at] = differences(*map(learned, ends))
        module, _, _ = fit(kind, [MAKE[name]()], folder, part=part, **pair)
        weights = {key: p.detach() for key, p in module.named_parameters()}
        torch.save({"differences": found, "weights": weights}, folder / f"{name}-{kind}.{rank}.pt")
    leave_together()
