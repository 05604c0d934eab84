"""The backbone under other heads: a masked language model, and a classifier of whole sequences."""

# Shape letters: B = batch, T = tokens, D = model width, V = vocabulary, K = classes, n = tokens that have a label.

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput

from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.modeling import SLMModel, SLMPreTrainedModel, make_norm


@dataclass
class SLMMaskedLMOutput(MaskedLMOutput):
    """Attributes: aux_loss: what mixers add to the training loss, see `SLMOutput`; ``loss`` has it in training."""

    aux_loss: Tensor | None = None


@dataclass
class SLMSequenceClassifierOutput(SequenceClassifierOutput):
    """Attributes: aux_loss: what mixers add to the training loss, see `SLMOutput`; ``loss`` has it in training."""

    aux_loss: Tensor | None = None


class SLMForMaskedLM(SLMPreTrainedModel):
    """An encoder that tells which token stood at each position (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

    The head is BERT's: a layer of the model's width, GELU, a norm, and the embedding again, with a bias.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (the form is transformers')

    def __init__(self, config: SLMConfig) -> None:
        super().__init__(config)
        if config.causal:
            raise ValueError("causal=True makes a decoder, whose tokens do not see what follows; give causal=False.")
        self.model = SLMModel(config)
        self.head_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.head_norm = make_norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SLMMaskedLMOutput:
        """Logits of every position, and the loss if ``labels`` are given.

        Args:
            labels: (B, T), not shifted: the token that stood there; -100 = no loss, as everywhere but at masks.
            return_logits: whether ``.logits`` is filled; None: unless in training with labels, where those of the
                labelled positions, a seventh of all, are enough.
            num_items_in_batch: what the summed loss is divided by; None: the number of labels.
        """
        out = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds)
        loss, logits = None, None
        if return_logits or (return_logits is None and (labels is None or not self.training)):
            logits = self.predict(out.last_hidden_state)
        if labels is not None:
            counted_BT = labels != -100
            kept_nV = self.predict(out.last_hidden_state[counted_BT]) if logits is None else logits[counted_BT]
            loss = F.cross_entropy(kept_nV.float(), labels[counted_BT], reduction="sum")
            loss = loss / (counted_BT.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
            loss = _with_aux(self, loss, out.aux_loss)
        return SLMMaskedLMOutput(loss=loss, logits=logits, aux_loss=out.aux_loss)

    def predict(self, hidden: Tensor) -> Tensor:
        """From hidden states (..., D) to logits (..., V)."""
        return self.lm_head(self.head_norm(F.gelu(self.head_dense(hidden))))


class _Score(nn.Linear):
    """A head, which compression leaves alone."""

    _slm_protected = ("weight",)


class SLMForSequenceClassification(SLMPreTrainedModel):
    """One answer to a whole text: of ``config.num_labels`` classes, or a number where that is 1.

    An encoder's answer is read from the mean of the tokens, a decoder's from the last one, the only one that has seen
    the whole text; padding, left or right, counts for neither.
    """

    def __init__(self, config: SLMConfig) -> None:
        super().__init__(config)
        self.model = SLMModel(config)
        self.score = _Score(config.hidden_size, config.num_labels or 2, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SLMSequenceClassifierOutput:
        """Logits (B, K), and the mean loss if ``labels`` are given.

        Args:
            attention_mask: 1 for tokens, 0 for padding. None: ``config.pad_token_id``, if there is one, is padding.
            labels: (B,): numbers of classes; with one class, what the logit shall be (squared error).
        """
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        out = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, use_cache=False)
        logits_BK = self.score(self._pool(out.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            one = self.config.num_labels == 1
            loss = F.mse_loss(logits_BK[:, 0], labels.to(logits_BK)) if one else F.cross_entropy(logits_BK, labels)
            loss = _with_aux(self, loss, out.aux_loss)
        return SLMSequenceClassifierOutput(loss=loss, logits=logits_BK, aux_loss=out.aux_loss)

    def _pool(self, hidden_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        if mask_BT is None:
            return hidden_BTD[:, -1] if self.config.causal else hidden_BTD.mean(1)
        if self.config.causal:
            place_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
            last_B = torch.where(mask_BT.bool(), place_T, 0).amax(1)
            return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
        weight_BT1 = mask_BT[..., None].to(hidden_BTD)
        return (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)


def _with_aux(model: nn.Module, loss: Tensor, aux_loss: Tensor | None) -> Tensor:
    return loss if aux_loss is None or not model.training else loss + aux_loss
