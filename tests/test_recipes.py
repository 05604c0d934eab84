"""Packaged recipes: found by name, listed, shown, copied; and each parses, alone and under its overlays."""

import pytest
import torch
import yaml

from lightning_slm._cli import UserError, packaged
from lightning_slm.cli import main

RECIPES = [name for name, path in packaged.recipes().items() if not packaged.is_overlay(path)]
OVERLAYS = [name for name, path in packaged.recipes().items() if packaged.is_overlay(path)]


PLUGINS = [name for name in OVERLAYS if "plugins+:" in packaged.recipes()[name].read_text()]
CALLBACKS = [name for name in OVERLAYS if "callbacks+:" in packaged.recipes()[name].read_text()]


def model_of(recipe):
    return yaml.safe_load(packaged.recipes()[recipe].read_text())["model"]


def test_there_is_a_recipe_for_every_preset_and_none_for_anything_else():
    from lightning_slm.models import ENCODERS, PRESETS

    presets = {model_of(name)["init_args"]["model"] for name in RECIPES}
    assert presets == {*PRESETS, *ENCODERS}


def test_list_has_every_recipe_with_a_sentence_and_tells_overlays_apart(capsys):
    main(["recipes", "list"])
    models, overlays = capsys.readouterr().out.split("Overlays")
    assert all(f"  {name} " in models for name in RECIPES)
    assert all(f"  {name} " in overlays for name in OVERLAYS)


def test_show_prints_the_file_and_copy_writes_it(tmp_path, capsys):
    text = packaged.find("slm_5m").read_text()
    main(["recipes", "show", "slm-5m.yaml"])
    assert capsys.readouterr().out == text
    assert main(["recipes", "copy", "slm_5m", str(tmp_path)]) == 0
    assert (tmp_path / "slm_5m.yaml").read_text() == text


def test_copy_replaces_nothing_unless_forced(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("mine")
    assert main(["recipes", "copy", "slm_5m", str(tmp_path / "mine.yaml")]) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert main(["recipes", "copy", "slm_5m", str(tmp_path / "mine.yaml"), "--force"]) == 0
    assert (tmp_path / "mine.yaml").read_text() == packaged.find("slm_5m").read_text()


def test_a_file_of_that_name_wins_over_a_packaged_recipe(tmp_path, monkeypatch):
    (tmp_path / "slm_5m.yaml").write_text("trainer: {max_steps: 1}")
    monkeypatch.chdir(tmp_path)
    assert packaged.find("slm_5m.yaml").resolve() == tmp_path / "slm_5m.yaml"
    assert packaged.find("slm_5m") == packaged.FOLDER / "slm_5m.yaml"


def test_an_unknown_recipe_is_told_what_is_near():
    with pytest.raises(UserError, match=r"'prune_24' is neither a file nor a packaged recipe. Near names: 'prune_2_4'"):
        packaged.find("prune_24")


def test_a_missing_file_is_not_mistaken_for_a_recipe():
    with pytest.raises(UserError, match="no such configuration file: configs"):
        packaged.find("configs/slm_5m.yaml")


@pytest.mark.parametrize("flag", [["--config", "slm_5m"], ["--config=slm_5m"], ["-c", "slm_5m"]], ids=" ".join)
def test_names_become_paths_behind_every_spelling_of_the_flag(flag):
    resolved = packaged.resolve_configs([*flag, "--data.path", "slm_5m"])
    assert packaged.configs_in(resolved) == [packaged.FOLDER / "slm_5m.yaml"]
    assert resolved[-1] == "slm_5m"


@pytest.fixture
def built(monkeypatch):
    """Runs a command up to, and without, the training: everything is parsed and built."""
    from lightning_slm._cli.training import SLMCLI

    made = []
    monkeypatch.setattr(SLMCLI, "_run_subcommand", lambda cli, command: made.append(cli))

    def build(*configs):
        assert main(["fit", *(word for name in configs for word in ("--config", name))]) == 0
        return made[-1]

    return build


def ours(cli):
    return [type(c).__name__ for c in cli.trainer.callbacks if type(c).__module__.startswith("lightning_slm.callbacks")]


def precision(cli):
    return type(cli.trainer.precision_plugin).__name__


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_builds_under_all_callbacks_at_once(recipe, built):
    cli = built(recipe, *CALLBACKS)
    assert len(ours(cli)) == len(CALLBACKS)
    assert type(cli.model).__name__ == model_of(recipe)["class_path"].removeprefix("lightning_slm.")
    assert cli.trainer.max_steps > 0 or cli.trainer.max_epochs > 0


@pytest.mark.parametrize("overlay", PLUGINS)
@pytest.mark.parametrize("recipe", ["slm_5m", "tinyllama_1.1b"])  # one without and one with a precision of its own
def test_each_low_bit_precision_stands_over_a_recipe_and_beside_all_callbacks(recipe, overlay, built):
    cli = built(recipe, *CALLBACKS, overlay)
    assert precision(cli).lower().startswith(overlay.replace("_", ""))
    assert len(ours(cli)) == len(CALLBACKS)


def test_each_overlay_of_a_callback_adds_one_and_changes_nothing_else(built):
    before = _without_callbacks(plain := built("slm_5m"))
    assert ours(plain) == []
    for overlay in CALLBACKS:
        overlaid = built("slm_5m", overlay)
        assert len(ours(overlaid)) == 1, overlay
        assert _without_callbacks(overlaid) == before, overlay


def test_an_overlay_exchanges_the_optimizer(built):
    cli = built("slm_5m", "optim_8bit")
    assert type(cli.model._make_optimizer([torch.nn.Parameter(torch.ones(4))])).__name__ == "AdamW8bit"
    assert set(OVERLAYS) == {*PLUGINS, *CALLBACKS, "optim_8bit", "fsdp2", "zero1"}


@pytest.mark.parametrize(("overlay", "kind"), [("fsdp2", "FSDP2Strategy"), ("zero1", "ZeRO1Strategy")])
def test_an_overlay_shards_beside_all_callbacks_and_a_precision(overlay, kind, built):
    cli = built("slm_5m", *CALLBACKS, "int8", overlay)
    assert type(cli.trainer.strategy).__name__ == kind
    assert precision(cli) == "Int8Precision"


def _without_callbacks(cli):
    config = cli.config["fit"].as_dict()
    config.pop("config")
    for key in ("callbacks", "default_root_dir", "logger"):  # the last two are named after the configurations
        config["trainer"].pop(key)
    return config
