"""Scores from gradients of the loss: Taylor expansions of coupled structures, and gates of heads."""

# Shape letters: U = units of a group, W = width of a unit, N = all leading axes of a layer's input.

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_slm.calibration.run import mask_of
from lightning_slm.nn.language_model import logits_of
from lightning_slm.pruning.structure import Group, Part

Loss = Callable[[Any, Any], Tensor]


def next_token_loss(output: Any, batch: Any) -> Tensor:
    """Mean cross-entropy of the next tokens, in nats, padding left out.

    Args:
        output: logits, or what has them.
        batch: a dict of ``input_ids``, and ``labels`` where they are not the same (not shifted, -100: no loss); or the
            ids, a tensor.

    Raises:
        ValueError: no logits, or a batch of another kind.
    """
    logits_BTV = logits_of(output)
    labels_BT = batch
    if isinstance(batch, Mapping):
        labels_BT = batch["labels"] if batch.get("labels") is not None else batch.get("input_ids")
        if batch.get("labels") is None and labels_BT is not None and (mask_BT := mask_of(batch)) is not None:
            labels_BT = labels_BT.masked_fill(~mask_BT, -100)
    if logits_BTV is None or not isinstance(labels_BT, Tensor) or labels_BT.shape != logits_BTV.shape[:-1]:
        raise ValueError(
            f"There is no next-token loss of a {type(output).__name__} and a batch of type {type(batch).__name__}: it "
            "needs logits (B, T, V), and input_ids or labels (B, T). Give loss=lambda output, batch: ..."
        )
    predicted, labels = logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten()
    return nn.functional.cross_entropy(predicted, labels.to(predicted.device))


def taylor_scores(
    groups: Sequence[Group], batches: Iterable[Any], run: Callable[[Any], Any], loss: Loss, kind: str = "taylor"
) -> dict[str, Tensor]:
    """What removing a unit would change the loss by, from its expansion in the unit's weights (LLM-Pruner, Ma et al.
    2023, https://arxiv.org/abs/2305.11627).

    With the gradient g of a weight w (mean over batches) and its Fisher information f (mean over batches of g^2):

    - "taylor": sum of |g w| over the unit's weights ("element-wise, first order").
    - "taylor2": sum of |g w - f w^2 / 2| ("element-wise, second order").
    - "taylor_vector": |sum of g w| for each matrix, added up over the unit's matrices ("vector-wise").

    In all three the parts of a coupled structure are added up. The paper's sample is a batch here: for its Fisher
    information, give batches of one text.
    """
    parameters = {id(p.parameter): p.parameter for group in groups for p in group.parts}
    gradient = {key: torch.zeros_like(p, dtype=torch.float32) for key, p in parameters.items()}
    fisher = {key: torch.zeros_like(g) for key, g in gradient.items()} if kind == "taylor2" else {}
    count = 0
    with _wanting_gradients(parameters.values()):
        for batch in batches:
            value, count = loss(run(batch), batch), count + 1
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for key, g in zip(parameters, found):
                if g is not None:
                    gradient[key] += g
                if g is not None and fisher:
                    fisher[key] += g.float().square()
    check_seen(count)
    with torch.no_grad():
        terms = {key: _term(p.float(), gradient[key] / count, fisher.get(key), count) for key, p in parameters.items()}
        if kind == "taylor_vector":
            return {group.name: _by_part(group, lambda part: terms[id(part.parameter)]) for group in groups}
        return {group.name: group.sums(lambda part: terms[id(part.parameter)].abs()) for group in groups}


def michel_scores(
    groups: Sequence[Group], batches: Iterable[Any], run: Callable[[Any], Any], loss: Loss
) -> dict[str, Tensor]:
    """Mean over the texts of |dL / dgate| of a gate at 1 on each unit, divided by the L2 norm of the layer's scores
    (Michel et al. 2019, https://arxiv.org/abs/1905.10650).

    A text is an entry of a batch's first axis; the absolute value is taken before texts are added up. The derivative
    is the product of what the unit gives to the layer after it and that layer's gradient, so one backward pass tells
    that of all texts.
    """
    totals = {group.name: torch.zeros(group.size) for group in groups}
    texts = 0
    with torch.enable_grad():
        for batch in batches:
            with _inputs_of(groups) as seen:
                value = loss(run(batch), batch)
            found = torch.autograd.grad(value, [x for xs in seen.values() for x in xs], allow_unused=True)
            gradients, texts = iter(found), texts + len(next(iter(seen.values()))[0])
            for group in groups:
                per_text: Any = 0
                for x in seen[group.name]:
                    if (g := next(gradients)) is not None:
                        product = (x.detach().float() * g.float()).unflatten(-1, (group.size, group.places[0].width))
                        per_text = per_text + product.sum(-1).flatten(1, -2).sum(1)
                if isinstance(per_text, Tensor):
                    totals[group.name] = totals[group.name].to(per_text.device) + per_text.abs().sum(0)
    check_seen(texts)
    return {name: total / texts / (total / texts).norm().clamp(min=1e-30) for name, total in totals.items()}


def check_seen(count: int) -> None:
    """Raises: ValueError: there was no batch."""
    if not count:
        raise ValueError("There was no calibration data: this criterion needs at least one batch.")


def _term(w: Tensor, g: Tensor, fisher: Tensor | None, count: int) -> Tensor:
    return g * w if fisher is None else g * w - fisher / count * w.square() / 2


def _by_part(group: Group, tensor_of: Callable[[Part], Tensor]) -> Tensor:
    sums = [group.sums(lambda part, only=only: tensor_of(part) if part is only else None) for only in group.parts]  # type: ignore[misc]
    return torch.stack([s.abs() for s in sums]).sum(0)


@contextmanager
def _wanting_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Frozen ones too, inside."""
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def _inputs_of(groups: Sequence[Group]) -> Iterator[dict[str, list[Tensor]]]:
    """What the units of each group give to the layer after them, by name, with its history; one for each call."""
    seen: dict[str, list[Tensor]] = {group.name: [] for group in groups}

    def keep(name: str, args: tuple[Any, ...]) -> None:
        x = args[0]
        seen[name].append(x if x.requires_grad else x.requires_grad_())

    handles = [
        group.places[0].module.register_forward_pre_hook(lambda _, args, name=group.name: keep(name, args))  # type: ignore[misc]
        for group in groups
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
