"""``benchmarks/gpu.py`` at tiny sizes on the CPU; nothing here looks at a time."""

import json
import sys

import pytest
import torch

pytest.importorskip("scipy")
import attention
import gpu
import model


def dry(monkeypatch, folder, *options):
    """What a dry run returns, its cases, and the page that it writes."""
    command = ["gpu.py", "--dry", "--rounds", "1", "--out", str(folder), *options]
    monkeypatch.setattr(sys, "argv", command)
    code = gpu.main()
    (file,) = folder.glob("gpu-*.json")
    text = file.with_suffix(".md").read_text(encoding="utf-8")
    return code, json.loads(file.read_text())["cases"], text


@pytest.mark.slow
def test_a_dry_run(monkeypatch, tmp_path):
    """Every case is there, and what cannot run on a CPU is named."""
    code, cases, text = dry(monkeypatch, tmp_path, "--minutes", "60")
    assert code == 0
    left_out = {name: case["left out"] for name, case in cases.items() if "left out" in case}
    why = "Left out: TimeoutError: not in a dry run"
    compiled = "flux, 64², float32, one step, compiled"
    assert left_out == {"fusion, training": why, compiled: why}
    found = cases["kernels"]
    assert {"SDPA math, bfloat16", "SDPA flash, float16", "flex, float16"} <= set(found["errors"])
    assert "Sage, bfloat16" in found["left_out"]
    assert "SDPA math, float8_e4m3fn" in found["left_out"]
    assert len(found["errors"]) + len(found["left_out"]) == 3 * 7
    assert all(f"| {name} | left out: " in text for name in found["left_out"])
    for name in gpu.NAMES:
        for size in (64, 128):
            steps = cases[f"{name}, {size}², float32, one step"]["step"]
            assert {"inside", "lora 16", "word", "negative word", "two full", "dense"} <= set(steps)
            block = cases[f"{name}, {size}², float32, one joint block"]
            assert max(block["max_abs_error"].values()) < attention.TOLERANCE["float32"]
            assert block["skipped"] == {"flex compiled": "a dry run"}
    assert set(cases["K in place"]["ways"]) == {"plain", "inside", "in place"}
    assert cases["the host's work"]["blocks"] == 57
    assert next(tmp_path.glob("*.png"))


@pytest.mark.parametrize("name", gpu.NAMES)
def test_every_number_of_a_model_is_seeded(name):
    """Buffers too: what memory held before may be NaN, and then nothing equals the plain model."""
    one = gpu.tiny(attention.SHAPES, model.MODELS)[1][name]
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch.empty give NaN
    try:
        loaded = model.load(one, one.reduced, torch.float32, torch.device("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in loaded.model.diffusion_model.state_dict().values())


@pytest.mark.slow
def test_without_time_everything_is_named(monkeypatch, tmp_path):
    code, cases, text = dry(monkeypatch, tmp_path, "--minutes", "0.000001")
    assert code == 0
    assert text.count("Left out: TimeoutError: no time was left") == len(cases) > 15


def test_a_wrong_kernel_is_found(monkeypatch, tmp_path):
    """TACA that does nothing, in the case of the kernels alone."""
    monkeypatch.setattr(attention.Joint, "inside", attention.Joint.plain)
    only = list(gpu.cases(gpu.argparse.Namespace(dry=True, rounds=1), torch.device("cpu")))[:1]
    monkeypatch.setattr(gpu, "cases", lambda *_: only)
    code, cases, text = dry(monkeypatch, tmp_path, "--minutes", "60")
    assert code == 1
    assert cases["kernels"]["left out"].startswith("Wrong: ValueError: SDPA flash, bfloat16: off")
    assert "Wrong: " in text


def test_it_needs_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--dry tries the command out" in capsys.readouterr().err
