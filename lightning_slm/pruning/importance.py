"""What the units of a model are worth: scores for structured pruning, by name of a criterion.

Scores are a plain dict, {name of a group: tensor (size,)}, so that they can be kept (``safetensors.torch.save_file``)
and serve another target without another forward pass. They compare units of one group with each other; those of
different groups need no common scale, since a plain configuration has as many units in each layer.
"""

# Shape letters: U = units of a group.

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_slm.calibration import run_model
from lightning_slm.errors import near
from lightning_slm.measure.quality import evaluating
from lightning_slm.pruning.importance_activations import activation_scores, block_influence, loss_without_block
from lightning_slm.pruning.importance_gradients import Loss, michel_scores, next_token_loss, taylor_scores
from lightning_slm.pruning.structure import Group, Unit, structure_of
from lightning_slm.pruning.structure_families import network_in

Scores = dict[str, Tensor]
Criterion = Literal[
    "activation", "alternate", "block_influence", "bottom", "loss", "magnitude", "michel", "random", "taylor",
    "taylor2", "taylor_vector", "top",
]  # fmt: skip
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


@dataclass(frozen=True)
class Calibration:
    """What criteria look at the model with.

    Args:
        batches: as `run_model` takes them.
        run: the network's forward pass on a batch.
        loss: of what ``run`` returned, and the batch.
        seed: for "random".
    """

    batches: Iterable[Any]
    run: Callable[[Any], Any]
    loss: Loss
    seed: int = 0


def scores_of(
    model: nn.Module,
    batches: Iterable[Any] = (),
    criterion: Criterion = "activation",
    units: Unit | Sequence[Unit] = "ffn",
    *,
    loss: Loss | None = None,
    run: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> Scores:
    """Scores of all units of these kinds; the lowest go first. The model is in evaluation mode meanwhile.

    Of any units:

    - "magnitude": the norm of the unit's weights.
    - "random": the baseline.
    - "taylor", "taylor2", "taylor_vector": what the loss would rise by, from gradients; see `taylor_scores`.
    - "activation": see `activation_scores`; of layers, as "block_influence".

    Of heads, key-value groups and feed-forward units:

    - "michel": gradients of gates; see `michel_scores`.

    Of layers:

    - "block_influence": how far a block turns its input; see `block_influence`.
    - "loss": what the loss rises by without the block; see `loss_without_block`.
    - "top", "bottom", "alternate": the last blocks go first; the first ones; from the last one on every other one (then
      the others, the last first). Sajjad et al. 2020, https://arxiv.org/abs/2004.03844.

    Where processes form a group, all must call this, and the mean of their scores is returned.

    Args:
        model: as for `structure_of`.
        batches: calibration data, as `run_model` takes it; not needed for "magnitude", "random" and the three orders.
        criterion: one of the above.
        units: what may go.
        loss: called as loss(output, batch), returns the mean over what the batch predicts; None: next tokens.
        run: called as run(batch), runs the network; None: by `run_model`.
        seed: of "random".

    Raises:
        ValueError: a criterion that says nothing about these units; no calibration data; scores that are not finite.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=6, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
    >>> scores = scores_of(model, [torch.tensor([[1, 2, 3]])], "taylor", "ffn")
    >>> {name: tuple(scores_U.shape) for name, scores_U in scores.items()}
    {'model.layers.0.mlp/ffn': (6,)}
    """
    groups = structure_of(model, units)
    check_criterion(criterion, {group.unit for group in groups})
    network = network_in(model).module
    data = Calibration(
        batches, run or (lambda batch: run_model(network, batch)), loss or _default_loss(network, criterion), seed
    )
    with evaluating(model):
        scores = _scores(model, groups, criterion, data)
    scores = {group.name: scores[group.name].float() for group in groups}
    for name, scores_U in scores.items():
        if not scores_U.isfinite().all():
            raise ValueError(
                f"{name!r}: its scores are not finite on the calibration data (NaN or inf); look for a layer before it "
                "that overflows, or calibrate in float32 or bfloat16."
            )
    return _mean_over_ranks(scores, next(network.parameters()).device)


def check_criterion(criterion: str, units: Iterable[str]) -> None:
    """Raises: ValueError: there is none of that name, or it says nothing about one of the units."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r} is unknown. {near(criterion, CRITERIA)}")
    about = _ABOUT.get(criterion)
    for unit in units:
        if about is not None and unit not in about:
            raise ValueError(
                f"criterion={criterion!r} is about {', '.join(map(repr, about))} and says nothing about {unit!r}: "
                "prune that in a second call, by another criterion."
            )


_ABOUT: dict[str, tuple[Unit, ...]] = {
    "michel": ("head", "kv_group", "ffn"),
    **dict.fromkeys(("block_influence", "loss", "top", "bottom", "alternate"), ("layer",)),
}


def _scores(model: nn.Module, groups: Sequence[Group], criterion: Criterion, data: Calibration) -> Scores:
    if criterion == "magnitude":
        return {group.name: magnitude_of_units(group) for group in groups}
    if criterion == "random":
        return random_scores(groups, data.seed)
    if criterion in ("taylor", "taylor2", "taylor_vector"):
        return taylor_scores(groups, data.batches, data.run, data.loss, criterion)
    if criterion == "michel":
        return michel_scores(groups, data.batches, data.run, data.loss)
    if criterion == "loss":
        return loss_without_block(model, groups, data.batches, data.run, data.loss)
    if criterion == "block_influence":
        return block_influence(groups, data.batches, data.run)
    if criterion == "activation":
        return activation_scores(groups, data.batches, data.run)
    return {group.name: order_scores(group.size, criterion) for group in groups}


@torch.no_grad()
def magnitude_of_units(group: Group) -> Tensor:
    """L2 norm of all weights of each unit, of all its parts together; shape (U,)."""
    return group.sums(lambda part: part.parameter.float().square()).sqrt()


def random_scores(groups: Iterable[Group], seed: int) -> Scores:
    """Between 0 and 1; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator) for group in groups}


def order_scores(size: int, order: str) -> Tensor:
    """Scores by which layers go in an order of Sajjad et al.: 0 for the first to go; shape (U,).

    >>> order_scores(6, "top").tolist(), order_scores(6, "bottom").tolist()
    ([5.0, 4.0, 3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    >>> order_scores(6, "alternate").tolist()
    [5.0, 2.0, 4.0, 1.0, 3.0, 0.0]
    """
    down = list(reversed(range(size)))
    first_to_go = {"top": down, "bottom": down[::-1], "alternate": down[::2] + down[1::2]}[order]
    return torch.tensor(first_to_go).argsort().float()


def _default_loss(network: nn.Module, criterion: str) -> Loss:
    config: Any = network.config
    bidirectional = (config.model_type == "bert" and not config.is_decoder) or getattr(config, "causal", True) is False
    if bidirectional and criterion in ("taylor", "taylor2", "taylor_vector", "michel", "loss"):
        raise ValueError(
            f"criterion={criterion!r} needs a loss, and {type(network).__name__} predicts no next tokens: give "
            "loss=lambda output, batch: ..."
        )
    return next_token_loss


def _mean_over_ranks(scores: Scores, device: torch.device) -> Scores:
    """On the CPU."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        together = torch.cat([scores_U.to(device) for scores_U in scores.values()])
        dist.all_reduce(together)
        parts = (together / dist.get_world_size()).split([len(scores_U) for scores_U in scores.values()])
        scores = dict(zip(scores, parts))
    return {name: scores_U.detach().cpu().clone() for name, scores_U in scores.items()}
