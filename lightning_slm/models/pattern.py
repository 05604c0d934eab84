"""The grammar of patterns: which mixers a model is stacked from, readable in one line of YAML.

pattern := item+                                items are separated by blanks
item    := block | block*n | (pattern) | (pattern)*n
block   := token_mixer/channel_mixer            "-" for none
mixer   := name | name@label                    the same name@label is the same module, weights included
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_slm.errors import near
from lightning_slm.models.registry import CHANNEL_MIXERS, TOKEN_MIXERS

_TOKEN = re.compile(r"\s*(?:(?P<bracket>[()])|\*\s*(?P<times>\d+)|(?P<block>[\w@/:.-]+))")
_MIXER = re.compile(r"(?P<name>[a-z0-9_]+)(?:@(?P<label>[a-z0-9_]+))?")


@dataclass(frozen=True, slots=True)
class MixerSpec:
    """One mixer of a pattern: its name in the registry, and its label if it is shared."""

    name: str
    label: str | None = None


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One block of a pattern; None where it has no such mixer."""

    token: MixerSpec | None
    channel: MixerSpec | None


def parse_pattern(pattern: str | Sequence[str]) -> list[BlockSpec]:
    """Expand a pattern to its blocks, from the embedding upwards.

    Args:
        pattern: see the grammar above; a list stands for its members in a row.

    Raises:
        ValueError: not of the grammar, or a mixer that does not exist; lists near names.

    >>> [block.token.name for block in parse_pattern("(attn/mlp swa/mlp*2)*2")]
    ['attn', 'swa', 'swa', 'attn', 'swa', 'swa']
    >>> parse_pattern("attn/mlp@shared*22")[21].channel
    MixerSpec(name='mlp', label='shared')
    """
    text = pattern if isinstance(pattern, str) else " ".join(pattern)
    levels: list[list[BlockSpec]] = [[]]
    last: list[BlockSpec] | None = None  # what a following "*n" multiplies
    for kind, value in _tokens(text):
        if kind == "times":
            if last is None or int(value) < 1:
                raise ValueError(f"pattern {text!r}: '*{value}' must be at least 1 and follow a block or a ')'.")
            levels[-1].extend(last * (int(value) - 1))
            last = None
        elif value == "(":
            levels.append([])
            last = None
        else:
            if value == ")" and len(levels) == 1:
                raise ValueError(f"pattern {text!r}: ')' without '('.")
            last = levels.pop() if value == ")" else [_block(value, text)]
            levels[-1].extend(last)
    if len(levels) > 1:
        raise ValueError(f"pattern {text!r}: '(' without ')'.")
    if not levels[0]:
        raise ValueError(f"pattern {text!r} holds no block; write for example 'attn/mlp*4'.")
    return levels[0]


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens, position = [], 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(
                f"pattern {text!r}: cannot read {text[position:].strip()!r}; write for example 'attn/mlp*4'."
            )
        kind = str(match.lastgroup)
        tokens.append((kind, match[kind]))
        position = match.end()
    return tokens


def _block(text: str, pattern: str) -> BlockSpec:
    parts = text.split("/")
    if len(parts) != 2:
        raise ValueError(
            f"pattern {pattern!r}: {text!r} is no block; a block is token mixer/channel mixer, 'attn/mlp' for example "
            "('attn/-' for no channel mixer)."
        )
    token = _mixer(parts[0], TOKEN_MIXERS, "token mixer", pattern)
    channel = _mixer(parts[1], CHANNEL_MIXERS, "channel mixer", pattern)
    if token is None and channel is None:
        raise ValueError(f"pattern {pattern!r}: a block '-/-' does nothing; leave it out.")
    return BlockSpec(token, channel)


def _mixer(text: str, registry: dict, kind: str, pattern: str) -> MixerSpec | None:
    if text == "-":
        return None
    match = _MIXER.fullmatch(text)
    if match is None:
        raise ValueError(f"pattern {pattern!r}: {text!r} is no mixer; write a name, or name@label to share it.")
    if match["name"] not in registry:
        raise ValueError(f"pattern {pattern!r}: no {kind} is called {match['name']!r}. {near(match['name'], registry)}")
    return MixerSpec(match["name"], match["label"])
