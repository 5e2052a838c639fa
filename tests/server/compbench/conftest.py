"""Fixtures of a compbench run."""

import json

import pytest
from compbench.plan import Plan, read_category
from compbench.workflow import read_workflow

from support.compbench import BENCH, COW, PROMPTS, api_form, write


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def color(tmp_path):
    """T2I-CompBench's prompt files end lines with CRLF, and have no end of the last line."""
    return write(tmp_path / "color_val.txt", " \r\n".join(PROMPTS))


@pytest.fixture
def geneval(tmp_path):
    return write(tmp_path / "metadata.jsonl", f"{json.dumps(BENCH)}\n{json.dumps(COW)}")


@pytest.fixture
def line(tmp_path, color, out):
    """The command line, for servers and options."""

    def line(*servers, prompts=(color,), workflow=None, images=2, **more):
        workflow = workflow or api_form(tmp_path)
        words = ["--prompts", *prompts, "--workflow", workflow, "--out", out, "--images", images]
        words += ["--servers", *servers] if servers else []
        for name, value in more.items():
            words += [f"--{name.replace('_', '-')}", value]
        return [str(word) for word in words]

    return line


@pytest.fixture
def plan(color, tmp_path):
    return Plan(read_workflow(api_form(tmp_path)), [1.0, 1.2], [read_category(color, 2)])
