"""What a run of compression cost and what it brought: the model before it beside the artefact after it."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_slm.callbacks._find import network_of, validation_loader
from lightning_slm.callbacks._hooks import refuse_flat_weights
from lightning_slm.measure import Measured, Method, Report, measure_model
from lightning_slm.nn.sharded import is_sharded, plain_copy
from lightning_slm.quantization import enable_fake_quant_, fake_quant_layers


class CompressionReport(Callback):
    """Measure the model at the start of ``fit``, its exported form at the end, and write both side by side.

    The report goes to the terminal and, as report.json, report.md and report.png, into a folder. Quality is measured
    on the first validation batches; what a model cannot do (be exported, generate) is left out with the reason. The
    first rank measures while the others wait; of a sharded model a whole copy, for which it needs the memory.

    Args:
        baseline: what is measured as "before". "start": the model as training begins, dense. Or another one: a preset,
            a Hugging Face folder, a checkpoint (.ckpt), a module.
        batches: validation batches to measure quality on.
        prompt_tokens: length of the prompt when decoding is timed.
        new_tokens: tokens decoded after it.
        runs: timed generations, of which the median counts.
        targets: name patterns of the weights whose sparsity is counted.
        skip: patterns to leave out again.
        folder: where the report is written; None: "report" in the trainer's default_root_dir.
    """

    def __init__(
        self,
        baseline: str | nn.Module = "start",
        batches: int = 16,
        prompt_tokens: int = 32,
        new_tokens: int = 64,
        runs: int = 5,
        targets: str | Sequence[str] = "*",
        skip: str | Sequence[str] = (),
        folder: str | None = None,
    ) -> None:
        self.baseline, self.batches, self.folder = baseline, batches, folder
        self.prompt_tokens, self.new_tokens, self.runs = prompt_tokens, new_tokens, runs
        self.targets, self.skip = targets, skip
        self._before: Measured | None = None
        self._began_at = 0  # global step at which "before" was measured

    @property
    def state_key(self) -> str:
        baseline = self.baseline if isinstance(self.baseline, str) else type(self.baseline).__name__
        return self._generate_state_key(baseline=baseline, folder=self.folder)

    def state_dict(self) -> dict[str, Any]:
        return {"before": asdict(self._before), "began_at": self._began_at} if self._before else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before, self._began_at = Measured(**state_dict["before"]), state_dict["began_at"]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget an earlier run; a resumed one gets its figures back after this."""
        if stage == "fit":
            refuse_flat_weights(self, trainer)
            self._before = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure "before", unless a resumed run brought its figures along."""
        if self._before is None:
            self._began_at = trainer.global_step
            source = _at_hand(self._baseline_model(pl_module), trainer)
            if source is not None:
                with _rounding(source, False):
                    self._before = self._measure(trainer, pl_module, source, quantized=False)
        trainer.strategy.barrier("CompressionReport before")

    before_first_cut = on_train_start  # by StructuredPruning, which comes first

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure "after", when every callback has had its last word on the weights, and write the report."""
        source = _at_hand(network_of(pl_module), trainer)
        # Without "before" nothing was left to train, in a run that began without us.
        if source is not None and self._before is not None:
            with _rounding(source, True):
                after = self._measure(trainer, pl_module, source, quantized="auto")
            report = Report(self._before, after, self._about(trainer, pl_module))
            report.save(self.folder or Path(trainer.default_root_dir, "report"))
            report.print()
        trainer.strategy.barrier("CompressionReport after")

    def _measure(self, trainer: Any, pl_module: Any, source: nn.Module, quantized: Any) -> Measured:
        """With the state of every random generator put back: training must not notice."""
        predicts = getattr(pl_module, "task", "causal") not in ("masked", "classification")  # the next token
        with isolate_rng():
            loader = validation_loader(trainer, pl_module) if predicts else None
            batches = list(itertools.islice(loader or (), self.batches))
            method = self._method(trainer.datamodule, source, quantized)
            return measure_model(source, batches, method, trainer.strategy.root_device)

    def _method(self, datamodule: Any, source: nn.Module, quantized: Any) -> Method:
        from lightning_slm.export import save_hf_folder  # here, since transformers takes seconds to import
        from lightning_slm.models.decode import generate_stream

        bytes_per_token = getattr(datamodule, "bytes_per_token", None)
        return Method(
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            runs=self.runs,
            targets=self.targets,
            skip=self.skip,
            bytes_per_token=bytes_per_token("val") if callable(bytes_per_token) else None,
            export=partial(save_hf_folder, quantized=quantized) if hasattr(source, "save_pretrained") else None,
            stream=generate_stream,
        )

    def _baseline_model(self, pl_module: Any) -> nn.Module:
        from lightning_slm.models import load_causal_lm
        from lightning_slm.modules import CausalLM

        if self.baseline == "start":
            return network_of(pl_module)
        if isinstance(self.baseline, str) and self.baseline.endswith(".ckpt"):
            return CausalLM.load_from_checkpoint(self.baseline, map_location="cpu").model
        return load_causal_lm(self.baseline)

    def _about(self, trainer: Any, pl_module: Any) -> dict[str, str]:
        data: Any = trainer.datamodule or getattr(validation_loader(trainer, pl_module), "dataset", None)
        place = f" of {data.path or 'the Python standard library'}" if hasattr(data, "path") else ""
        start = f"the model at step {self._began_at}"
        return {
            "data": f"{type(data).__name__}{place}, validation split, the first {self.batches} batches",
            "before": start if self.baseline == "start" else str(self.baseline).partition("(\n")[0],
            "after": f"the model at step {trainer.global_step}",
        }


def _at_hand(network: nn.Module, trainer: Any) -> nn.Module | None:
    """What the first rank measures: the network, or a whole copy of one that is in shards; None on other ranks."""
    keep = trainer.is_global_zero
    if is_sharded(network):
        return plain_copy(network, keep)
    return network if keep else None


@contextmanager
def _rounding(network: nn.Module, enabled: bool) -> Iterator[None]:
    """Fake quantisation on or off inside, for networks that are measured as they stand; put back afterwards."""
    was = {layer: layer.fake_quant_enabled for _, layer in fake_quant_layers(network)}
    enable_fake_quant_(network, enabled)
    try:
        yield
    finally:
        for layer, on in was.items():
            layer.fake_quant_enabled = on
