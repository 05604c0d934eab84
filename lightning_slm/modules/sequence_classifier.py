"""`SequenceClassifier`: trains any model to tell which class a text is of."""

# Shape letters: B = batch, K = classes.

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from lightning_slm.models import load_model
from lightning_slm.modules.base import PerUnit, SLMModule
from lightning_slm.modules.inputs import Inputs
from lightning_slm.modules.muon_adamw import MuonAdamW
from lightning_slm.modules.schedules import Schedule, WSDSchedule
from lightning_slm.nn.cross_entropy import IGNORED
from lightning_slm.nn.language_model import logits_of

_HEADS = ("score", "classifier")  # what Hugging Face calls them


class SequenceClassifier(SLMModule):
    """A model that learns to put texts into classes, or, where there is one class only, to give each a number.

    Batches are dicts: ``input_ids`` (B, T), ``labels`` (B,), -100 = no loss; ``attention_mask``, ``position_ids`` and
    ``token_type_ids`` are passed on. Every text counts alike. Logs ``train_loss``, ``val_loss``, ``val_accuracy``,
    ``val_f1`` (the mean over the classes), ``val_mcc`` (Matthews' correlation), and the same of ``test_``; of numbers
    the squared error as loss, and ``val_mae`` (mean absolute error).

    The names of the classes come from the data and are kept in the model's configuration (``id2label``), so that a
    checkpoint, or a folder, knows what its answers mean.

    Args:
        model: a preset, encoder or decoder, or the dict of a configuration (new weights); a Hugging Face folder (its
            weights, under a new head if it has none for classes); or any module whose forward(input_ids) gives logits
            (B, K), or an object that has them.
        optimizer: makes the optimizer, of groups: hidden matrices, other weights that decay, and those that do not.
        lr_scheduler: a schedule of ours, in fractions of the run; or makes one of torch's, which then moves at each
            optimizer step (ReduceLROnPlateau: at each epoch, by val_loss). None: constant learning rates.
        init_weights_from: a checkpoint of ours, a Hugging Face folder or a safetensors file to start from; of a
            language model, all but its head. A resumed run does not read it.
        overrides: values of the model's configuration to replace, such as max_position_embeddings.
        compile: compile each repeated block of the model.
        num_labels: classes, where the data does not name them (``class_names``); 1: the labels are numbers.
    """

    task: ClassVar[str] = "classification"

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str = "encoder-5m",
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: Schedule | LRSchedulerCallable | None = WSDSchedule(),  # noqa: B008 (frozen)
        init_weights_from: str | Path | None = None,
        overrides: dict[str, Any] | None = None,
        compile: bool = False,
        num_labels: int | None = None,
    ) -> None:
        super().__init__(model, optimizer, lr_scheduler, init_weights_from, overrides, compile)
        self.save_hyperparameters("num_labels")
        self.num_labels = num_labels

    @property
    def class_names(self) -> list[str]:
        """The classes by number; "LABEL_0" and so on where nobody named them."""
        names = getattr(getattr(self.model, "config", None), "id2label", None) or _numbered(self._classes())
        return [names[i] for i in sorted(names)]

    def _build(self, source: Any) -> nn.Module:
        names = self._names_wanted(source)
        labels = {"id2label": names, "label2id": {v: k for k, v in names.items()}} if names else {}
        return load_model(source, self.task, **{**labels, **self._overrides})

    def _names_wanted(self, source: Any) -> dict[int, str] | None:
        """As the data names them; else as many as we were told, unless the source names as many itself."""
        given: Sequence[str] | None = getattr(getattr(self._trainer, "datamodule", None), "class_names", None)
        if given is not None:
            if isinstance(source, dict) and source.get("id2label"):
                return None  # a checkpoint's; compared in `_check_data`
            return dict(enumerate(given))
        own = source.get("id2label") if isinstance(source, dict) else None
        return None if self.num_labels is None or (own and len(own) == self.num_labels) else _numbered(self.num_labels)

    def _make_loss(self) -> "ClassLogits":
        for name in _HEADS:
            head = getattr(self.model, name, None)
            if isinstance(head, nn.Linear):
                head._slm_protected = ("weight",)  # type: ignore[assignment]
        return ClassLogits(self.model)

    def _check_data(self, loss: Inputs) -> None:
        """Also raises: ValueError: the data has other classes than the model."""
        super()._check_data(loss)
        config, tokenizer = getattr(self.model, "config", None), self._current_tokenizer()
        given = getattr(getattr(self._trainer, "datamodule", None), "class_names", None)
        if config is not None and given is not None:
            ours = self.class_names
            if ours == list(_numbered(len(given)).values()):
                config.id2label, config.label2id = dict(enumerate(given)), {v: k for k, v in enumerate(given)}
                self.hparams["model"]["id2label"] = dict(config.id2label)
                self.hparams["model"]["label2id"] = dict(config.label2id)
            elif ours != list(given):
                raise ValueError(
                    f"The data has the classes {list(given)[:8]}, but {type(self.model).__name__} has {ours[:8]}; give "
                    f"the data class_names={ours[:8]}, or a model for these classes."
                )
        if given is not None and self.num_labels not in (None, len(given)):
            raise ValueError(f"num_labels={self.num_labels}, but the data has {len(given)} classes; leave it out.")
        if config is not None and tokenizer is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id  # decoders of Hugging Face's look for the last other token

    def _classes(self) -> int:
        found: int | None = getattr(getattr(self.model, "config", None), "num_labels", None) or self.num_labels
        if found is None:
            given = getattr(getattr(self._trainer, "datamodule", None), "class_names", None)
            if given is None:
                raise ValueError(f"{type(self.model).__name__} does not say how many classes it has; give num_labels.")
            found = len(given)
        return found

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss per text; see `TokenWindow` for what it is divided by."""
        summed, _, aux_loss = self._answer(batch)
        texts = _count(batch["labels"])
        return self._window.loss(summed if aux_loss is None else summed + aux_loss * texts, texts)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The probability of each class (B, K); where there is one class only, the number itself (B,)."""
        logits_BK, _ = self._ready_loss()(batch)
        return logits_BK[:, 0] if self._classes() == 1 else logits_BK.softmax(-1)

    def _make_metrics(self, stage: str) -> dict[str, nn.Module]:
        K = self._classes()
        if K == 1:
            return {"loss": PerUnit(), "mae": MeanAbsoluteError()}
        how: dict[str, Any] = {"num_classes": K, "ignore_index": IGNORED, "validate_args": False}
        return {
            "loss": PerUnit(),
            "accuracy": MulticlassAccuracy(**how, average="micro"),
            "f1": MulticlassF1Score(**how, average="macro"),
            "mcc": MulticlassMatthewsCorrCoef(**how),
        }

    def _evaluate(self, stage: str, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        summed, logits_BK, _ = self._answer(batch)
        labels_B = batch["labels"]
        updates: dict[str, tuple[Any, ...]] = {"loss": (summed, _count(labels_B))}
        if self._classes() == 1:
            updates["mae"] = (logits_BK[:, 0], labels_B.float())
        else:
            updates |= dict.fromkeys(("accuracy", "f1", "mcc"), (logits_BK.argmax(-1), labels_B))
        self._measure(stage, dataloader_idx, **updates)

    def _answer(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The summed loss, the logits, and what the model adds to the loss."""
        logits_BK, aux_loss = self._ready_loss()(batch)
        if not isinstance(batch.get("labels"), Tensor):
            raise ValueError(f"SequenceClassifier wants batches with labels, but this one has {sorted(batch)}.")
        if self._classes() == 1:
            return F.mse_loss(logits_BK[:, 0], batch["labels"].float(), reduction="sum"), logits_BK, aux_loss
        return F.cross_entropy(logits_BK, batch["labels"], reduction="sum"), logits_BK, aux_loss


class ClassLogits(Inputs):
    """Logits (B, K) in float32, and in training what the model adds to the loss."""

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        if not isinstance(batch, dict) or "input_ids" not in batch:
            has = f"has {sorted(batch)}" if isinstance(batch, dict) else f"is a {type(batch).__name__}"
            raise ValueError(f"SequenceClassifier wants a dict with input_ids and labels, but the batch {has}.")
        out = self.model(batch["input_ids"], **self.options(batch, ("token_type_ids",)))
        logits_BK = logits_of(out)
        if logits_BK is None or logits_BK.ndim != 2:
            raise ValueError(
                f"The model's forward(input_ids) returned {type(out).__name__}; it must be logits of shape (batch, "
                "classes), or an object or dict that has them as logits."
            )
        return logits_BK.float(), getattr(out, "aux_loss", None) if self.model.training else None


def _numbered(count: int) -> dict[int, str]:
    return {i: f"LABEL_{i}" for i in range(count)}


def _count(labels_B: Tensor) -> Tensor:
    if labels_B.is_floating_point():
        return torch.tensor(len(labels_B), device=labels_B.device)
    return (labels_B != IGNORED).sum()
