"""ComfyUI's page in a headless Chromium."""

import io
import json
import os
import shutil
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

from PIL import Image
from playwright.sync_api import sync_playwright

from support.workflow import ROOT, TITLE

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ["--disable-gpu", "--disable-quic", "--disable-sync"]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
# Errors of the page itself:
ABSENT = ("/user.css", "/api/userdata")  # what a new user has not got
EARLY = "ComfyApp graph accessed before initialization"  # as it starts
OUTSIDE = "Content Security Policy"  # it may not look for models in the net
# Each node has as many pictures as it put out, and a widget with its text; spaces may be others.
# In Nodes 2.0 it has one of them at a time, in its element.
SHOWN = r"""outputs => Object.entries(outputs).every(([id, { images = [], text = [] }]) => {
    const node = app.graph.getNodeById(id), plain = text => String(text).replace(/\s+/g, " ");
    const shown = (node.widgets ?? []).map(widget => plain(widget.value));
    const element = document.querySelector(`[data-node-id="${id}"]`);
    const pictures = element ? [...element.querySelectorAll("img")] : node.imgs ?? [];
    return pictures.length >= (element ? Math.min(images.length, 1) : images.length)
        && pictures.every(image => image.complete && image.naturalWidth)
        && text.every(line => shown.includes(plain(line)));
})"""
STORES = """() => [...document.querySelectorAll("*")].find(e => e.__vue_app__).__vue_app__
    .config.globalProperties.$pinia._s"""
# Node -> left, top, right, bottom with its title; in Nodes 2.0 those of its element in the page.
BOXES = """() => Object.fromEntries(app.graph.nodes.map(node => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`);
    const { scale, offset } = app.canvas.ds, area = app.canvas.canvas.getBoundingClientRect();
    const { left, top, right, bottom } = element?.getBoundingClientRect() ?? {};
    const [x, y, width, height] = node.boundingRect;
    const name = `${node.type} ${node.id}`;
    return element
        ? [name, [[left, top], [right, bottom]].flatMap(([x, y]) =>
            [(x - area.left) / scale - offset[0], (y - area.top) / scale - offset[1]])]
        : [name, [x, y, x + width, y + height]];
}))"""
SCREENSHOTS = ROOT / ".dev" / "screenshots"
SMALL = {"width": 1280, "height": 720}  # a large page is slow where there is no graphics card
LEFT, TOP, RIGHT = 80, 110, 450  # the page's own bars, and what it says at the right of a run


def chromium():
    """The browser's path, from CHROMIUM or its usual names; None if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A server's page, cut off from the rest of the world.

    Attributes
    ----------
    errors : list of str
        The console's errors since the last workflow was opened.
    nodes_2 : bool
        Whether nodes are elements of the page, not drawn by LiteGraph.
    """

    def __init__(self, page, server, nodes_2):
        self._page, self._server, self.nodes_2 = page, server, nodes_2
        self.errors = []
        page.set_default_timeout(60_000)
        page.on("console", self._listen)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.route("**/*", self._stay_home)
        settings = SETTINGS | {"Comfy.VueNodes.Enabled": nodes_2}
        page.request.post(f"{server.address}/settings", data=settings)
        page.goto(server.address)
        page.wait_for_function(
            "!!(window.app?.graph && window.LiteGraph?.registered_node_types.TACAPatchModel)"
        )

    def _listen(self, message):
        text, url = message.text, message.location["url"]
        foreign = text == EARLY or OUTSIDE in text or urlsplit(url).path.startswith(ABSENT)
        if message.type == "error" and not foreign:
            self.errors.append(f"{text} ({url})")

    def _stay_home(self, route):
        url = route.request.url
        outside = url.startswith("http") and not url.startswith(self._server.address)
        route.abort() if outside else route.continue_()

    def open(self, workflow):
        """Open a workflow as the menu does, with the models that are there by now."""
        self.errors.clear()
        self._page.evaluate(
            "async workflow => {"
            " await app.refreshComboInNodes(); await app.loadGraphData(workflow) }",
            workflow,
        )
        self._page.wait_for_timeout(500)  # it looks for missing models and nodes meanwhile

    def boxes(self):
        """Where each node is, by type and id: left, top, right and bottom, with its title."""
        self._page.wait_for_function(
            "seen => document.querySelectorAll('[data-node-id]').length === seen",
            arg=len(self.saved()["nodes"]) if self.nodes_2 else 0,
        )
        return self._page.evaluate(BOXES)

    def missing(self, offered=()):
        """The models that it finds missing and where it offers to download them from.

        Once it offers those with these names and no others: it looks for them in its own time.
        """
        found = f"() => ({STORES})().get('missingModel').missingModelCandidates ?? []"
        self._page.wait_for_function(
            f"names => {{ const found = ({found})().filter(model => model.url).map(m => m.name);"
            " return names.every(n => found.includes(n)) && found.every(n => names.includes(n)) }",
            arg=list(offered),
        )
        return {(m["name"], m.get("url"), m.get("directory")) for m in self._page.evaluate(found)}

    def marked(self):
        """Types of the nodes that the page does not know or frames in red."""
        return self._page.evaluate(
            "() => app.graph.nodes"
            ".filter(node => node.has_errors || !LiteGraph.registered_node_types[node.type])"
            ".map(node => node.type)"
        )

    def api_form(self):
        """What the Run button sends: node id -> class_type and inputs."""
        return self._page.evaluate("async () => (await app.graphToPrompt()).output")

    def saved(self):
        """What the page saves, less where the user looks and in which language."""
        workflow = json.loads(self._page.evaluate("() => JSON.stringify(app.graph.serialize())"))
        workflow["extra"].pop("ds", None)
        for node in workflow["nodes"]:
            for socket in (*node.get("inputs", []), *node.get("outputs", [])):
                socket.pop("localized_name", None)
        return workflow

    def shorten(self, values):
        """Set a widget of every node of a type: type -> name and value."""
        self._page.evaluate(
            "values => { for (const node of app.graph.nodes) if (node.type in values)"
            " for (const widget of node.widgets) if (widget.name === values[node.type][0])"
            " widget.value = values[node.type][1]; }",
            values,
        )

    def run(self, limit=180):
        """Press the Run button and wait; the run's entry in the history.

        What a node put out that another expanded to is under that one, where the page shows it.
        What came from the cache may have been made under another workflow's id.
        """
        before = self._server.get("/history").keys()
        refused = self._page.evaluate(
            "async () => { await app.queuePrompt(0, 1); return app.lastNodeErrors }"
        )
        if refused:
            raise RuntimeError(json.dumps(refused, indent=1))
        deadline = time.monotonic() + limit
        while not (new := self._server.get("/history").keys() - before):
            if time.monotonic() > deadline:
                raise self._server.failure("The run did not end")
            self._page.wait_for_timeout(200)
        entry = self._server.get("/history")[new.pop()]
        meta, graph = entry["meta"], entry["prompt"][2]
        shown_in = {node: meta[node]["display_node"] for node in meta.keys() - graph.keys()}
        entry["outputs"] = {shown_in.get(n, n): each for n, each in entry["outputs"].items()}
        return entry

    def wait_for(self, outputs):
        """Wait until nodes show what they put out: node id -> ``images``, ``text``."""
        self._page.wait_for_function(SHOWN, arg=outputs)

    def text_under(self, node, part):
        """The text that a node shows below its widgets, once it has this part."""
        text = "node => app.graph.getNodeById(node).widgets.find(w => w.type === 'progressText')"
        self._page.wait_for_function(
            f"([node, part]) => ({text})(node)?.value?.includes(part)", arg=[node, part]
        )
        return self._page.evaluate(f"node => ({text})(node).value", node)

    def found(self, text):
        """The types of the nodes that the search finds, best first."""
        search = "stores.get('nodeDef').nodeSearchService.searchNode(text).map(n => n.name)"
        return self._page.evaluate(
            f"text => {{ const stores = ({STORES})(); return {search} }}", text
        )

    def draw(self):
        """The whole graph as a picture."""
        workflow = self.saved()
        boxes = [group["bounding"] for group in workflow["groups"]]
        for (x, y), (w, h) in ((node["pos"], node["size"]) for node in workflow["nodes"]):
            boxes.append((x, y - TITLE, w, h + TITLE))
        left, top = (min(box[i] for box in boxes) - 20 for i in (0, 1))
        right, bottom = (max(box[i] + box[i + 2] for box in boxes) + 20 for i in (0, 1))
        clip = {"x": LEFT, "y": TOP, "width": right - left, "height": bottom - top}
        self._page.set_viewport_size(
            {"width": int(clip["width"]) + LEFT + RIGHT, "height": int(clip["height"]) + 2 * TOP}
        )
        self._page.evaluate(
            "offset => { app.canvas.deselectAll(); app.canvas.ds.scale = 1;"
            " app.canvas.ds.offset = offset; app.canvas.setDirty(true, true) }",
            [LEFT - left, TOP - top],
        )
        self._page.wait_for_timeout(700)
        picture = self._page.screenshot(clip=clip)
        self._page.set_viewport_size(SMALL)
        return Image.open(io.BytesIO(picture)).convert("RGB")


@contextmanager
def browsing(server, nodes_2=False):
    """A page of this server for the length of this context, drawn by LiteGraph or as Nodes 2.0."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            yield Page(browser.new_page(viewport=SMALL), server, nodes_2)
        finally:
            browser.close()
