"""A ComfyUI server as a painter: a graph in, a PNG out, over HTTP."""

from __future__ import annotations

import threading
import time
from typing import Any
from urllib.parse import urlsplit

import requests

_TIMEOUT = 60  # seconds for one request, not for a picture
_LOOK = 5.0  # seconds between looks at the queue


class Lost(Exception):
    """The server cannot be reached, or has lost the picture: another may draw it."""


class Hung(Lost):
    """The server answers, and does not get on with the picture."""


class Failed(Exception):
    """A node failed; perhaps not the next time."""


class Refused(Exception):
    """The workflow cannot run on this server."""


class Server:
    """A running ComfyUI.

    Parameters
    ----------
    url : str
        For example ``http://127.0.0.1:8188``.
    patience : float
        Seconds after which a picture counts as lost.
    """

    def __init__(self, url: str, patience: float = 1800.0) -> None:
        self.name = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
        self._patience = patience
        self._closed = threading.Event()
        self._of_thread = threading.local()

    def close(self) -> None:
        """Give up what is being drawn."""
        self._closed.set()

    def check(self) -> Any:
        """Ask whether it is there, `Lost` if not; what it says of itself."""
        return self._json("GET", "/system_stats")

    def draw(self, graph: dict[str, Any], output: str) -> bytes:
        """Draw one picture.

        Parameters
        ----------
        graph : dict
            In API form.
        output : str
            The node whose picture is taken.

        Returns
        -------
        bytes
            The file.

        Raises
        ------
        Lost, Failed, Refused
        """
        number = self._json("POST", "/prompt", json={"prompt": graph})["prompt_id"]
        try:
            entry = self._wait(number)
        except BaseException:
            self._cancel(number)
            raise
        if entry["status"]["status_str"] != "success":
            raise Failed(_reason(entry["status"]["messages"]))
        images = entry["outputs"].get(output, {}).get("images", [])
        if len(images) != 1:
            raise Refused(
                f"Node {output} draws {len(images)} pictures; one is wanted: set the "
                f"batch size to 1."
            )
        query = {key: images[0][key] for key in ("filename", "subfolder", "type")}
        try:
            return self._ask("GET", "/view", params=query).content
        except Refused as error:
            raise Failed(f"the picture is gone: {error}") from error

    def _wait(self, number: str) -> dict[str, Any]:
        """The history's entry of a picture, once it has one."""
        started = looked = time.monotonic()
        pause = 0.02
        while not self._closed.wait(pause):
            pause = min(1.5 * pause, 1.0)
            in_queue = True
            if time.monotonic() - looked > _LOOK:  # a server that was restarted has forgotten
                queue = self._json("GET", "/queue")
                in_queue = any(number == item[1] for part in queue.values() for item in part)
                looked = time.monotonic()
            history = self._json("GET", f"/history/{number}")
            if number in history:
                return history[number]
            if not in_queue:
                raise Lost("it was restarted")
            if time.monotonic() - started > self._patience:
                raise Hung(f"no picture in {self._patience / 60:g} minutes")
        raise Lost("stopped")

    def _cancel(self, number: str) -> None:
        try:
            self._ask("POST", "/queue", json={"delete": [number]}, timeout=5)
            self._ask("POST", "/interrupt", json={"prompt_id": number}, timeout=5)
        except (Lost, Refused):
            pass

    def _json(self, method: str, path: str, **options: Any) -> Any:
        try:
            return self._ask(method, path, **options).json()
        except requests.JSONDecodeError as error:
            raise Lost("it answers as no ComfyUI does") from error

    def _session(self) -> requests.Session:
        """A connection that is kept open; each thread has its own."""
        try:
            return self._of_thread.session
        except AttributeError:
            session = self._of_thread.session = requests.Session()
            # No proxy leads to this machine itself.
            session.trust_env = urlsplit(self.name).hostname not in ("127.0.0.1", "localhost")
            return session

    def _ask(
        self, method: str, path: str, timeout: float | None = None, **options: Any
    ) -> requests.Response:
        timeout = min(timeout or _TIMEOUT, _TIMEOUT)
        try:
            reply = self._session().request(method, self.name + path, timeout=timeout, **options)
        except requests.RequestException as error:
            raise Lost(type(error).__name__) from error
        if reply.status_code >= 500:
            raise Lost(f"HTTP {reply.status_code}")
        if not reply.ok:
            raise Refused(f"HTTP {reply.status_code} at {path}: {reply.text[:2000]}")
        return reply


def _reason(messages: list[Any]) -> str:
    for kind, about in messages:
        if kind == "execution_error":
            return f"{about['node_type']}: {about['exception_message'].strip()}"
    return "interrupted on the server"
