"""How fast to prune."""


def cubic_sparsity(progress: float, initial: float = 0.0, final: float = 0.5) -> float:
    """Fast while there is much to take, slow at the end (Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878, eq. 1).

    Args:
        progress: of the ramp; 0 is its begin and 1 its end. Outside of [0, 1] the sparsity stays what it is there.
        initial: sparsity at the begin.
        final: sparsity at the end.

    >>> [cubic_sparsity(p, 0.0, 0.5) for p in (0.0, 0.5, 1.0, 7.0)]
    [0.0, 0.4375, 0.5, 0.5]
    """
    remaining = 1.0 - min(max(progress, 0.0), 1.0)
    return final + (initial - final) * remaining**3
