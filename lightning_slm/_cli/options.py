"""Options of ``generate``, ``measure`` and ``export``, apart from their work so that ``--help`` need not import it."""

import argparse

_SOURCE = "a run folder, a checkpoint (.ckpt), a Hugging Face folder (plain or quantised), or a preset (new weights)"


def parser(command: str) -> argparse.ArgumentParser:
    """The parser of one of the three."""
    return {"generate": _generate, "measure": _measure, "export": _export}[command]()


def _generate() -> argparse.ArgumentParser:
    options = _new("generate", "Continue a prompt, and print every piece of text as it comes.")
    options.add_argument("prompt", nargs="?", help="text to continue; - or nothing: standard input")
    options.add_argument("--max_new_tokens", type=int, default=128, help="tokens at most (128)")
    options.add_argument("--temperature", type=float, default=0.0, help="0: always the most probable token (0)")
    options.add_argument("--top_k", type=int, help="draw among the k most probable tokens only")
    options.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    options.add_argument("--tokenizer", help="a tokenizer file or folder, where the model has none with it")
    options.add_argument("--compile", action="store_true", help="compile first: slower to start, faster per token")
    return options


def _measure() -> argparse.ArgumentParser:
    options = _new("measure", "Size, sparsity, operations, speed, memory and quality of a model, as a table.")
    help_data = "text to measure quality on, all of it (the validation split of the run, else of the standard library)"
    options.add_argument("--data", metavar="PATH", help=help_data)
    options.add_argument("--window", type=int, default=256, help="tokens per window, and the context of FLOPs (256)")
    options.add_argument("--windows", type=int, default=64, help="windows to measure quality on (64)")
    options.add_argument("--new_tokens", type=int, default=64, help="tokens to time (64)")
    options.add_argument("--tokenizer", help="a tokenizer file or folder, where the model has none with it")
    options.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return options


def _export() -> argparse.ArgumentParser:
    options = _new("export", "Write a Hugging Face folder with safetensors, load it again, and compare.")
    options.add_argument("folder", help="folder to write; must not exist, or be empty")
    options.add_argument(
        "--dense", action="store_true", help="without quantisation, though the model was trained for it"
    )
    options.add_argument("--tokenizer", help="a tokenizer file or folder, where the model has none with it")
    return options


def _new(command: str, description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(f"lightning-slm {command}", description=description)
    options.add_argument("source", help=_SOURCE)
    return options
