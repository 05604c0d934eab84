"""``lightning-slm``: train, measure, export and try small language models from the command line.

This module only decides who answers. Importing Lightning and torch takes seconds, so help, recipes and mistyped names
are answered without them; the rest of the work is in ``lightning_slm._cli``.
"""

import sys
import traceback
from collections.abc import Callable, Sequence

from lightning_slm import __version__
from lightning_slm._cli import UserError, options, packaged, summary
from lightning_slm._cli.quiet import quieten
from lightning_slm.errors import near

USAGE = """\
usage: lightning-slm COMMAND ...

Train a small language model, make it smaller, measure it, use it.

  fit        train: any model, any data, any of the compression callbacks in one run
  validate   evaluate on the validation split
  test       evaluate on the test split
  predict    run the model over a data set
  generate   continue a prompt, word by word
  measure    size, sparsity, speed, memory and quality of a model, as a table
  export     write a Hugging Face folder, quantised if the model was trained to be, and check it
  recipes    list, show or copy the packaged configurations

lightning-slm COMMAND --help tells more; lightning-slm --version.

  lightning-slm fit --config slm_5m
  lightning-slm fit --config mobilellm_125m --config prune_2_4 --data.path corpus/
  lightning-slm generate runs/slm_5m 'def read_csv(path):'"""


def _train(command: str) -> Callable[[list[str]], None]:
    def run(args: list[str]) -> None:
        if {"-h", "--help"} & set(args):
            print(summary.of_training(command))
            return
        configs = packaged.resolve_configs(args)
        quieten()
        from lightning_slm._cli.training import run as run_training

        run_training(command, configs)

    return run


def _tool(command: str) -> Callable[[list[str]], None]:
    def run(args: list[str]) -> None:
        parsed = options.parser(command).parse_args(args)
        quieten()
        from lightning_slm._cli import tools

        getattr(tools, command)(parsed)

    return run


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{name: _train(name) for name in ("fit", "validate", "test", "predict")},
    **{name: _tool(name) for name in ("generate", "measure", "export")},
    "recipes": packaged.command,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, or raises SystemExit where a parser ends the program."""
    argv = list(sys.argv[1:] if args is None else args)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        print(f"lightning-slm {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            hint = "Options follow the command." if argv[0].startswith("-") else near(argv[0], COMMANDS, n=8)
            raise UserError(f"unknown command {argv[0]!r}. {hint}")
        COMMANDS[argv[0]](argv[1:])
    except (UserError, FileNotFoundError, ValueError, FloatingPointError, RuntimeError) as error:
        if not _is_explained(error):
            raise
        missing = getattr(error, "filename", None)
        print(f"lightning-slm: error: {f'there is no {missing}' if missing else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while importing or preparing: there is nothing to save yet, and nothing to explain
        print("lightning-slm: interrupted", file=sys.stderr)
        return 130
    return 0


def _is_explained(error: BaseException) -> bool:
    """Whether it was raised in this package, its message hence written for the user: a traceback would hide it."""
    if isinstance(error, FileNotFoundError):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").startswith("lightning_slm.")
