"""A stand-in for a ComfyUI server: its protocol, and a small picture for each graph.

For what takes thousands of pictures, or a server that misbehaves. As a script:
``PORT FOLDER [FAULT]``.
"""

import asyncio
import hashlib
import io
import json
import socket
import sys
import threading
import uuid
from collections import Counter

from aiohttp import web
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def graph_of_the_demo(steps=12):
    """The demo's model with TACA, in API form."""
    sampler = {"steps": steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
    sampler |= {"positive": ["positive", 0], "negative": ["negative", 0], "denoise": 1.0}
    unet = {"unet_name": "taca_demo_mmdit.safetensors", "weight_dtype": "default"}
    taca = {"model": ["model", 0], "gamma": 1.2, "timestep_threshold": 970.0}
    nodes = {
        "model": ("UNETLoader", unet),
        "taca": ("TACAPatchModel", taca),
        "positive": ("TACADemoTextEncode", {"text": ""}),
        "negative": ("TACADemoTextEncode", {"text": ""}),
        "latent": ("EmptySD3LatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "sample": ("KSampler", {"model": ["taca", 0], "latent_image": ["latent", 0], "seed": 0}),
        "decode": ("TACADemoDecode", {"samples": ["sample", 0], "upscale": 1}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "ComfyUI"}),
    }
    nodes["sample"][1].update(sampler)
    return {node: {"class_type": kind, "inputs": inputs} for node, (kind, inputs) in nodes.items()}


def changed(**nodes):
    """The demo's workflow with other inputs; ``None`` takes one away."""
    graph = graph_of_the_demo()
    for node, inputs in nodes.items():
        graph.setdefault(node, {"class_type": inputs.pop("class_type", ""), "inputs": {}})
        graph[node]["inputs"] |= inputs
        for name in [name for name, value in inputs.items() if value is None]:
            del graph[node]["inputs"][name]
    return graph


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


def png_of(graph, has_metadata=True):
    note = PngInfo()
    if has_metadata:
        note.add_text("prompt", json.dumps(graph))
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour_of(*asked_for(graph))).save(file, "PNG", pnginfo=note)
    return file.getvalue()


class StandIn:
    """A server in a thread of this process.

    Attributes
    ----------
    fault : callable
        Graph -> None, or what goes wrong with it: a word of `_prompt`.
    asked : Counter
        How often each picture was drawn.
    """

    def __init__(self, fault=lambda graph: None, port=0):
        self.fault, self.asked = fault, Counter()
        self._outputs, self._pictures, self._events = {}, {}, {}
        self._socket = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self):
        self._loop, self._end = asyncio.new_event_loop(), asyncio.Event()
        whole = self._loop.run_until_complete
        self._thread = threading.Thread(target=whole, args=(self.serve(self._end),), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def serve(self, end):
        app = web.Application()
        app.add_routes(
            [
                web.get("/ws", self._listen),
                web.post("/prompt", self._prompt),
                web.get("/history/{number}", self._history),
                web.get("/view", self._view),
                web.get("/system_stats", self._stats),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        await web.SockSite(runner, self._socket).start()
        await end.wait()
        for events in list(self._events.values()):
            await events.close()
        await runner.cleanup()

    async def _listen(self, request):
        events = self._events[request.query["clientId"]] = web.WebSocketResponse()
        await events.prepare(request)
        async for _ in events:
            pass
        return events

    async def _prompt(self, request):
        body = await request.json()
        graph, events = body["prompt"], self._events[body["client_id"]]
        fault = await asyncio.to_thread(self.fault, graph)
        if fault in ("refuse", "500"):
            return web.Response(status=400 if fault == "refuse" else 500, text="no such node")
        number = str(uuid.uuid4())
        if fault == "restart":
            asyncio.get_running_loop().call_soon(asyncio.ensure_future, events.close())
        elif fault != "wait":
            asyncio.ensure_future(self._draw(number, graph, events, fault))  # noqa: RUF006
        return web.json_response({"prompt_id": number})

    async def _draw(self, number, graph, events, fault):
        self.asked[asked_for(graph)] += 1
        if fault == "error":
            about = {"node_type": "KSampler", "exception_message": "no memory\n"}
            await self._tell(events, "execution_error", prompt_id=number, **about)
            return
        other = json.loads(json.dumps(graph))
        other["sample"]["inputs"]["seed"] += fault == "other"
        picture = png_of(other, has_metadata=fault != "bare")
        self._pictures[number] = picture[:-20] if fault == "cut" else picture
        image = {"filename": number, "subfolder": "", "type": "output"}
        self._outputs[number] = {"save": {"images": [image] * (2 if fault == "batch" else 1)}}
        await self._tell(events, "executing", prompt_id=number, node=None)

    async def _tell(self, events, kind, **data):
        if not events.closed:
            await events.send_str(json.dumps({"type": kind, "data": data}))

    async def _history(self, request):
        number = request.match_info["number"]
        return web.json_response({number: {"outputs": self._outputs[number]}})

    async def _view(self, request):
        return web.Response(body=self._pictures[request.query["filename"]])

    async def _stats(self, request):
        return web.json_response({"system": {"argv": sys.argv}})


if __name__ == "__main__":
    fault = (sys.argv[3:] or [None])[0]
    asyncio.run(StandIn(lambda graph: fault, int(sys.argv[1])).serve(asyncio.Event()))
