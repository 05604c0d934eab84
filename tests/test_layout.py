"""The house: what is on disk is what ships, and importing it is cheap."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lightning_slm

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_on_disk_is_shipped_and_no_other():
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    inside = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "lightning_slm").glob("**/__init__.py")}
    on_disk = inside | {"lightning_slm.callbacks", "lightning_slm.strategies"}
    assert declared == on_disk


@pytest.mark.parametrize("folder", ["callbacks", "strategies"])
def test_every_technique_has_a_card_and_every_card_a_technique(folder):
    modules = {p.stem for p in (ROOT / folder).glob("[a-z]*.py")}
    assert modules == {p.stem for p in (ROOT / folder).glob("*.md")}


@pytest.mark.parametrize("folder", ["callbacks", "strategies"])
def test_the_two_mapped_folders_are_flat_and_refuse_to_be_imported_under_a_second_name(folder):
    assert not [p for p in (ROOT / folder).iterdir() if p.is_dir() and p.name != "__pycache__"]
    code = f"import sys; sys.path.insert(0, '.'); import {folder}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert f"import lightning_slm.{folder}" in result.stderr


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import lightning_slm, sys; sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_every_exported_name_exists():
    missing = [name for name in lightning_slm.__all__ if not hasattr(lightning_slm, name)]
    assert missing == []


def test_a_misspelt_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="GradualPrunning"):
        _ = lightning_slm.GradualPrunning
