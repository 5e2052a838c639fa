"""benchmarks/evidence.py on the demo's model: what it draws, what is posted, and the page of it."""

import copy
import hashlib
import json
import os
from unittest import mock

import evidence
import pytest
from comfy_server import serving
from PIL import Image

from support.servers import add_tiny_clip
from support.workflow import ONE_THREAD, ROOT

pytestmark = pytest.mark.slow  # both a server and many pictures
MODELS = ROOT / "demo/models"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A dry run: 6 captions of two steps, 4 seeds, 48 pictures."""
    folder = tmp_path_factory.mktemp("evidence")
    with (
        mock.patch.dict(os.environ, ONE_THREAD),
        serving(folder / "base", folder / "log") as server,
    ):
        graph = evidence.graph_of("demo", server.get("/object_info"), prompts=6, steps=2)
        return evidence.draw(server, graph, "demo", [MODELS], folder)


def test_dry_run_on_the_demo(written):
    """One JSON that the page takes, with the weights' hash and all scores; one sheet."""
    posted = json.loads(written.read_text("utf-8"))
    assert evidence.checked(posted) == posted
    record = posted["record"]
    assert record["settings"] == ["gamma 1 (plain)", "gamma 1.2, t >= 970"]
    assert len(record["scores"]) == 2 * 6 * 4
    assert {row[3] for row in record["scores"]} <= {0.0, 1.0}
    weights = (MODELS / "taca_demo_suppressed_mmdit.safetensors").read_bytes()
    assert posted["weights"] == {"UNETLoader.unet_name": hashlib.sha256(weights).hexdigest()}
    assert Image.open(written.with_suffix(".png")).width == 1200


def test_prompt_check_as_the_judge(tmp_path):
    """In the place of the workflow's judge, with a text encoder that sees pictures."""
    base = tmp_path / "base"
    add_tiny_clip(base)
    with (
        mock.patch.dict(os.environ, ONE_THREAD),
        serving(base, tmp_path / "log") as server,
    ):
        graph = evidence.graph_of("demo", server.get("/object_info"), prompts=2, steps=1)
        evidence.judged_by(graph, "encoder.safetensors", "qwen_image")
        graph["encoder"] = {"class_type": "TinyJudge", "inputs": {}}
        path = evidence.draw(server, graph, "demo", [MODELS], tmp_path)
    posted = json.loads(path.read_text("utf-8"))
    assert posted["judge"] == "TACAPromptCheck"
    scores = [row[3] for row in posted["record"]["scores"]]
    assert len(scores) == 2 * 2 * 4
    assert all(0 < score < 1 for score in scores)
    assert len(set(scores)) > 2, "each of its own picture"


def test_nothing_private_is_written(written):
    """No prompt, no file's name, no path."""
    text = written.read_text("utf-8")
    for private in ("circle", "safetensors", str(written.parent), os.sep + "home", "custom_nodes"):
        assert private not in text


def test_the_page_counts_what_is_posted(written, tmp_path):
    page, folder = tmp_path / "page.md", tmp_path / "posted"
    folder.mkdir()
    page.write_text("before\n<!-- evidence -->\n<!-- /evidence -->\nafter\n")
    evidence.write_page(folder, page)
    assert "So far: none." in page.read_text()
    (folder / "one.json").write_text(written.read_text("utf-8"))
    evidence.write_page(folder, page)
    text = page.read_text()
    assert "So far: 1." in text
    assert "| demo | TACADemoCheck | 48 |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_the_committed_page_is_the_scripts(tmp_path):
    page = tmp_path / "evidence.md"
    page.write_bytes(evidence.PAGE.read_bytes())
    evidence.write_page(page=page)
    assert page.read_text("utf-8") == evidence.PAGE.read_text("utf-8")


SPOILT = {
    "and no more": lambda e: e.update(name="somebody"),
    "its record must have": lambda e: e["record"].update(prompt="a red circle"),
    "its versions": lambda e: e["versions"].update(host="a machine"),
    "no SHA-256": lambda e: e["weights"].update({"UNETLoader.unet_name": "a file"}),
    "a score for each": lambda e: e["record"]["scores"].pop(),
    "has a score twice": lambda e: e["record"]["scores"].append(e["record"]["scores"][0]),
    "finite number": lambda e: e["record"]["scores"][0].__setitem__(3, float("nan")),
}


@pytest.mark.parametrize("problem", SPOILT)
def test_what_is_not_evidence_is_refused(problem, written, tmp_path):
    posted = copy.deepcopy(json.loads(written.read_text("utf-8")))
    SPOILT[problem](posted)
    with pytest.raises(ValueError, match=problem):
        evidence.checked(posted)
    (tmp_path / "spoilt.json").write_text(json.dumps(posted))
    with pytest.raises(SystemExit, match=r"spoilt\.json: "):
        evidence.write_page(tmp_path, tmp_path / "page.md")
