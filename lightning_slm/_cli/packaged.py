"""Packaged recipes: found by name for ``--config``, and listed, shown and copied by ``lightning-slm recipes``."""

import argparse
import os
import re
from importlib.resources import files
from pathlib import Path

from lightning_slm._cli import UserError
from lightning_slm.errors import near

FOLDER = Path(str(files("lightning_slm.recipes")))
_NAMES_A_MODEL = re.compile(r"^ +model: \S", re.MULTILINE)


def recipes() -> dict[str, Path]:
    """Every packaged recipe by name, in alphabetical order."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def is_overlay(path: Path) -> bool:
    """A recipe names a model and is a run of its own; an overlay changes something of whatever stands before it."""
    return _NAMES_A_MODEL.search(path.read_text()) is None


def find(name: str) -> Path:
    """The file that ``--config name`` means: a path that exists wins, then a packaged recipe, with or without .yaml.

    Raises: UserError: if there is neither; names the recipes that are near.
    """
    if Path(name).is_file():
        return Path(name)
    key = name.removesuffix(".yaml").removesuffix(".yml").replace("-", "_")
    packaged = recipes()
    if key in packaged:
        return packaged[key]
    if os.sep in name:
        raise UserError(f"no such configuration file: {name}")
    raise UserError(f"{name!r} is neither a file nor a packaged recipe. {near(key, packaged)} See: recipes list.")


def resolve_configs(args: list[str]) -> list[str]:
    """The same arguments with the path of a file behind every ``--config`` and ``-c``."""
    resolved, value_follows = [], False
    for arg in args:
        if value_follows:
            arg = str(find(arg))
        elif arg.startswith("--config="):
            arg = f"--config={find(arg.removeprefix('--config='))}"
        value_follows = not value_follows and arg in ("--config", "-c")
        resolved.append(arg)
    return resolved


def configs_in(args: list[str]) -> list[Path]:
    """The configuration files that resolved arguments name, in order."""
    pairs = zip(args, [*args[1:], ""])
    return [
        Path(arg.removeprefix("--config=") if "=" in arg else value)
        for arg, value in pairs
        if arg in ("--config", "-c") or arg.startswith("--config=")
    ]


def _sentence(path: Path) -> str:
    return path.read_text().partition("\n")[0].lstrip("# ").rstrip()


def _list() -> None:
    every = recipes()
    width = max(map(len, every)) + 2
    for title, overlay in (
        ("Models: lightning-slm fit --config NAME", False),
        ("Overlays, after a model: --config NAME --config OVERLAY --config OVERLAY", True),
    ):
        print(title)
        for name, path in every.items():
            if is_overlay(path) is overlay:
                print(f"  {name:{width}}{_sentence(path)}")


def _copy(name: str, target: Path, force: bool) -> None:
    source = find(name)
    target = target / source.name if target.is_dir() else target
    if target.exists() and not force:
        raise UserError(f"{target} exists; give another name, or --force to replace it.")
    target.write_text(source.read_text())
    print(f"{target}: yours to change; lightning-slm fit --config {target}")


def command(args: list[str]) -> None:
    """``lightning-slm recipes list | show NAME | copy NAME [TARGET]``."""
    parser = argparse.ArgumentParser("lightning-slm recipes", description=__doc__)
    actions = parser.add_subparsers(dest="action", metavar="list | show | copy")
    actions.add_parser("list", help="every recipe with one sentence")
    show = actions.add_parser("show", help="print one")
    show.add_argument("name")
    copy = actions.add_parser("copy", help="write one to a file of your own")
    copy.add_argument("name")
    copy.add_argument("target", nargs="?", type=Path, default=Path(), help="file or folder; default: here")
    copy.add_argument("--force", action="store_true", help="replace an existing file")
    parsed = parser.parse_args(args)
    if parsed.action == "show":
        print(find(parsed.name).read_text(), end="")
    elif parsed.action == "copy":
        _copy(parsed.name, parsed.target, parsed.force)
    else:
        _list()
