"""The callback contract (DESIGN.md), over the registry: every callback, on modules that are not made for it."""

import itertools
import random
import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch.callbacks
import lightning.pytorch.strategies
import pytest
import pytorch_lightning
import torch
import yaml
from contract import (
    ELSEWHERE,
    EVERY_CALLBACK,
    MODULES,
    ON_TWO_RANKS,
    STRATEGIES,
    all_together,
    apart,
    comparable,
    fit,
    flat,
    make_callbacks,
    muon_in_float32,
    without_fresh_processes,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from support import (
    Demo,
    ForeignLlama,
    Killed,
    SaveAndDie,
    batches,
    checkpoint,
    differences,
    kill_and_resume,
    trainer,
)

import lightning_slm
from lightning_slm import callbacks as registry
from lightning_slm.nn.targets import weight_targets

both = pytest.mark.parametrize("kind", MODULES)
every = pytest.mark.parametrize("name", EVERY_CALLBACK)


@pytest.fixture(autouse=True)
def _comparable_numbers(monkeypatch):
    from lightning_slm.measure import measured
    from lightning_slm.modules import muon_adamw

    monkeypatch.setattr(measured, "peak_memory", measured.peak_memory)  # put back afterwards
    monkeypatch.setattr(muon_adamw, "fast_dtype", muon_adamw.fast_dtype)
    without_fresh_processes()
    muon_in_float32()


def test_the_table_has_every_callback_of_the_registry():
    assert sorted([*EVERY_CALLBACK, *ELSEWHERE]) == sorted(registry.__all__)
    assert all((Path(__file__).parent / file).is_file() for file in ELSEWHERE.values())
    assert set(registry.__all__) < set(lightning_slm.__all__)  # short names, for the command line


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create")
@both
@every
def test_a_killed_and_resumed_run_is_bit_identical_and_its_checkpoint_needs_no_callback(tmp_path, name, kind):
    case, module = EVERY_CALLBACK[name], MODULES[kind]
    make = partial(Demo, dropout=0.1) if kind == "demo" else module.make
    straight, resumed = kill_and_resume(make, lambda: [case.make(kind)], tmp_path, module.loader)
    assert differences(comparable(straight), comparable(resumed)) == []
    assert straight["notes"]

    plain = module.make()
    assert list(straight["state_dict"]) == list(plain.state_dict())
    loaded = type(plain).load_from_checkpoint(tmp_path / "end.ckpt")
    assert differences(dict(loaded.state_dict()), dict(straight["state_dict"])) == []

    tests = {}
    for who, callbacks in (("with us", [case.make(kind)]), ("without us", [])):
        run = trainer(tmp_path, callbacks)
        (tests[who],) = run.test(module.make(), module.loader(n=4), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert tests["without us"].keys() == tests["with us"].keys()
    assert all(torch.isfinite(torch.tensor(value)) for value in tests["with us"].values())
    if not case.rounds:
        assert tests["with us"] == tests["without us"]


@both
@every
def test_a_file_of_weights_only_loads_without_us(tmp_path, name, kind):
    module, _, run = fit(kind, [EVERY_CALLBACK[name].make(kind)], tmp_path)
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    loaded = type(module).load_from_checkpoint(tmp_path / "weights.ckpt")
    assert differences(dict(loaded.state_dict()), dict(module.state_dict())) == []


@both
@every
def test_accumulated_gradients_do_what_the_large_batch_does(tmp_path, name, kind):
    """Up to the order of sums: 1 % of the way; where weights are rounded, a sum decides which way: 20 %."""
    case = EVERY_CALLBACK[name]
    large, start, run = fit(kind, [case.make(kind)], tmp_path, batch_size=4)
    parts, _, in_parts = fit(kind, [case.make(kind)], tmp_path, batch_size=2, accumulate_grad_batches=2)
    assert run.global_step == in_parts.global_step == 8
    assert apart(large, parts, start) < (0.2 if case.rounds else 0.01)


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
@every
def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path, name, kind):
    watch = NormAtTheStep()
    fit(kind, [EVERY_CALLBACK[name].make(kind), watch], tmp_path, gradient_clip_val=0.01)
    assert len(watch.norms) == 8
    assert watch.norms == pytest.approx([0.01] * 8, rel=1e-3)  # all were longer


@both
@every
def test_bf16_mixed_trains_keeps_the_weights_in_fp32_and_resumes(tmp_path, name, kind):
    module, case = MODULES[kind], EVERY_CALLBACK[name]
    ends = kill_and_resume(module.make, lambda: [case.make(kind)], tmp_path, module.loader, precision="bf16-mixed")
    assert differences(*map(comparable, ends)) == []
    assert {value.dtype for value in ends[0]["state_dict"].values()} == {torch.float32}
    losses = [v for values in ends[0]["notes"].values() for v in values.values()]
    assert torch.isfinite(torch.tensor(losses)).all()


@every
def test_a_callback_can_be_used_again_on_the_module_it_was_used_on(tmp_path, name):
    """The second run with the old object is the second run with a new one: nothing is left from the first."""
    ends = []
    for again in (True, False):
        first = EVERY_CALLBACK[name].make("foreign")
        module, _, _ = fit("foreign", [first], tmp_path)
        second = first if again else EVERY_CALLBACK[name].make("foreign")
        run = trainer(tmp_path, [second])
        run.fit(module, batches(), batches())
        ends.append(comparable(checkpoint(run)))
    assert differences(*ends) == []


@every
def test_what_a_run_broken_off_leaves_behind_does_not_disturb_the_next_one(tmp_path, name):
    ends = []
    for broken_off in (True, False):
        torch.manual_seed(0)
        module, callback = ForeignLlama(), EVERY_CALLBACK[name].make("foreign")
        begin = deepcopy(module.state_dict())
        if broken_off:
            run = trainer(tmp_path, [callback, SaveAndDie(tmp_path / "saved.ckpt", 3)], enable_checkpointing=True)
            with pytest.raises(Killed):
                run.fit(module, batches(), batches())
            module.load_state_dict(begin)
        run = trainer(tmp_path, [callback])
        run.fit(module, batches(), batches())
        ends.append(comparable(checkpoint(run)))
    assert differences(*ends) == []


@pytest.mark.parametrize("kind", ["DeepSpeedStrategy", "FSDPStrategy"])
@pytest.mark.parametrize(
    "name", ["GradualPruning", "CompressionReport", "MagnitudePruning", "NMSparseTraining", "WandaPruning"]
)
def test_who_needs_matrices_refuses_strategies_that_flatten_them_before_anything_happens(name, kind):
    """DeepSpeed and FSDP1 want a GPU: this is all that can be tried of them here."""
    strategy = object.__new__(getattr(lightning.pytorch.strategies, kind))
    with pytest.raises(ValueError, match=rf'{name} needs the weights as matrices, and {kind}.*strategy="slm_fsdp2"'):
        EVERY_CALLBACK[name].make("foreign").setup(SimpleNamespace(strategy=strategy), ForeignLlama(), "fit")


@every
def test_two_instances_keep_two_states(tmp_path, monkeypatch, name):
    case = EVERY_CALLBACK[name]
    monkeypatch.chdir(tmp_path)
    straight, resumed = kill_and_resume(
        ForeignLlama, lambda: [case.make("foreign", **arguments) for arguments in case.pair], tmp_path
    )
    assert differences(comparable(straight), comparable(resumed)) == []
    assert len([key for key in straight["callbacks"] if key.startswith(name)]) == 2


class OldLlama(pytorch_lightning.LightningModule):
    """`ForeignLlama` under the other name that Lightning has."""

    def __init__(self):
        super().__init__()
        self.net = ForeignLlama().net

    training_step = ForeignLlama.training_step
    validation_step = ForeignLlama.validation_step
    configure_optimizers = ForeignLlama.configure_optimizers


def test_all_work_in_a_trainer_of_pytorch_lightning_as_in_one_of_lightning(tmp_path):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"accelerator": "cpu", "devices": 1, "max_steps": 8, "logger": False, "num_sanity_val_steps": 1}
    weights = []
    for make, package in ((OldLlama, pytorch_lightning), (ForeignLlama, None)):
        torch.manual_seed(0)
        module = make()
        callbacks = all_together("foreign")
        if package is None:
            run = trainer(tmp_path, callbacks, val_check_interval=1.0)
        else:
            run = package.Trainer(default_root_dir=tmp_path, callbacks=callbacks, **quiet, **settings)
        run.fit(module, batches(), batches(n=4))
        weights.append(dict(module.net.state_dict()))
    assert differences(*weights) == []


def test_in_any_order_of_the_list_the_same_comes_out(tmp_path):
    """Forty of the orders: each of two comes before the other in about half of them."""
    orders = list(itertools.permutations(range(len(EVERY_CALLBACK))))
    ends = {}
    for order in random.Random(0).sample(orders, k=min(40, len(orders))):
        callbacks = all_together("foreign")
        module, _, run = fit("foreign", [callbacks[i] for i in order], tmp_path)
        ends[order] = comparable(checkpoint(run))
    first = ends.pop(next(iter(ends)))
    assert {order: found for order, end in ends.items() if (found := differences(first, end))} == {}
    assert all(((t.weight.reshape(-1, 4) == 0).sum(1) >= 2).all() for t in weight_targets(module))


@both
def test_all_together_resume_bit_identically(tmp_path, kind):
    module = MODULES[kind]
    ends = kill_and_resume(module.make, partial(all_together, kind), tmp_path, module.loader)
    assert differences(*map(comparable, ends)) == []


def test_an_average_of_the_weights_may_stand_anywhere_in_the_list(tmp_path):
    ends = []
    for place in range(len(EVERY_CALLBACK) + 1):
        callbacks = all_together("foreign")
        callbacks.insert(place, EMAWeightAveraging(decay=0.7))
        _, _, run = fit("foreign", callbacks, tmp_path)
        ends.append(comparable(checkpoint(run)))
    for end in ends[1:]:
        assert differences(ends[0], end) == []
    names = [t.name for t in weight_targets(ForeignLlama())]
    for name in names:
        assert ((ends[0]["state_dict"][name].reshape(-1, 4) == 0).sum(1) >= 2).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look,
@pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd functions")  # and its own call
@pytest.mark.parametrize("name", [*EVERY_CALLBACK, "all"])
def test_a_compiled_block_learns_what_an_uncompiled_one_learns(tmp_path, name):
    """Up to fused sums, as with accumulated gradients. The compiler's back end is left out: it is not ours."""

    def compile_block(module):
        module.net.model.layers[0].compile(backend="aot_eager")

    make = partial(make_callbacks, "foreign", name)
    rounds = name == "all" or EVERY_CALLBACK[name].rounds
    eager, start, _ = fit("foreign", make(), tmp_path)
    compiled, _, run = fit("foreign", make(), tmp_path, prepare=compile_block)
    assert apart(eager, compiled, start) < (0.2 if rounds else 0.01)
    assert list(checkpoint(run)["state_dict"]) == list(eager.state_dict())


def parse(*args):
    settings = {"run": False, "save_config_callback": None, "seed_everything_default": 0}
    return LightningCLI(ForeignLlama, args=[*args, "--trainer.logger=false"], **settings)


@every
def test_yaml_in_yaml_out_is_the_same_callback(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    wanted = EVERY_CALLBACK[name].yaml
    path = f"lightning_slm.{name}" if hasattr(lightning.pytorch.callbacks, name) else name  # two may share a short name
    (tmp_path / "short.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": path, "init_args": wanted}]}})
    )
    first = parse(f"--config={tmp_path / 'short.yaml'}")
    (tmp_path / "dumped.yaml").write_text(first.parser.dump(first.config, skip_none=False))
    second = parse(f"--config={tmp_path / 'dumped.yaml'}")
    made = [next(c for c in cli.trainer.callbacks if type(c).__name__ == name) for cli in (first, second)]
    for callback in made:
        assert {key: getattr(callback, key) for key in wanted} == wanted
    assert made[0].state_key == made[1].state_key


def test_dotted_paths_need_no_import(tmp_path):
    paths = [f"--trainer.callbacks+=lightning_slm.callbacks.{name}" for name in EVERY_CALLBACK]
    at = paths.index("--trainer.callbacks+=lightning_slm.callbacks.KnowledgeDistillation")
    paths.insert(at + 1, "--trainer.callbacks.teacher=slm-5m")
    script = (
        "import sys\nfrom lightning.pytorch.cli import LightningCLI\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "assert 'lightning_slm' not in sys.modules\n"
        f"cli = LightningCLI(BoringModel, run=False, save_config_callback=None, args={paths!r})\n"
        "print(*(type(c).__name__ for c in cli.trainer.callbacks))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(EVERY_CALLBACK) <= set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), ON_TWO_RANKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_two_ranks_it_resumes_bit_identically_and_learns_what_one_process_learns(
    tmp_path, two_ranks, strategy, kind, name
):
    found = two_ranks(strategy, "callbacks")[f"{kind}-{name}"]
    assert "error" not in found
    assert found["differences"] == []
    assert found["ranks agree"]
    assert found["steps"] == 8
    plain = MODULES[kind].make()
    assert list(found["state_dict"]) == list(plain.state_dict())
    if name in ("GradualPruning", "NMSparseTraining", "all"):
        weights = [found["state_dict"][t.name] for t in weight_targets(plain)]
        assert all(((weight.reshape(-1, 4) == 0).sum(1) >= 2).all() for weight in weights)
    alone, start, _ = fit(kind, make_callbacks(kind, name), tmp_path, batch_size=4)
    apart = (flat(alone) - found["learned"]).norm() / (flat(alone) - start).norm()
    assert apart < (0.2 if name == "all" or EVERY_CALLBACK[name].rounds else 0.01)
