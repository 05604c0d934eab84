"""By a clock that only the test moves: every figure is then known exactly.

``python tests/callbacks/test_throughput_monitor.py FOLDER`` is the job of two processes that one test starts.
"""

# Shape letters: B = batch, T = tokens.

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from support import (
    Demo,
    ForeignLlama,
    Notes,
    batches,
    checkpoint,
    differences,
    kill_and_resume,
    leave_together,
    run_on_ranks,
    trainer,
)
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_slm.callbacks.knowledge_distillation import KnowledgeDistillation
from lightning_slm.callbacks.throughput_monitor import ThroughputMonitor, multiplied_dtype
from lightning_slm.errors import NoEffectWarning
from lightning_slm.measure import flops_per_token, throughput
from lightning_slm.measure.peak import measured_peak
from lightning_slm.measure.throughput import Throughput
from lightning_slm.strategies.float8_precision import Float8Precision
from lightning_slm.strategies.int8_precision import Int8Precision

# Seconds that things take here: powers of two, so that sums are exact.
ITEM, STEP, VALIDATION, SAVE = 0.25, 1.0, 64.0, 1024.0
B, T = 2, 8


class Clock:
    """Stands where it is until somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


class Worker(ForeignLlama):
    """Steps that take their time."""

    def __init__(self, clock, step=STEP):
        super().__init__()
        self.clock, self.step = clock, step

    def training_step(self, batch):
        self.clock.work(self.step)
        return super().training_step(batch)

    def validation_step(self, batch):
        self.clock.work(VALIDATION)


class Items(Dataset):
    """Examples that take time to fetch; ``real`` tokens of each are no padding."""

    def __init__(self, clock, n=64, real=None):
        self.clock, self.n, self.real = clock, n, real

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.clock.work(ITEM)
        ids = torch.randint(64, (T,), generator=torch.Generator().manual_seed(i))
        mask = {} if self.real is None else {"attention_mask": (torch.arange(T) < self.real).long()}
        return {"input_ids": ids, "labels": ids, **mask}


class SaveOften(Checkpoint):
    """After every step; and a callback that is no ``Checkpoint`` may stand before us in the list."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "often.ckpt")


class SaveEarly(Callback):
    on_train_batch_end = SaveOften.on_train_batch_end


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(throughput, "perf_counter", made)
    return made


def run(folder, clock, callbacks, loader=None, module=None, steps=12, **kwargs):
    """Logged values by step, and the trainer."""
    notes, module = Notes(), module or Worker(clock)
    trained = trainer(folder, callbacks, steps=steps, logger=notes, **kwargs)
    val = DataLoader(Items(clock, n=2), batch_size=B) if isinstance(module, Worker) else None
    trained.fit(module, loader or DataLoader(Items(clock), batch_size=B), val)
    return notes.steps, trained


def expected_flops(per_batch=B * T):
    """Of forward and backward of the tokens of a batch, by the formula that its own test compares with PyTorch's."""
    model = ForeignLlama().net
    return 3 * sum(flops_per_token(model, context) for context in range(1, T + 1)) / T * per_batch


def test_tokens_and_flops_per_second_and_mfu_are_those_of_the_clock(tmp_path, clock):
    steps, _ = run(tmp_path, clock, [ThroughputMonitor(window=4, warmup=2, peak_tflops=1e-6)])
    seconds = STEP + B * ITEM
    assert set(steps[1]) == {"train_loss", "epoch", "slm/tokens_seen"}  # the first two steps warm up
    for step in range(3, 12):
        assert steps[step]["slm/tokens_per_second"] == pytest.approx(B * T / seconds)
        assert steps[step]["slm/tflops_per_second"] == pytest.approx(expected_flops() / seconds / 1e12)
        assert steps[step]["slm/mfu"] == pytest.approx(expected_flops() / seconds / 1e6)
        assert steps[step]["slm/tokens_seen"] == (step + 1) * B * T


def test_an_optimizer_step_of_several_batches_is_one_step(tmp_path, clock):
    steps, _ = run(tmp_path, clock, [ThroughputMonitor(warmup=1)], steps=6, accumulate_grad_batches=4)
    assert sorted(step for step, values in steps.items() if "slm/tokens_per_second" in values) == [1, 2, 3, 4, 5]
    assert steps[3]["slm/tokens_per_second"] == pytest.approx(B * T / (STEP + B * ITEM))
    assert steps[3]["slm/tokens_seen"] == 4 * 4 * B * T


def test_the_window_looks_at_the_last_steps_only(tmp_path, clock):
    class Slower(Worker):
        def training_step(self, batch):
            self.clock.work(STEP * (self.global_step >= 6))  # twice as long from then on
            return super().training_step(batch)

    steps, _ = run(tmp_path, clock, [ThroughputMonitor(window=2, warmup=1)], module=Slower(clock))
    assert steps[5]["slm/tokens_per_second"] == pytest.approx(B * T / (STEP + B * ITEM))
    assert steps[6]["slm/tokens_per_second"] == pytest.approx(2 * B * T / (3 * STEP + 2 * B * ITEM))
    assert steps[7]["slm/tokens_per_second"] == pytest.approx(B * T / (2 * STEP + B * ITEM))


@pytest.mark.parametrize("early", [True, False], ids=["saves-before-us", "saves-after-us"])
def test_validation_and_checkpoints_do_not_count(tmp_path, clock, monkeypatch, early):
    from lightning.pytorch import Trainer

    save = Trainer.save_checkpoint

    def slow(*args, **kwargs):
        clock.work(SAVE)
        save(*args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", slow)
    monitor = ThroughputMonitor(warmup=1)
    callbacks = [SaveEarly(), monitor] if early else [monitor, SaveOften()]
    steps, _ = run(
        tmp_path, clock, callbacks, val_check_interval=3, num_sanity_val_steps=1, enable_checkpointing=not early
    )
    assert clock.now > 12 * SAVE + 4 * VALIDATION
    # Fetching the validation data is no training either; what is fetched ahead of it is.
    for step in range(4, 12):
        assert steps[step]["slm/tokens_per_second"] == pytest.approx(B * T / (STEP + B * ITEM))


def test_padding_is_no_token(tmp_path, clock):
    loader = DataLoader(Items(clock, real=5), batch_size=B)
    steps, _ = run(tmp_path, clock, [ThroughputMonitor(warmup=1, peak_tflops=1.0)], loader)
    assert steps[4]["slm/tokens_per_second"] == pytest.approx(B * 5 / (STEP + B * ITEM))
    assert steps[4]["slm/mfu"] == pytest.approx(expected_flops(B * 5) / (STEP + B * ITEM) / 1e12)
    assert steps[4]["slm/tokens_seen"] == 5 * B * 5


def test_sequences_of_several_lengths_cost_what_each_costs(tmp_path, clock):
    ids = [torch.randint(64, (B, length)) for length in (4, 8, 4, 8, 4, 8)]
    loader = DataLoader([{"input_ids": x, "labels": x} for x in ids], batch_size=None)
    steps, _ = run(tmp_path, clock, [ThroughputMonitor(warmup=0)], loader, steps=6)
    model = ForeignLlama().net
    costs = [3 * sum(flops_per_token(model, c) for c in range(1, x.shape[1] + 1)) * B for x in ids]
    assert steps[5]["slm/tflops_per_second"] == pytest.approx(sum(costs) / (6 * STEP) / 1e12)
    assert steps[5]["slm/tokens_seen"] == sum(x.numel() for x in ids)


def test_values_are_computed_when_the_trainer_logs_and_the_device_waited_for_only_then(tmp_path, monkeypatch):
    waits, seen = [], []
    monkeypatch.setattr(Throughput, "seconds", lambda self: waits.append(0) or 1.0)
    monkeypatch.setattr(ThroughputMonitor, "_peak", lambda self, trainer: seen.append(trainer.global_step))
    trainer(tmp_path, [ThroughputMonitor(warmup=1)], steps=12, log_every_n_steps=5).fit(ForeignLlama(), batches())
    assert seen == [5, 10]
    assert len(waits) == 2


@pytest.mark.parametrize("kind", ["foreign", "demo"])
def test_training_is_bit_for_bit_as_without_it(tmp_path, kind):
    ends = []
    for callbacks in ([ThroughputMonitor(warmup=0)], []):
        torch.manual_seed(0)
        module = Demo(dropout=0.2) if kind == "demo" else ForeignLlama()
        done = trainer(tmp_path, callbacks)
        done.fit(module, batches(pairs=kind == "demo"))
        ends.append(checkpoint(done))
    ends[0]["callbacks"] = ends[1]["callbacks"] = {}
    assert differences(ends[0]["state_dict"], ends[1]["state_dict"]) == []
    assert differences(ends[0]["optimizer_states"], ends[1]["optimizer_states"]) == []


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_counts_its_tokens_from_the_beginning(tmp_path, accumulate):
    ends = kill_and_resume(
        ForeignLlama, lambda: [ThroughputMonitor(warmup=1)], tmp_path, accumulate_grad_batches=accumulate
    )
    (state,) = (s for key, s in ends[0]["callbacks"].items() if key.startswith("ThroughputMonitor"))
    assert state == {"tokens_seen": 8 * accumulate * B * T}
    assert ends[0]["callbacks"] == ends[1]["callbacks"]
    assert ends[1]["notes"][7]["slm/tokens_seen"] == 8 * accumulate * B * T


def test_nothing_stays_on_trainer_and_module_and_a_second_run_begins_anew(tmp_path):
    monitor, module = ThroughputMonitor(), Demo()
    for _ in range(2):
        done = trainer(tmp_path, [monitor])
        done.fit(module, batches(pairs=True))
        assert monitor.state_dict() == {"tokens_seen": 8 * B * T}
        assert "save_checkpoint" not in vars(done)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_of_a_model_without_formula_the_first_forward_pass_is_counted(tmp_path, clock):
    class Slow(Demo):
        def training_step(self, batch, batch_idx):
            clock.work(STEP)
            return super().training_step(batch, batch_idx)

    module = Slow()
    inputs, target = next(iter(batches(pairs=True)))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(inputs, target)
    steps, _ = run(tmp_path, clock, [ThroughputMonitor(warmup=1)], batches(pairs=True), module)
    assert steps[4]["slm/tflops_per_second"] == pytest.approx(3 * counter.get_total_flops() / STEP / 1e12)


def test_a_teacher_s_forward_pass_is_no_training_flops(tmp_path, clock):
    teacher = KnowledgeDistillation(teacher=ForeignLlama(hidden=64).net)
    steps, _ = run(tmp_path, clock, [teacher, ThroughputMonitor(warmup=1)])
    assert steps[4]["slm/tflops_per_second"] == pytest.approx(expected_flops() / (STEP + B * ITEM) / 1e12)


def test_where_flops_cannot_be_known_there_is_one_warning_and_the_tokens(tmp_path, clock):
    class Bag(Demo):
        """Looks up and adds: no product that PyTorch's counter knows."""

        def __init__(self):
            super().__init__()
            self.model = torch.nn.Embedding(64, 4)

        def training_step(self, batch, batch_idx):
            clock.work(STEP)
            return self.model(batch[0]).sum()

    with pytest.warns(NoEffectWarning, match="no formula for the FLOPs of Bag") as caught:
        steps, _ = run(tmp_path, clock, [ThroughputMonitor(warmup=0)], batches(pairs=True), Bag())
    assert len([w for w in caught if w.category is NoEffectWarning]) == 1
    assert steps[4]["slm/tokens_per_second"] == pytest.approx(B * T / STEP)
    assert "slm/mfu" not in steps[4]


def test_batches_without_token_ids_are_told_once(tmp_path):
    class Floats(Demo):
        def training_step(self, batch, batch_idx):
            return self.model.decoder(batch).sum()

    notes = Notes()
    with pytest.warns(NoEffectWarning, match=r"sees no token ids.* in a Tensor") as caught:
        trainer(tmp_path, [ThroughputMonitor(warmup=0)], logger=notes).fit(
            Floats(), DataLoader(torch.randn(16, 32), batch_size=2)
        )
    assert len([w for w in caught if w.category is NoEffectWarning]) == 1
    assert not any(name.startswith("slm/") for values in notes.steps.values() for name in values)


def test_an_unknown_peak_is_told_once_and_the_rest_is_logged(tmp_path, clock):
    double = {"precision": "64-true"}  # not in the table of any GPU; a CPU can measure it
    steps, _ = run(tmp_path, clock, [ThroughputMonitor(warmup=1)], **double)
    assert steps[4]["slm/mfu"] == pytest.approx(steps[4]["slm/tflops_per_second"] * 1e12 / measured_peak(torch.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_slm.callbacks.throughput_monitor.peak_flops", lambda device, dtype: None)
        with pytest.warns(NoEffectWarning, match="knows no peak of 'cpu' in torch.float32") as caught:
            steps, _ = run(tmp_path, clock, [ThroughputMonitor(warmup=1)])
    assert len([w for w in caught if w.category is NoEffectWarning]) == 1
    assert "slm/tflops_per_second" in steps[4]
    assert "slm/mfu" not in steps[4]


def test_two_monitors_log_under_two_names(tmp_path, clock):
    pair = [ThroughputMonitor(window=1, warmup=1), ThroughputMonitor(window=8, warmup=1)]
    steps, _ = run(tmp_path, clock, pair)
    assert {"slm/tokens_per_second/1", "slm/tokens_per_second/8"} <= set(steps[4])
    assert pair[0].state_key != pair[1].state_key


def test_its_cost_may_be_told_by_whoever_knows_better(tmp_path, clock):
    class Own(ThroughputMonitor):
        def flops_per_token(self, pl_module, length):
            return 1e12

    steps, _ = run(tmp_path, clock, [Own(warmup=1, peak_tflops=100)])
    assert steps[4]["slm/tflops_per_second"] == pytest.approx(B * T / (STEP + B * ITEM))
    assert steps[4]["slm/mfu"] == pytest.approx(B * T / (STEP + B * ITEM) / 100)


def test_arguments_that_make_no_sense_are_refused():
    for arguments in ({"window": 0}, {"warmup": -1}, {"peak_tflops": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            ThroughputMonitor(**arguments)


def plugin(**attributes):
    return SimpleNamespace(**{"precision": "32-true", **attributes})


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (Precision(), torch.float32),
        (HalfPrecision("bf16-true"), torch.bfloat16),
        (HalfPrecision("16-true"), torch.float16),
        (MixedPrecision("bf16-mixed", "cpu"), torch.bfloat16),
        (DoublePrecision(), torch.float64),
        (plugin(precision="transformer-engine"), torch.float8_e4m3fn),
        (plugin(dtype=torch.bfloat16), torch.bfloat16),  # Lightning's bitsandbytes
        (Float8Precision(), torch.float8_e4m3fn),
        (Float8Precision(emulate=True), torch.bfloat16),
        (Int8Precision(), torch.int8),
    ],
    ids=lambda value: str(getattr(value, "precision", value)),  # alike in every process
)
def test_the_dtype_that_is_multiplied_is_the_plugin_s(precision, dtype):
    on_cpu = SimpleNamespace(root_device=torch.device("cpu"))
    assert multiplied_dtype(SimpleNamespace(precision_plugin=precision, strategy=on_cpu)) == dtype


def test_float32_on_a_gpu_is_tf32_where_that_is_allowed_and_sharded_weights_may_be_gathered_as_bf16(monkeypatch):
    on_gpu = SimpleNamespace(root_device=torch.device("cuda"))
    run = SimpleNamespace(precision_plugin=Precision(), strategy=on_gpu)
    assert multiplied_dtype(run) == torch.float32
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert multiplied_dtype(run) == "tf32"
    on_gpu.param_dtype = "bfloat16"
    assert multiplied_dtype(run) == torch.bfloat16


class Sharded(Worker):
    """FSDP2 as Lightning wants it."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


@pytest.mark.slow
def test_two_ranks_are_summed_and_shards_cost_what_whole_weights_do(tmp_path):
    run_on_ranks(Path(__file__), tmp_path, timeout=200)
    for strategy in ("ddp", "halves"):
        ranks = [torch.load(tmp_path / f"{strategy}.{rank}.pt") for rank in range(2)]
        assert ranks[0] == ranks[1]  # the same figures everywhere
        values = ranks[0]["steps"][5]
        # The second rank takes twice as long and, padded, has fewer tokens: seconds are a mean, tokens a sum.
        seconds = (STEP + 2 * STEP) / 2 + B * ITEM
        assert values["slm/tokens_per_second"] == pytest.approx(B * (T + 4) / seconds)
        assert values["slm/tflops_per_second"] == pytest.approx(expected_flops(B * (T + 4)) / 2 / seconds / 1e12)
        assert values["slm/tokens_seen"] == 6 * B * (T + 4)
        assert ranks[0]["state"] == {"tokens_seen": 6 * B * (T + 4)}


def two_ranks(folder):
    """What one rank of two does: a run under DDP, another one with sharded weights."""
    clock, settings = Clock(), {"devices": 2, "use_distributed_sampler": False, "steps": 6}
    throughput.perf_counter = clock
    halves = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    for name, strategy, make in (("ddp", "ddp", Worker), ("halves", halves, Sharded)):
        rank = int(os.environ.get("LOCAL_RANK", 0))
        loader = DataLoader(Items(clock, real=4 if rank else T), batch_size=B)
        monitor = ThroughputMonitor(warmup=1, peak_tflops=1.0)
        # The same logged values on both ranks: loggers exist on the first one only.
        seen = {}
        watch = SeeMetrics(seen)
        run(folder, clock, [monitor, watch], loader, make(clock, STEP * (1 + rank)), strategy=strategy, **settings)
        torch.save({"steps": seen, "state": monitor.state_dict()}, Path(folder, f"{name}.{rank}.pt"))


class SeeMetrics(Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._keep(trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self._keep(trainer)

    def _keep(self, trainer):
        values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("slm/")}
        self.steps[trainer.global_step - 1] = values


if __name__ == "__main__":
    two_ranks(sys.argv[1])
    leave_together()
