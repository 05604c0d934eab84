"""GradualPruning: what is zero, when, and that it stays so."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning
from support import ForeignLlama, Notes, batches, differences, kill_and_resume, learned, trainer
from torch import nn

from lightning_slm.callbacks.gradual_pruning import GradualPruning
from lightning_slm.errors import NoEffectWarning
from lightning_slm.nn.targets import weight_targets
from lightning_slm.pruning import cubic_sparsity


class Watch(Callback):
    """The zeros of every target after every optimizer step, counted before any other callback may act."""

    def __init__(self, targets="*"):
        self.targets, self.zeros, self.momentum = targets, [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = [t.weight for t in weight_targets(pl_module, self.targets)]
        self.zeros.append(torch.cat([(w == 0).flatten() for w in weights]))
        moments = [trainer.optimizers[0].state[w].get("exp_avg", w) for w in weights]
        self.momentum.append(torch.cat([(m == 0).flatten() for m in moments]))


def fit(folder, *callbacks, module=None, steps=10, **kwargs):
    torch.manual_seed(0)
    module = module or ForeignLlama()
    run = trainer(folder, callbacks, steps=steps, **kwargs)
    run.fit(module, batches())
    return module


def test_sparsity_is_the_cubic_schedule_exactly_and_nothing_pruned_comes_back(tmp_path):
    watch, notes = Watch(), Notes()
    fit(tmp_path, watch, GradualPruning(0.5, begin=0.1, end=0.7, every=2), steps=20, logger=notes)
    due = {step: cubic_sparsity((step - 2) / 12, 0.0, 0.5) for step in range(4, 15, 2)}
    sizes = [t.weight.numel() for t in weight_targets(ForeignLlama())]
    expected = 0
    for step, zeros in enumerate(watch.zeros, start=1):
        expected = sum(round(due[step] * n) for n in sizes) if step in due else expected
        assert int(zeros.sum()) == expected
        assert notes.steps[step - 1]["slm/sparsity"] == pytest.approx(expected / sum(sizes), abs=1e-7)  # float32
        if step > 1:
            assert not (watch.zeros[step - 2] & ~zeros).any()
    assert expected == sum(sizes) / 2


def test_two_of_four_rises_smoothly_and_ends_exactly(tmp_path):
    watch = Watch()
    model = fit(tmp_path, watch, GradualPruning(0.5, group=4, end=0.8, every=1), steps=10)
    for target in weight_targets(model):
        assert ((target.weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    counts = [int(z.sum()) for z in watch.zeros]
    sizes = [t.weight.numel() for t in weight_targets(model)]
    assert counts == [sum(round(cubic_sparsity(step / 8, 0.0, 0.5) * n) for n in sizes) for step in range(1, 11)]


def test_a_global_budget_is_exact_over_all_layers_and_uneven_between_them(tmp_path):
    model = fit(tmp_path, GradualPruning(0.5, end=0.5, budget="global"))
    weights = [t.weight for t in weight_targets(model)]
    assert sum(int((w == 0).sum()) for w in weights) == sum(w.numel() for w in weights) / 2
    assert len({int((w == 0).sum()) / w.numel() for w in weights}) > 1


def test_pruned_weights_have_no_momentum(tmp_path):
    watch = Watch()
    fit(tmp_path, watch, GradualPruning(0.5, end=0.5, every=2), gradient_clip_val=0.5)
    for zeros, momentum in zip(watch.zeros, watch.momentum):
        assert zeros.any() == (zeros & momentum).any()
        assert not (zeros & ~momentum).any()


def test_the_clipped_norm_is_that_of_the_weights_that_live(tmp_path):
    class Norms(Callback):
        seen = None

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [t.weight.grad[t.weight == 0] for t in weight_targets(pl_module) if t.weight.grad is not None]
            if grads and trainer.global_step > 5:
                self.seen = max(float(g.abs().max()) for g in grads)

    norms = Norms()
    fit(tmp_path, norms, GradualPruning(0.5, end=0.4, every=1))
    assert norms.seen == 0.0


def test_only_what_is_targeted_is_pruned_and_two_instances_share_a_model(tmp_path):
    notes = Notes()
    model = fit(
        tmp_path,
        GradualPruning(0.25, targets="*self_attn*", end=0.5),
        GradualPruning(0.75, group=4, targets="*mlp*", skip="*down_proj", end=0.5),
        logger=notes,
    )
    for target in weight_targets(model):
        share = (target.weight == 0).float().mean().item()
        assert share == (0.25 if "self_attn" in target.name else 0.0 if "down" in target.name else 0.75)
    last = notes.steps[9]
    assert (last["slm/sparsity/*self_attn*"], last["slm/sparsity/*mlp*"]) == (0.25, 0.75)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("saved_at", [5, 10], ids=["on the ramp", "after it"])
def test_a_killed_and_resumed_run_is_bit_identical(tmp_path, group, saved_at):
    def callbacks():
        return [GradualPruning(0.5, group=group, end=0.75, every=4)]  # prunes after 4, 8 and 9 steps

    straight, resumed = kill_and_resume(ForeignLlama, callbacks, tmp_path, saved_at=saved_at, steps=12)
    assert differences(learned(straight), learned(resumed)) == []


class ZeroBorn(ForeignLlama):
    """Some weights are zero without being pruned: a zero-initialised projection that has not learned yet."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.net.model.layers[0].self_attn.o_proj.weight)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        asleep = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step < 6 else 1.0)
        return [optimizer], [{"scheduler": asleep, "interval": "step"}]


def test_zeros_that_were_not_pruned_wake_up_after_a_resume_as_without_one(tmp_path):
    def callbacks():
        return [GradualPruning(0.5, end=0.3, every=1)]

    straight, resumed = kill_and_resume(ZeroBorn, callbacks, tmp_path, saved_at=5, steps=10)
    assert differences(learned(straight), learned(resumed)) == []
    weight = resumed["state_dict"]["net.model.layers.0.self_attn.o_proj.weight"]
    assert int((weight == 0).sum()) == weight.numel() // 2


def lightnings_pruning(permanent):
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=None,
        parameter_names=["weight"],
        amount=0.5,
        use_lottery_ticket_hypothesis=False,
        use_global_unstructured=False,
        make_pruning_permanent=permanent,
        apply_pruning=lambda epoch: epoch == 0,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("permanent", [True, False])
def test_lightnings_own_model_pruning_fails_the_same_test(tmp_path, permanent):
    """The comparison of the card. Epochs of 4 steps: it prunes at their ends only, so the save at step 9 has masks."""

    def callbacks():
        return [lightnings_pruning(permanent)]

    def run():
        return kill_and_resume(ForeignLlama, callbacks, tmp_path, lambda: batches(n=8), saved_at=9, steps=11)

    if not permanent:
        with pytest.raises(RuntimeError, match="Missing key"):
            run()
        return
    straight, resumed = run()
    name = "net.model.layers.0.mlp.up_proj.weight"
    assert [(end["state_dict"][name] == 0).float().mean().item() for end in (straight, resumed)] == [0.5, 0.0]


def test_an_average_of_the_weights_is_as_sparse_as_they_are(tmp_path):
    for i, order in enumerate(([0, 1], [1, 0])):
        callbacks = [EMAWeightAveraging(decay=0.8), GradualPruning(0.5, group=4, end=0.6, every=1)]
        model = fit(tmp_path / str(i), *(callbacks[j] for j in order))
        assert all(((t.weight.reshape(-1, 4) == 0).sum(1) == 2).all() for t in weight_targets(model))


def test_layers_born_in_configure_model_are_pruned(tmp_path):
    class Late(ForeignLlama):
        def __init__(self):
            super().__init__()
            self.made, self.net = self.net, None

        def configure_model(self):
            if self.net is None:
                self.net, self.made = self.made, None

    model = fit(tmp_path, GradualPruning(0.5, end=0.5, targets="net.*"), module=Late())
    assert all((t.weight == 0).float().mean() == 0.5 for t in weight_targets(model))


def test_begin_equal_to_end_at_zero_holds_a_pruned_model_as_it_came(tmp_path):
    once = fit(tmp_path, GradualPruning(0.5, end=0.5))
    before = {t.name: t.weight == 0 for t in weight_targets(once)}
    fit(tmp_path, GradualPruning(0.5, end=0.0), module=once)
    assert all(torch.equal(t.weight == 0, before[t.name]) for t in weight_targets(once))


def test_pruning_at_once_waits_until_all_have_seen_the_model_as_it_came(tmp_path):
    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            self.start = all((t.weight != 0).all() for t in weight_targets(pl_module))

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.first = getattr(self, "first", all((t.weight == 0).any() for t in weight_targets(pl_module)))

    look = Look()
    fit(tmp_path, GradualPruning(0.5, end=0.0), look)
    assert (look.start, look.first) == (True, True)


def test_a_resumed_run_without_our_state_catches_up_with_the_schedule(tmp_path):
    dense = trainer(tmp_path, steps=10)
    dense.fit(ForeignLlama(), batches(), ckpt_path=None)
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    watch, model = Watch(), ForeignLlama()
    run = trainer(tmp_path, [watch, GradualPruning(0.5, end=0.5)], steps=12)
    run.fit(model, batches(), ckpt_path=tmp_path / "dense.ckpt")
    assert [z.float().mean().item() for z in watch.zeros] == [0.5, 0.5]


def test_another_criterion_is_one_method(tmp_path):
    class KeepTheFirstInputs(GradualPruning):
        def scores(self, target):
            return -torch.arange(target.weight.shape[1]).float().expand_as(target.weight)

    model = fit(tmp_path, KeepTheFirstInputs(0.5, end=0.5))
    for target in weight_targets(model):
        half = target.weight.shape[1] // 2
        assert (target.weight[:, half:] == 0).all()
        assert (target.weight[:, :half] != 0).all()


class Record(Callback):
    """Weight, gradient and inputs of every training step of one layer, before anyone may act on them."""

    name = "net.model.layers.1.mlp.up_proj"

    def __init__(self):
        self.weights, self.grads, self.inputs = [], [], []

    def on_train_start(self, trainer, pl_module):
        def look(module, args):
            if module.training:
                self.inputs.append(args[0].detach().flatten(0, 1))

        pl_module.get_submodule(self.name).register_forward_pre_hook(look)

    def on_after_backward(self, trainer, pl_module):
        weight = pl_module.get_submodule(self.name).weight
        self.weights.append(weight.detach().clone())
        self.grads.append(weight.grad.clone())


def lowest(scores, count):
    """True at the lowest, by a sort of the whole layer."""
    order = scores.flatten().argsort()[:count]
    return torch.zeros(scores.numel(), dtype=torch.bool).scatter_(0, order, True).view_as(scores)


@pytest.mark.parametrize("criterion", ["movement", "taylor", "wanda"])
def test_the_first_weights_to_go_are_those_of_the_criterions_formula(tmp_path, criterion):
    """Pruned at once after 6 steps, which the criterion has seen, as their gradients are before clipping."""
    record, callback = Record(), GradualPruning(0.75, begin=0.6, end=0.6, criterion=criterion)
    model = fit(tmp_path, record, callback, gradient_clip_val=0.1)
    grads = [w * g for w, g in zip(record.weights[:6], record.grads[:6])]
    zeros = model.get_submodule(record.name).weight == 0
    if criterion != "wanda":
        scores = -sum(grads) if criterion == "movement" else sum(x.square() for x in grads)
        assert torch.equal(zeros, lowest(scores, round(0.75 * scores.numel())))
        return
    norms = torch.cat(record.inputs[:6]).norm(dim=0)
    dense = fit(tmp_path, gradient_clip_val=0.1, steps=6).get_submodule(record.name).weight.detach()
    assert torch.equal(zeros, torch.stack([lowest(row, round(0.75 * len(row))) for row in dense.abs() * norms]))


@pytest.mark.parametrize("saved_at", [5, 10], ids=["on the ramp", "after it"])
@pytest.mark.parametrize("criterion", ["movement", "taylor", "wanda"])
def test_what_a_criterion_has_seen_survives_a_kill(tmp_path, criterion, saved_at):
    def callbacks():  # saved between two looks, of which the second one depends on all that was seen
        return [GradualPruning(0.5, end=0.75, every=4, criterion=criterion)]

    straight, resumed = kill_and_resume(ForeignLlama, callbacks, tmp_path, saved_at=saved_at, steps=12)
    assert differences(learned(straight), learned(resumed)) == []


@pytest.mark.parametrize("criterion", ["movement", "taylor", "wanda"])
@pytest.mark.parametrize("group", [None, 4])
def test_every_criterion_ends_at_the_share_asked_for_and_accumulates_over_micro_batches(tmp_path, criterion, group):
    ends = []
    for size, parts in ((2, 1), (1, 2)):
        torch.manual_seed(0)
        module = ForeignLlama()
        callback = GradualPruning(0.5, group=group, end=0.5, every=2, criterion=criterion)
        run = trainer(tmp_path, [callback], steps=8, accumulate_grad_batches=parts)
        run.fit(module, batches(batch_size=size))
        ends.append(module)
        assert all((t.weight == 0).float().mean() == 0.5 for t in weight_targets(module))
    same = [(a.weight == 0) == (b.weight == 0) for a, b in zip(*map(weight_targets, ends))]
    assert torch.cat([s.flatten() for s in same]).float().mean() > 0.99  # up to the order of sums


def test_a_budget_of_rows_is_exact_in_every_row(tmp_path):
    model = fit(tmp_path, GradualPruning(0.5, end=0.5, budget="row"))
    for target in weight_targets(model):
        assert ((target.weight == 0).sum(1) == target.weight.shape[1] // 2).all()


def test_a_criterion_that_has_seen_nothing_waits_for_the_steps_of_one_look(tmp_path):
    watch = Watch()
    fit(tmp_path, watch, GradualPruning(0.5, end=0.0, every=4, criterion="movement"))
    assert [z.float().mean().item() for z in watch.zeros] == [0.0] * 4 + [0.5] * 6
    with pytest.warns(NoEffectWarning, match=r"a sparsity of 0.000 of 0.5"):
        fit(tmp_path, GradualPruning(0.5, end=0.0, every=40, criterion="movement"))


def test_frozen_weights_cannot_be_judged_by_their_gradient(tmp_path):
    module = ForeignLlama()
    module.net.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight' is frozen.* skip it"):
        fit(tmp_path, GradualPruning(criterion="taylor"), module=module)
    fit(tmp_path, GradualPruning(criterion="wanda"), module=module)


def test_a_run_too_short_says_so(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 4

    with pytest.warns(NoEffectWarning, match=r"sparsity of 0.000 of 0.5: it runs from step 5 to 9"):
        fit(tmp_path, GradualPruning(0.5, begin=0.5, end=0.9), Stop())
    with pytest.warns(UserWarning, match=r"the run ended after 4 steps. Resume it, or choose smaller") as caught:
        fit(tmp_path, GradualPruning(0.5, end=0.9, every=1), Stop())
    assert not any(isinstance(w.message, NoEffectWarning) for w in caught)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"begin": 0.7, "end": 0.6}, "must be 0 <= begin <= end <= 1"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"budget": "model"}, "budget='model' must be 'row', 'layer', 'global' or None"),
        ({"criterion": "movements"}, "criterion='movements' is unknown. Near names: 'movement'"),
        ({"sparsity": 0.0}, "sparsity=0.0 must lie between 0 and 1"),
        ({"group": 3}, r"'net.model.layers.0.self_attn.q_proj.weight': sparsity=0.5 of group=3 must be whole"),
        ({"targets": "*q_prj"}, r"targets='\*q_prj' matches no weight of the model. Near names: .*q_proj'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_step(tmp_path, asked, complaint):
    with pytest.raises(ValueError, match=complaint):
        fit(tmp_path, GradualPruning(**asked))


def test_a_run_of_unknown_length_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="give it one"):
        fit(tmp_path, GradualPruning(0.5), steps=-1, max_epochs=-1, max_time="00:00:00:30")
