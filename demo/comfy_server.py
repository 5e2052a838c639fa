"""A real ComfyUI server with this pack and the demo's, and nobody else's.

Run as a script (``python dev.py serve``) it stays open; the demo and the tests start and stop one.
ComfyUI is found in COMFYUI_PATH. The server listens on this machine alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
PACKS = {"comfyui-taca": ROOT, "comfyui-taca-demo": ROOT / "demo"}
MODEL_FOLDERS = (
    "checkpoints", "diffusion_models", "unet", "text_encoders", "clip", "vae", "loras"
)  # fmt: skip


def prepare_base(base: Path, comfyui: Path, models: dict[str, Path] | None = None) -> list[str]:
    """Make a base directory with links to the two packs; returns the server's arguments for it.

    Parameters
    ----------
    base : Path
        Holds custom_nodes, input, output and the settings of the page.
    comfyui : Path
        Whose models are offered too.
    models : dict, optional
        Further folders of models: kind -> folder.
    """
    packs = base / "custom_nodes"
    packs.mkdir(parents=True, exist_ok=True)
    for name, folder in PACKS.items():
        link(packs / name, folder)
    places: list[tuple[str, Path]] = [("diffusion_models", ROOT / "demo" / "models")]
    places += [(kind, comfyui / "models" / kind) for kind in MODEL_FOLDERS]
    places += list((models or {}).items())
    lines = []
    for i, (kind, folder) in enumerate(places):
        lines.append(f"place{i}:\n  {kind}: {json.dumps(str(folder))}\n")
    paths = base / "extra_model_paths.yaml"
    paths.write_text("".join(lines))
    return ["--base-directory", str(base), "--extra-model-paths-config", str(paths)]


def link(at: Path, folder: Path) -> None:
    """Link to a folder; on Windows by a junction, which needs no rights."""
    if at.exists() and at.resolve() == folder:
        return
    if os.name == "nt":
        import _winapi

        if at.exists():
            at.rmdir()
        _winapi.CreateJunction(str(folder), str(at))
    else:
        at.unlink(missing_ok=True)
        at.symlink_to(folder, target_is_directory=True)


def command(comfyui: Path, port: int, arguments: list[str]) -> list[str]:
    """The command that starts ComfyUI."""
    import torch

    graphics = torch.cuda.is_available() or torch.backends.mps.is_available()
    device = [] if graphics else ["--cpu", "--use-pytorch-cross-attention"]
    return [
        sys.executable, str(comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(port),
        "--disable-api-nodes", "--database-url", "sqlite:///:memory:", *device, *arguments,
    ]  # fmt: skip


class Server:
    """A running ComfyUI.

    Parameters
    ----------
    address : str
        ``http://127.0.0.1:port``.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str) -> Any:
        """The JSON at a path of the server."""
        with urllib.request.urlopen(self.address + path, timeout=60) as reply:  # noqa: S310
            return json.load(reply)

    def picture(self, image: dict[str, str]) -> bytes:
        """The file of an output image."""
        query = "&".join(f"{key}={image[key]}" for key in ("filename", "subfolder", "type"))
        with urllib.request.urlopen(f"{self.address}/view?{query}", timeout=60) as reply:  # noqa: S310
            return reply.read()

    def run(
        self,
        graph: dict[str, Any],
        on_progress: Callable[[str, int, int], None] = lambda node, step, steps: None,
    ) -> dict[str, Any]:
        """Queue a graph in API format and wait for it.

        Parameters
        ----------
        graph : dict
            Node id -> class_type and inputs.
        on_progress : callable
            Called with node id, step and number of steps.

        Returns
        -------
        dict
            Outputs by node id.

        Raises
        ------
        RuntimeError
            If the server refuses the graph or a node fails; with its reason.
        """
        return asyncio.run(self._run(graph, on_progress))

    async def _run(
        self, graph: dict[str, Any], on_progress: Callable[[str, int, int], None]
    ) -> dict[str, Any]:
        client = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.address}/ws?clientId={client}", max_msg_size=0) as events,
        ):
            body = {"prompt": graph, "client_id": client}
            async with session.post(f"{self.address}/prompt", json=body) as reply:
                answer = await reply.json()
                if reply.status != 200:
                    raise RuntimeError(json.dumps(answer, indent=1))
            prompt = answer["prompt_id"]
            async for event in events:
                if event.type is not aiohttp.WSMsgType.TEXT:
                    continue  # preview pictures
                message = json.loads(event.data)
                data = message.get("data", {})
                if data.get("prompt_id") != prompt:
                    continue
                if message["type"] == "progress":
                    on_progress(data["node"], data["value"], data["max"])
                elif message["type"] == "execution_error":
                    raise RuntimeError(f"{data['node_type']}: {data['exception_message']}")
                elif message["type"] == "executing" and data["node"] is None:
                    break  # sent once the outputs are in the history
            async with session.get(f"{self.address}/history/{prompt}") as reply:
                return (await reply.json())[prompt]["outputs"]


@contextmanager
def serving(base: Path, log: Path, models: dict[str, Path] | None = None) -> Iterator[Server]:
    """A server for the length of this context; its output goes to the log file.

    Raises
    ------
    RuntimeError
        If it does not come up within two minutes; with the end of its log.
    """
    comfyui = Path(os.environ["COMFYUI_PATH"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*prepare_base(base, comfyui, models), "--disable-auto-launch"]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command(comfyui, port, arguments), stdout=output, stderr=subprocess.STDOUT, cwd=comfyui
        )
    server = Server(f"http://127.0.0.1:{port}")
    try:
        for _ in range(600):
            try:
                server.get("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError):
                if process.poll() is not None:
                    break
                time.sleep(0.2)
        else:
            process.kill()
        if process.poll() is not None:
            raise RuntimeError(f"ComfyUI did not start:\n{log.read_text()[-3000:]}")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> None:
    """Keep a server open until Ctrl-C; further arguments are ComfyUI's."""
    comfyui = Path(os.environ["COMFYUI_PATH"])
    arguments = prepare_base(ROOT / ".dev" / "base", comfyui)
    if "--disable-auto-launch" not in sys.argv:
        arguments.append("--auto-launch")
    try:
        subprocess.run(
            command(comfyui, 8188, [*arguments, *sys.argv[1:]]), cwd=comfyui, check=False
        )
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
