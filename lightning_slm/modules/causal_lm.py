"""`CausalLM`: trains any causal language model on next tokens."""

# Shape letters: B = batch, T = tokens, N = predicted positions, n = those of a chunk, V = vocabulary.

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerFast

from lightning_slm.measure import BitsPerByte, Perplexity
from lightning_slm.models import load_causal_lm
from lightning_slm.modules.muon_adamw import MuonAdamW
from lightning_slm.modules.next_token import NextTokenLoss, next_labels
from lightning_slm.modules.parameter_groups import parameter_groups
from lightning_slm.modules.schedules import Schedule, WSDSchedule
from lightning_slm.modules.stored import (
    OWN_MODULE,
    configuration_of,
    load_weights_,
    tokenizer_from_text,
    tokenizer_to_text,
)
from lightning_slm.modules.token_window import TokenWindow
from lightning_slm.nn.blocks import repeated_blocks
from lightning_slm.nn.cross_entropy import LogitsLoss
from lightning_slm.nn.sharded import is_sharded, plain_copy


class CausalLM(LightningModule):
    """A causal language model that learns to predict the next token.

    Batches are dicts: ``input_ids`` (B, T); ``labels`` (B, T), not shifted, -100 = no loss (absent: the ids);
    ``position_ids`` and ``attention_mask`` are passed on. Every token counts alike, however micro-batches and ranks
    divide them. Logs ``train_loss`` (the loss optimised, per token, of one optimizer step), ``val_loss``,
    ``val_perplexity``, ``val_bits_per_byte`` (if the data module knows ``bytes_per_token``), and the same of ``test_``.

    The network is ``self.model``; from a name or configuration it is built in ``configure_model``, which the Trainer
    and ``load_from_checkpoint`` call.

    Args:
        model: a preset (new weights), a Hugging Face folder (its weights), the dict of a configuration (new weights),
            or any module whose forward(input_ids) gives logits or an object that has them.
        optimizer: makes the optimizer, of groups: hidden matrices, other weights that decay, and those that do not.
        lr_scheduler: a schedule of ours, in fractions of the run; or makes one of torch's, which then moves at each
            optimizer step (ReduceLROnPlateau: at each epoch, by val_loss). None: constant learning rates.
        init_weights_from: a checkpoint of ours, a Hugging Face folder or a safetensors file to start from. A resumed
            run does not read it.
        overrides: values of the model's configuration to replace, such as max_position_embeddings.
        compile: compile each repeated block of the model.
    """

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str = "slm-5m",
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
        self._logits_losses: OrderedDict[int, tuple[LogitsLoss, float]] = OrderedDict()
        self._loss: NextTokenLoss | None = None
        self._not_loaded: FileNotFoundError | None = None
        self._window = TokenWindow()
        self._metrics = nn.ModuleDict()
        if isinstance(model, nn.Module):
            self.model = load_causal_lm(model, **self._overrides)
            self.hparams["model"] = configuration_of(self.model)
        elif isinstance(model, dict) and OWN_MODULE in model:
            raise ValueError(
                f"The checkpoint holds the weights of a module of your own, {model[OWN_MODULE]}, which it cannot "
                "rebuild: give it, CausalLM.load_from_checkpoint(path, model=...)."
            )

    # The network.

    def configure_model(self) -> None:
        """Build the network, once, with the weights to start from; refuse data that does not fit it."""
        if self._loss is None:
            if "model" not in self._modules:
                assert self._source is not None
                self.model = load_causal_lm(self._source, **self._overrides).train()  # from a folder it comes in eval
                self.hparams["model"] = configuration_of(self.model)
            self._load_initial_weights()
            self._loss = NextTokenLoss(self.model)
            if self.compile_blocks:
                _compile_blocks(self.model)
        self._check_data(self._loss)

    def _load_initial_weights(self) -> None:
        """Lightning does not tell yet whether a checkpoint follows, which makes up for a file that is gone."""
        try:
            if self.init_weights_from is not None:
                load_weights_(self.model, self.init_weights_from)
        except FileNotFoundError as error:
            self._not_loaded = error

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """What the model gives."""
        return self.model(input_ids, **kwargs)

    def add_logits_loss(self, fn: LogitsLoss, ce_weight: float = 1.0) -> RemovableHandle:
        """Add a loss on the training logits, which exist for a chunk of positions at a time only.

        Args:
            fn: called as ``fn(logits_nV, labels_n, rows)`` for each chunk, with logits in float32. ``rows`` is a slice
                of the B * (T - 1) predicted positions: row r is position r % (T - 1) of sequence r // (T - 1), and
                its label is the token after it. Returns the sum over the chunk of its own loss per token, weight
                included and rows with label -100 excluded; the total is divided by the tokens, as the cross-entropy.
            ce_weight: factor of the cross-entropy itself; those of several losses multiply.

        Returns: a handle; ``handle.remove()`` takes the loss away.
        """
        handle = RemovableHandle(self._logits_losses)
        self._logits_losses[handle.id] = (fn, ce_weight)
        return handle

    # Training.

    def on_train_start(self) -> None:
        """Begin with an empty window of micro-batches."""
        self._window = TokenWindow(self.trainer.world_size)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss per token; see `TokenWindow` for what it is divided by."""
        labels_N = next_labels(batch)
        extra = [fn for fn, _ in self._logits_losses.values()]
        ce_weight = math.prod(weight for _, weight in self._logits_losses.values())
        return self._window.loss(self._next_token_loss(batch, labels_N, extra, ce_weight), _count(labels_N))

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

    def _next_token_loss(self, batch: dict[str, Tensor], labels_N: Tensor, *args: Any) -> Tensor:
        assert self._loss is not None, "configure_model comes first"
        if self._not_loaded is not None:
            raise self._not_loaded
        return self._loss(batch, labels_N, *args)

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
        """Add to the sums of nats, tokens and bytes."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """As validation."""
        self._evaluate("test", batch, dataloader_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Mean nats per predicted token of each sequence, (B,): how surprising the model finds it."""
        labels_N, B = next_labels(batch), len(batch["input_ids"])
        nats_N = torch.zeros(len(labels_N), device=labels_N.device)

        def keep(logits_nV: Tensor, labels_n: Tensor, rows: slice) -> Tensor:
            nats_N[rows] = nn.functional.cross_entropy(logits_nV, labels_n, reduction="none")
            return logits_nV.new_zeros(())

        self._next_token_loss(batch, labels_N, [keep])
        return nats_N.view(B, -1).sum(1) / (labels_N.view(B, -1) != -100).sum(1).clamp(min=1)

    def _evaluate(self, stage: str, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        labels_N = next_labels(batch)
        nats, tokens = self._next_token_loss(batch, labels_N), _count(labels_N)
        bytes_per_token: Any = getattr(self.trainer.datamodule, "bytes_per_token", None)  # type: ignore[attr-defined]
        key = f"{stage}_{dataloader_idx}"
        if key not in self._metrics:
            made: dict[str, nn.Module] = {"loss": _NatsPerToken(), "perplexity": Perplexity()}
            made |= {"bits_per_byte": BitsPerByte()} if bytes_per_token else {}
            self._metrics[key] = nn.ModuleDict(made).to(self.device)
        metrics: Any = self._metrics[key]
        metrics["loss"].update(nats, tokens)
        metrics["perplexity"].update(nats, tokens)
        if bytes_per_token:
            metrics["bits_per_byte"].update(nats, tokens * bytes_per_token(stage))
        for name, metric in metrics.items():
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
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "CausalLM":  # type: ignore[override]
        """As Lightning's; the network is rebuilt from the checkpoint, without the files it once came from."""
        return super().load_from_checkpoint(checkpoint_path, *args, **{"init_weights_from": None, **kwargs})

    @classmethod
    def from_checkpoint(cls, source: str | Path, **kwargs: Any) -> "CausalLM":
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
        """Add the tokenizer, as text: a model without it is of no use."""
        if (tokenizer := self._current_tokenizer()) is not None:
            checkpoint["slm_tokenizer"] = tokenizer_to_text(tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the tokenizer out again; refuse data in another one's ids."""
        self._not_loaded = None
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

    def _check_data(self, loss: NextTokenLoss) -> None:
        """Raises: ValueError: the data module's windows or token ids are more than the model has room for."""
        data = getattr(self._trainer, "datamodule", None)
        if window := getattr(data, "window", None):
            loss.check_length(window)
        rows = getattr(getattr(self.model, "config", None), "vocab_size", None)
        tokenizer = self._current_tokenizer()
        if rows is not None and tokenizer is not None and len(tokenizer) > rows:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, but the model's vocabulary only {rows}; give the model "
                f"overrides={{'vocab_size': {len(tokenizer)}}}, or the data a smaller vocab_size."
            )


class _NatsPerToken(Perplexity):
    """The logarithm of perplexity, which does not overflow where a run diverges."""

    def compute(self) -> Tensor:
        return self.nats / self.units


def _count(labels_N: Tensor) -> Tensor:
    return (labels_N != -100).sum()


def _compile_blocks(model: nn.Module) -> None:
    """Compile, in place, the repeated blocks."""
    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(
            f"compile=True: {type(model).__name__} has no repeated blocks; compile what you want of it: "
            "model.part.compile(), before it is given to CausalLM."
        )
    for _, block in blocks:
        block.compile()
