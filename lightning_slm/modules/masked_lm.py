"""`MaskedLM`: trains any masked language model to guess tokens from both sides."""

# Shape letters: B = batch, T = tokens, n = masked tokens, V = vocabulary.

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_slm.measure import Perplexity
from lightning_slm.modules.base import PerUnit, SLMModule
from lightning_slm.modules.inputs import Inputs
from lightning_slm.modules.masking import MaskedLogits, draws_of_rows, draws_of_step, mask_tokens
from lightning_slm.modules.muon_adamw import MuonAdamW
from lightning_slm.modules.schedules import Schedule, WSDSchedule
from lightning_slm.nn.cross_entropy import IGNORED

_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


class MaskedLM(SLMModule):
    """An encoder that learns to guess masked tokens (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

    Batches are those of `CausalLM`, from the same data: dicts with ``input_ids`` (B, T); ``attention_mask``,
    ``position_ids`` and ``token_type_ids`` are passed on; where ``labels`` are -100, and at padding and special tokens,
    nothing is masked. The data's tokenizer needs a mask token: ``TextData(mask_token=True)``.

    Masks are new in every step, and a function of the step alone, so that a resumed run goes on with the very same;
    in evaluation they are a function of the text, whatever the batch size and the number of ranks. Every masked token
    counts alike. Logs ``train_loss``, ``val_loss`` (nats per masked token), ``val_perplexity``, ``val_accuracy`` (of
    masked tokens), and the same of ``test_``.

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
        mask_probability: part of the tokens that are to be guessed; 0: batches are masked already, and their
            ``labels`` are -100 but at the masks.
        mask_token_id: the id that stands for a masked token; None: the tokenizer's.
        mask_seed: another one gives other masks.
    """

    task: ClassVar[str] = "masked"
    _ordinary_K: Tensor  # what random tokens are drawn from
    _special_N: Tensor  # what is never masked

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str = "encoder-5m",
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: Schedule | LRSchedulerCallable | None = WSDSchedule(),  # noqa: B008 (frozen)
        init_weights_from: str | Path | None = None,
        overrides: dict[str, Any] | None = None,
        compile: bool = False,
        mask_probability: float = 0.15,
        mask_token_id: int | None = None,
        mask_seed: int = 0,
    ) -> None:
        if not 0 <= mask_probability < 1:
            raise ValueError(f"mask_probability={mask_probability} must be at least 0 and below 1.")
        super().__init__(model, optimizer, lr_scheduler, init_weights_from, overrides, compile)
        self.save_hyperparameters("mask_probability", "mask_token_id", "mask_seed")
        self.mask_probability, self.mask_token_id, self.mask_seed = mask_probability, mask_token_id, mask_seed
        self.register_buffer("_ordinary_K", torch.empty(0, dtype=torch.long), persistent=False)
        self.register_buffer("_special_N", torch.empty(0, dtype=torch.long), persistent=False)

    def _make_loss(self) -> MaskedLogits:
        return MaskedLogits(self.model)

    def _check_data(self, loss: Inputs) -> None:
        """Also raises: ValueError: there is no mask token."""
        super()._check_data(loss)
        tokenizer, config = self._current_tokenizer(), getattr(self.model, "config", None)
        if tokenizer is not None and self.mask_probability:
            self._mask_id()
        special = {self.mask_token_id, *(getattr(config, name, None) for name in _SPECIAL)}
        special |= set(tokenizer.all_special_ids) if tokenizer is not None else set()
        size = len(tokenizer) if tokenizer is not None else getattr(config, "vocab_size", 0)
        self._special_N = torch.tensor(sorted(i for i in special if isinstance(i, int)), dtype=torch.long)
        self._ordinary_K = torch.tensor([i for i in range(size) if i not in special], dtype=torch.long)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss per masked token; see `TokenWindow` for what it is divided by."""
        ids_BT = _ids(batch)
        replicas = self.trainer.distributed_sampler_kwargs  # not the rank: a tensor-parallel group sees the same data
        place = (self.mask_seed, self.current_epoch, batch_idx, replicas["rank"] if replicas else 0)
        nats, _, labels_n, aux_loss = self._guess(batch, draws_of_step(ids_BT.shape, *place))
        loss = nats if aux_loss is None else nats + aux_loss * len(labels_n)
        return self._window.loss(loss, _count(labels_n))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The ids (B, T), with the most probable token in the place of every mask."""
        ids_BT = _ids(batch)
        masked_BT = ids_BT == self._mask_id()
        logits_nV, _ = self._ready_loss()(batch, ids_BT, masked_BT)
        return ids_BT.masked_scatter(masked_BT, logits_nV.argmax(-1))

    def _make_metrics(self, stage: str) -> dict[str, nn.Module]:
        return {"loss": PerUnit(), "perplexity": Perplexity(), "accuracy": PerUnit()}

    def _evaluate(self, stage: str, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        ids_BT, mask_BT = _ids(batch), batch.get("attention_mask")
        draws_3BT = draws_of_rows(ids_BT, None if mask_BT is None else mask_BT.bool(), self.mask_seed)
        nats, logits_nV, labels_n, _ = self._guess(batch, draws_3BT)
        count, right = _count(labels_n), (logits_nV.argmax(-1) == labels_n).sum()
        self._measure(stage, dataloader_idx, loss=(nats, count), perplexity=(nats, count), accuracy=(right, count))

    def _guess(self, batch: dict[str, Tensor], draws_3BT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Summed nats of the masked tokens, their logits (n, V) and labels (n,); what the model adds to the loss."""
        loss = self._ready_loss()
        read_BT, labels_BT = self._masked(batch, draws_3BT)
        wanted_BT = labels_BT != IGNORED
        logits_nV, aux_loss = loss(batch, read_BT, wanted_BT)
        labels_n = labels_BT[wanted_BT]
        return F.cross_entropy(logits_nV, labels_n, reduction="sum"), logits_nV, labels_n, aux_loss

    def _masked(self, batch: dict[str, Tensor], draws_3BT: Tensor) -> tuple[Tensor, Tensor]:
        ids_BT, labels_BT = batch["input_ids"], batch.get("labels")
        if not self.mask_probability:
            if labels_BT is None:
                raise ValueError("MaskedLM(mask_probability=0) wants batches with labels, -100 but at the masks.")
            return ids_BT, labels_BT
        maskable_BT = ~torch.isin(ids_BT, self._special_N.to(ids_BT.device))
        if labels_BT is not None:
            maskable_BT &= labels_BT != IGNORED
        if batch.get("attention_mask") is not None:
            maskable_BT &= batch["attention_mask"].bool()
        draws_3BT, ordinary_K = draws_3BT.to(ids_BT.device), self._ordinary_K.to(ids_BT.device)
        if not len(ordinary_K):  # neither a tokenizer nor a configuration says what tokens there are
            ordinary_K = ids_BT.flatten()
        return mask_tokens(ids_BT, maskable_BT, draws_3BT, self._mask_id(), ordinary_K, self.mask_probability)

    def _mask_id(self) -> int:
        tokenizer = self._current_tokenizer()
        found = self.mask_token_id
        if found is None and tokenizer is not None:
            found = tokenizer.mask_token_id
        if found is None:
            raise ValueError(
                f"MaskedLM: {'there is no tokenizer that names' if tokenizer is None else 'the tokenizer has no'} mask "
                "token; give TextData(mask_token=True), or MaskedLM(mask_token_id=...)."
            )
        return found


def _ids(batch: Any) -> Tensor:
    if not isinstance(batch, dict) or "input_ids" not in batch:
        has = f"has {sorted(batch)}" if isinstance(batch, dict) else f"is a {type(batch).__name__}"
        raise ValueError(f"MaskedLM wants a dict with input_ids, but the batch {has}.")
    return batch["input_ids"]


def _count(labels_n: Tensor) -> Tensor:
    return torch.tensor(len(labels_n), device=labels_n.device)
