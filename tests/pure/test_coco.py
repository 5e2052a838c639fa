"""benchmarks/coco.py: FID against scipy's matrix root in float64, CLIP score one by one."""

import json
import sys
from pathlib import Path

import coco
import comfy.sd1_clip
import numpy as np
import pytest
import torch
from compbench.plan import Category, Plan
from PIL import Image
from scipy import linalg

from support.compbench import NO_WORKFLOW

WORDS = ("a cat", "a dog on a mat", "two trains", "a red bus", "an old clock", "rain")


@pytest.fixture
def pictures(tmp_path):
    """Real ones, wider than high and larger, and a run of two settings of drawn ones."""
    rng = np.random.default_rng(0)
    plan = Plan(NO_WORKFLOW, [1.0, 2.0], [Category("coco", list(WORDS), [42])])
    plan.begin(tmp_path / "run")
    (tmp_path / "real").mkdir()
    places = {tmp_path / "real" / f"COCO_{i}.png": (60, 90, 120) for i in range(12)}
    for unit in plan.units():
        places[tmp_path / "run" / unit.path] = 32, 32, 128 * int(unit.gamma)
    for file, (height, width, most) in places.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, most, (height, width, 3), np.uint8)).save(file)
    return tmp_path


def drawn_in(folder, gamma):
    plan = Plan.read(folder / "run")
    return [folder / "run" / unit.path for unit in plan.units() if unit.gamma == gamma]


class Features(torch.nn.Module):
    """Some numbers of a picture, by a seeded matrix."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.randn(3 * 8 * 8, 5, generator=torch.manual_seed(0))

    def forward(self, pixels):
        small = torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 8) / 255
        return small.flatten(1) @ self.matrix


def test_fid_of_each_setting(pictures):
    pytest.importorskip("torchmetrics", reason="no torchmetrics: pip install '.[coco]'")
    real = sorted((pictures / "real").iterdir())
    settings = [drawn_in(pictures, gamma) for gamma in (1.0, 2.0)]
    found = list(coco.fids_of(real, settings, "cpu", 4, Features()))

    def told(files, crop):
        pixels = []
        for file in files:
            picture = Image.open(file)
            if crop:  # the middle 60 x 60 of 90 x 60
                picture = picture.resize((32, 32), Image.Resampling.BICUBIC, box=(15, 0, 75, 60))
            pixels.append(torch.from_numpy(np.array(picture)).movedim(-1, 0))
        return torch.stack(pixels)

    a, *others = (
        Features()(told(files, files is real)).double().numpy() for files in (real, *settings)
    )
    for fid, b in zip(found, others, strict=True):
        root = np.trace(linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real)
        spread = np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * root
        assert fid == pytest.approx(((a.mean(0) - b.mean(0)) ** 2).sum() + spread, rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=0.1)


def test_clip_score(pictures):
    transformers = pytest.importorskip("transformers")
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "eos_token_id": 49407,
    }
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=small, vision_config={**small, "patch_size": 32})
    ).eval()
    tokenizer = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(), transformers.CLIPTokenizer.from_pretrained(tokenizer)
    )
    captions = [*WORDS[:5], "rain " * 100]  # CLIP reads the first 75
    drawn = drawn_in(pictures, 1.0)
    mean, half = coco.clip_score_of(drawn, captions, "cpu", 4, model, processor)
    scores = []
    for file, caption in zip(drawn, [*WORDS[:5], "rain " * 75], strict=True):
        given = processor(text=[caption], images=[Image.open(file)], return_tensors="pt")
        out = model(**given)
        a, b = out.image_embeds[0].double().numpy(), out.text_embeds[0].double().numpy()
        scores.append(100 * a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert mean == pytest.approx(np.mean(scores), abs=1e-3)
    assert half == pytest.approx(1.96 * np.std(scores, ddof=1) / 6**0.5, rel=1e-3)
    assert half > 0


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["coco.py", *map(str, arguments)])
    coco.main()


def test_captions_are_chosen(tmp_path, monkeypatch, capsys):
    """Each once, always the same, without what no file can be called."""
    told = [*WORDS, "a/b", "snake_case", "x" * 300, "two\nlines"]
    file, out = tmp_path / "captions_val2014.json", tmp_path / "coco.txt"
    file.write_text(json.dumps({"annotations": [{"caption": caption} for caption in told]}))
    run(monkeypatch, "prompts", "--captions", file, "--out", out, "--count", 7)
    chosen = out.read_text().splitlines()
    assert sorted(chosen) == sorted([*WORDS, "two lines"])
    run(monkeypatch, "prompts", "--captions", file, "--out", out, "--count", 7)
    assert out.read_text().splitlines() == chosen
    with pytest.raises(SystemExit, match="7 usable captions"):
        run(monkeypatch, "prompts", "--captions", file, "--out", out)
    file.write_text("[]")
    with pytest.raises(SystemExit, match="not a file of COCO's captions"):
        run(monkeypatch, "prompts", "--captions", file, "--out", out)


def score(monkeypatch, folder):
    run(monkeypatch, "score", "--run", folder / "run", "--real", folder / "real")


WRONG = {
    "2 pictures are not drawn yet": lambda folder: [
        file.unlink() for file in (folder / "run").glob("*/coco/samples/*_000003.png")
    ],
    "holds no run": lambda folder: (folder / "run/run.json").unlink(),
    "has 0 pictures": lambda folder: [file.unlink() for file in (folder / "real").iterdir()],
}


@pytest.mark.parametrize("told", WRONG)
def test_wrong_pictures_are_told(pictures, monkeypatch, told):
    WRONG[told](pictures)
    with pytest.raises(SystemExit, match=told):
        score(monkeypatch, pictures)


def test_without_torchmetrics_it_says_how_to_install(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(SystemExit, match=r"pip install '\.\[coco\]'"):
        score(monkeypatch, pictures)
