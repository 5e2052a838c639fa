"""A real ComfyUI server with this pack and the demo's, and nobody else's.

Run as a script (``python dev.py serve``) it stays open; the demo, tests and benchmarks start and
stop one. ComfyUI is found in COMFYUI_PATH. The server listens on this machine alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import uuid
import webbrowser
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
PACKS = {"comfyui-taca": ROOT, "comfyui-taca-demo": ROOT / "demo"}
MODEL_FOLDERS = ("checkpoints", "diffusion_models", "unet", "text_encoders", "clip", "vae", "loras")
START_LIMIT = 600  # seconds: a busy machine takes minutes; a server that ends is noticed at once
DEMO_MODELS = (
    ("diffusion_models", ROOT / "demo" / "models"),
    ("loras", ROOT / "demo" / "loras"),
)
OPENED = {"template": "01_With_and_without_TACA", "source": "comfyui-taca-demo"}
# Compare Images needs Nodes 2.0; the tutorial would lie over the workflow.
SETTINGS = {"Comfy.VueNodes.Enabled": True, "Comfy.TutorialCompleted": True}
TIMEOUT = 60  # seconds for one request, and without a sign of life from a server at work
Models = Iterable[tuple[str, Path]]


def prepare_base(base: Path, comfyui: Path, models: Models = ()) -> list[str]:
    """Make a base directory with links to the two packs; returns the server's arguments for it.

    Parameters
    ----------
    base : Path
        Holds custom_nodes, input, output and the settings of the page.
    comfyui : Path
        Whose models are offered too.
    models : iterable of (str, Path), optional
        Further folders of models, each with its kind; they come before the others.
    """
    packs = base / "custom_nodes"
    packs.mkdir(parents=True, exist_ok=True)
    for name, folder in PACKS.items():
        link(packs / name, folder)
    places = [*models, *DEMO_MODELS]
    places += [(kind, comfyui / "models" / kind) for kind in MODEL_FOLDERS]
    lines = []
    for i, (kind, folder) in enumerate(places):
        lines.append(f"place{i}:\n  {kind}: {json.dumps(str(folder))}\n")
    paths = base / "extra_model_paths.yaml"
    paths.write_text("".join(lines))
    return ["--base-directory", str(base), "--extra-model-paths-config", str(paths)]


def link(at: Path, folder: Path) -> None:
    """Link to a folder; on Windows by a junction, which needs no rights.

    Raises
    ------
    RuntimeError
        If something else than an earlier link is there.
    """
    if at.exists() and at.resolve() == folder.resolve():
        return
    try:
        if os.name == "nt":
            import _winapi

            with suppress(FileNotFoundError):
                at.rmdir()  # a junction, or an empty folder
            _winapi.CreateJunction(str(folder), str(at))
        else:
            if at.is_symlink():
                at.unlink()
            at.symlink_to(folder, target_is_directory=True)
    except OSError as error:
        raise RuntimeError(
            f"Cannot link to {folder} at {at} ({error.strerror}). If something lies there, move it."
        ) from error


def command(comfyui: Path, port: int, arguments: list[str]) -> list[str]:
    """The command that starts ComfyUI."""
    import torch

    graphics = torch.cuda.is_available() or torch.backends.mps.is_available()
    device = [] if graphics else ["--cpu", "--use-pytorch-cross-attention"]
    return [
        sys.executable,
        str(comfyui / "main.py"),
        "--listen",
        "127.0.0.1",
        "--port",
        str(port),
        "--disable-api-nodes",
        "--database-url",
        "sqlite:///:memory:",
        *device,
        *arguments,
    ]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process for the length of this context, and no longer: SIGTERM ends it as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    process = None
    try:
        process = subprocess.Popen(command, **options)
        yield process
    finally:
        if process:
            process.terminate()
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            finally:  # also when a second Ctrl-C comes meanwhile
                process.kill()
                process.wait()
        signal.signal(signal.SIGTERM, before)


class Lost(RuntimeError):
    """The server cannot be reached, or has ended."""


class Failed(RuntimeError):
    """The server could not run the graph this time."""


class Refused(RuntimeError):
    """The graph cannot run on this server."""


class Server:
    """A running ComfyUI.

    Parameters
    ----------
    address : str
        ``http://127.0.0.1:port``, say.
    log : Path, optional
        What it prints.
    patience : float, optional
        Seconds that ``draw`` waits for a picture.
    """

    def __init__(
        self, address: str, log: Path | None = None, patience: float | None = None
    ) -> None:
        self.address = (address if "://" in address else f"http://{address}").rstrip("/")
        self.log, self.patience = log, patience
        # No proxy leads to this machine itself.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _read(self, path: str) -> bytes:
        with self._opener.open(self.address + path, timeout=TIMEOUT) as reply:
            return reply.read()

    def get(self, path: str) -> Any:
        """The JSON at a path of the server."""
        return json.loads(self._read(path))

    def picture(self, image: dict[str, str]) -> bytes:
        """The file of an output image."""
        return self._read(_view(image))

    def failure(self, what: str) -> Lost:
        """An error that ends with the end of the log."""
        if not self.log:
            return Lost(what)
        return Lost(f"{what}:\n{self.log.read_text('utf-8', 'replace')[-3000:]}")

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
        Lost, Failed, Refused
            If the server ends, a node fails, or the server refuses the graph; with its reason.
        """
        with self._reached():
            return asyncio.run(self._run(graph, on_progress))

    async def check(self) -> dict[str, Any]:
        """What it says of itself; `Lost` if it does not answer."""
        with self._reached():
            return json.loads(await self._fetch("/system_stats"))

    async def draw(self, graph: dict[str, Any], node: str) -> bytes:
        """The file of the one picture that a node saves or shows; raises as `run`."""
        try:
            return await asyncio.wait_for(self._draw(graph, node), self.patience)
        except asyncio.TimeoutError:
            raise Lost(f"no picture in {self.patience / 60:g} minutes") from None

    async def _draw(self, graph: dict[str, Any], node: str) -> bytes:
        with self._reached():
            images = (await self._run(graph)).get(node, {}).get("images", [])
            if len(images) != 1:
                raise Refused(
                    f"Node {node} gives {len(images)} pictures in place of one: set the batch "
                    f"size to 1."
                )
            return await self._fetch(_view(images[0]))

    async def _fetch(self, path: str) -> bytes:
        async with _session() as session, session.get(self.address + path) as reply:
            reply.raise_for_status()
            return await reply.read()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, KeyError) as error:
            why = str(error) or type(error).__name__
            raise self.failure(f"Lost ComfyUI ({why})") from error

    async def _run(
        self,
        graph: dict[str, Any],
        on_progress: Callable[[str, int, int], None] = lambda node, step, steps: None,
    ) -> dict[str, Any]:
        client = uuid.uuid4().hex
        async with (
            _session() as session,
            session.ws_connect(
                f"{self.address}/ws?clientId={client}", max_msg_size=0, heartbeat=TIMEOUT
            ) as ws,
        ):
            body = {"prompt": graph, "client_id": client}
            async with session.post(f"{self.address}/prompt", json=body) as reply:
                if reply.status != 200:
                    kind = Refused if reply.status < 500 else Failed
                    raise kind(f"HTTP {reply.status}: {(await reply.text())[:2000]}")
                prompt = (await reply.json())["prompt_id"]
            try:
                await self._follow(ws, prompt, on_progress)
            except asyncio.CancelledError:  # nobody waits for it now
                soon = aiohttp.ClientTimeout(5)
                with suppress(aiohttp.ClientError, asyncio.TimeoutError):
                    for path, what in (
                        ("queue", {"delete": [prompt]}),
                        ("interrupt", {"prompt_id": prompt}),
                    ):
                        await session.post(f"{self.address}/{path}", json=what, timeout=soon)
                raise
            async with session.get(f"{self.address}/history/{prompt}") as reply:
                return (await reply.json())[prompt]["outputs"]

    async def _follow(
        self,
        ws: aiohttp.ClientWebSocketResponse,
        prompt: str,
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        """Come back when a prompt is done."""
        async for event in ws:
            if event.type is not aiohttp.WSMsgType.TEXT:
                continue  # preview pictures
            message = json.loads(event.data)
            data = message.get("data", {})
            if data.get("prompt_id") != prompt:
                continue
            if message["type"] == "progress":
                on_progress(data["node"], data["value"], data["max"])
            elif message["type"] == "execution_error":
                raise Failed(f"{data['node_type']}: {data['exception_message'].strip()}")
            elif message["type"] == "execution_interrupted":
                raise Failed("interrupted on the server")
            elif message["type"] == "executing" and data["node"] is None:
                return  # sent once the outputs are in the history
        raise self.failure("ComfyUI ended before it was done")


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT))


def _view(image: dict[str, str]) -> str:
    query = {key: image[key] for key in ("filename", "subfolder", "type")}
    return f"/view?{urllib.parse.urlencode(query)}"


@contextmanager
def serving(base: Path, log: Path, models: Models = ()) -> Iterator[Server]:
    """A server for the length of this context; its output goes to the log file.

    Raises
    ------
    RuntimeError
        If it does not come up; with the end of its log.
    """
    comfyui = Path(os.environ["COMFYUI_PATH"])
    port = free_port()
    server = Server(f"http://127.0.0.1:{port}", log)
    arguments = [*prepare_base(base, comfyui, models), "--disable-auto-launch"]
    with (
        log.open("wb") as output,
        running(
            command(comfyui, port, arguments), stdout=output, stderr=subprocess.STDOUT, cwd=comfyui
        ) as process,
    ):
        deadline = time.monotonic() + START_LIMIT
        while True:
            with suppress(OSError):
                server.get("/system_stats")
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise server.failure("ComfyUI did not start")
            time.sleep(0.2)
        yield server


def main() -> None:
    """Keep a server open until Ctrl-C, on the demo's first workflow; arguments are ComfyUI's."""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--port", type=int, default=8188)
    asked.add_argument("--disable-auto-launch", action="store_true")
    options, others = asked.parse_known_args()
    comfyui = Path(os.environ["COMFYUI_PATH"])
    base = ROOT / ".dev" / "base"
    arguments = [*prepare_base(base, comfyui), "--disable-auto-launch", *others]
    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.exists():
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(SETTINGS))
    server = Server(f"http://127.0.0.1:{options.port}")
    page = f"{server.address}/?{urllib.parse.urlencode(OPENED)}"
    try:
        with running(command(comfyui, options.port, arguments), cwd=comfyui) as process:
            while process.poll() is None:
                with suppress(OSError):
                    server.get("/system_stats")
                    print(f"The demo's workflow is at {page}", flush=True)
                    if not options.disable_auto_launch:
                        webbrowser.open(page)
                    break
                time.sleep(0.2)
            sys.exit(process.wait())
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
