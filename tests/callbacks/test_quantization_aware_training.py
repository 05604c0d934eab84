"""QuantizationAwareTraining: when the network feels the rounding, and what the run leaves behind."""

import pytest
import torch
import transformers
from lightning.pytorch import Callback
from support import Demo, ForeignLlama, Notes, batches, differences, kill_and_resume, learned, trainer

from lightning_slm.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_slm.errors import NoEffectWarning
from lightning_slm.export import save_hf_folder
from lightning_slm.quantization import convert_qat_, enable_fake_quant_, fake_quant_layers


class Watch(Callback):
    """Whether each step, and each validation, was rounded."""

    def __init__(self):
        self.steps, self.validations = [], []

    def on_before_backward(self, trainer, pl_module, loss):
        self.steps.append((trainer.global_step, rounds(pl_module)))

    def on_validation_start(self, trainer, pl_module):
        self.validations.append((trainer.global_step, rounds(pl_module)))


def rounds(module):
    (on,) = {layer.fake_quant_enabled for _, layer in fake_quant_layers(module)}
    return on


def fit(folder, *callbacks, module=None, pairs=False, steps=8, **kwargs):
    torch.manual_seed(0)
    module = module or ForeignLlama()
    run = trainer(folder, callbacks, steps=steps, **kwargs)
    run.fit(module, batches(pairs), batches(pairs))
    return module


def test_rounding_begins_at_its_fraction_of_the_optimizer_steps_whatever_is_accumulated(tmp_path):
    watch = Watch()
    fit(tmp_path, QuantizationAwareTraining(begin=0.5), watch, accumulate_grad_batches=2, val_check_interval=4)
    assert watch.steps == [(step, step >= 4) for step in range(8) for _ in range(2)]
    assert watch.validations[:2] == [(0, False), (2, False)]  # the sanity check, and the first one
    assert watch.validations[-1] == (8, True)


def test_from_the_first_step_on_unless_asked_otherwise(tmp_path):
    watch = Watch()
    fit(tmp_path, QuantizationAwareTraining(), watch)
    assert {on for _, on in watch.steps + watch.validations} == {True}


def test_training_feels_the_rounding_and_the_weights_behind_it_move(tmp_path):
    plain = fit(tmp_path, steps=2)
    rounded = fit(tmp_path, QuantizationAwareTraining("int2_weight"), steps=2)
    start = (torch.manual_seed(0), ForeignLlama())[1]
    for (name, a), b, c in zip(rounded.named_parameters(), plain.parameters(), start.parameters()):
        assert not torch.equal(a, c), name
        if "proj" in name:
            assert not torch.equal(a, b), name


@pytest.mark.parametrize("saved_at", [2, 5], ids=["before it begins", "after"])
def test_a_killed_run_resumes_bit_identically(saved_at, tmp_path):
    straight, resumed = kill_and_resume(
        ForeignLlama, lambda: [QuantizationAwareTraining(begin=0.5)], tmp_path, saved_at=saved_at
    )
    assert differences(learned(straight), learned(resumed)) == []


def test_a_longer_run_begins_where_the_first_was_to_begin(tmp_path):
    first = trainer(tmp_path, [QuantizationAwareTraining(begin=0.5)], steps=6)
    first.fit(ForeignLlama(), batches())
    first.save_checkpoint(tmp_path / "six.ckpt")
    watch = Watch()
    again = trainer(tmp_path, [QuantizationAwareTraining(begin=0.5), watch], steps=12)
    again.fit(ForeignLlama(), batches(), ckpt_path=tmp_path / "six.ckpt")
    assert watch.steps == [(step, True) for step in range(6, 12)]


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create")
def test_a_checkpoint_is_that_of_the_plain_module_and_is_tested_rounded(tmp_path):
    module = ForeignLlama()
    keys = list(module.state_dict())
    run = trainer(tmp_path, [QuantizationAwareTraining("int2_weight")], steps=4)
    run.fit(module, batches(), batches())
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert list(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]) == keys
    plain = ForeignLlama.load_from_checkpoint(tmp_path / "end.ckpt")
    assert fake_quant_layers(plain) == []

    def tested(*callbacks):
        fresh = ForeignLlama()
        fresh.test_step = fresh.validation_step  # its own test_step logs another name
        (logged,) = trainer(tmp_path, callbacks).test(fresh, batches(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
        return logged["val_loss"]

    (after,) = run.validate(module, batches(), verbose=False)
    assert tested(QuantizationAwareTraining("int2_weight")) == after["val_loss"]
    assert tested() != after["val_loss"], "without us, the weights behind the codes"


def test_after_the_run_the_model_exports_packed_and_converts_exactly(tmp_path):
    module = fit(tmp_path, QuantizationAwareTraining(group=16), steps=4).eval()
    ids = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        fake = module.net(ids).logits
        done = save_hf_folder(module.net, tmp_path / "out")
        packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        convert_qat_(module)
        real = module.net(ids).logits
    assert done.quantized
    assert torch.equal(packed, fake)
    assert (real - fake).abs().max() == 0.0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_lightnings_own_demo_trains_rounded_in_every_precision(precision, tmp_path):
    callback = QuantizationAwareTraining("int4_weight", group=16, skip="*attn*")
    module = fit(tmp_path, callback, module=Demo(), pairs=True, precision=precision, steps=4).eval()
    ids = torch.arange(16).reshape(2, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        fake = module(ids, ids)
        convert_qat_(module)
        assert torch.equal(module(ids, ids), fake)


def test_two_instances_take_different_layers_and_begin_at_their_own_time(tmp_path):
    class Each(Callback):
        seen = []  # noqa: RUF012

        def on_before_backward(self, trainer, pl_module, loss):
            layers = dict(fake_quant_layers(pl_module))
            names = "net.model.layers.0.mlp.up_proj", "net.model.layers.0.self_attn.q_proj"
            self.seen.append([layers[n].fake_quant_enabled and layers[n].quant.bits for n in names])

    both = (
        QuantizationAwareTraining("int4_weight", targets="*mlp*", embedding=None),
        QuantizationAwareTraining("int8_weight", begin=0.5, skip="*mlp*"),
    )
    fit(tmp_path, *both, Each(), steps=4)
    assert Each.seen == [[4, False], [4, False], [4, 8], [4, 8]]
    assert len({callback.state_key for callback in both}) == 2


def test_layers_born_in_configure_model_are_prepared(tmp_path):
    class Late(ForeignLlama):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = ForeignLlama().net

    module = fit(tmp_path, QuantizationAwareTraining(), module=Late(), steps=2)
    assert len(fake_quant_layers(module)) == 2 * 7 + 2
    assert "configure_model" not in vars(module), "our wrap is taken off again"


def test_a_run_that_ends_before_it_begins_says_so(tmp_path):
    with pytest.warns(NoEffectWarning, match=r"rounded nothing: the run ended after 2 steps, and begin=1.0 is step 2"):
        fit(tmp_path, QuantizationAwareTraining(begin=1.0), steps=2)


def test_wrong_arguments_are_refused_when_they_are_given():
    with pytest.raises(ValueError, match=r"scheme='int4_wait' is unknown. Near names: 'int4_weight'"):
        QuantizationAwareTraining("int4_wait")
    with pytest.raises(ValueError, match="begin=3 is a fraction"):
        QuantizationAwareTraining(begin=3)


def test_a_run_of_unknown_length_is_refused_only_where_the_length_matters(tmp_path):
    endless = {"steps": -1, "max_epochs": -1, "max_time": {"seconds": 1}, "limit_train_batches": 2}
    fit(tmp_path, QuantizationAwareTraining(), **endless)
    with pytest.raises(ValueError, match="length is not known"):
        fit(tmp_path, QuantizationAwareTraining(begin=0.1), **endless)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler hides warnings of its own, but not once they are errors
def test_a_compiled_part_starts_to_round_in_the_middle_of_a_run(tmp_path):
    compiled = (torch.manual_seed(0), ForeignLlama(layers=1))[1]
    compiled.net.model.layers[0].mlp.compile(backend="aot_eager")
    losses = {}
    for name, module in {"eager": (torch.manual_seed(0), ForeignLlama(layers=1))[1], "compiled": compiled}.items():
        notes = Notes()
        fit(tmp_path, QuantizationAwareTraining("int4_weight", begin=0.5), module=module, steps=4, logger=notes)
        losses[name] = [notes.steps[step]["train_loss"] for step in range(4)]
    assert losses["compiled"] == pytest.approx(losses["eager"], abs=1e-3)
    x = torch.randn(1, 3, 32)
    mlp = compiled.net.model.layers[0].mlp
    rounded = mlp(x)
    enable_fake_quant_(mlp, False)
    assert not torch.allclose(mlp(x), rounded, atol=1e-3)
