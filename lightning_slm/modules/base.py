"""`SLMModule`: what all modules here share: how the network is built, optimised, logged, kept and given back."""

import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import PreTrainedTokenizerFast

from lightning_slm.measure import Perplexity
from lightning_slm.models import load_model
from lightning_slm.modules.inputs import Inputs
from lightning_slm.modules.muon_adamw import MuonAdamW
from lightning_slm.modules.parameter_groups import parameter_groups
from lightning_slm.modules.schedules import Schedule, WSDSchedule
from lightning_slm.modules.stored import (
    OWN_MODULE,
    check_tokenizer,
    configuration_of,
    load_weights_,
    tokenizer_from_text,
    tokenizer_to_text,
)
from lightning_slm.modules.token_window import TokenWindow
from lightning_slm.nn.blocks import repeated_blocks
from lightning_slm.nn.sharded import is_sharded, plain_copy


class SLMModule(LightningModule):
    """A network and how it learns. A subclass says for which task, and what the loss is:

    - ``task``: as `load_model` takes it.
    - ``_make_loss()``: called once, when the network is there with its first weights; the object becomes
      ``self._loss``.
    - ``training_step``: returns ``self._window.loss(summed loss, units)``. Every unit (a token, a text) counts alike,
      however micro-batches and ranks divide them.
    - ``_make_metrics(stage)``: what ``self._measure(stage, ...)`` updates and logs.

    The arguments are `CausalLM`'s.
    """

    task: ClassVar[str]

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str,
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: Schedule | LRSchedulerCallable | None = WSDSchedule(),  # noqa: B008 (frozen)
        init_weights_from: str | Path | None = None,
        overrides: dict[str, Any] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("compile")
        self._source, self._overrides = None if isinstance(model, nn.Module) else model, overrides or {}
        self._make_optimizer, self._make_scheduler = optimizer, lr_scheduler
        self.init_weights_from, self.compile_blocks = init_weights_from, compile
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self._loss: Any = None
        self._not_loaded: FileNotFoundError | None = None
        self._window = TokenWindow()
        self._metrics = nn.ModuleDict()
        if isinstance(model, nn.Module):
            self.model = load_model(model, self.task, **self._overrides)
            self.hparams["model"] = configuration_of(self.model)
        elif isinstance(model, dict) and OWN_MODULE in model:
            raise ValueError(
                f"The checkpoint holds the weights of a module of your own, {model[OWN_MODULE]}, which it cannot "
                f"rebuild: give it, {type(self).__name__}.load_from_checkpoint(path, model=...)."
            )

    # The network.

    def configure_model(self) -> None:
        """Build the network, once, with the weights to start from; refuse data that does not fit it."""
        if self._loss is None:
            if "model" not in self._modules:
                assert self._source is not None
                self.model = self._build(self._source).train()  # from a folder it comes in eval
            self._load_initial_weights()
            self._loss = self._make_loss()
            self.hparams["model"] = configuration_of(self.model)
            if self.compile_blocks:
                _compile_blocks(self.model, type(self).__name__)
        self._check_data(self._loss)

    def _build(self, source: Any) -> nn.Module:
        return load_model(source, self.task, **self._overrides)

    def _make_loss(self) -> Inputs:
        raise NotImplementedError(f"{type(self).__name__}._make_loss")

    def _load_initial_weights(self) -> None:
        """Lightning does not tell yet whether a checkpoint follows, which makes up for a file that is gone."""
        try:
            if self.init_weights_from is not None:
                load_weights_(self.model, self.init_weights_from, self.task)
                check_tokenizer(self.init_weights_from, self._current_tokenizer())
        except FileNotFoundError as error:
            self._not_loaded = error

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """What the model gives."""
        return self.model(input_ids, **kwargs)

    # Training.

    def on_train_start(self) -> None:
        """Begin with an empty window of micro-batches."""
        self._window = TokenWindow(self.trainer.world_size)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """All micro-batches are in: stop if the loss is not finite, else make every token count alike.

        Raises:
            FloatingPointError: on all ranks; before the step, so that the weights are still the last good ones.
        """
        if not self._window.micro_batches:
            return
        loss, factor = self._window.result(self.trainer.accumulate_grad_batches)
        if not math.isfinite(loss):
            raise FloatingPointError(self._not_finite(loss))
        if factor != 1.0:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(factor)
        self.log("train_loss", loss, prog_bar=True)

    def _ready_loss(self) -> Any:
        """``self._loss``, if the network has the weights to start from."""
        assert self._loss is not None, "configure_model comes first"
        if self._not_loaded is not None:
            raise self._not_loaded
        return self._loss

    def _not_finite(self, loss: float) -> str:
        names = ("last_model_path", "best_model_path")
        saved = [getattr(callback, name, "") for callback in self.trainer.checkpoint_callbacks for name in names]
        last = next((repr(path) for path in saved if path), "none was saved yet")
        return (
            f"The training loss is {loss} at step {self.global_step} (epoch {self.current_epoch}). Stopped before the "
            f"optimizer's step, so the weights are still the good ones of that step; last checkpoint: {last}. Resume "
            "there with a lower learning rate, gradient_clip_val=1.0, or precision bf16-mixed instead of 16-mixed."
        )

    # Evaluation.

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add to the sums of the validation's metrics."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As validation."""
        self._evaluate("test", batch, dataloader_idx)

    def _evaluate(self, stage: str, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        raise NotImplementedError(f"{type(self).__name__}._evaluate")

    def _make_metrics(self, stage: str) -> dict[str, nn.Module]:
        raise NotImplementedError(f"{type(self).__name__}._make_metrics")

    def _measure(self, stage: str, dataloader_idx: int, **updates: tuple[Any, ...]) -> None:
        """Update the metrics of a stage and log them, each as ``<stage>_<name>``; all but perplexity in the bar."""
        key = f"{stage}_{dataloader_idx}"
        if key not in self._metrics:
            self._metrics[key] = nn.ModuleDict(self._make_metrics(stage)).to(self.device)
        metrics: Any = self._metrics[key]
        for name, metric in metrics.items():
            _leave_inference_(metric)
            metric.update(*updates[name])
            found_at: Any = f"_metrics.{key}.{name}"
            self.log(f"{stage}_{name}", metric, prog_bar=name != "perplexity", metric_attribute=found_at)

    # Optimizer and schedule.

    def configure_optimizers(self) -> Any:
        """One optimizer over three groups of parameters, and the schedule.

        Raises:
            ValueError: a schedule in fractions of the run, and a run without an end in steps.
        """
        optimizer, schedule = self._make_optimizer(parameter_groups(self)), self._make_scheduler
        if schedule is None:
            return optimizer
        if not isinstance(schedule, Schedule):
            scheduler = schedule(optimizer)
            per_epoch = isinstance(scheduler, ReduceLROnPlateau)
            when = {"interval": "epoch", "monitor": "val_loss"} if per_epoch else {"interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **when}}
        total = self.trainer.estimated_stepping_batches
        if not 0 < total < float("inf"):
            raise ValueError(
                f"{schedule} is in fractions of the run, but this run has no known number of steps (max_time does not "
                "give one): set Trainer(max_steps=...), or lr_scheduler=None for a constant learning rate."
            )
        scheduler = LambdaLR(optimizer, lambda step: schedule(step, int(total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Checkpoints.

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """As Lightning's; the network is rebuilt from the checkpoint, without the files it once came from."""
        return super().load_from_checkpoint(checkpoint_path, *args, **{"init_weights_from": None, **kwargs})

    @classmethod
    def from_checkpoint(cls, source: str | Path, **kwargs: Any) -> Self:
        """From a Lightning checkpoint, or from a folder that `save_pretrained` or Hugging Face wrote.

        Args:
            source: the file or folder.
            kwargs: other arguments of the module.
        """
        if not Path(source).is_dir():
            return cls.load_from_checkpoint(source, **kwargs)
        module = cls(model=str(source), **kwargs)
        module.configure_model()
        if (Path(source) / "tokenizer.json").is_file():
            module.tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
        return module

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as a Hugging Face folder, on the first rank; where the model is in shards, all
        ranks must call this.

        Raises:
            ValueError: the model is not a Hugging Face model.
        """
        network: Any = self.model
        if not hasattr(network, "save_pretrained"):
            raise ValueError(
                f"{type(network).__name__} has no save_pretrained; use torch.save(module.model.state_dict(), ...)."
            )
        if is_sharded(network):
            network = plain_copy(network, keep=self.global_rank == 0)
        if self.global_rank == 0:
            network.save_pretrained(folder)
            if (tokenizer := self._current_tokenizer()) is not None:
                tokenizer.save_pretrained(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the task, and the tokenizer as text: a model without it is of no use."""
        checkpoint["slm_task"] = self.task
        if (tokenizer := self._current_tokenizer()) is not None:
            checkpoint["slm_tokenizer"] = tokenizer_to_text(tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the tokenizer out again; refuse data in another one's ids.

        Raises:
            ValueError: another kind of module wrote the checkpoint, or the data has another tokenizer.
        """
        self._not_loaded = None
        if (task := checkpoint.get("slm_task", self.task)) != self.task:
            raise ValueError(
                f"The checkpoint is of a model for the task {task!r}, but {type(self).__name__} trains for "
                f"{self.task!r}; to start from its weights, give init_weights_from."
            )
        if "slm_tokenizer" not in checkpoint:
            return
        self.tokenizer = tokenizer_from_text(checkpoint["slm_tokenizer"])
        current = self._current_tokenizer()
        if current is not None and current.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError(
                "The data has another tokenizer than the checkpoint, so the model would read other words than it "
                "learned: save the checkpoint's with module.tokenizer.save_pretrained(folder), and give the data that."
            )

    def _current_tokenizer(self) -> PreTrainedTokenizerFast | None:
        of_data = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        return self.tokenizer if of_data is None else of_data

    def _check_data(self, loss: Inputs) -> None:
        """Raises: ValueError: the data module's windows or token ids are more than the model has room for."""
        data = getattr(self._trainer, "datamodule", None)
        if longest := getattr(data, "window", None) or getattr(data, "max_length", None):
            loss.check_length(longest)
        rows = getattr(getattr(self.model, "config", None), "vocab_size", None)
        tokenizer = self._current_tokenizer()
        if rows is not None and tokenizer is not None and len(tokenizer) > rows:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, but the model's vocabulary only {rows}; give the model "
                f"overrides={{'vocab_size': {len(tokenizer)}}}, or the data a smaller vocab_size."
            )


class PerUnit(Perplexity):
    """A sum over how many units it is of, right for unequal batches and ranks: nats per token, say, which unlike
    perplexity does not overflow where a run diverges.
    """

    def compute(self) -> Tensor:
        return self.nats / self.units


def _leave_inference_(metric: Any) -> None:
    """``validate`` runs in inference mode, the validation of a ``fit`` does not, and may not change what that left."""
    if not torch.is_inference_mode_enabled():
        for name, state in metric.metric_state.items():
            if isinstance(state, Tensor) and state.is_inference():
                setattr(metric, name, state.clone())


def _compile_blocks(model: nn.Module, module: str) -> None:
    """Compile, in place, the repeated blocks."""
    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(
            f"compile=True: {type(model).__name__} has no repeated blocks; compile what you want of it: "
            f"model.part.compile(), before it is given to {module}."
        )
    for _, block in blocks:
        block.compile()
