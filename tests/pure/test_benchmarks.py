"""What the scripts of ``benchmarks/`` compute and write; nothing is timed here."""

import dataclasses
import functools
import json
import sys

import attention
import fusion
import pytest
import scale
import targets
import timing
import torch

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", attention.SHAPES)
def test_every_way_is_eq_10(name):
    """Each equals dense float64 at the shape's own mask, and a block runs on it."""
    shape = dataclasses.replace(attention.SHAPES[name], hidden=64, heads=2, text=12)
    names = [n for n in attention.METHODS if n != "flex compiled"]
    with torch.inference_mode():
        case = attention.Case(shape, 16, 2, CPU, "float32")
        errors, skipped = case.check(names)
        assert list(errors) == names
        assert not skipped
        before, after = case.step("plain"), case.step("inside")
        assert [x.shape for x in before] == [x.shape for x in after]
        assert not torch.equal(before[1], after[1])


def test_a_way_that_is_wrong_is_found(monkeypatch):
    monkeypatch.setattr(attention.Joint, "two_full", attention.Joint.plain)
    case = attention.Case(attention.Shape(64, 2, 12), 16, 1, CPU, "float32")
    with pytest.raises(ValueError, match="two full: off by"):
        case.check(["plain", "two full"])


def test_results_of_another_schema_are_refused(tmp_path):
    results = timing.Results("model", tmp_path, CPU)
    results.add("one", {"times_s": [1.0, 2.0], "note": "a [b] c"})
    assert timing.Results("model", tmp_path, CPU).cases == results.cases
    results.file.write_text(json.dumps({"environment": {}, "models": {}}))
    with pytest.raises(SystemExit, match="move it away or delete it"):
        timing.Results("model", tmp_path, CPU)


def measured(point, constants, noise):
    """A row of ``scale`` as the model with these constants would give it."""
    row = {**point, "peak_mib": {"call": {"plain": 2.0, "inside": 2.0}}}
    for kind in ("call", "step"):
        plain = sum(
            constants[k] * x for k, x in zip("ab", scale.terms(point, kind)[0], strict=True)
        )
        extra = plain * (scale.predicted({"constants": constants}, point, kind) - 1)
        again = timing.summary([plain - noise, plain, plain + noise], [plain] * 3)
        inside = [plain + extra + each * noise for each in (-1, 0, 1)]
        row[kind] = {
            "plain": timing.summary([plain] * 3, [plain] * 3),
            "plain again": again,
            "inside": timing.summary(inside, [plain] * 3),
        }
    return row


def test_the_model_of_growth_is_found_again():
    """Its constants from exact times; one point that is off within its spread moves none."""
    constants = {"a": 2e-11, "b": 3e-11, "c": 4e-9, "d": 2e-9, "e": 2e-5}
    rows = [measured(point, constants, 1e-6) for point in scale.points(4096, 4608)]
    found = scale.fit(rows)
    assert found["constants"] == pytest.approx(constants, rel=1e-3)
    assert found["within_two_errors"][0] == found["within_two_errors"][1]
    off = measured(scale.BASE | {"image": 256}, constants, 1e-1)
    off["call"]["inside"]["extra_s"] = 1e-9  # almost nothing, by noise
    assert scale.fit([*rows, off])["constants"] == pytest.approx(constants, rel=1e-3)
    assert "extrapolated" in scale.table({"points": rows, "fit": found})


def test_targets_say_how_far_they_were_missed(monkeypatch, tmp_path):
    row = {"ratio": 1.03, "ratio_p10": 1.02, "ratio_p90": 1.04}
    again = {"ratio": 1.0, "ratio_p10": 0.99, "ratio_p90": 1.01}
    case = {
        "model": "flux",
        "size": 512,
        "dtype": "float32",
        "compiled": False,
        "environment": {"device": "cpu"},
        "peak_mib": {"plain": 100.0, "inside": 100.5},
        "step": {"inside": row, "plain again": again},
    }
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    timing.Results("model", tmp_path, CPU).add("flux, small", case)
    text = targets.table()
    assert targets.NO_GPU in text
    step, peak, picture = (line for line in text.splitlines() if "flux, small" in line)
    assert "1.030 (1.020 to 1.040) | 1.000 (0.990 to 1.010) | missed by 0.010" in step
    assert "| 1.005 (1.005 to 1.005) |  | met |" in peak
    assert "1.0030 (1.0020 to 1.0040)" in picture
    assert "missed by 0.0010" in picture
    assert "| flux, small | 100.0 | 100.5 |" in targets.memory()
    page = tmp_path / "README.md"
    page.write_bytes(targets.README.read_bytes())
    for name in ("targets", "tried", "host"):
        targets.write_between(page, name, f"{name} of ours\n")
        assert f"\n<!-- {name} -->\n{name} of ours\n<!-- /{name} -->\n" in page.read_text("utf-8")
    with pytest.raises(SystemExit, match="has no marks"):
        targets.write_between(page, "other", "")


@pytest.mark.parametrize("kind", ["attention", "model", "scale", "host"])
def test_committed_results_are_still_read(kind, tmp_path):
    """Those of before have all that tables and plots are made of."""
    (file,) = timing.RESULTS.glob(f"{kind}-*.json")
    results = timing.Results(kind, tmp_path, CPU)
    results.cases = timing.read(file)
    script = pytest.importorskip(kind)
    results.report(kind, script.table)
    if kind == "scale":
        scale.plot(results.cases["scale"], results)
    elif kind != "host":
        results.plot(script.METHODS)
    written = results.file.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    kept = file.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    assert written[1:] == kept[1:]  # but the title
    assert results.file.with_suffix(".png").exists() or kind == "host"


@pytest.mark.parametrize("all_float32", [False, True])
def test_cost_of_fusion_is_one_file(monkeypatch, tmp_path, all_float32):
    """FLOPs of every c and v, all methods in the same rounds, and the tables."""
    small = {"width": 64, "side": 4, "text_tokens": 5, "text_width": 6}
    monkeypatch.setattr(fusion, "UViTConfig", functools.partial(fusion.UViTConfig, **small))
    monkeypatch.setattr(fusion, "SIZES", {"small": 3})
    monkeypatch.setattr(fusion, "COUNTED", range(2))
    ways = {
        "concatenation c1 v1": (1, 1, "concatenation"),
        "cross c0 v1": (0, 1, "cross-attention"),
    }
    monkeypatch.setattr(fusion, "TIMED", ways)
    file = tmp_path / "cost.json"
    asked = ["--rounds", "2", "--batches", "2", "--out", str(file)]
    asked += ["--all-float32"] if all_float32 else []
    monkeypatch.setattr(sys, "argv", ["fusion.py", *asked])
    threads, dtypes = torch.get_num_threads(), set()

    def seen(module, given, result):
        if isinstance(module, torch.nn.Linear):
            dtypes.add(result.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(seen)
    with torch.enable_grad():
        fusion.main()
    hook.remove()
    torch.set_num_threads(threads)
    assert (torch.bfloat16 in dtypes) != all_float32
    report = json.loads(file.read_text())
    assert list(report["throughput"]) == ["small, batch 2, training", "small, batch 2, sampling"]
    for found in report["throughput"].values():
        assert found["rounds"] == 2
        assert all(set(ratios) == set(ways) for ratios in found["fusion"].values())
        assert set(found["both"]) == (set() if all_float32 else set(ways))
        assert len(found["pictures_per_second"]) == (1 if all_float32 else 2) * 3
        assert all(low <= middle <= high for low, middle, high in found["precision"].values())
    page = file.with_suffix(".md").read_text()
    assert page.count("\n| small") == 2 * (2 if all_float32 else 3)
    assert page.count("\n| v") == 2 * 2


@pytest.mark.slow
def test_flops_of_fusions():
    """At the published size, against what the widths come to by hand, in percent."""
    with torch.enable_grad():
        early = fusion.gflops_of(fusion.config_of("small", "early"))
        for captions, images, conditioning, saved in (
            (3, 3, "concatenation", 6.8),
            (1, 5, "concatenation", 17.5),
            (3, 3, "cross-attention", 17.5),
            (2, 4, "cross-attention", 19.7),
        ):
            counted = fusion.gflops_of(fusion.streams_of("small", captions, images, conditioning))
            for one, all_of_it in zip(counted, early, strict=True):
                assert 100 * (1 - one / all_of_it) == pytest.approx(saved, abs=0.1)


@pytest.mark.slow
def test_the_host_script_measures_what_it_names():
    """TACA and its LoRA by the operations written out by hand, on all 57 blocks and 304 layers."""
    import host

    with torch.inference_mode():
        machine = host.Host()
        captured = machine.check()
        assert (machine.blocks, machine.layers) == (57, 304)
        layers = captured["bare lora"].forwards
        assert layers.keys() == captured["inside lora"].forwards.keys() > set(machine.counts)
        replays = {block: layers[block] for block in machine.counts}
        assert captured["bare"].forwards == replays
        assert captured["inside"].forwards.keys() == replays.keys()
        assert not replays.items() & captured["inside"].forwards.items()
        found = machine.measure(captured, 1, 2)
        assert {"installing", "blocks", "lora layers"} <= set(found["rows"])
        assert host.table(found).count("\n| ") == 12
