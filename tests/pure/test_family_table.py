"""The table of families is what ``benchmarks/families.py`` makes of recorded results."""

import json
import sys

import families
import pytest

from support.families import CASES


def test_the_table_is_the_generated_one():
    """Of the recorded results and today's FAMILIES and REFUSED; nobody has edited it."""
    found = json.loads(families.RECORD.read_text(encoding="utf-8"))
    page = (families.ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert set(found) == set(families.COMFYUI)
    table = page.partition("<!-- families -->\n")[2].partition("<!-- /families -->\n")[0]
    assert table == families.table(found), "run benchmarks/families.py, or with --table"
    assert not any(each["failed"] for each in found.values())
    missing = {case.name for case in CASES}.difference(*(each["models"] for each in found.values()))
    assert not missing


def test_no_table_without_every_version(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "DEV", tmp_path)
    monkeypatch.setattr(sys, "argv", ["families.py"])
    with pytest.raises(SystemExit, match=r"ComfyUI 0.16.3 is missing.*setup --comfyui-version"):
        families.main()
