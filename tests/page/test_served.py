"""Help pages, translations and the blueprint, as ComfyUI's page has them."""

import re
import subprocess
import sys
import time

import pytest
from comfy_server import Server, free_port, running, serving

from support.page import SCREENSHOTS, STORES, browsing, chromium
from support.workflow import ROOT, USERS, blueprint_of, place_files, read

# Its model, CLIP and VAE from loaders, its picture into a preview; all with the page's own calls.
CONNECT = """blueprint => {
    app.graph.clear();
    app.canvas._deserializeItems(
        {nodes: blueprint.nodes, subgraphs: blueprint.definitions.subgraphs}, {position: [350, 0]});
    const inner = app.graph.nodes[0];
    const add = (type, x, y, values) => {
        const node = LiteGraph.createNode(type);
        node.pos = [x, y];
        app.graph.add(node);
        values.forEach((value, i) => node.widgets[i].value = value);
        return node;
    };
    const to = (node, name) => node.connect(0, inner, inner.inputs.findIndex(i => i.name === name));
    to(add("UNETLoader", 0, 0, ["flux1-dev.safetensors"]), "model");
    to(add("DualCLIPLoader", 0, 150, ["t5xxl_fp16.safetensors", "clip_l.safetensors", "flux"]),
       "clip");
    to(add("VAELoader", 0, 350, ["ae.safetensors"]), "vae");
    inner.connect(0, add("PreviewImage", 760, 0, []), 0);
}"""
HELP = f"""type => {{
    const stores = ({STORES})();
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    node.pos = [100, 100];
    app.graph.add(node);
    app.canvas.selectItems([node]);
    stores.get("rightSidePanel").openPanel("info");
}}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    models = place_files(
        folder / "base", [read(ROOT / "workflows/01_FLUX.1-dev_with_and_without_TACA.json")]
    )
    with serving(folder / "base", folder / "log", models) as running:
        yield running


in_the_page = pytest.mark.skipif(
    not chromium(), reason="no Chromium: install one, or name it in the variable CHROMIUM"
)


@pytest.fixture
def page(server):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with browsing(server) as page:
        yield page


@pytest.mark.slow
@in_the_page
def test_blueprint_in_the_page(server, page):
    """Dropped from the library and connected, it sends what its widgets say."""
    number, _ = blueprint_of(server)
    page._page.wait_for_function(
        f"number => ({STORES})().get('subgraph')?.subgraphBlueprints"
        ".some(b => b.name.endsWith(number) && b.category === 'Subgraph Blueprints/TACA')",
        arg=number,
    )
    blueprint = page._page.evaluate(
        f"name => ({STORES})().get('subgraph').getBlueprint(name)", f"SubgraphBlueprint.{number}"
    )
    page._page.evaluate(CONNECT, blueprint)
    assert page.marked() == []
    values = {
        "prompt": "a cup",
        "negative_prompt": "fog",
        "gamma": 1.3,
        "timestep_threshold": 950,
        "width": 512,
        "height": 768,
        "seed": 7,
        "steps": 28,
        "cfg": 7,
        "scheduler": "normal",
    }
    assert page._page.evaluate(
        "values => app.graph.nodes[0].widgets.map(widget => {"
        " widget.value = values[widget.name]; return widget.name })",
        values,
    ) == list(values)
    sent = {
        node["class_type"]: node["inputs"]
        for node in page.api_form().values()
        if node["class_type"] != "CLIPTextEncode"
    }
    texts = [
        node["inputs"]["text"]
        for node in page.api_form().values()
        if node["class_type"] == "CLIPTextEncode"
    ]
    assert texts == ["a cup", "fog"]
    taca, sampler, size = (sent[t] for t in ("TACAPatchModel", "KSampler", "EmptySD3LatentImage"))
    assert [taca["gamma"], taca["timestep_threshold"]] == [1.3, 950]
    assert [sampler[k] for k in ("seed", "steps", "cfg", "scheduler")] == [7, 28, 7, "normal"]
    assert (size["width"], size["height"]) == (512, 768)
    page.draw().save(SCREENSHOTS / "blueprint.png")
    assert page.errors == []


@pytest.mark.slow
@in_the_page
@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_in_the_page(server, page, pack, language):
    """The panel shows the page with its pictures; the node speaks the page's language."""
    browser = page._page
    browser.request.post(f"{server.address}/settings", data={"Comfy.Locale": language})
    browser.goto(server.address)
    browser.wait_for_function(
        f"() => window.app?.graph && ({STORES})().get('workflow')?.activeWorkflow"
    )
    browser.wait_for_timeout(1500)  # the panels come last
    browser.set_viewport_size({"width": 1500, "height": 1000})
    texts = read(ROOT / "locales" / language / "nodeDefs.json")
    page.errors.clear()
    for name in pack:
        browser.evaluate(HELP, name)
        title = texts[name]["display_name"]
        assert browser.evaluate("() => app.graph.nodes[0].title") == title
        browser.wait_for_function(
            "title => document.querySelector('.node-help-content h1')?.innerText === title",
            arg=title,
        )
        browser.wait_for_function(
            "() => [...document.querySelectorAll('.node-help-content img')]"
            ".every(picture => picture.naturalWidth)"
        )
        names = browser.evaluate(
            "() => app.graph.nodes[0].widgets?.map(w => [w.name.replace('.', '_'), w.label])"
        )
        for widget, label in names or []:
            assert label == texts[name]["inputs"][widget]["name"]
        if name == "TACASchedule":
            browser.screenshot(path=SCREENSHOTS / f"help_{language}.png")
    browser.request.post(f"{server.address}/settings", data={"Comfy.Locale": "en"})
    # English has one page for all languages but Chinese; the page asks for its own first.
    assert [e for e in page.errors if "/en.md" not in e] == []


@pytest.mark.slow
@in_the_page
def test_serve_opens_the_demos_workflow(tmp_path):
    """``dev.py serve``: nothing red in the log, nor in the page at the address that it opens."""
    port = free_port()
    script = ROOT / "hosting/comfy_server.py"
    whole = [sys.executable, str(script), "--disable-auto-launch", "--port", str(port)]
    log = tmp_path / "log"
    with log.open("wb") as output, running(whole, stdout=output, stderr=subprocess.STDOUT) as serve:
        while not (found := re.search(r"workflow is at (http://[^/]+)(\S+)", log.read_text())):
            assert serve.poll() is None, log.read_text()
            time.sleep(0.2)
        with browsing(Server(found[1]), nodes_2=True) as page:
            page._page.goto(found[1] + found[2])
            demo = read(ROOT / "demo/workflows/01_With_and_without_TACA.json")
            page._page.wait_for_function(
                "seen => window.app?.graph?.nodes.length === seen", arg=len(demo["nodes"])
            )
            assert page.marked() == []
            assert page.missing() == set()
            page._page.wait_for_timeout(1500)
            page._page.screenshot(path=SCREENSHOTS / "serve.png")
    assert "ERROR" not in log.read_text()


@pytest.mark.slow
@in_the_page
def test_page_offers_the_models(tmp_path):
    """On a server without any, each that is published with its folder and address."""
    with serving(tmp_path / "base", tmp_path / "log") as bare, browsing(bare) as page:
        for path in USERS:
            workflow = read(path)
            page.open(workflow)
            wanted = {
                (model["name"], model["url"], model["directory"])
                for node in workflow["nodes"]
                for model in node["properties"].get("models", ())
            }
            offered = page.missing([name for name, *_ in wanted])
            assert {each for each in offered if each[1]} == wanted, path.stem
            assert {name for name, url, _ in offered if not url} <= {"mscoco_uvit_small.pth"}
