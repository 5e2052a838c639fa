"""A Ray cluster's GPUs as painters: each worker starts a ComfyUI of its own.

Where workers run, and what becomes of one that is lost, is Ray's business.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from comfy_server import ROOT, Lost

from .draw import Painter
from .plan import Problem

START = (
    f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'hosting/comfy_server.py'))} "
    "--port {port} --disable-auto-launch --output-directory {folder} --temp-directory {folder}"
)
# The command ends when the pipe to this shell closes, so with its worker, however that ends. It
# runs in the background, as nobody's child, because Ray kills a worker's children before it.
_GUARD = 'exec 3<&0; { { "$@" 3<&-; kill -9 0; } & cat <&3 >/dev/null; kill -9 0; } &'
_START_LIMIT = 600  # seconds


class Worker:
    """The actor: it keeps a ComfyUI running, which is known by the worker's own folder."""

    def __init__(self, start: str, patience: float) -> None:
        self._command, self._patience = start, patience
        self.folder = tempfile.TemporaryDirectory(prefix="compbench-")
        self.painter: Painter | None = None
        self.pipe: Any = None
        self._checking = asyncio.Lock()

    async def check(self) -> None:
        """See that a ComfyUI answers: one that is not there, or hangs, is started anew."""
        async with self._checking:
            if not self.painter or not await self._answers(self.painter):
                self.painter = await self._started()

    async def draw(self, graph: dict[str, Any], output: str) -> bytes:
        if not (painter := self.painter):
            raise Lost("not started")
        try:
            return await painter.draw(graph, output)
        except Lost:
            self.painter = None if self.painter is painter else self.painter
            raise
        finally:  # the caller has the picture; thousands of copies would fill the disk
            if prefix := graph[output]["inputs"].get("filename_prefix"):
                for copy in Path(self.folder.name).glob(f"{prefix}_*"):
                    copy.unlink()

    async def _started(self) -> Painter:
        if self.pipe:
            self.pipe.close()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = self.folder.name
        command = [part.format(port=port, folder=folder) for part in shlex.split(self._command)]
        with Path(folder, "log").open("wb") as log:
            guarded = ["sh", "-c", _GUARD, "guard", *command]
            streams = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "bufsize": 0}
            self.pipe = subprocess.Popen(guarded, start_new_session=True, **streams).stdin
        painter = Painter(f"http://127.0.0.1:{port}", self._patience)
        deadline = time.monotonic() + _START_LIMIT
        with suppress(BrokenPipeError):  # the command has ended, and with it its shell
            while time.monotonic() < deadline and self.pipe.write(b"."):
                if await self._answers(painter):
                    return painter
                await asyncio.sleep(0.2)
        end = Path(folder, "log").read_text("utf-8", "replace")[-2000:]
        raise Lost(f"ComfyUI did not start: {shlex.join(command)}\n{end}")

    async def _answers(self, painter: Painter) -> bool:
        """Whether this worker's own ComfyUI answers: another may have taken the port meanwhile."""
        with suppress(Lost, KeyError, TypeError):
            return any(
                self.folder.name in word for word in (await painter.check())["system"]["argv"]
            )
        return False


class RayPainter:
    """The driver's side of a worker."""

    def __init__(self, actor: Any, name: str, errors: Any) -> None:
        self.name, self.actor, self._errors = name, actor, errors

    async def check(self) -> None:
        await self._reply(self.actor.check.remote())

    async def draw(self, graph: dict[str, Any], output: str) -> bytes:
        return await self._reply(self.actor.draw.remote(graph, output))

    async def _reply(self, reference: Any) -> Any:
        try:
            return await reference
        except self._errors.RayTaskError as error:
            raise error.cause from None  # the worker's own: Lost, Failed, Refused
        except self._errors.RayError as error:
            raise Lost(type(error).__name__) from error


@contextmanager
def workers(
    address: str | None, number: int | None, gpus: float, start: str | None, patience: float
) -> Iterator[list[RayPainter]]:
    """Workers for the length of this context: as many as named, or as there are GPUs for."""
    if missing := [part for part in ("{port}", "{folder}") if start and part not in start]:
        raise Problem(f"--start has no {' and no '.join(missing)}, which ComfyUI must be told.")
    if os.name == "nt":
        raise Problem("Workers on Ray need Linux or macOS: use --servers.")
    try:
        import ray
    except ImportError:
        raise Problem("Ray is not installed: pip install ray. Without it, use --servers.") from None
    environment = {k: os.environ[k] for k in ("COMFYUI_PATH", "PYTHONPATH") if k in os.environ}
    paths = str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = os.pathsep.join(paths).rstrip(os.pathsep)
    ray.init(address=address, runtime_env={"env_vars": environment}, log_to_driver=False)
    try:
        has = ray.cluster_resources().get("GPU" if gpus else "CPU", 0)
        if not (number := number or int(has // (gpus or 1))):
            raise Problem(f"The Ray cluster has {has:g} GPUs. (--gpus-per-worker 0: on the CPU.)")
        actor = ray.remote(Worker).options(num_gpus=gpus, num_cpus=1, max_restarts=-1)
        handles = [actor.remote(start or START, patience) for _ in range(number)]
        yield [RayPainter(h, f"worker {i}", ray.exceptions) for i, h in enumerate(handles)]
    finally:
        ray.shutdown()
