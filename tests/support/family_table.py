"""The table of families in docs/models.md: the tests of every family, run on every pinned ComfyUI.

``python dev.py run tests/support/family_table.py`` after ``python dev.py setup --comfyui-version
VERSION`` for each version; it writes ``tests/families.json`` and, from that, what is between the
page's marks. With ``--table`` it runs no tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path += [str(Path(__file__).resolve().parents[2] / folder) for folder in (".", "benchmarks")]

from reporting import ROOT, markdown, store, write_between

from dev import COMFYUI, DEV
from taca.families import FAMILIES, REFUSED

RECORD = ROOT / "tests" / "families.json"
TESTS = {
    "test_equals_dense": "attention",
    "test_equals_dense_with_cfg_in_a_batch": "attention",
    "test_equals_the_merged_lora": "LoRA",
}
FILES = ("tests/core/test_families.py", "tests/core/test_family_lora.py")


def results(comfyui: Path) -> dict[str, Any]:
    """What passed, failed and was skipped on one ComfyUI, and the models it was tested with."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *FILES]
        environment = {**os.environ, "COMFYUI_PATH": str(comfyui)}
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode not in (0, 1):  # not run to the end
            sys.exit(f"The tests did not run on {comfyui}:\n{done.stdout}{done.stderr}")
        tests = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": {}, "models": {}}
    for test in tests:
        name = test.get("name", "")
        skipped = test.find("skipped")
        if skipped is not None:
            found["skipped"][name] = skipped.get("message")
            continue
        passed = test.find("failure") is None and test.find("error") is None
        found["passed"] += passed
        found["failed"] += [] if passed else [name]
        told = defaultdict(list)
        for each in test.iter("property"):
            told[each.get("name", "")].append(each.get("value", ""))
        what = TESTS.get(name.partition("[")[0])
        if what and told["model"]:
            model = found["models"].setdefault(told["model"][0], {"text": [], "image": []})
            model[what] = passed and model.get(what, True)
            if told["family"]:
                model["family"] = told["family"][0]
            for kind in ("text", "image"):
                model[kind] = sorted({*model[kind], *map(int, told[kind])})
    return found


def table(versions: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each family, what was skipped, what is refused."""
    models: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for version, found in versions.items():
        for name, model in found["models"].items():
            models[name].append({**model, "from": version})
    rows = []
    for family in FAMILIES:
        names = [name for name, runs in models.items() if runs[0]["family"] == family.name]
        runs = [run for name in names for run in models[name]]
        if not runs:
            sys.exit(f"No test ran for {family.name}.")
        oldest = min((run["from"] for run in runs), key=list(versions).index)
        since = {name: models[name][0]["from"] for name in names}
        tested = [n if since[n] == oldest else f"{n} ({since[n]})" for n in names]
        tokens = [span({n for run in runs for n in run[kind]}) for kind in ("text", "image")]
        if all("a stand-in" in name for name in names):
            oldest = f"after {[*versions][-1]}"
        verdicts = verdict(runs, "attention"), verdict(runs, "LoRA")
        rows.append([family.name, "; ".join(tested), ", ".join(tokens), *verdicts, oldest])
    head = ("family", "tested as", "text, image tokens", "attention", "LoRA", "from")
    counts = "What these tests counted, and skipped with the reason"
    lines = [markdown(head, rows), "", f"<details><summary>{counts}</summary>", ""]
    everywhere = set.intersection(*(set(found["skipped"].values()) for found in versions.values()))
    for version, found in versions.items():
        own = dict.fromkeys(r for r in found["skipped"].values() if r not in everywhere)
        lacks = [r.rpartition(" has no ")[2] for r in own if " has no " in r]
        parts = ["it has no " + "; ".join(lacks)] * bool(lacks)
        parts += [r for r in own if " has no " not in r]
        numbers = (
            f"{found['passed']} passed, {len(found['failed'])} failed, "
            f"{len(found['skipped'])} skipped"
        )
        lines.append(f"- {version} ({numbers}): {'. '.join(parts)}.")
    lines.append(f"- on all: {'. '.join(sorted(everywhere))}.")
    lines += ["", "</details>", "", "Refused, by name and with the reason:", ""]
    reasons = defaultdict(dict)
    for called, reason in REFUSED.values():
        reasons[reason][called] = None
    lines += [f"- {', '.join(called)}: {reason}" for reason, called in reasons.items()]
    return "\n".join(lines) + "\n"


def span(numbers: set[int]) -> str:
    """The least and the most of some numbers."""
    return "-".join(map(str, sorted({min(numbers), max(numbers)})))


def verdict(runs: list[dict[str, Any]], what: str) -> str:
    """Whether a family's tests of attention or LoRA pass on all versions."""
    tested = [run[what] for run in runs if what in run]
    return "fails" if not all(tested) else "exact" if tested else "refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="write the table again")
    if not parser.parse_args().table:
        places = {version: DEV / f"comfyui-{version}" for version in COMFYUI}
        for version in [version for version, place in places.items() if not place.is_dir()]:
            sys.exit(
                f"ComfyUI {version} is missing, and the table would lose what is known of it: run "
                f"python dev.py setup --comfyui-version {version}"
            )
        store(RECORD, {version: results(place) for version, place in places.items()})
    text = table(json.loads(RECORD.read_text(encoding="utf-8")))
    write_between(ROOT / "docs" / "models.md", "families", text)


if __name__ == "__main__":
    main()
