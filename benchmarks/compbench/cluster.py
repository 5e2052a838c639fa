"""A Ray cluster's GPUs as painters: each worker starts a ComfyUI of its own.

Where workers run, and what becomes of one whose process or machine is lost, is Ray's business; a
unit that it was at is drawn by another. The checkout, ComfyUI and its models lie at the same path
on every machine.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .plan import Problem
from .server import Hung, Lost, Refused, Server

HERE = Path(__file__).resolve().parent
START = (
    f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE.parents[1] / 'demo/comfy_server.py'))} "
    "--port {port} --disable-auto-launch --output-directory {folder} --temp-directory {folder}"
)
"""The ComfyUI in COMFYUI_PATH with this pack; ``{port}`` and ``{folder}`` are filled in.

The folder, which is the worker's own, is also what its ComfyUI is known by.
"""
_START_LIMIT = 600  # seconds
_LOOK = 5


class Worker:
    """The actor: it keeps a ComfyUI running, which ends with it."""

    def __init__(self, start: str, patience: float) -> None:
        self._start_line, self._patience = start, patience
        self._folder = tempfile.TemporaryDirectory(prefix="compbench-")
        self._log = Path(self._folder.name, "comfyui.log")
        self._server: Server | None = None
        self._guard: subprocess.Popen | None = None
        self._hung: Server | None = None
        self._starting = threading.Lock()

    def process(self) -> int:
        """The worker's process id."""
        return os.getpid()

    def check(self) -> None:
        """As `server.Server.check`; a ComfyUI that is not there, or hangs, is started anew."""
        with self._starting:
            if self._runs() and self._hung is not self._server:
                with suppress(Lost):
                    self._server.check()
                    return
            self._stop()
            self._start()

    def draw(self, graph: dict[str, Any], output: str) -> bytes:
        """As `server.Server.draw`."""
        server = self._server
        if server is None:
            raise Lost("not started")
        try:
            return server.draw(graph, output)
        except Hung:
            self._hung = server
            raise
        finally:  # the caller has the picture; thousands of copies would fill the disk
            if prefix := graph[output]["inputs"].get("filename_prefix"):
                for copy in Path(self._folder.name).glob(f"{prefix}_*"):
                    copy.unlink()

    def _runs(self) -> bool:
        """Whether ComfyUI's process, and with it its guard, is there."""
        if self._guard is None:
            return False
        try:
            os.write(self._guard.stdin.fileno(), b".")
        except BrokenPipeError:
            return False
        return True

    def _stop(self) -> None:
        """End ComfyUI, by its guard, and all it has started."""
        if self._guard is not None:
            with suppress(BrokenPipeError):
                self._guard.stdin.close()
            self._guard = None

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            part.format(port=port, folder=self._folder.name)
            for part in shlex.split(self._start_line)
        ]
        self._server = Server(f"http://127.0.0.1:{port}", self._patience)
        with self._log.open("wb") as output:
            self._guard = subprocess.Popen(
                [sys.executable, str(HERE / "guard.py"), *command],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        deadline = time.monotonic() + _START_LIMIT
        while not self._answers():
            if not self._runs() or time.monotonic() > deadline:
                end = self._log.read_text("utf-8", "replace")[-2000:]
                raise Lost(f"ComfyUI did not start: {shlex.join(command)}\n{end}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        """Whether this worker's own ComfyUI answers: another may have taken the port meanwhile."""
        try:
            arguments = self._server.check()["system"]["argv"]
        except (Lost, Refused, KeyError, TypeError):
            return False
        return any(self._folder.name in argument for argument in arguments)


class Painter:
    """The driver's side of a worker."""

    def __init__(self, actor: Any, name: str, ray: Any) -> None:
        self.name = name
        self.actor = actor
        self._ray = ray

    def _ask(self, reply: Any, timeout: float | None = None) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reply, timeout=timeout)
        except errors.RayTaskError as error:
            raise error.cause from None  # the worker's own: Lost, Failed, Refused
        except TimeoutError:
            raise Lost("not yet") from None
        except errors.RayError as error:
            raise Lost(type(error).__name__) from error

    def check(self) -> None:
        self._ask(self.actor.check.remote(), timeout=_LOOK)

    def draw(self, graph: dict[str, Any], output: str) -> bytes:
        return self._ask(self.actor.draw.remote(graph, output))

    def close(self) -> None:
        """Nothing: the workers end with the run."""


@contextmanager
def workers(
    address: str | None, number: int | None, gpus: float, start: str | None, patience: float
) -> Iterator[list[Painter]]:
    """Workers for the length of this context.

    Parameters
    ----------
    address : str, optional
        Of a running cluster (``auto``: the one this machine belongs to); None for this machine.
    number : int, optional
        How many; by default as many as the cluster has GPUs for.
    gpus : float
        What each takes; 0 draws on the CPU.
    start : str, optional
        The command that starts a ComfyUI, with ``{port}`` and ``{folder}``.

    Raises
    ------
    Problem
        If Ray is not there, or the cluster has no GPU.
    """
    if missing := [part for part in ("{port}", "{folder}") if start and part not in start]:
        raise Problem(f"--start has no {' and no '.join(missing)}, which ComfyUI must be told.")
    if os.name == "nt":
        raise Problem("Workers on Ray need Linux or macOS: use --servers.")
    try:
        import ray
    except ImportError:
        raise Problem("Ray is not installed: pip install ray. Without it, use --servers.") from None
    environment = {"PYTHONPATH": str(HERE.parent)}
    if "COMFYUI_PATH" in os.environ:
        environment["COMFYUI_PATH"] = os.environ["COMFYUI_PATH"]
    ray.init(address=address, runtime_env={"env_vars": environment}, log_to_driver=False)
    try:
        has = ray.cluster_resources().get("GPU" if gpus else "CPU", 0)
        number = number or int(has // (gpus or 1))
        if not number:
            raise Problem(f"The Ray cluster has {has:g} GPUs. (--gpus-per-worker 0: on the CPU.)")
        actor = ray.remote(Worker).options(
            num_gpus=gpus, num_cpus=1, max_restarts=-1, max_concurrency=8
        )
        yield [
            Painter(actor.remote(start or START, patience), f"worker {i}", ray)
            for i in range(number)
        ]
    finally:
        ray.shutdown()
