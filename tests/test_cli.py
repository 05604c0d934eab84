"""``lightning-slm`` without and with Lightning: what it answers, what it refuses, what it leaves behind."""

import subprocess
import sys

import pytest

from lightning_slm.cli import COMMANDS, main


def test_help_names_every_command(capsys):
    assert main([]) == main(["--help"]) == 0
    helped = capsys.readouterr().out
    assert all(f"\n  {command} " in helped for command in COMMANDS)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_short_help_lists_what_the_model_and_the_data_take_and_every_overlay(command, capsys):
    assert main([command, "--help"]) == 0
    helped = capsys.readouterr().out
    for option in ("--model.optimizer", "--model.init_weights_from", "--data.path", "--data.window", "prune_2_4"):
        assert option in helped


@pytest.mark.parametrize("command", ["generate", "measure", "export", "recipes"])
def test_each_tool_explains_itself(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: lightning-slm {command}" in capsys.readouterr().out


def test_help_recipes_and_mistyped_names_are_answered_without_importing_torch():
    program = """
import sys
from lightning_slm.cli import main
for args in (["--help"], ["--version"], ["fit", "--help"], ["recipes", "list"], ["ft"], ["fit", "--config", "slm5m"]):
    main(args)
assert not {"torch", "lightning", "transformers"} & set(sys.modules), sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_mistyped_command_is_told_what_is_near(capsys):
    assert main(["mesure"]) == 2
    assert "unknown command 'mesure'. Near names: 'measure'." in capsys.readouterr().err


def test_options_before_the_command_are_refused_with_the_reason(capsys):
    assert main(["--config", "slm_5m", "fit"]) == 2
    assert "Options follow the command." in capsys.readouterr().err
