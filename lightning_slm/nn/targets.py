"""Which weights a technique touches: chosen by name patterns, in any model."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_slm.errors import near

# Parameters that no technique may touch, by the names they have in ours and in Hugging Face's models: decays and mixing
# weights of recurrences, and routers, where a rounded or lost weight changes what the layer is.
NEVER = (
    "A_log", "D", "dt_bias", "time_decay", "time_first", "time_faaaa", "time_maa*", "time_mix*", "*router*", "conv1d",
)  # fmt: skip

# A pattern matches the module ("layers.0.mixer.q_proj") or the parameter ("layers.0.mixer.q_proj.weight").
Patterns = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class Target:
    """One weight matrix, where it lives, and which of its axes runs over the layer's inputs."""

    name: str  # of the parameter, e.g. "layers.0.mixer.q_proj.weight"
    module: nn.Module  # that holds it
    attribute: str  # its name there
    input_dim: int  # 1 for nn.Linear's (out, in); 0 for transformers' Conv1D's (in, out)

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def module_name(self) -> str:
        return self.name.rpartition(".")[0]


def weight_targets(model: nn.Module, targets: Patterns = "*", skip: Patterns = ()) -> list[Target]:
    """The weight matrices of ``model`` that compression may touch, chosen by name.

    Candidates are two-dimensional parameters (shape (out, in)), whatever class holds them, except embeddings,
    everything tied to one, and the output head (a Hugging Face model tells which); biases and norms are no
    matrices. A tied matrix appears once. A module may protect
    parameters of its own by naming them in ``_slm_protected`` (a tuple of attribute names): routers, for example.

    Args:
        model: any module.
        targets: fnmatch patterns of module or parameter names to include.
        skip: patterns to leave out again.

    Raises:
        ValueError: a pattern that matches nothing (lists near names), or only what is protected.
    """
    candidates = list(weight_matrices(model))
    _refuse_protected(model, candidates, targets)
    included = _matching(candidates, targets, "targets")
    excluded = _matching(candidates, skip, "skip", also=[name for name, _ in model.named_modules() if name])
    return [t for t in candidates if t.name in included and t.name not in excluded]


def matches(name: str, patterns: Patterns) -> bool:
    """Whether ``name`` fits one of the patterns.

    >>> matches("layers.3.q_proj", "*q_proj"), matches("head", ["*proj", "norm*"])
    (True, False)
    """
    return any(fnmatchcase(name, p) for p in as_list(patterns))


def weight_matrices(model: nn.Module) -> Iterator[Target]:
    """The candidates of ``weight_targets``; none is no error."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | output_heads(model)
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False):
            if p.ndim != 2 or id(p) in embedded or id(p) in seen or is_protected(module_name, module, attribute):
                continue
            seen.add(id(p))
            input_dim = 0 if type(module).__name__ == "Conv1D" else 1
            yield Target(f"{module_name}.{attribute}".lstrip("."), module, attribute, input_dim)


def is_protected(module_name: str, module: nn.Module, attribute: str) -> bool:
    """Whether no technique may touch this parameter: its module says so, or it has one of the names in ``NEVER``."""
    own_name = module_name.rpartition(".")[2]
    return (
        attribute in getattr(module, "_slm_protected", ())
        or "Router" in type(module).__name__
        or any(fnmatchcase(name, pattern) for name in (attribute, own_name) for pattern in NEVER)
    )


def protected_weights(model: nn.Module) -> list[str]:
    """Names of the tensors of two and more dimensions that compression leaves alone because they are protected."""
    return [
        f"{module_name}.{attribute}".lstrip(".")
        for module_name, module in model.named_modules()
        for attribute, p in module.named_parameters(recurse=False)
        if p.ndim > 1 and is_protected(module_name, module, attribute)
    ]


def what_is_left_alone(model: nn.Module) -> str | None:
    """One sentence about the protected weights of ``model``, for a log; None if it has none.

    >>> class Router(nn.Linear): ...
    >>> what_is_left_alone(nn.Sequential(Router(4, 2), nn.Linear(4, 4)))
    'decays, short convolutions, routers and their like stay as they are: weight (1)'
    """
    kinds = Counter(_short(name) for name in protected_weights(model))
    if not kinds:
        return None
    listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
    return f"decays, short convolutions, routers and their like stay as they are: {listed}"


def _short(name: str) -> str:
    """The last part of a name that says something: "A_log", but "router.weight"."""
    *_, module, attribute = ["", *name.split(".")]
    return f"{module}.{attribute}".lstrip(".") if attribute == "weight" and not module.isdigit() else attribute


def output_heads(model: nn.Module) -> set[int]:
    """Identities of the output heads' weights, where a model (of Hugging Face's kind) tells them."""
    makers = [getattr(m, "get_output_embeddings", None) for m in model.modules()]
    heads = [make() for make in makers if callable(make)]
    return {id(head.weight) for head in heads if head is not None}


def _refuse_protected(model: nn.Module, candidates: list[Target], targets: Patterns) -> None:
    """Whoever names a protected weight is told that it is one, not that there is none of that name."""
    protected = protected_weights(model)
    for pattern in as_list(targets):
        if any(matches(name, pattern) for t in candidates for name in (t.name, t.module_name)):
            continue
        for name in protected:
            if matches(name, pattern) or matches(name.rpartition(".")[0], pattern):
                raise ValueError(
                    f"targets={pattern!r}: {name!r} is protected: a decay, a short convolution or a router is too "
                    "small to save anything, and what the layer is depends on its exact values."
                )


def _matching(candidates: list[Target], patterns: Patterns, argument: str, also: Sequence[str] = ()) -> set[str]:
    found: set[str] = set()
    for pattern in as_list(patterns):
        hits = {t.name for t in candidates if fnmatchcase(t.name, pattern) or fnmatchcase(t.module_name, pattern)}
        # A skip that only names something never touched (an embedding, say) is no mistake.
        if not hits and not any(fnmatchcase(name, pattern) for name in also):
            names = [t.module_name for t in candidates]
            names += [name.rpartition(".")[2] for name in names]  # "q_prj" is nearer to "q_proj" than to its whole path
            raise ValueError(
                f"{argument}={pattern!r} matches no weight of the model. {near(pattern.strip('*'), names)}"
            )
        found |= hits
    return found


def as_list(patterns: Patterns) -> list[str]:
    """One pattern or several, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)
