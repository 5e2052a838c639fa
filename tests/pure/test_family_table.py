"""The table of families is what ``benchmarks/families.py`` makes of recorded results."""

import importlib.util
import json
import sys
from pathlib import Path

import families
import pytest


@pytest.fixture
def generator(monkeypatch):
    """``benchmarks/families.py``."""
    root = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location("families_table", root / "benchmarks/families.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(root / "benchmarks")
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_generated_one(generator):
    """Of the recorded results and today's FAMILIES and REFUSED; nobody has edited it."""
    found = json.loads(generator.RECORD.read_text(encoding="utf-8"))
    page = (generator.ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert set(found) == set(generator.COMFYUI)
    table = page.partition("<!-- families -->\n")[2].partition("<!-- /families -->\n")[0]
    assert table == generator.table(found), "run benchmarks/families.py, or with --table"
    assert not any(each["failed"] for each in found.values())
    missing = {case.name for case in families.CASES}.difference(*(
        each["models"] for each in found.values()
    ))  # fmt: skip
    assert not missing


def test_no_table_without_every_version(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "DEV", tmp_path)
    monkeypatch.setattr(sys, "argv", ["families.py"])
    with pytest.raises(SystemExit, match=r"ComfyUI 0.16.3 is missing.*setup --comfyui-version"):
        generator.main()
