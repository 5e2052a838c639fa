"""A Ray cluster's GPUs as servers: each worker keeps a ComfyUI of its own.

Where workers run, and what becomes of one that is lost, is Ray's business.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy_server import ROOT, Lost
from kept_server import START, KeptServer

from .plan import Problem


class Worker:
    """The driver's side of a worker."""

    def __init__(self, actor: Any, address: str, errors: Any) -> None:
        self.address, self.actor, self._errors = address, actor, errors

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
) -> Iterator[list[Worker]]:
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
    paths = str(ROOT / "hosting"), environment.get("PYTHONPATH", "")
    environment["PYTHONPATH"] = os.pathsep.join(paths).rstrip(os.pathsep)
    ray.init(address=address, runtime_env={"env_vars": environment}, log_to_driver=False)
    try:
        has = ray.cluster_resources().get("GPU" if gpus else "CPU", 0)
        if not (number := number or int(has // (gpus or 1))):
            raise Problem(f"The Ray cluster has {has:g} GPUs. (--gpus-per-worker 0: on the CPU.)")
        actor = ray.remote(KeptServer).options(num_gpus=gpus, num_cpus=1, max_restarts=-1)
        handles = [actor.remote(start or START, patience) for _ in range(number)]
        yield [Worker(h, f"worker {i}", ray.exceptions) for i, h in enumerate(handles)]
    finally:
        ray.shutdown()
