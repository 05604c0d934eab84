"""Which tokens a masked language model must guess, and their logits without those of all the others."""

# Shape letters: B = batch, T = tokens, K = ordinary tokens of the vocabulary, V = vocabulary, n = masked tokens.

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_slm.measure.quality import evaluating
from lightning_slm.modules.inputs import Inputs, few_ids
from lightning_slm.nn.cross_entropy import IGNORED
from lightning_slm.nn.language_model import logits_of

_MASKED, _KEPT = 0.8, 0.1  # of the tokens to guess; the rest becomes random ones


def mask_tokens(
    ids_BT: Tensor, maskable_BT: Tensor, draws_3BT: Tensor, mask_id: int, ordinary_K: Tensor, probability: float
) -> tuple[Tensor, Tensor]:
    """What the model reads, and what it must say (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

    Each maskable token is chosen with ``probability``. Of the chosen, 80 % become the mask, 10 % a random ordinary
    token, and 10 % stay, since outside of training there are no masks to tell the model where to look.

    Args:
        draws_3BT: random numbers in [0, 1): which are chosen, what becomes of them, by which token.
        ordinary_K: the ids that random tokens are drawn from.
    Returns: ids and labels; -100 where nothing was chosen.

    >>> ids, ordinary = torch.arange(2, 8)[None], torch.arange(2, 8)
    >>> draws = torch.tensor([[[0.1, 0.1, 0.1, 0.1, 0.9, 0.9]], [[0.0, 0.7, 0.85, 0.95, 0.0, 0.0]], [[0.5] * 6]])
    >>> mask_tokens(ids, torch.ones_like(ids).bool(), draws, 1, ordinary, 0.15)
    (tensor([[1, 1, 4, 5, 6, 7]]), tensor([[   2,    3,    4,    5, -100, -100]]))
    """
    chosen_BT = maskable_BT & (draws_3BT[0] < probability)
    becomes_mask = chosen_BT & (draws_3BT[1] < _MASKED)
    becomes_random = chosen_BT & (draws_3BT[1] >= _MASKED + _KEPT)
    random_BT = ordinary_K[(draws_3BT[2] * len(ordinary_K)).long().clamp(max=len(ordinary_K) - 1)]
    read_BT = ids_BT.masked_fill(becomes_mask, mask_id).where(~becomes_random, random_BT)
    return read_BT, ids_BT.masked_fill(~chosen_BT, IGNORED)


def draws_of_step(shape: torch.Size, *numbers: int) -> Tensor:
    """(3, B, T) random numbers that these numbers decide: seed, epoch, batch, rank."""
    return torch.rand(3, *shape, generator=_generator(repr(numbers).encode()))


def draws_of_rows(ids_BT: Tensor, tokens_BT: Tensor | None, seed: int) -> Tensor:
    """(3, B, T) random numbers, each row's decided by its own tokens: whatever batch, rank or epoch it comes in."""
    draws = torch.zeros(3, *ids_BT.shape)
    everywhere = torch.ones_like(ids_BT, dtype=torch.bool)
    for row, (ids_T, kept_T) in enumerate(zip(ids_BT.cpu(), (everywhere if tokens_BT is None else tokens_BT).cpu())):
        ids_t = ids_T[kept_T]
        draws[:, row, kept_T] = torch.rand(3, len(ids_t), generator=_generator(repr((seed, ids_t.tolist())).encode()))
    return draws


def _generator(key: bytes) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(blake2b(key, digest_size=7).digest(), "big"))


class MaskedLogits(Inputs):
    """The logits of single positions of ``model``.

    Heads of masked language models work position by position, so that the hidden states of the wanted positions are
    all that one needs to be given, a seventh of the work: a hook on the backbone takes them out. Whether the head is
    of this kind is tried out once on a few tokens; other models, and modules of the user's own, are called whole.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # A model on the meta device is looked at when it is first called: it has weights then.
        self.selects = None if any(p.is_meta for p in model.parameters()) else self._can_select()

    def __call__(self, batch: dict[str, Tensor], read_BT: Tensor, wanted_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (n, V) of the wanted positions in float32, and in training what the model adds to the loss.

        Args:
            batch: what goes with the ids, such as ``attention_mask``.
            read_BT: the ids themselves.

        Raises:
            ValueError: more tokens than the model has positions, inputs that it does not take, or no logits.
        """
        options = self.options(batch, ("token_type_ids",))
        if self.selects is None:
            self.selects = self._can_select()
        out, rows = self._call(read_BT, wanted_BT, options) if self.selects else (self.model(read_BT, **options), None)
        logits = logits_of(out)
        if logits is None or logits.ndim != 3:
            raise ValueError(
                f"The model's forward(input_ids) returned {type(out).__name__}; it must be logits of shape (batch, "
                "tokens, vocabulary), or an object or dict that has them as logits."
            )
        logits_nV = logits[0] if rows is not None else logits[wanted_BT]
        return logits_nV.float(), getattr(out, "aux_loss", None) if self.model.training else None

    def _call(self, ids_BT: Tensor, wanted_BT: Tensor, options: dict[str, Any]) -> tuple[Any, Tensor]:
        def take(module: nn.Module, args: Any, out: Any) -> Any:
            out.last_hidden_state = out.last_hidden_state[wanted_BT][None]
            return out

        model: Any = self.model
        backbone = getattr(model, model.base_model_prefix)
        handle = backbone.register_forward_hook(take)
        try:
            return model(ids_BT, **options), wanted_BT
        finally:
            handle.remove()

    @torch.no_grad()
    def _can_select(self) -> bool:
        model = self.model
        if not isinstance(model, PreTrainedModel) or not hasattr(model, model.base_model_prefix):
            return False
        ids_BT = few_ids(model)
        wanted_BT = torch.zeros_like(ids_BT).bool()
        wanted_BT[:, 1::3] = True
        with evaluating(model):
            whole = logits_of(model(ids_BT))
            try:
                some = logits_of(self._call(ids_BT, wanted_BT, {})[0])
            except (AttributeError, RuntimeError, TypeError, ValueError, IndexError):
                return False  # no last_hidden_state, or a head that wants the whole sequence
        if whole is None or some is None or some.shape[:2] != (1, int(wanted_BT.sum())):
            return False
        error = (whole[wanted_BT].float() - some[0].float()).abs().max()
        return bool(error <= 0.01 * whole.float().abs().max())
