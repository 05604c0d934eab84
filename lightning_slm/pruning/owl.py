"""OWL: blocks with many outliers are pruned less (Yin et al. 2023, https://arxiv.org/abs/2310.05175)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_slm.calibration import Layer
from lightning_slm.nn.targets import Patterns
from lightning_slm.pruning.one_shot import look_at_dense
from lightning_slm.pruning.wanda import wanda_scores


def owl_sparsities(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float = 0.5,
    *,
    outlier: float = 5.0,
    spread: float = 0.08,
    targets: Patterns = "*",
    skip: Patterns = (),
    blocks: Patterns = "auto",
    run: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """A share for each block, for the ``sparsity`` of any solver; over all weights they are ``sparsity``.

    A block's outliers are the weights whose Wanda score is more than ``outlier`` times the block's mean score.

    Args:
        model: any module; it stays as it is.
        batches: calibration data, as of `wanda_`.
        sparsity: share of all targets to set to zero.
        outlier: M of the paper, which takes 3 to 10.
        spread: lambda of the paper: between the blocks with most and with fewest outliers lie ``2 * spread``.
        targets: name patterns of what is to be pruned.
        skip: name patterns of what to leave out again.
        blocks: name patterns of the repeated blocks; "auto" finds them.
        run: runs the model on a batch, where `run_model` does not know how.
        progress: whether a bar is shown.

    Returns:
        Shares by name pattern: ``{"layers.0.*": 0.42, ...}``.

    Raises:
        ValueError: as of `wanda_`; or a block's share would not lie between 0 and 1.
    """
    outliers: dict[str, float] = {}
    sizes: dict[str, int] = {}

    def look(block: str, layers: list[Layer]) -> dict[str, Tensor]:
        name = f"{block}.*" if block else "*"
        # What is known only to be read (not called) has no score that compares with the others'.
        scores = [wanda_scores(each.weight_OI, each.inputs.rms_I) for each in layers if each.inputs is not None]
        outliers[name] = outlier_share(torch.cat([s.flatten() for s in scores]), outlier) if scores else 0.0
        sizes[name] = sum(each.weight_OI.numel() for each in layers)
        return {}

    way = {"targets": targets, "skip": skip, "blocks": blocks, "run": run, "progress": progress}
    look_at_dense(model, batches, look, sparsity=sparsity, **way)  # type: ignore[arg-type]
    return owl_shares(outliers, sizes, sparsity, spread)


def outlier_share(scores: Tensor, outlier: float) -> float:
    """The share of the scores that are more than ``outlier`` times their mean."""
    return (scores > outlier * scores.mean()).float().mean().item()


def owl_shares(
    outliers: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, spread: float
) -> dict[str, float]:
    """Shares that fall linearly with the shares of outliers, over ``2 * spread``; their mean is ``sparsity``.

    Args:
        outliers: share of outliers of each block.
        sizes: weights of each block: the mean is over weights, so that blocks may differ in size.
    """
    low, high = min(outliers.values()), max(outliers.values())
    width = 2 * spread / (high - low) if high > low else 0.0
    kept = {name: width * (share - low) for name, share in outliers.items()}
    mean = sum(kept[name] * sizes[name] for name in sizes) / sum(sizes.values())
    shares = {name: sparsity + mean - more for name, more in kept.items()}
    for name, share in shares.items():
        if not 0.0 <= share <= 1.0:
            raise ValueError(
                f"sparsity={sparsity} and spread={spread} give {name!r} a share of {share:.3f}, which must lie between "
                "0 and 1; choose a smaller spread."
            )
    return shares
