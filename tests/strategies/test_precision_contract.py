"""Every precision plugin: alone, with every callback, on one process and on two under every strategy.

What goes together is bit-identical after a kill; what does not is refused with the reason.
"""

import functools
import json
import sys
from functools import partial

import pytest
import torch
import yaml
from contract import (
    EVERY_CALLBACK,
    EVERY_PRECISION,
    EVERY_SETTING,
    FROZEN,
    MODULES,
    STRATEGIES,
    combinable,
    comparable,
    fit,
    flat,
    in_base,
    layer_of,
    logged,
    muon_in_float32,
    pruned,
    refusal,
    without_fresh_processes,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from support import Demo, ForeignLlama, Notes, batches, differences, kill_and_resume, trainer
from torch import nn

import lightning_slm
from lightning_slm import strategies as registry
from lightning_slm._cli import packaged
from lightning_slm.nn.targets import weight_targets
from lightning_slm.quantization.bitnet import bitnet_
from lightning_slm.quantization.bnb import llm_int8_, nf4_
from lightning_slm.quantization.float8 import float8_
from lightning_slm.quantization.int4 import int4_
from lightning_slm.quantization.int8 import int8_
from lightning_slm.strategies._low_bit import LowBitPrecision, refuse_strategy

every_precision = pytest.mark.parametrize("precision", EVERY_PRECISION)
ONE_OF_EACH = [name for name in EVERY_PRECISION if "," not in name]
one_of_each = pytest.mark.parametrize("precision", ONE_OF_EACH)
not_everything = pytest.mark.filterwarnings("ignore:Not quantised, for only the forward")  # the demo's in_proj_weight

# What each does to layers.
BY_HAND = {
    "BitNetPrecision": bitnet_,
    "Float8Precision": partial(float8_, emulate=True),
    "Int4Precision": int4_,
    "Int8Precision": int8_,
    "Int8Precision, blockwise": partial(int8_, recipe="blockwise"),
    "LLMInt8Precision": llm_int8_,
    "NF4Precision": partial(nf4_, block=32),
}
# Those that keep something beside the plain weights.
WITH_STATE = ("BitNetPrecision, 1 bit", "NF4Precision")
# How far the losses may be from those in bf16. A frozen network learns something else; BitNet's is another function.
SHARE = {"Float8Precision": 0.05, "Int4Precision": 0.15, "Int8Precision": 0.05}
NEAR = [(name, SHARE[kind]) for name in EVERY_SETTING if (kind := name.partition(",")[0]) in SHARE]
# Twenty batches of random tokens, of which there are a dozen: that much can be learned of them in twenty steps.
TWENTY = {"loader": partial(batches, words=12), "n": 160, "batch_size": 8, "steps": 20}
# Options as the command line gives them.
OPTIONS = [
    ("BitNetPrecision", {"bits": "1.58", "warmup": 0.1}),  # strings that look like numbers
    ("BitNetPrecision", {"bits": "1", "warmup": 0.1}),
    ("Float8Precision", {"recipe": "rowwise", "emulate": True}),
    ("Int4Precision", {"sampled": False, "skip": "*k_proj"}),
    ("Int8Precision", {"recipe": "blockwise", "block": 16}),
    ("LLMInt8Precision", {"threshold": 3.5}),
    ("NF4Precision", {"block": 32, "skip": ["*down_proj"]}),
]
# Where the packaged overlay departs from the defaults.
OVERLAID = {"BitNetPrecision": {"weight_decay_until": 0.5}, "Float8Precision": {"recipe": "rowwise"}}


@pytest.fixture(autouse=True)
def _comparable_numbers(monkeypatch):
    from lightning_slm.measure import measured
    from lightning_slm.modules import muon_adamw

    monkeypatch.setattr(measured, "peak_memory", measured.peak_memory)  # put back afterwards
    monkeypatch.setattr(muon_adamw, "fast_dtype", muon_adamw.fast_dtype)
    monkeypatch.setattr("lightning_slm.measure.plot.draw", lambda report: b"")  # half the time of a report
    without_fresh_processes()
    muon_in_float32()


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory):
    """The losses of a run without us, in Lightning's bf16-mixed; each is made once."""
    folder = tmp_path_factory.mktemp("bf16")

    @functools.cache
    def losses(**options):
        *_, run = fit("foreign", [], folder, logger=Notes(), precision="bf16-mixed", **options)
        return logged(run)["train_loss"]

    return losses


def parse(*args):
    """What Lightning's command line makes of them: the plugin, and the configuration as it would be saved."""
    settings = {"run": False, "save_config_callback": None, "seed_everything_default": 0}
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false"]
    cli = LightningCLI(ForeignLlama, args=[*args, *quiet], **settings)
    return cli.trainer.precision_plugin, cli.parser.dump(cli.config, skip_none=False)


def settings(plugin):
    """All that is known of a plugin; the command line makes lists of tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(plugin).items()}


def test_the_tables_have_every_precision_of_the_registry():
    plugins = {name for name in registry.__all__ if issubclass(getattr(registry, name), LowBitPrecision)}
    for table in (EVERY_PRECISION, BY_HAND, dict(OPTIONS)):
        assert {name.partition(",")[0] for name in table} == plugins
    assert set(registry.__all__) < set(lightning_slm.__all__)


@every_precision
@pytest.mark.parametrize("callback", EVERY_CALLBACK)
def test_each_pair_resumes_bit_identically_or_is_refused_with_the_reason(tmp_path, precision, callback):
    make, plugin = EVERY_CALLBACK[callback].make, EVERY_PRECISION[precision]
    reason = refusal(precision, callback)
    if reason is not None:
        run = trainer(tmp_path, [make("foreign")], plugin=plugin)
        with pytest.raises(ValueError, match=reason):
            run.fit(ForeignLlama(), batches(), batches(n=4))
        return
    ends = kill_and_resume(ForeignLlama, lambda: [make("foreign")], tmp_path, plugin=plugin)
    assert differences(*map(comparable, ends)) == []
    assert list(ends[0]["state_dict"]) == list(ForeignLlama().state_dict())
    assert callback != "GradualPruning" or pruned("foreign", ends[0]["state_dict"])


@every_precision
def test_with_all_that_go_together_our_own_module_resumes_bit_identically(tmp_path, precision):
    make = partial(combinable, "ours", precision)
    ends = kill_and_resume(MODULES["ours"].make, make, tmp_path, plugin=EVERY_PRECISION[precision])
    assert differences(*map(comparable, ends)) == []
    assert refusal(precision, "GradualPruning") or pruned("ours", ends[0]["state_dict"], alone=False)
    loaded = type(MODULES["ours"].make()).load_from_checkpoint(tmp_path / "end.ckpt")  # without any of us
    assert differences(dict(loaded.state_dict()), dict(ends[0]["state_dict"])) == []


@not_everything
@pytest.mark.parametrize(
    ("precision", "kind", "base"),
    [(name, "demo", "bf16-mixed") for name in EVERY_SETTING] + [(name, "foreign", "bf16-true") for name in ONE_OF_EACH],
)
def test_alone_it_resumes_bit_identically_and_its_checkpoint_needs_nobody(tmp_path, precision, kind, base):
    make = partial(Demo, dropout=0.1) if kind == "demo" else MODULES[kind].make
    ends = kill_and_resume(make, list, tmp_path, MODULES[kind].loader, plugin=in_base(precision, base))
    assert differences(*map(comparable, ends)) == []
    assert len(ends[0]["notes"]) == 3
    state = precision.partition(",")[0]
    assert (state in ends[0]) is (precision in WITH_STATE)
    assert differences(*(end.get(state) for end in ends)) == []
    if precision.startswith("BitNet"):
        assert all({"slm/flip_rate", "slm/zero_fraction"} <= values.keys() for values in ends[0]["notes"].values())
    plain, found = make(), dict(ends[0]["state_dict"])
    frozen = {t.name for t in weight_targets(plain)} if precision.startswith(FROZEN) else set()
    assert list(found) == list(plain.state_dict())
    for name, value in plain.state_dict().items():  # codes are found again from the dtype that they were made from
        assert found[name].dtype is (torch.bfloat16 if base == "bf16-true" and name not in frozen else value.dtype)
    loaded = type(plain).load_from_checkpoint(tmp_path / "end.ckpt").state_dict()
    assert differences({name: value.to(found[name].dtype) for name, value in loaded.items()}, found) == []


@pytest.mark.parametrize("precision", BY_HAND)
@pytest.mark.parametrize("base", ["32-true", "bf16-mixed", "bf16-true"])
def test_in_every_base_a_run_is_that_of_a_module_whose_layers_were_exchanged_by_hand(tmp_path, precision, base):
    """Bit for bit: what is left computes in the base."""
    module, start, run = fit("foreign", [], tmp_path, plugin=in_base(precision, base), logger=Notes())
    by_hand, _, expected = fit("foreign", [], tmp_path, prepare=BY_HAND[precision], precision=base, logger=Notes())
    assert logged(run)["train_loss"] == logged(expected)["train_loss"]
    assert differences(dict(by_hand.state_dict()), dict(module.state_dict())) == []

    layers = [module.get_submodule(name) for name in run.precision_plugin.converted]
    assert [type(layer).__name__ for layer in layers] == [layer_of(precision)] * 14
    trained = [p for p in module.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.bfloat16 if base == "bf16-true" else torch.float32}
    assert not torch.equal(start[: trained[0].numel()], trained[0].detach().flatten().to(start.dtype))
    run.validate(module, batches(n=4), verbose=False)  # in inference mode
    assert torch.isfinite(run.callback_metrics["val_loss"])


@one_of_each
@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_it_goes_with_accumulation_and_clipping(tmp_path, in_bf16, precision, options):
    """Near the run in bf16 where that is near without them; elsewhere as by hand."""
    module, _, run = fit("foreign", [], tmp_path, plugin=in_base(precision, "bf16-mixed"), logger=Notes(), **options)
    losses = logged(run)["train_loss"]
    assert len(losses) == 8
    if precision in SHARE:
        assert losses == pytest.approx(in_bf16(**options), rel=SHARE[precision])
        return
    by_hand, _, _ = fit("foreign", [], tmp_path, prepare=BY_HAND[precision], precision="bf16-mixed", **options)
    assert differences(dict(by_hand.state_dict()), dict(module.state_dict())) == []


@pytest.mark.parametrize(("precision", "share"), NEAR)
def test_twenty_steps_learn_within_a_share_of_bf16(tmp_path, in_bf16, precision, share):
    *_, run = fit("foreign", [], tmp_path, plugin=in_base(precision, "bf16-mixed"), logger=Notes(), **TWENTY)
    losses, plain = logged(run)["train_loss"], in_bf16(**TWENTY)
    assert len(plain) == 20
    assert plain[-1] < 0.7 * plain[0]
    assert losses == pytest.approx(plain, rel=share)
    assert losses != plain


@one_of_each
def test_evaluating_a_checkpoint_with_it_gives_the_run_s_own_figure_exactly(tmp_path, precision):
    plugin = in_base(precision, "bf16-mixed")
    module, _, run = fit("foreign", [], tmp_path, plugin=plugin)
    run.save_checkpoint(tmp_path / "end.ckpt")
    own = run.validate(module, batches(n=4), verbose=False)
    for again in (ForeignLlama(), module):  # and into layers that are exchanged already
        fresh = trainer(tmp_path, plugin=plugin)
        assert fresh.validate(again, batches(n=4), tmp_path / "end.ckpt", verbose=False, weights_only=True) == own


@one_of_each
def test_a_second_conversion_changes_nothing_and_embeddings_and_head_are_left_alone(precision):
    module, plugin = ForeignLlama(), EVERY_PRECISION[precision]()
    kept = {name: p for name, p in module.named_parameters() if "embed" in name or "norm" in name}
    plugin.convert_module(module)
    once = {name: (type(m), id(m)) for name, m in module.named_modules()}
    weights = flat(module)
    plugin.convert_module(module)
    assert {name: (type(m), id(m)) for name, m in module.named_modules()} == once
    assert torch.equal(flat(module), weights)
    assert sorted(plugin.converted) == sorted(t.module_name for t in weight_targets(ForeignLlama()))
    assert type(module.net.lm_head) is nn.Linear
    assert all(dict(module.named_parameters())[name] is p for name, p in kept.items())


@one_of_each
def test_what_is_skipped_stays_as_it_was(precision):
    module, make = ForeignLlama(), EVERY_PRECISION[precision]
    plugin = make(skip="*k_proj")
    plugin.convert_module(module)
    assert plugin.converted == [n for n, m in module.named_modules() if type(m).__name__ == layer_of(precision)]
    assert len(plugin.converted) == 2 * 6
    assert [type(m) for name, m in module.named_modules() if name.endswith("k_proj")] == [nn.Linear] * 2


class Late(ForeignLlama):
    """A layer of it is born in ``configure_model``."""

    def configure_model(self):
        if not hasattr(self, "late"):
            self.late = nn.Linear(32, 32)


@one_of_each
def test_layers_that_are_born_in_configure_model_are_exchanged_too(tmp_path, precision):
    module = Late()
    run = trainer(tmp_path, steps=1, plugin=EVERY_PRECISION[precision])
    run.fit(module, batches())
    assert type(module.late).__name__ == layer_of(precision)
    assert "late" in run.precision_plugin.converted


@one_of_each
@pytest.mark.parametrize("kind", [DeepSpeedStrategy, FSDPStrategy])
def test_strategies_with_weights_of_their_own_are_refused_early(precision, kind):
    plugin = EVERY_PRECISION[precision]()
    with pytest.raises(TypeError, match="FSDP strategy can only work with the `FSDPPrecision` plugin"):
        FSDPStrategy().precision_plugin = plugin
    module = ForeignLlama()

    class Run:
        strategy = object.__new__(kind)

    module._trainer = Run()
    with pytest.raises(ValueError, match=rf'does not work with {kind.__name__}.*strategy="slm_fsdp2"'):
        plugin.convert_module(module)
    module._trainer = None
    refuse_strategy(plugin, module)


@one_of_each
def test_beside_precision_as_a_string_a_plugin_is_refused(tmp_path, precision):
    with pytest.raises(ValueError, match="Received both `precision=bf16-mixed` and `plugins="):
        trainer(tmp_path, plugin=EVERY_PRECISION[precision], precision="bf16-mixed")


@one_of_each
def test_an_unknown_base_is_refused_at_once(precision):
    with pytest.raises(ValueError, match="base='16-mixed' must be one of '32-true'"):
        EVERY_PRECISION[precision](base="16-mixed")


@pytest.mark.parametrize(("precision", "options"), OPTIONS, ids=str)
def test_the_command_line_knows_its_short_name(tmp_path, monkeypatch, precision, options):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    asked = [f"--trainer.plugins={precision}", *(f"--trainer.plugins.{name}={word}" for name, word in words.items())]
    first, config = parse(*asked, f"--trainer.default_root_dir={tmp_path}")
    (tmp_path / "dumped.yaml").write_text(config)
    second, _ = parse(f"--config={tmp_path / 'dumped.yaml'}")
    kind = getattr(registry, precision)
    for plugin in (first, second):
        assert type(plugin) is kind
        assert settings(plugin) == settings(kind(**options))
        assert plugin.base == "bf16-mixed"


@one_of_each
def test_its_overlay_says_its_defaults_but_for_what_is_known(tmp_path, monkeypatch, precision):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    said = f"class_path: lightning_slm.{precision}\n"
    (overlay,) = [path for path in packaged.recipes().values() if said in path.read_text()]
    (asked,) = yaml.safe_load(overlay.read_text())["trainer"]["plugins+"]
    plugin, _ = parse(f"--config={overlay}", f"--trainer.default_root_dir={tmp_path}")
    kind = getattr(registry, precision)
    assert type(plugin) is kind
    assert settings(plugin) == settings(kind(**asked["init_args"])) == settings(kind(**OVERLAID.get(precision, {})))


@pytest.mark.slow
@every_precision
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_two_ranks_with_all_that_go_together_it_resumes_bit_identically(two_ranks, strategy, precision):
    """And sharded weights learn what whole ones do; a code more or less that flips is a small share of few."""
    found, whole = two_ranks(strategy, "precisions")[precision], two_ranks("ddp", "precisions")[precision]
    assert "error" not in found
    assert found["differences"] == []
    assert found["ranks agree"]
    assert found["steps"] == 8
    assert list(found["state_dict"]) == list(ForeignLlama().state_dict())
    assert refusal(precision, "GradualPruning") or pruned("foreign", found["state_dict"], alone=False)
    assert found["logged"].keys() == whole["logged"].keys()
    shares = {"slm/flip_rate": 0.05, "slm/zero_fraction": 0.01}
    for name, values in found["logged"].items():
        assert len(values) == (7 if name.startswith("slm/mask_flips") else 8), name  # flips: from the second step on
        assert values == pytest.approx(whole["logged"][name], rel=shares.get(name, 1e-4))
    assert ("slm/flip_rate" in found["logged"]) is precision.startswith("BitNet")
