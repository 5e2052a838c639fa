"""The table of families is what ``support/family_table.py`` makes of recorded results."""

import json
import sys

import pytest

from support import family_table
from support.families import CASES


def test_the_table_is_the_generated_one():
    """Of the recorded results and today's FAMILIES and REFUSED; nobody has edited it."""
    found = json.loads(family_table.RECORD.read_text(encoding="utf-8"))
    page = (family_table.ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert set(found) == set(family_table.COMFYUI)
    table = page.partition("<!-- families -->\n")[2].partition("<!-- /families -->\n")[0]
    assert table == family_table.table(found), "run tests/support/family_table.py, or with --table"
    assert not any(each["failed"] for each in found.values())
    missing = {case.name for case in CASES}.difference(*(each["models"] for each in found.values()))
    assert not missing


def test_no_table_without_every_version(tmp_path, monkeypatch):
    monkeypatch.setattr(family_table, "DEV", tmp_path)
    monkeypatch.setattr(sys, "argv", ["family_table.py"])
    with pytest.raises(SystemExit, match=r"ComfyUI 0.16.3 is missing.*setup --comfyui-version"):
        family_table.main()
