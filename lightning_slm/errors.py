"""What every error and warning here has in common: it names the thing, and says what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class NoEffectWarning(UserWarning):
    """A technique was asked for and touched nothing, or nothing any more."""


def near(name: str, candidates: Iterable[str], n: int = 5) -> str:
    """End of an error message: the candidates nearest to ``name``, or the first few.

    >>> near("q_prj", ["q_proj", "k_proj", "norm"])
    "Near names: 'q_proj', 'k_proj'."
    >>> near("x", [])
    'There is nothing to choose from.'
    """
    names = list(dict.fromkeys(candidates))
    if not names:
        return "There is nothing to choose from."
    close = get_close_matches(name, names, n=n, cutoff=0.5)
    return ("Near names: " if close else "There are: ") + ", ".join(map(repr, close or names[:n])) + "."
