"""`CausalLM`: trains any causal language model on next tokens."""

# Shape letters: B = batch, T = tokens, N = predicted positions, n = those of a chunk, V = vocabulary.

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_slm.measure import BitsPerByte, Perplexity
from lightning_slm.modules.base import PerUnit, SLMModule
from lightning_slm.modules.muon_adamw import MuonAdamW
from lightning_slm.modules.next_token import NextTokenLoss, next_labels
from lightning_slm.modules.schedules import Schedule, WSDSchedule
from lightning_slm.nn.cross_entropy import LogitsLoss


class CausalLM(SLMModule):
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

    task: ClassVar[str] = "causal"

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str = "slm-5m",
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: Schedule | LRSchedulerCallable | None = WSDSchedule(),  # noqa: B008 (frozen)
        init_weights_from: str | Path | None = None,
        overrides: dict[str, Any] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler, init_weights_from, overrides, compile)
        self._logits_losses: OrderedDict[int, tuple[LogitsLoss, float]] = OrderedDict()

    def _make_loss(self) -> NextTokenLoss:
        return NextTokenLoss(self.model)

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

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss per token; see `TokenWindow` for what it is divided by."""
        labels_N = next_labels(batch)
        extra = [fn for fn, _ in self._logits_losses.values()]
        ce_weight = math.prod(weight for _, weight in self._logits_losses.values())
        return self._window.loss(self._next_token_loss(batch, labels_N, extra, ce_weight), _count(labels_N))

    def _next_token_loss(self, batch: dict[str, Tensor], labels_N: Tensor, *args: Any) -> Tensor:
        return self._ready_loss()(batch, labels_N, *args)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Mean nats per predicted token of each sequence, (B,): how surprising the model finds it."""
        labels_N, B = next_labels(batch), len(batch["input_ids"])
        nats_N = torch.zeros(len(labels_N), device=labels_N.device)

        def keep(logits_nV: Tensor, labels_n: Tensor, rows: slice) -> Tensor:
            nats_N[rows] = nn.functional.cross_entropy(logits_nV, labels_n, reduction="none")
            return logits_nV.new_zeros(())

        self._next_token_loss(batch, labels_N, [keep])
        return nats_N.view(B, -1).sum(1) / (labels_N.view(B, -1) != -100).sum(1).clamp(min=1)

    def _make_metrics(self, stage: str) -> dict[str, nn.Module]:
        metrics: dict[str, nn.Module] = {"loss": PerUnit(), "perplexity": Perplexity()}
        return metrics | ({"bits_per_byte": BitsPerByte()} if self._bytes_per_token() else {})

    def _evaluate(self, stage: str, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        labels_N = next_labels(batch)
        nats, tokens = self._next_token_loss(batch, labels_N), _count(labels_N)
        updates = {"loss": (nats, tokens), "perplexity": (nats, tokens)}
        if bytes_per_token := self._bytes_per_token():
            updates["bits_per_byte"] = (nats, tokens * bytes_per_token(stage))
        self._measure(stage, dataloader_idx, **updates)

    def _bytes_per_token(self) -> Any:
        return getattr(self.trainer.datamodule, "bytes_per_token", None)  # type: ignore[attr-defined]


def _count(labels_N: Tensor) -> Tensor:
    return (labels_N != -100).sum()
