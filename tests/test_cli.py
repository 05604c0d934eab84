"""``lightning-slm`` without and with Lightning: what it answers, what it refuses, what it leaves behind."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from support import RENDEZVOUS

from lightning_slm.cli import COMMANDS, main
from lightning_slm.measure import file_bytes, sparsity
from lightning_slm.modules import CausalLM  # and Lightning, whose log handlers keep the stderr of their first import


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
    assert main(["exportt"]) == 2
    assert "unknown command 'exportt'. Near names: 'export'." in capsys.readouterr().err


def test_options_before_the_command_are_refused_with_the_reason(capsys):
    assert main(["--config", "slm_5m", "fit"]) == 2
    assert "Options follow the command." in capsys.readouterr().err


# From here on something is trained: a model of a few thousand weights, on a few hundred words.

TINY = """
trainer: {max_steps: 6, accelerator: cpu, log_every_n_steps: 1, limit_val_batches: 1, limit_test_batches: 2,
          val_check_interval: 3, check_val_every_n_epoch: null, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: lightning_slm.CausalLM
  init_args:
    model: slm-5m
    overrides: {vocab_size: 320, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2,
                num_key_value_heads: 2, pattern: attn/mlp*2, max_position_embeddings: 128}
data: {path: CORPUS, vocab_size: 320, window: 16, batch_size: 2, val_fraction: 0.2, test_fraction: 0.2}
"""
OVERLAYS = ["--config", "prune_2_4", "--config", "qat_int4", "--config", "distill"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus and tiny.yaml."""
    folder = tmp_path_factory.mktemp("place")
    words = ["def", "class", "return", "self.value", "=", "None", "import", "os", "for", "if", "in"]
    (folder / "corpus").mkdir()
    random = Random(0)
    for i in range(40):
        (folder / "corpus" / f"{i}.txt").write_text(" ".join(random.choices(words, k=80)))
    (folder / "tiny.yaml").write_text(TINY.replace("CORPUS", str(folder / "corpus")))
    return folder


def fit(place, run, *args):
    return main(["fit", "--config", str(place / "tiny.yaml"), "--trainer.default_root_dir", str(run), *args])


@pytest.fixture(scope="module")
def dense(place):
    """The folder of a run that was trained without interruption."""
    assert fit(place, place / "dense") == 0
    return place / "dense"


@pytest.fixture(scope="module")
def small(place, dense):
    """The folder of a run with all three overlays in it, from the weights of the dense one."""
    last = str(dense / "checkpoints" / "last.ckpt")
    teacher = ["--trainer.callbacks.teacher", last, "--model.init_weights_from", last]
    assert fit(place, place / "small", *OVERLAYS, *teacher) == 0
    return place / "small"


def printed_config(capsys, *args):
    with pytest.raises(SystemExit, match="0"):
        main([*args, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_our_classes_are_the_defaults_and_their_arguments_need_no_prefix(capsys):
    config = printed_config(capsys, "fit", "--data.path", "corpus/", "--model.model", "mobilellm-125m")
    assert config["model"]["class_path"] == "lightning_slm.CausalLM"
    assert config["model"]["init_args"]["model"] == "mobilellm-125m"
    assert config["data"]["class_path"] == "lightning_slm.TextData"
    assert config["data"]["init_args"]["path"] == "corpus/"


def test_every_public_class_has_a_short_name(capsys):
    config = printed_config(
        capsys, "fit", "--trainer.callbacks+=GradualPruning", "--trainer.callbacks.group=4",
        "--trainer.callbacks+=CompressionReport", "--model.optimizer=MuonAdamW", "--model.optimizer.lr=0.5",
    )  # fmt: skip
    pruning, report = config["trainer"]["callbacks"]
    assert pruning["class_path"].endswith(".GradualPruning")
    assert pruning["init_args"]["group"] == 4
    assert report["class_path"].endswith(".CompressionReport")
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--data.pth", "x"], "Option 'pth' is not accepted. Near names: 'path'"),
        (["--modle.model", "x"], "--modle.model x. Near names: 'model'"),
        (["--trainer.max_stepz", "3"], "Near names: 'trainer.max_steps'"),
        (["--config", "trainer: {max_stps: 3}"], "'trainer.max_stps'. Near names: 'trainer.max_steps'"),
        (["--config", "data: {windw: 3}"], "Option 'windw' is not accepted. Near names: 'window'"),
        (["--trainer.callbacks+=GradualPrunin"], "no class 'GradualPrunin'. Near names: 'GradualPruning'"),
        (["--trainer.callbacks+=GradualPruning", "--trainer.callbacks.sparcity=1"], "Near names: 'sparsity'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistyped_key_or_class_is_told_what_is_near(args, said, tmp_path, capsys):
    if args[0] == "--config":
        (tmp_path / "mistyped.yaml").write_text(args[1])
        args = ["--config", str(tmp_path / "mistyped.yaml")]
    assert main(["fit", *args]) == 2
    assert said in capsys.readouterr().err


def test_a_mistyped_preset_is_told_what_is_near_without_a_traceback(place, tmp_path, capsys):
    assert fit(place, tmp_path, "--model.model", "slm-5k") == 2
    assert "Near names: 'slm-5m'" in capsys.readouterr().err
    assert main(["generate", "mobillm-125m", "x"]) == 2
    assert "Near names: 'mobilellm-125m'" in capsys.readouterr().err


def test_a_run_leaves_its_resolved_configuration_beside_its_checkpoint(dense):
    config = yaml.safe_load((dense / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 6
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "lightning_slm.MuonAdamW"
    checkpoint = torch.load(dense / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6


def test_the_same_command_again_trains_anew_and_gives_the_same(place, tmp_path, dense):
    assert fit(place, tmp_path) == fit(place, tmp_path) == 0
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path).values(), weights(dense).values()))


def test_a_run_that_cannot_start_leaves_the_configuration_alone(place, tmp_path):
    assert fit(place, tmp_path) == 0
    assert fit(place, tmp_path, "--model.model", "slm-5k") == 2
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["init_args"]["model"] == "slm-5m"


def test_without_a_run_folder_it_is_named_after_the_configurations(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", str(place / "tiny.yaml"), "--config", "prune_50", "--trainer.max_steps", "1"]) == 0
    assert (tmp_path / "runs" / "tiny+prune_50" / "config.yaml").is_file()


def test_minutes_become_steps_that_a_continued_run_keeps(place, tmp_path):
    assert fit(place, tmp_path, "--minutes", "0.02") == 0
    steps = yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["max_steps"]
    assert steps != 6
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == steps
    assert fit(place, tmp_path, "--minutes", "5", "--ckpt_path", "last") == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["max_steps"] == steps


@pytest.mark.slow
def test_a_stopped_run_continues_and_ends_like_one_that_was_not_stopped(place, tmp_path, dense):
    """SIGINT in another process: it finishes the step, saves, and says how to go on."""
    args = ["fit", "--config", str(place / "tiny.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    slowly = f"""
import os, signal, sys
from lightning_slm.cli import main
from lightning_slm.modules import CausalLM
step = CausalLM.training_step
def interrupted(self, batch, batch_idx):
    if self.global_step == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, batch, batch_idx)
CausalLM.training_step = interrupted
sys.exit(main({[*args, "--ckpt_path", "last"]!r}))
"""
    done = subprocess.run([sys.executable, "-c", slowly], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Saved step 3: the same command with --ckpt_path last continues." in done.stderr + done.stdout
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert main([*args, "--ckpt_path", "last"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path).values(), weights(dense).values()))


def test_a_finished_run_is_not_trained_again(dense, place):
    before = weights(dense)
    assert fit(place, dense, "--ckpt_path", "last") == 0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(dense).values()))


def test_a_run_is_evaluated_with_its_own_configuration_and_flags_win_over_it(dense, capsys):
    config = printed_config(capsys, "test", "--ckpt_path", str(dense), "--data.window", "8")
    assert config["model"]["init_args"]["overrides"]["hidden_size"] == 32
    assert config["data"]["init_args"]["vocab_size"] == 320
    assert config["data"]["init_args"]["window"] == 8
    assert main(["test", "--ckpt_path", str(dense)]) == 0
    assert "test_bits_per_byte" in capsys.readouterr().out


def test_a_checkpoint_that_was_moved_still_says_which_network_it_holds(dense, tmp_path, capsys):
    moved = tmp_path / "alone.ckpt"
    moved.write_bytes((dense / "checkpoints" / "last.ckpt").read_bytes())
    config = printed_config(capsys, "test", "--ckpt_path", str(moved))
    assert config["model"]["init_args"]["model"]["hidden_size"] == 32


def test_a_checkpoint_that_is_not_there_is_named(capsys):
    assert main(["test", "--ckpt_path", "runs/nothing"]) == 2
    assert "there is no runs/nothing" in capsys.readouterr().err


def test_generate_continues_an_argument_and_standard_input_alike(dense, capsys, monkeypatch):
    assert main(["generate", str(dense), "def class", "--max_new_tokens", "8"]) == 0
    from_argument = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("def class"))
    assert main(["generate", str(dense), "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out == from_argument
    assert from_argument.startswith("def class")
    assert len(from_argument) > len("def class\n")


def test_generate_refuses_an_empty_prompt_and_a_model_without_tokenizer(dense, capsys):
    assert main(["generate", str(dense), ""]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert main(["generate", "slm-5m", "def"]) == 2
    assert "slm-5m has no tokenizer with it; give one with --tokenizer" in capsys.readouterr().err


def test_a_character_of_several_tokens_is_printed_when_it_is_whole():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    from lightning_slm._cli.tools import pieces

    assert list(pieces(Bytes(), list(b"n"), iter("aïve".encode()))) == ["a", "ï", "v", "e"]


def test_export_writes_what_was_trained_and_generate_agrees(dense, place, capsys):
    assert main(["export", str(dense), str(place / "plain")]) == 0
    assert "in full precision; loaded again, logits differ by 0" in capsys.readouterr().out
    main(["generate", str(dense), "import os", "--max_new_tokens", "8"])
    expected = capsys.readouterr().out
    main(["generate", str(place / "plain"), "import os", "--max_new_tokens", "8"])
    assert capsys.readouterr().out == expected


def test_three_overlays_train_in_one_run_and_export_a_small_sparse_model_that_speaks(small, place, capsys):
    network = CausalLM.load_from_checkpoint(small / "checkpoints" / "last.ckpt").model
    assert sparsity(network, targets="*_proj*") == 0.5
    assert main(["export", str(small), str(place / "packed")]) == 0
    assert "quantised and packed" in capsys.readouterr().out
    assert main(["export", str(small), str(place / "unpacked"), "--dense"]) == 0
    packed, unpacked = (file_bytes(place / name / "model.safetensors") for name in ("packed", "unpacked"))
    assert packed < unpacked / 3
    assert main(["generate", str(place / "packed"), "import os", "--max_new_tokens", "8"]) == 0
    assert "import os" in capsys.readouterr().out


@pytest.mark.slow
def test_measure_gives_every_number_of_a_run_as_json(dense, capsys):
    assert main(["measure", str(dense), "--windows", "2", "--new_tokens", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["not_measured"] == {}
    assert {"bits_per_byte", "perplexity", "sparsity", "weight_bytes", "file_bytes", "flops_per_token"} <= set(
        report["values"]
    )
    assert all(value >= 0 for value in report["values"].values())
    assert "corpus" in report["text"]


@pytest.mark.slow
def test_measure_reads_all_of_a_text_that_is_given(dense, place, capsys):
    """One document: no split of it would do. Exported, so that what is measured is what lies there."""
    text = place / "one.txt"
    text.write_text("import os " * 60)
    main(["export", str(dense), str(place / "measured")])
    options = ["--windows", "1", "--window", "16", "--new_tokens", "2", "--json"]
    capsys.readouterr()
    assert main(["measure", str(place / "measured"), "--data", str(text), *options]) == 0
    values = json.loads(capsys.readouterr().out)["values"]
    assert values["bits_per_byte"] > 0
    assert values["file_bytes"] == file_bytes(place / "measured")


def test_a_teacher_that_is_not_there_is_named(place, tmp_path, capsys):
    assert fit(place, tmp_path, "--config", "distill", "--trainer.callbacks.teacher", str(tmp_path / "no.ckpt")) == 2
    assert "no.ckpt" in capsys.readouterr().err


@pytest.mark.slow
def test_measure_prints_a_table_and_says_what_it_could_not_measure(capsys):
    assert main(["measure", "slm-5m", "--new_tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "5,065,472" in printed
    assert "there is no tokenizer" in printed


@pytest.mark.slow
def test_two_processes_train_in_shards_from_the_command_line_and_go_on_as_one(place, tmp_path, capsys):
    """The run folder is one process's: what reads it knows nothing of shards, nor of the precision of the run."""
    command = [str(Path(sys.executable).with_name("lightning-slm")), "fit", "--config", str(place / "tiny.yaml")]
    command += ["--config", "fsdp2", "--config", "int8", "--trainer.devices", "2"]
    command += ["--trainer.default_root_dir", str(tmp_path / "run")]
    environment = {k: v for k, v in os.environ.items() if k not in RENDEZVOUS} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    assert fit(place, tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps", "8") == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported/model.safetensors").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may well multiply FP8")
def test_hardware_that_cannot_do_what_is_asked_is_an_error_of_one_line_with_the_way_out(place, tmp_path, capsys):
    assert fit(place, tmp_path, "--config", "float8") == 2
    told = capsys.readouterr().err
    assert "lightning-slm: error: FP8 with recipe='rowwise' needs" in told
    assert "emulate=True" in told
    assert "Traceback" not in told
