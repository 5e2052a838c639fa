"""Draw the pictures of the help pages: ``python dev.py run assets/help.py``.

They are what the nodes show on the demo's model, and ComfyUI's own page (a Chromium is needed).
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "web" / "docs" / "images"
sys.path += [str(ROOT / "tests"), str(ROOT / "hosting")]

from comfy_server import serving  # noqa: E402

from support.page import browsing  # noqa: E402
from support.workflow import api_form, place_files, read  # noqa: E402

LOADER = ("UNETLoader", {"unet_name": "flux1-dev.safetensors"})
TACA = ("TACAPatchModel", {})
LORA = ("LoadTACALoRA", {"lora_name": "flux-dev-lora-rank-64.safetensors"})
SAMPLER = ("KSampler", {"steps": 30, "cfg": 1})
# Nodes from left to right, with some of their values; each gives its model to the next.
CHAINS = {
    "patch": [LOADER, TACA, SAMPLER],
    "lora": [LOADER, TACA, LORA, SAMPLER],
    "training": [
        LOADER,
        TACA,
        ("TACATrainingWindow", {}),
        ("TrainLoraNode", {"grad_accumulation_steps": 4, "learning_rate": 1e-4, "rank": 16}),
    ],
}
SPREAD = """chain => {
    app.graph.clear();
    let before = null, x = 0;
    for (const [type, values] of chain) {
        const node = LiteGraph.createNode(type);
        node.pos = [x, 0];
        node.size[0] = Math.max(node.size[0], 240);
        for (const widget of node.widgets ?? [])
            if (widget.name in values) widget.value = values[widget.name];
        app.graph.add(node);
        if (before) before.connect(0, node, node.inputs.findIndex(i => i.name === "model"));
        x += node.size[0] + 50;
        before = node;
    }
}"""


def save(picture: Image.Image, name: str, width: int) -> None:
    """Save a picture, at most this wide."""
    if picture.width > width:
        size = (width, round(width * picture.height / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    if name.endswith(".png"):  # plots have few colours
        picture.quantize(64, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
    else:
        picture.save(IMAGES / name, quality=88)


def demo(server, info, name: str, **changes: dict) -> dict:  # noqa: ANN001
    """Run a workflow of the demo with other values; its outputs by node type."""
    graph = api_form(read(ROOT / f"demo/workflows/{name}.json"), info)
    for node in graph.values():
        if node["class_type"] in changes:
            kept = {k: v for k, v in node["inputs"].items() if not k.startswith("window")}
            node["inputs"] = kept | changes[node["class_type"]]
    outputs = server.run(graph)
    return {
        graph[node]["class_type"]: output["images"]
        for node, output in outputs.items()
        if "images" in output
    }


def main() -> None:
    """Start a server that offers FLUX.1-dev by name, and draw."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        models = place_files(base, [read(ROOT / "workflows/16_FLUX.1-dev_with_a_LoRA.json")])
        with serving(base, Path(folder, "log"), models) as server:
            draw(server)


def draw(server) -> None:  # noqa: ANN001
    """Draw them all with this server."""
    info = server.get("/object_info")

    def picture(image: dict) -> Image.Image:
        return Image.open(io.BytesIO(server.picture(image))).convert("RGB")

    for name, window in (
        ("preview", {"window": "timestep", "window.timestep_threshold": 970.0}),
        (
            "schedule",
            {
                "window": "percent",
                "window.start_percent": 0.0,
                "window.end_percent": 0.2,
                "window.shape": "cosine",
            },
        ),
    ):
        shown = demo(server, info, "04_On_which_steps", TACASchedule={"gamma": 1.2, **window})
        save(picture(shown["TACASchedulePreview"][0]), f"{name}.png", 720)
    shares, heat_maps = demo(server, info, "05_Attention_report")["TACAAttentionReport"]
    save(picture(shares), "shares.png", 760)
    save(picture(heat_maps), "heat_maps.jpg", 900)
    save(
        picture(demo(server, info, "03_Sweep_over_gamma_and_window")["TACAContactSheet"][0]),
        "sheet.jpg",
        900,
    )
    with browsing(server) as page:
        for name, chain in CHAINS.items():
            page._page.evaluate(SPREAD, chain)
            page._page.wait_for_timeout(500)
            save(page.draw(), f"{name}.jpg", 1000)


if __name__ == "__main__":
    main()
