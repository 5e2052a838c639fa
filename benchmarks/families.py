"""README's table of families: the tests of every family, run on every pinned ComfyUI.

``python dev.py run benchmarks/families.py`` after ``python dev.py env --comfyui-version VERSION``
for each version; it writes the table between README's marks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- families -->\n", "<!-- /families -->\n"
TESTS = {"test_equals_dense": "attention", "test_equals_the_merged_lora": "LoRA"}
FILES = ("tests/test_families.py", "tests/test_family_lora.py", "tests/test_model.py")


def results(comfyui: Path) -> dict[str, dict[str, bool]]:
    """Model -> what was tested -> whether it passed; skipped tests are left out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}",
             "-k", " or ".join(TESTS), *FILES],
            cwd=ROOT, check=False, stdout=subprocess.DEVNULL,
            env={**os.environ, "COMFYUI_PATH": str(comfyui)},
        )  # fmt: skip
        found: dict[str, dict[str, bool]] = {}
        for test in ElementTree.parse(report).iter("testcase"):  # noqa: S314
            name, _, model = test.get("name", "").partition("[")
            if name in TESTS and test.find("skipped") is None:
                passed = test.find("failure") is None and test.find("error") is None
                found.setdefault(model.rstrip("]"), {})[TESTS[name]] = passed
    return found


def table(versions: dict[str, dict[str, dict[str, bool]]]) -> str:
    """Markdown: a row for each model, a column for each version."""
    lines = [
        "| model | " + " | ".join(versions) + " |",
        "|---|" + "---|" * len(versions),
    ]
    models = dict.fromkeys(model for found in versions.values() for model in found)
    for model in sorted(models, key=str.lower):
        cells = []
        for found in versions.values():
            tests = found.get(model, {})
            failed = [what for what, passed in tests.items() if not passed]
            cells.append(f"fails: {', '.join(failed)}" if failed else ", ".join(tests) or "-")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    places = sorted((ROOT / ".dev").glob("comfyui-*"), key=lambda path: [
        int(part) for part in re.findall(r"\d+", path.name)
    ])  # fmt: skip
    versions = {}
    for place in filter(Path.is_dir, places):
        version = place.name.removeprefix("comfyui-")
        print(f"ComfyUI {version}", flush=True)
        versions[version] = results(place)
    text = table(versions)
    print(text)
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + text + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
