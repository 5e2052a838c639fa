"""A ComfyUI that is started by a command, started anew when it ends or hangs, and ends with us."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from comfy_server import ROOT, START_LIMIT, Lost, Server, free_port

START = (
    f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'hosting/comfy_server.py'))} "
    "--port {port} --disable-auto-launch --output-directory {folder} --temp-directory {folder}"
)
# The command ends when the pipe to this shell closes, so with its worker, however that ends. It
# runs in the background, as nobody's child, because Ray kills a worker's children before it.
_GUARD = 'exec 3<&0; { { "$@" 3<&-; kill -9 0; } & cat <&3 >/dev/null; kill -9 0; } &'


class KeptServer:
    """A ComfyUI that is kept running, and known by a folder of its own; a Ray actor, too."""

    def __init__(self, start: str, patience: float) -> None:
        self._command, self._patience = start, patience
        self.folder = tempfile.TemporaryDirectory(prefix="compbench-")
        self.server: Server | None = None
        self.pipe: Any = None
        self._checking = asyncio.Lock()

    async def check(self) -> None:
        """See that a ComfyUI answers: one that is not there, or hangs, is started anew."""
        async with self._checking:
            if not self.server or not await self._answers(self.server):
                self.server = await self._started()

    async def draw(self, graph: dict[str, Any], output: str) -> bytes:
        if not (server := self.server):
            raise Lost("not started")
        try:
            return await server.draw(graph, output)
        except Lost:
            self.server = None if self.server is server else self.server
            raise
        finally:  # the caller has the picture; thousands of copies would fill the disk
            if prefix := graph[output]["inputs"].get("filename_prefix"):
                for copy in Path(self.folder.name).glob(f"{prefix}_*"):
                    copy.unlink()

    async def _started(self) -> Server:
        if self.pipe:
            self.pipe.close()
        port, folder = free_port(), self.folder.name
        command = [part.format(port=port, folder=folder) for part in shlex.split(self._command)]
        with Path(folder, "log").open("wb") as log:
            guarded = ["sh", "-c", _GUARD, "guard", *command]
            streams = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "bufsize": 0}
            self.pipe = subprocess.Popen(guarded, start_new_session=True, **streams).stdin
        server = Server(f"http://127.0.0.1:{port}", patience=self._patience)
        deadline = time.monotonic() + START_LIMIT
        with suppress(BrokenPipeError):  # the command has ended, and with it its shell
            while time.monotonic() < deadline and self.pipe.write(b"."):
                if await self._answers(server):
                    return server
                await asyncio.sleep(0.2)
        end = Path(folder, "log").read_text("utf-8", "replace")[-2000:]
        raise Lost(f"ComfyUI did not start: {shlex.join(command)}\n{end}")

    async def _answers(self, server: Server) -> bool:
        """Whether the ComfyUI of this folder answers: another may have taken the port meanwhile."""
        with suppress(Lost, KeyError, TypeError):
            return any(
                self.folder.name in word for word in (await server.check())["system"]["argv"]
            )
        return False
