"""``make benchmark``: every theme, or those named on the command line; tables go to ``results/``."""

import importlib
import logging
import sys
import warnings

from harness import Results

THEMES = (
    "callbacks",
    "backbone",
    "architectures",
    "contexts",
    "decoding",
    "data",
    "classification",
    "imports",
    "sharding",
    "packed",
    "one_shot",
    "gpu",
)


def main(themes: list[str]) -> int:
    """Run the themes in a row. A missed goal is printed, not an error: it may be the machine."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    missed = 0
    for theme in themes or THEMES:
        if theme not in THEMES:
            raise SystemExit(f"There is no benchmark {theme!r}; there are: {', '.join(THEMES)}.")
        print(f"\n## {theme}\n| what | measured | goal | met | detail |\n|---|---|---|---|---|", flush=True)
        results = Results(theme)
        importlib.import_module(theme).run(results)
        if results.goals:
            print(f"-> {results.write()}")
        missed += sum(not goal.met for goal in results.goals)
    print(f"\n{missed} goals missed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
