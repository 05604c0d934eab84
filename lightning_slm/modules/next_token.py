"""The next-token loss of any causal language model, without the logits of a whole batch where it can be done."""

# Shape letters: B = batch, T = tokens, N = B * (T - 1) predicted positions, D = model width, V = vocabulary.

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_slm.measure.quality import evaluating
from lightning_slm.modules.inputs import Inputs, few_ids
from lightning_slm.nn.cross_entropy import LogitsLoss, linear_cross_entropy
from lightning_slm.nn.language_model import backbone_and_head, is_backbone_and_head, logits_of


class NextTokenLoss(Inputs):
    """Summed cross-entropy of ``model`` on a batch.

    A model that is nothing but a backbone and an output head is called part by part, so that the logits of only a few
    rows exist at a time. Whether it is, is tried out once on a few tokens: models that scale or cap their logits
    (Gemma 2, Cohere, Granite), and modules of the user's own, are called whole.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # A model on the meta device is looked at when it is first called: it has weights then.
        self.in_parts = None if any(p.is_meta for p in model.parameters()) else self._is_in_parts()

    def __call__(
        self, batch: dict[str, Tensor], labels_N: Tensor, extra: Sequence[LogitsLoss] = (), ce_weight: float = 1.0
    ) -> Tensor:
        """``ce_weight`` times the cross-entropy in nats, summed over the labels, plus the sum of ``extra``, and in
        training, for each label, what the model adds to the loss (``aux_loss`` of its output: routers).

        Raises:
            ValueError: more tokens than the model has positions, or inputs that it does not take.
        """
        ids_BT, options = batch["input_ids"], self.options(batch)
        if self.in_parts is None:
            self.in_parts = self._is_in_parts()
        parts = backbone_and_head(self.model) if self.in_parts else None
        if parts is None:
            out = self.model(ids_BT, **options)
            logits_BTV = _logits(out)
            loss = linear_cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1), nn.Identity(), labels_N, extra=extra, ce_weight=ce_weight
            )
            return self._with_aux(loss, out, labels_N)
        backbone, head = parts
        out = backbone(ids_BT, **options)
        rows_ND = out.last_hidden_state[:, :-1].flatten(0, 1)
        loss = linear_cross_entropy(rows_ND, head, labels_N, extra=extra, ce_weight=ce_weight)
        return self._with_aux(loss, out, labels_N)

    def _with_aux(self, loss: Tensor, out: Any, labels_N: Tensor) -> Tensor:
        aux_loss = getattr(out, "aux_loss", None) if self.model.training else None
        return loss if aux_loss is None else loss + aux_loss * (labels_N != -100).sum()

    def _is_in_parts(self) -> bool:
        if not isinstance(self.model, PreTrainedModel):
            return False
        with evaluating(self.model):
            return is_backbone_and_head(self.model, few_ids(self.model))


def next_labels(batch: Any) -> Tensor:
    """What each position but a row's last shall predict, flattened: (N,), -100 where there is no loss.

    Raises:
        ValueError: the batch is no dict with ``input_ids``, or its rows predict nothing.
    """
    if not isinstance(batch, dict) or "input_ids" not in batch:
        has = f"has {sorted(batch)}" if isinstance(batch, dict) else f"is a {type(batch).__name__}"
        raise ValueError(f"CausalLM wants a dict with input_ids (and labels, unshifted), but the batch {has}.")
    labels_BT = batch["labels"] if batch.get("labels") is not None else batch["input_ids"]
    if labels_BT.shape[1] < 2:
        raise ValueError(f"Rows of {labels_BT.shape[1]} token have no next token; give at least 2.")
    if batch.get("attention_mask") is not None:
        labels_BT = labels_BT.masked_fill(batch["attention_mask"] == 0, -100)
    return labels_BT[:, 1:].reshape(-1)


def _logits(output: Any) -> Tensor:
    logits = logits_of(output)
    if logits is None:
        raise ValueError(
            f"The model's forward(input_ids) returned {type(output).__name__}; it must be logits of shape (batch, "
            "tokens, vocabulary), or an object or dict that has them as logits."
        )
    return logits
