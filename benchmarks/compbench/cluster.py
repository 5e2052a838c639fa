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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .plan import Problem
from .server import Lost, Server

HERE = Path(__file__).resolve().parent
START = (
    f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE.parents[1] / 'demo/comfy_server.py'))} "
    "--port {port} --disable-auto-launch --output-directory {folder} --temp-directory {folder}"
)
"""The ComfyUI in COMFYUI_PATH with this pack; ``{port}`` and ``{folder}`` are filled in."""
_START_LIMIT = 600  # seconds


class Worker:
    """The actor: one ComfyUI, beside which it lives and with which it dies."""

    def __init__(self, start: str, patience: float) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._folder = tempfile.TemporaryDirectory(prefix="compbench-")
        log = Path(self._folder.name, "comfyui.log")
        command = [part.format(port=port, folder=self._folder.name) for part in shlex.split(start)]
        with log.open("wb") as output:
            self._comfyui = subprocess.Popen(
                [sys.executable, str(HERE / "guard.py"), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._server = Server(f"http://127.0.0.1:{port}", patience)
        deadline = time.monotonic() + _START_LIMIT
        while not self._server.is_ready():
            if self._comfyui.poll() is not None or time.monotonic() > deadline:
                end = log.read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"ComfyUI did not start ({shlex.join(command)}):\n{end}")
            time.sleep(0.2)

    def is_ready(self) -> bool:
        """True; it is asked of a worker that has started."""
        return True

    def process(self) -> int:
        """The worker's process id."""
        return os.getpid()

    def draw(self, graph: dict[str, Any], output: str) -> bytes:
        """As `server.Server.draw`; without its ComfyUI the worker ends, and Ray starts another."""
        try:
            return self._server.draw(graph, output)
        except Lost:
            if self._comfyui.poll() is not None:
                os._exit(1)
            raise


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
        except errors.RayTaskError:
            raise  # the worker's own: Lost, Failed, Refused
        except (errors.RayError, TimeoutError) as error:
            raise Lost(type(error).__name__) from error

    def draw(self, graph: dict[str, Any], output: str) -> bytes:
        return self._ask(self.actor.draw.remote(graph, output))

    def is_ready(self) -> bool:
        try:
            return self._ask(self.actor.is_ready.remote(), timeout=30)
        except Lost:
            return False

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
        If Ray is not installed, or the cluster has no GPU.
    """
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
