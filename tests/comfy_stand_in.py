"""A stand-in for a ComfyUI server: its HTTP protocol, and a small picture for each graph.

For what takes thousands of pictures, or a server that misbehaves. As a script:
``PORT FOLDER [FAULT]``.
"""

import hashlib
import io
import json
import sys
import threading
import time
import uuid
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def asked_for(graph):
    """What decides a picture."""
    return (
        graph["positive"]["inputs"]["text"],
        graph["sample"]["inputs"]["seed"],
        float(graph["taca"]["inputs"]["gamma"]),
    )


def colour_of(prompt, seed, gamma):
    """The stand-in's picture has this colour all over."""
    return tuple(hashlib.sha256(f"{prompt}|{seed}|{float(gamma)}".encode()).digest()[:3])


def png_of(graph, size=8):
    note = PngInfo()
    note.add_text("prompt", json.dumps(graph))
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour_of(*asked_for(graph))).save(file, "PNG", pnginfo=note)
    return file.getvalue()


class StandIn:
    """A server in a thread of this process.

    Attributes
    ----------
    fault : callable
        Graph -> None, or what goes wrong with it: a word of `_run` and `_reply`.
    asked : Counter
        How often each picture was drawn.
    """

    def __init__(self, fault=lambda graph: None, port=0):
        self.fault, self.asked = fault, Counter()
        self._history, self._queue, self._pictures = {}, {}, {}
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self):
                stand_in._reply(self, None)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                stand_in._reply(self, json.loads(body))

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    def _run(self, number, graph, fault):
        if fault == "forget":
            return
        if fault == "wait":
            self._queue[number] = graph
            return
        self.asked[asked_for(graph)] += 1
        status = {"status_str": "success", "messages": []}
        if fault == "error":
            about = {"node_type": "KSampler", "exception_message": "no memory\n"}
            status = {"status_str": "error", "messages": [["execution_error", about]]}
        other = json.loads(json.dumps(graph))
        other["sample"]["inputs"]["seed"] += fault == "other"
        picture = png_of(other, 16 if fault == "size" else 8)
        self._pictures[number] = picture[:-20] if fault == "cut" else picture
        image = {"filename": number, "subfolder": "", "type": "output"}
        images = [image] * (2 if fault == "batch" else 1)
        self._history[number] = {"outputs": {"save": {"images": images}}, "status": status}

    def _reply(self, handler, body):
        url = urlsplit(handler.path)
        code, reply = 200, b"{}"
        if url.path == "/prompt":
            fault = self.fault(body["prompt"])
            if fault in ("refuse", "500"):
                code, reply = (
                    (400, b'{"error": "no such node"}') if fault == "refuse" else (500, b"")
                )
            else:
                number = str(uuid.uuid4())
                self._run(number, body["prompt"], fault)
                reply = json.dumps({"prompt_id": number}).encode()
        elif url.path.startswith("/history/"):
            number = url.path.rpartition("/")[2]
            known = {number: self._history[number]} if number in self._history else {}
            reply = json.dumps(known).encode()
        elif url.path == "/queue":
            running = [[0, number, graph] for number, graph in self._queue.items()]
            reply = json.dumps({"queue_running": running, "queue_pending": []}).encode()
        elif url.path == "/system_stats":
            reply = json.dumps({"system": {"argv": sys.argv}}).encode()
        elif url.path == "/view":
            reply = self._pictures[parse_qs(url.query)["filename"][0]]
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(reply)))
        handler.end_headers()
        handler.wfile.write(reply)


if __name__ == "__main__":
    fault = (sys.argv[3:] or [None])[0]
    with StandIn(lambda graph: fault, int(sys.argv[1])):
        while True:
            time.sleep(60)
