"""NMSparseTraining: what computes at every step, what trains, what is left at the end; and that the masks settle."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging
from support import (
    VOCABULARY,
    ForeignLlama,
    Killed,
    Notes,
    SaveAndDie,
    batches,
    checkpoint,
    differences,
    kill_and_resume,
    learned,
    trainer,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_slm.callbacks import GradualPruning, NMSparseTraining, QuantizationAwareTraining
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import magnitude_


def zeros_in_four(module):
    return {int(n) for t in weight_targets(module) for n in (t.weight.reshape(-1, 4) == 0).sum(1).unique()}


class WatchForwards(Callback):
    """How many of every four weights are zero in each forward pass, by stage; and between the steps."""

    def __init__(self):
        self.training, self.evaluation, self.between = set(), set(), set()

    def setup(self, trainer, pl_module, stage):
        def look(module, args):
            seen = self.training if trainer.training else self.evaluation
            seen |= zeros_in_four(pl_module)

        self.handle = pl_module.net.register_forward_pre_hook(lambda *args: look(*args))

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step < trainer.max_steps:
            self.between |= zeros_in_four(pl_module)

    def teardown(self, trainer, pl_module, stage):
        self.handle.remove()


def fit(folder, *callbacks, module=None, steps=10, **kwargs):
    torch.manual_seed(0)
    module = module or ForeignLlama()
    run = trainer(folder, callbacks, steps=steps, **kwargs)
    run.fit(module, batches(), batches(n=4))
    return module, run


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("order", [1, -1])
def test_every_forward_pass_has_two_of_four_and_the_steps_in_between_have_all(tmp_path, accumulate, order):
    watch, again = WatchForwards(), WatchForwards()
    callbacks = [watch, NMSparseTraining()][::order]
    module, _ = fit(
        tmp_path, *callbacks, num_sanity_val_steps=1, val_check_interval=2, accumulate_grad_batches=accumulate
    )
    assert (watch.training, watch.evaluation, watch.between) == ({2}, {2}, {0})
    assert zeros_in_four(module) == {2}
    trainer(tmp_path, [again]).test(module, batches(n=4), verbose=False)  # without us
    assert again.evaluation == {2}


class SaveTheLastStep(Checkpoint):
    """As the command line does: before any `on_train_end`."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == trainer.estimated_stepping_batches:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/last.ckpt")


@pytest.mark.parametrize("length", [{"steps": 6}, {"steps": -1, "max_epochs": 1, "limit_train_batches": 6}])
def test_a_checkpoint_of_the_last_step_has_two_of_four(tmp_path, length):
    fit(tmp_path, SaveTheLastStep(), NMSparseTraining(), enable_checkpointing=True, **length)
    assert zeros_in_four(ForeignLlama.load_from_checkpoint(tmp_path / "last.ckpt")) == {2}


def test_a_run_that_ends_early_ends_with_two_of_four(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 4

    module, run = fit(tmp_path, NMSparseTraining(), Stop())
    assert (run.global_step, zeros_in_four(module)) == (4, {2})


def test_a_checkpoint_of_a_run_that_goes_on_is_dense_and_is_tested_as_it_was_validated(tmp_path):
    run = trainer(tmp_path, [NMSparseTraining(), SaveAndDie(tmp_path / "saved.ckpt", 5)], enable_checkpointing=True)
    with pytest.raises(Killed):
        run.fit(ForeignLlama(), batches(), batches(n=4))
    saved = ForeignLlama.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert zeros_in_four(saved) == {0}
    watch = WatchForwards()
    with_us = trainer(tmp_path, [NMSparseTraining(), watch]).test(saved, batches(n=4), verbose=False)
    assert (watch.evaluation, zeros_in_four(saved)) == ({2}, {0})
    magnitude_(saved, sparsity=0.5, group=4)
    assert with_us == trainer(tmp_path).test(saved, batches(n=4), verbose=False)


class Formula(ForeignLlama):
    """The paper's update written out in the module: masks before the forward pass, decay before the step."""

    decay = 0.0

    def training_step(self, batch):
        self.dense = {t.name: t.weight.detach().clone() for t in weight_targets(self)}
        magnitude_(self, sparsity=0.5, group=4)
        return super().training_step(batch)

    def on_before_optimizer_step(self, optimizer):
        for target in weight_targets(self):
            dense, masked = self.dense[target.name], target.weight.detach().clone()
            target.weight.data.copy_(dense)
            target.weight.grad.add_(torch.where(masked == 0, dense, 0), alpha=self.decay)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.1])
def test_a_run_of_adamw_is_that_of_the_formula_bit_for_bit_and_the_decay_is_clipped_as_a_gradient(
    tmp_path, decay, clip
):
    reference = Formula()
    reference.decay = decay
    module = ForeignLlama()
    module.load_state_dict(reference.state_dict())
    fit(tmp_path, module=reference, gradient_clip_val=clip, limit_val_batches=0)
    fit(tmp_path, NMSparseTraining(decay=decay), module=module, gradient_clip_val=clip, limit_val_batches=0)
    magnitude_(reference, sparsity=0.5, group=4)
    assert differences(dict(reference.state_dict()), dict(module.state_dict())) == []


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_a_killed_and_resumed_run_is_bit_identical(tmp_path, warmup):
    def callbacks():
        return [NMSparseTraining(decay=0.05, warmup=warmup, flips_every=1)]

    straight, resumed = kill_and_resume(ForeignLlama, callbacks, tmp_path, saved_at=5, steps=12)
    assert differences(learned(straight), learned(resumed)) == []
    flips = [values["slm/mask_flips"] for values in straight["notes"].values() if "slm/mask_flips" in values]
    assert len(flips) == 7
    assert all(0 < share < 1 for share in flips)


def test_the_decay_rises_linearly_to_its_value(tmp_path):
    callback = NMSparseTraining(decay=0.1, warmup=0.5)
    fit(tmp_path, callback, steps=8)
    assert [callback.decay_at(step) for step in (0, 1, 2, 4, 8)] == pytest.approx([0.0, 0.025, 0.05, 0.1, 0.1])


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_batch_that_is_skipped_leaves_the_weights_dense(tmp_path):
    class Skips(ForeignLlama):
        def training_step(self, batch):
            return None if self.global_step % 2 else super().training_step(batch)

        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 7 else None

    watch = WatchForwards()
    module, _ = fit(tmp_path, NMSparseTraining(), watch, module=Skips())
    assert (watch.between, zeros_in_four(module)) == ({0}, {2})


@pytest.mark.parametrize("order", [1, -1])
def test_an_average_of_the_weights_is_validated_and_left_as_two_of_four(tmp_path, order):
    watch = WatchForwards()
    callbacks = [EMAWeightAveraging(decay=0.8), NMSparseTraining()][::order]
    module, _ = fit(tmp_path / str(order), *callbacks, watch, val_check_interval=2)
    assert (watch.training, watch.evaluation, zeros_in_four(module)) == ({2}, {2}, {2})


def test_rounded_layers_round_the_weights_that_are_left(tmp_path):
    module, _ = fit(tmp_path, NMSparseTraining(), QuantizationAwareTraining("int4_weight", group=16))
    assert zeros_in_four(module) == {2}


def test_two_instances_share_a_model_and_gradual_pruning_may_stand_beside_them(tmp_path):
    notes = Notes()
    module, _ = fit(
        tmp_path,
        NMSparseTraining(targets="*self_attn*"),
        NMSparseTraining(0.75, group=8, targets="*up_proj"),
        GradualPruning(0.25, targets="*down_proj", end=0.5),
        logger=notes,
    )
    shares = {"self_attn": 0.5, "up_proj": 0.75, "down_proj": 0.25, "gate_proj": 0.0}
    for target in weight_targets(module):
        expected = next(share for part, share in shares.items() if part in target.name)
        assert (target.weight == 0).float().mean() == expected, target.name
    last = notes.steps[9]
    assert (last["slm/sparsity/*self_attn*"], last["slm/sparsity/*up_proj"], last["slm/sparsity"]) == (0.5, 0.75, 0.25)
    assert 0 < last["slm/mask_flips/*up_proj"] < 1


def test_layers_born_in_configure_model_are_sparse(tmp_path):
    class Late(ForeignLlama):
        def __init__(self):
            super().__init__()
            self.made, self.net = self.net, None

        def configure_model(self):
            if self.net is None:
                self.net, self.made = self.made, None

    module, _ = fit(tmp_path, NMSparseTraining(targets="net.*"), module=Late())
    assert zeros_in_four(module) == {2}


def sentences(n, seed):
    """Words of which each makes a few others likely: learned in some hundred steps."""
    generator = torch.Generator().manual_seed(seed)
    likely = torch.rand(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(5)).pow(12)
    ids = torch.randint(VOCABULARY, (n, 1), generator=generator)
    for _ in range(31):
        ids = torch.cat([ids, torch.multinomial(likely[ids[:, -1]], 1, generator=generator)], 1)
    return [{"input_ids": row, "labels": row} for row in ids]


def test_the_decay_makes_masks_flip_less_in_a_model_that_learns(tmp_path):
    """As the paper says of images: the more decay, the fewer flips; here at no cost in loss."""
    flips, losses = [], []
    for decay in (0.0, 2e-4, 6e-3):
        torch.manual_seed(0)
        module, notes = ForeignLlama(hidden=64), Notes()
        run = trainer(tmp_path, [NMSparseTraining(decay=decay, flips_every=1)], steps=160, logger=notes)
        run.fit(module, StatefulDataLoader(sentences(2560, 1), batch_size=16))
        losses += [values["val_loss"] for values in run.validate(module, _test_sentences(), verbose=False)]
        seen = [values["slm/mask_flips"] for values in notes.steps.values() if "slm/mask_flips" in values]
        flips.append(sum(seen) / len(seen))
    print(flips, losses)  # for the card
    assert flips[0] > 1.02 * flips[1] > 1.02**2 * flips[2]
    assert max(losses) < 3.0  # of 4.16 = log(64), so it has learned
    assert losses[2] < losses[0] + 0.02


def _test_sentences():
    return StatefulDataLoader(sentences(128, 2), batch_size=64)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"decay": -1.0}, "decay=-1.0 must be 0 or positive"),
        ({"warmup": 1.5}, "warmup=1.5 is a fraction of the run"),
        ({"flips_every": 0}, "flips_every=0 must be at least 1"),
        ({"sparsity": 1.0}, "sparsity=1.0 must lie between 0 and 1"),
        ({"group": 3}, r"'net.model.layers.0.self_attn.q_proj.weight': sparsity=0.5 of group=3 must be whole"),
        ({"targets": "*q_prj"}, r"targets='\*q_prj' matches no weight of the model. Near names: .*q_proj'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_step(tmp_path, asked, complaint):
    with pytest.raises(ValueError, match=complaint):
        fit(tmp_path, NMSparseTraining(**asked))


def test_manual_optimization_and_runs_of_unknown_length_are_refused_with_the_way_out(tmp_path):
    manual = ForeignLlama()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match=r"use lightning_slm\.pruning\.NMWeights there"):
        fit(tmp_path, NMSparseTraining(), module=manual)
    with pytest.raises(ValueError, match=r"NMSparseTraining\(warmup=0.5\).* give the Trainer max_steps"):
        fit(tmp_path, NMSparseTraining(warmup=0.5), steps=-1, max_epochs=-1, max_time="00:00:00:30")


def test_a_second_run_goes_on_from_the_sparse_weights(tmp_path):
    module, _ = fit(tmp_path, NMSparseTraining())
    before = copy.deepcopy(module.state_dict())
    module, run = fit(tmp_path, NMSparseTraining(), module=module)
    assert zeros_in_four(module) == {2}
    assert differences(dict(before), dict(checkpoint(run)["state_dict"])) != []
