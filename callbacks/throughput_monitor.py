"""Tokens per second, and which share of the hardware's peak they are: model FLOPs utilisation (Chowdhery et al. 2022,
https://arxiv.org/abs/2204.02311, appendix B).
"""

import warnings
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_slm.callbacks._find import network_of, tokens_in
from lightning_slm.callbacks._hooks import Undo, wrap_method
from lightning_slm.errors import NoEffectWarning
from lightning_slm.measure.flops import ForwardFlops, training_flops
from lightning_slm.measure.peak import Multiplied, peak_flops
from lightning_slm.measure.throughput import Throughput


class ThroughputMonitor(Callback):
    """Log how fast training is, over the last optimizer steps, whenever the Trainer logs.

    - ``slm/tokens_per_second``: of all processes together; padding (``attention_mask`` 0) is no token;
    - ``slm/tflops_per_second``: of one device, the arithmetic that these tokens need: forward and backward, each token
      attending to those before it, without teachers and without what activation checkpointing computes twice;
    - ``slm/mfu``: the same, as a share of the dense peak of the device in the dtype that is multiplied;
    - ``slm/tokens_seen``: since training began, through all resumed runs.

    Waiting for data counts; validation, saving checkpoints and the first steps do not. The device is waited for only
    when values are logged.

    Args:
        window: optimizer steps to look back at.
        warmup: first steps of a run that do not count: compilers and caches work then.
        peak_tflops: what 100 % is, in TFLOP/s of one device; None: by the data sheet of a GPU, measured on a CPU.
    """

    _throughput: Throughput
    _batch: tuple[Any, int] | None  # tokens and length of the present one
    _measured: float | None  # FLOPs per token where there is no formula; 0: not known either
    _watch: ForwardFlops | None

    def __init__(self, window: int = 20, warmup: int = 3, peak_tflops: float | None = None) -> None:
        if window < 1 or warmup < 0 or (peak_tflops is not None and peak_tflops <= 0):
            raise ValueError(
                f"window={window} must be 1 step or more, warmup={warmup} 0 or more, peak_tflops={peak_tflops} above 0."
            )
        self.window, self.warmup, self.peak_tflops = window, warmup, peak_tflops
        self._undo: list[Undo] = []
        self._begin_anew()

    # What to override.

    def flops_per_token(self, pl_module: nn.Module, length: int) -> float:
        """Of forward and backward pass, for one token of a sequence of ``length``; ValueError where it is not known."""
        return training_flops(network_of(pl_module), length) / length

    # When.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier run; a resumed one gets its tokens back after this."""
        if stage == "fit":
            self._begin_anew()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to look."""
        self._throughput = Throughput(trainer.strategy.root_device, self.window, self.warmup)
        self._stepped = trainer.global_step
        self._undo.append(wrap_method(trainer, "save_checkpoint", lambda *a, **kw: self._save(trainer, *a, **kw)))

    def on_new_structure(self, pl_module: Any) -> None:
        """A smaller model has another formula."""
        self._formulas.clear()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the tokens of this batch."""
        self._throughput.start()
        ids, mask = tokens_in(batch)
        if ids is None:
            self._batch = None
            self._warn("ids", f"sees no token ids, integers of shape (batch, tokens), in a {type(batch).__name__}.")
            return
        tokens: Any = ids.numel() if mask is None else (mask != 0).sum()
        self._batch = tokens, ids.shape[1]
        self._counted += tokens
        if self._per_token(pl_module, ids.shape[1]) is None and self._measured is None:
            self._watch = ForwardFlops(m for m in pl_module.children() if any(p.requires_grad for p in m.parameters()))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Close the optimizer step, if there was one, and log if it is time to."""
        if self._batch is not None:
            self._throughput.end_batch(*self._batch)
            self._read_watch(pl_module, batch)
        if trainer.global_step == self._stepped:
            return
        self._stepped = trainer.global_step
        self._throughput.end_step()
        if _logs_now(trainer):
            with self._throughput.paused():
                self._log(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Training goes on now."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._throughput.resume()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Sum up, for whoever saves a checkpoint after training."""
        self._sum_tokens(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take our hooks off again."""
        while self._undo:
            self._undo.pop()()
        if self._watch is not None:
            self._watch.remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As `teardown`, which Lightning leaves out then."""
        self.teardown(trainer, pl_module, "fit")

    # State: how much was read.

    @property
    def state_key(self) -> str:
        """Tells two instances apart."""
        return self._generate_state_key(window=self.window, warmup=self.warmup, peak_tflops=self.peak_tflops)

    def state_dict(self) -> dict[str, Any]:
        """Tokens of all processes, up to when a checkpoint was saved or training ended."""
        return {"tokens_seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._before = self._seen = state_dict["tokens_seen"]

    # How.

    def _begin_anew(self) -> None:
        self._before = self._seen = 0  # tokens of all processes: of earlier runs; up to the last sum
        self._counted: Any = 0  # tokens of this process in this run, on the device where there is padding
        self._formulas: dict[int, float | None] = {}  # length of a sequence -> FLOPs per token
        self._batch = self._measured = self._watch = None
        self._warned: set[str] = set()

    def _per_token(self, pl_module: nn.Module, length: int) -> float | None:
        if length not in self._formulas:
            try:
                self._formulas[length] = self.flops_per_token(pl_module, length)
            except ValueError:
                self._formulas[length] = None
        formula = self._formulas[length]
        return formula if formula is not None else self._measured or None

    def _read_watch(self, pl_module: nn.Module, batch: Any) -> None:
        """After the first batch of a model without formula: backward costs twice what was seen of forward."""
        ids, _ = tokens_in(batch)
        if self._watch is None or ids is None:
            return
        self._watch.remove()
        self._measured, self._watch = 3 * self._watch.flops / ids.numel(), None
        if not self._measured:
            self._warn(
                "flops",
                f"has no formula for the FLOPs of {type(pl_module).__name__}, and saw none in its first forward pass "
                "(is it compiled?), so it logs neither slm/tflops_per_second nor slm/mfu: give the layers that mix "
                "tokens a method flops_per_token(context), or override ThroughputMonitor.flops_per_token.",
            )

    def _log(self, trainer: Any, pl_module: Any) -> None:
        tokens = self._throughput.tokens()
        costs = {length: self._per_token(pl_module, length) for length in tokens}
        flops = sum(tokens[length] * (cost or 0.0) for length, cost in costs.items())
        here = (tokens.total(), flops, self._throughput.seconds(), int(self._counted))
        all_tokens, all_flops, device_seconds, counted = _sum_over_ranks(trainer, *here)
        self._seen = self._before + round(counted)
        values: dict[str, float] = {"tokens_seen": self._seen} if counted else {}
        if all_tokens:
            values["tokens_per_second"] = all_tokens * trainer.world_size / device_seconds
        if all_flops:
            per_device = all_flops / device_seconds
            values["tflops_per_second"] = per_device / 1e12
            if (peak := self._peak(trainer)) is not None:
                values["mfu"] = per_device / peak
        alone = sum(isinstance(c, ThroughputMonitor) for c in trainer.callbacks) == 1
        suffix = "" if alone else f"/{self.window}"
        pl_module.log_dict({f"slm/{name}{suffix}": float(value) for name, value in values.items()})

    def _peak(self, trainer: Any) -> float | None:
        if self.peak_tflops is not None:
            return self.peak_tflops * 1e12
        device, dtype = trainer.strategy.root_device, multiplied_dtype(trainer)
        peak = peak_flops(device, dtype)
        if peak is None:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            self._warn("peak", f"knows no peak of {name!r} in {dtype}, so it logs no slm/mfu; give peak_tflops.")
        return peak

    def _sum_tokens(self, trainer: Any) -> None:
        *_, counted = _sum_over_ranks(trainer, 0, 0, 0, int(self._counted))
        self._seen = self._before + round(counted)

    def _save(self, trainer: Any, save: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``Trainer.save_checkpoint``, which all processes call."""
        with self._throughput.paused():
            self._sum_tokens(trainer)
            return save(*args, **kwargs)

    def _warn(self, about: str, what: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(f"ThroughputMonitor {what}", NoEffectWarning, stacklevel=3)


def multiplied_dtype(trainer: Any) -> Multiplied:
    """What the matrix products of a run are made in, as far as its precision plugin and strategy tell."""
    plugin, strategy = trainer.precision_plugin, trainer.strategy
    low_bit = None if getattr(plugin, "emulate", False) else getattr(plugin, "multiplies", None)
    for told in (low_bit, getattr(plugin, "dtype", None)):
        if isinstance(told, torch.dtype):
            return told
    dtype = _dtype_named(str(plugin.precision))
    if dtype != torch.float32:
        return dtype
    if shards := getattr(strategy, "param_dtype", None):  # of slm_fsdp2
        return getattr(torch, shards)
    on_tensor_cores = torch.get_float32_matmul_precision() != "highest" and strategy.root_device.type == "cuda"
    return "tf32" if on_tensor_cores else dtype


def _dtype_named(precision: str) -> torch.dtype:
    if precision.startswith("transformer-engine"):
        return torch.float8_e4m3fn
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return kinds.get(precision.partition("-")[0], torch.float32)


def _logs_now(trainer: Any) -> bool:
    """Whether Lightning hands this step's values to loggers: counted as it does, so alike on all ranks."""
    steps, every = trainer.fit_loop.epoch_loop._batches_that_stepped + 1, trainer.log_every_n_steps
    return every > 0 and steps % every == 0


def _sum_over_ranks(trainer: Any, tokens: float, flops: float, seconds: float, counted: float) -> list[float]:
    """Sums over all processes, which must all call this; what several do to one batch (tensor parallel) counts once."""
    if trainer.world_size == 1:
        return [tokens, flops, seconds, counted]
    mesh: Any = getattr(trainer.strategy, "device_mesh", None)
    dims = getattr(mesh, "mesh_dim_names", None) or ()
    sharers = mesh["tensor_parallel"].size() if "tensor_parallel" in dims else 1
    here = [tokens / sharers, flops / sharers, seconds, counted / sharers]
    summed = torch.tensor(here, dtype=torch.float64, device=trainer.strategy.root_device)
    return trainer.strategy.reduce(summed, reduce_op="sum").tolist()
