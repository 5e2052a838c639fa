"""What users install: the registry's archive, the modules that ComfyUI imports, and how fast."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_config.config_parser import extract_node_configuration
from pathspec import GitIgnoreSpec  # mypy brings it
from PIL import Image

from support import ROOT

REPOSITORY = "https://github.com/taca-comfyui/taca-attention"
RAW = "https://raw.githubusercontent.com/taca-comfyui/taca-attention/main/"

BUILTINS = {"eval", "exec", "compile", "__import__", "print", "breakpoint"}
MODULES = {
    "subprocess",
    "multiprocessing",
    "pty",
    "ctypes",
    "importlib",
    "runpy",
    "code",  # run
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",  # what runs when it is read
    "socket",
    "ssl",
    "urllib",
    "http",
    "ftplib",
    "smtplib",
    "requests",
    "httpx",
    "aiohttp",
    "urllib3",
    "websocket",
    "websockets",
    "huggingface_hub",  # the net
}
CALLS = {
    "os": {"system", "popen", "remove", "unlink", "rmdir"},
    "torch": {"load", "save", "hub"},
    "shutil": {"rmtree"},
}
# The registry's scanner reads text, comments too.
WORDS = re.compile(r"(?<![.\w])(eval|exec)\s*\(|subprocess|pickle|os\.system|__import__|base64")


def starts_process(name):
    return name.startswith(("exec", "spawn"))


def offences(source):
    """What a shipped module must not have, by line."""
    found = [
        f"{i}: {m[0]}"
        for i, line in enumerate(source.splitlines(), 1)
        for m in WORDS.finditer(line)
    ]
    for node in ast.walk(ast.parse(source)):
        bad = []
        if isinstance(node, ast.Import):
            bad = [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            base = (node.module or "").split(".")[0]
            names = {a.name for a in node.names}
            bad = [base] if base in MODULES else sorted(names & CALLS.get(base, set()))
        elif isinstance(node, ast.Name) and node.id in BUILTINS:
            bad = [node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            of, name = node.value.id, node.attr
            if name in CALLS.get(of, ()) or (of == "os" and starts_process(name)):
                bad = [f"{of}.{name}"]
            elif of in ("builtins", "__builtins__"):
                bad = [of]
        found += [f"{node.lineno}: {name}" for name in bad]
    return found


def archive(root):
    """Files of the registry's archive: those of the repository less what .comfyignore names."""
    patterns = [".git"]
    for name in (".gitignore", ".comfyignore"):
        patterns += (root / name).read_text("utf-8").splitlines()
    ignored = GitIgnoreSpec.from_lines(patterns)
    found = set()
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        folders[:] = [f for f in folders if not ignored.match_file((here / f).as_posix() + "/")]
        found |= {p for f in files if not ignored.match_file(p := (here / f).as_posix())}
    return found


def imported(root):
    """Modules that the pack's ``__init__`` imports, and theirs, by relative imports."""
    found, todo = set(), [Path("__init__.py")]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse((root / path).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                package = path.parents[node.level - 1]
                base = package.joinpath(*(node.module or "").split("."))
                places = [package, base, *(base / a.name for a in node.names)]
                files = [
                    p for place in places for p in (place / "__init__.py", Path(f"{place}.py"))
                ]
                todo += [p for p in files if (root / p).is_file()]
    return {path.as_posix() for path in found}


@pytest.fixture(scope="module")
def files():
    return archive(ROOT)


@pytest.fixture(scope="module")
def modules():
    return imported(ROOT)


def test_modules_are_clean(files, modules):
    """Nothing that runs text, starts programs, unpickles, reaches the net or prints."""
    for path in sorted(modules | {f for f in files if f.endswith(".py")}):
        assert offences((ROOT / path).read_text("utf-8")) == [], path


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "f = exec",
        "compile('1', '', 'eval')",
        "import subprocess",
        "def f():\n    from subprocess import run",
        "import os\nos.system('x')",
        "from os import system",
        "import os\nos.execv('x', [])",
        "import pickle",
        "import marshal as m",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import socket",
        "import urllib.request",
        "import requests",
        "from http import client",
        "import aiohttp",
        "print('x')",
        "import builtins\nbuiltins.eval('1')",
        "# eval(x)",
    ],
)
def test_an_unclean_module_is_seen(source):
    assert offences(source)


def test_a_clean_module_passes():
    clean = (
        "import os, re, torch\nfrom .http import f\nre.compile('a')\ntorch.compile(f)\n"
        "model.eval()\nevaluate(1)\nos.path.join('a')\nlog.info('print')\n"
    )
    assert offences(clean) == []


def test_archive_holds_what_runs_and_no_more(files, modules):
    assert {f for f in files if f.endswith(".py")} == modules
    assert {f.split("/")[0] for f in files} == {
        "__init__.py",
        "nodes",
        "taca",
        "uvit",
        "web",
        "locales",
        "workflows",
        "subgraphs",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "pyproject.toml",
        "requirements.txt",
    }
    kinds = {Path(f).suffix for f in files - {"LICENSE"}}
    assert kinds <= {".py", ".md", ".json", ".jpg", ".png", ".toml", ".txt"}  # no script, no model
    assert sum((ROOT / f).stat().st_size for f in files) < 5_000_000


def test_what_should_not_be_in_the_archive_is_seen(tmp_path):
    """A copy with a module too many, one that is missing, and a helper that nobody imports."""
    for name, text in {
        ".gitignore": "*.pyc",
        ".comfyignore": "/tests/",
        "__init__.py": "from .nodes import a",
        "nodes/__init__.py": "from . import b\nfrom ..taca import c",
        "nodes/a.py": "",
        "nodes/b.py": "from ..taca.d import e",
        "taca/__init__.py": "",
        "taca/c.py": "",
        "taca/d.py": "def f():\n    from .g import h",
        "taca/g.py": "",
        "taca/loose.py": "",
        "tests/t.py": "",
        "nodes/tests/t.py": "",
        "x.pyc": "",
        ".git/config": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = imported(tmp_path)
    assert found == {"__init__.py"} | {f"nodes/{n}.py" for n in ("__init__", "a", "b")} | {
        f"taca/{n}.py" for n in ("__init__", "c", "d", "g")
    }
    extra = {f for f in archive(tmp_path) if f.endswith(".py")} - found
    assert extra == {"taca/loose.py", "nodes/tests/t.py"}
    (tmp_path / ".comfyignore").write_text("/tests/\n/taca/g.py\n")
    assert found - archive(tmp_path) == {"taca/g.py"}


def test_nothing_has_to_be_installed():
    assert (ROOT / "requirements.txt").read_text("utf-8").strip() == ""


def test_versions_agree():
    """The changelog's first heading is the version that would be published."""
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    version = extract_node_configuration(str(ROOT)).project.version
    assert first[1] == version
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)


def test_pyproject_as_comfyui_reads_it():
    config = extract_node_configuration(str(ROOT))
    project, comfy = config.project, config.tool_comfy
    assert project.name == "taca-attention"  # the registry never lets it change
    assert project.description
    assert (ROOT / project.license.file).is_file()
    assert project.urls.repository == REPOSITORY
    assert project.supported_os == ["OS Independent"]
    assert project.dependencies == []
    assert project.supported_comfyui_version.startswith(">=")
    assert comfy.publisher_id
    assert comfy.display_name
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for key, (width, height) in {"Icon": (400, 400), "Banner": (1260, 540)}.items():
        url = re.search(rf'^{key} = "(.+)"', text, re.MULTILINE)[1]
        assert url.startswith(RAW)
        assert Image.open(ROOT / url.removeprefix(RAW)).size == (width, height)


IMPORT = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
import comfy.options
comfy.options.enable_args_parsing(False)
from comfy.cli_args import args
args.cpu = True
import nodes, comfy_api.latest, comfy_extras.nodes_custom_sampler  # as ComfyUI has by then
for number, folder in enumerate(sys.argv[2:]):
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location(f"taca_imported{number}", folder + "/__init__.py",
                                                  submodule_search_locations=[folder])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    brought = set(sys.modules) - before
    print(len(brought), *{name.split(".")[0] for name in brought})
"""


def imports_of(*folders):
    """How many modules each pack brings where ComfyUI's are, and the packages they are of."""
    command = [sys.executable, "-c", IMPORT, os.environ["COMFYUI_PATH"], *map(str, folders)]
    lines = subprocess.check_output(command, text=True).splitlines()[-len(folders) :]
    return [(int(count), set(brought)) for count, *brought in map(str.split, lines)]


def brings_packages(brought):
    """Packages that are neither Python's, nor ComfyUI's, nor the pack."""
    ours = set(sys.stdlib_module_names) | {"comfy", "comfy_api", "comfy_extras"}
    return {name for name in brought - ours if not name.startswith("taca_imported")}


def test_import_is_quick(tmp_path):
    """It brings its own modules, a few of Python's and of ComfyUI's, and no package; one that
    brings more is seen."""
    (tmp_path / "__init__.py").write_text("import matplotlib\n")
    (count, brought), (more, others) = imports_of(ROOT, tmp_path)
    own = sum(1 for folder in ("taca", "nodes", "uvit") for _ in (ROOT / folder).rglob("*.py"))
    assert own < count < own + 40
    assert brings_packages(brought) == set()
    assert more > 40
    assert "matplotlib" in brings_packages(others)
