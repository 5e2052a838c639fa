"""The demo: one seed without and with TACA, on a real ComfyUI server (``python dev.py demo``).

Without arguments it draws with the demo's own small model. With ``--checkpoint`` it runs FLUX.1 or
SD3.5: give the text encoders and the VAE too, unless the checkpoint holds them.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from comfy_server import ROOT, Server, serving
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open

Graph = dict[str, Any]
WHAT = {"plain": "plain", "taca": "TACA"}
CFG = {"demo": 3.0, "FLUX.1": 1.0, "SD3.5": 7.0}


def node(class_type: str, **inputs: object) -> dict[str, Any]:
    """One node of a graph in API format."""
    return {"class_type": class_type, "inputs": inputs}


def demo_model(options: argparse.Namespace) -> Graph:
    """Loaders, text and decoder of the demo's own model; ids "model", "positive", "decode"."""
    return {
        "model": node(
            "UNETLoader", unet_name="taca_demo_mmdit.safetensors", weight_dtype="default"
        ),
        "positive": node("TACADemoTextEncode", text=options.prompt),
        "negative": node("TACADemoTextEncode", text=""),
        "latent": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "decode": node("TACADemoDecode", upscale=6),
    }


def own_model(options: argparse.Namespace) -> Graph:
    """The same ids for the user's FLUX or SD3.5."""
    clips = {f"clip_name{i + 1}": path.name for i, path in enumerate(options.text_encoder)}
    graph: Graph = {}
    if clips:
        graph["model"] = node("UNETLoader", unet_name=options.checkpoint.name,
                              weight_dtype="default")  # fmt: skip
        loader = {1: "CLIPLoader", 2: "DualCLIPLoader", 3: "TripleCLIPLoader"}[len(clips)]
        kind = {"type": "flux" if options.family == "FLUX.1" else "sd3"} if len(clips) < 3 else {}
        if len(clips) == 1:
            clips = {"clip_name": clips["clip_name1"]}
        graph["clip"], clip = node(loader, **clips, **kind), ["clip", 0]
        graph["vae"], vae = node("VAELoader", vae_name=options.vae.name), ["vae", 0]
    else:
        graph["model"] = node("CheckpointLoaderSimple", ckpt_name=options.checkpoint.name)
        clip, vae = ["model", 1], ["model", 2]
    return graph | {
        "positive": node("CLIPTextEncode", clip=clip, text=options.prompt),
        "negative": node("CLIPTextEncode", clip=clip, text=""),
        "latent": node("EmptySD3LatentImage", width=options.size, height=options.size,
                       batch_size=1),
        "decode": node("VAEDecode", vae=vae),
    }  # fmt: skip


def graph_of(options: argparse.Namespace) -> Graph:
    """The whole graph: the model's part, then a sampler, a decoder and a picture each way."""
    graph = own_model(options) if options.checkpoint else demo_model(options)
    decode = graph.pop("decode")
    positive = ["positive", 0]
    if options.family == "FLUX.1":
        graph["guidance"] = node("FluxGuidance", conditioning=positive, guidance=3.5)
        positive = ["guidance", 0]
    graph["taca_model"] = node("TACAPatchModel", model=["model", 0], gamma=options.gamma,
                               timestep_threshold=options.threshold)  # fmt: skip
    for name, model in (("plain", ["model", 0]), ("taca", ["taca_model", 0])):
        graph[f"{name}_sample"] = node(
            "KSampler", model=model, seed=options.seed, steps=options.steps, cfg=options.cfg,
            sampler_name="euler", scheduler="simple", positive=positive, negative=["negative", 0],
            latent_image=["latent", 0], denoise=1.0,
        )  # fmt: skip
        inputs = decode["inputs"] | {"samples": [f"{name}_sample", 0]}
        graph[f"{name}_image"] = node(decode["class_type"], **inputs)
        graph[name] = node("SaveImage", images=[f"{name}_image", 0], filename_prefix=name)
    graph["scheduler"] = node("BasicScheduler", model=["taca_model", 0], scheduler="simple",
                              steps=options.steps, denoise=1.0)  # fmt: skip
    graph["sigmas"] = node("PreviewAny", source=["scheduler", 0])
    return graph


def show_progress(graph: Graph, what: str, step: int, steps: int) -> None:
    """A bar on one line for the sampler that is running."""
    if what.endswith("_sample"):
        bar = "#" * (30 * step // steps)
        end = "\n" if step == steps else ""
        label = WHAT[what.removesuffix("_sample")]
        print(f"\r  {label:<6}[{bar:<30}] {step}/{steps}", end=end, flush=True)


def side_by_side(pictures: dict[str, Image.Image], title: str) -> Image.Image:
    """The pictures in a row, each under its label."""
    width, height = next(iter(pictures.values())).size
    sheet = Image.new("RGB", (len(pictures) * (width + 16) + 16, height + 76), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((16, 8), title, fill="black", font_size=18)
    for i, (label, picture) in enumerate(pictures.items()):
        left = 16 + i * (width + 16)
        draw.text((left, 36), label, fill="black", font_size=16)
        sheet.paste(picture, (left, 60))
    return sheet


def plot_gamma(path: Path, sigma: list[float], inside: int, options: argparse.Namespace) -> None:
    """Plot gamma and sigma over the steps, of which the first few are inside the window."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    gamma = [options.gamma if i < inside else 1.0 for i in range(len(sigma))]
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    steps = range(1, len(sigma) + 1)
    axis.step(steps, gamma, where="mid", color="tab:red", label="γ")
    axis.set(xlabel="step", ylabel="γ", title=f"γ = {options.gamma:g} at t ≥ {options.threshold:g}")
    other = axis.twinx()
    other.plot(steps, sigma, "o-", markersize=3, color="tab:gray", label="σ")
    other.set(ylabel="σ", ylim=(0, 1.05))
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def family_of(checkpoint: Path) -> tuple[str, bool]:
    """Which model a file holds, and whether as a whole checkpoint; from its weights' names.

    Raises
    ------
    ValueError
        If it is neither a FLUX.1 nor an SD3.5.
    """
    try:
        with safe_open(checkpoint, "np") as file:
            names = set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{checkpoint} is not a safetensors file ({error})") from error
    prefix = "model.diffusion_model."
    whole = any(name.startswith(prefix) for name in names)
    parts = {name.removeprefix(prefix).split(".")[0] for name in names}
    for part, family in (("double_blocks", "FLUX.1"), ("joint_blocks", "SD3.5")):
        if part in parts:
            return family, whole
    raise ValueError(f"{checkpoint} is neither a FLUX.1 nor an SD3.5")


def options_of(arguments: list[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default="a red circle left of a blue square")
    parser.add_argument("--gamma", type=float, default=1.2)
    parser.add_argument("--threshold", type=float, default=970.0, help="timestep, 0..1000")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cfg", type=float, help="default 3 (demo), 1 (FLUX.1), 7 (SD3.5)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="your FLUX.1 or SD3.5")
    parser.add_argument("--text-encoder", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--vae", type=Path, metavar="FILE")
    parser.add_argument("--size", type=int, default=1024, help="of your own model's picture")
    parser.add_argument("--out", type=Path, default=ROOT / ".dev" / "demo")
    options = parser.parse_args(arguments)
    files = [options.vae, *options.text_encoder]
    for file in filter(None, [options.checkpoint, *files]):
        if not file.is_file():
            parser.error(f"there is no file {file}")
    if not options.checkpoint and any(files):
        parser.error("--text-encoder and --vae are for --checkpoint")
    if any(files) and not all([*files, options.text_encoder]):
        parser.error("--text-encoder and --vae need each other")
    options.family = "demo"
    if options.checkpoint:
        try:
            options.family, whole = family_of(options.checkpoint)
        except ValueError as error:
            parser.error(str(error))
        count = len(options.text_encoder)
        if not whole and not count:
            parser.error(f"{options.checkpoint} holds no text encoders: give --text-encoder, --vae")
        if count not in ((0, 2) if options.family == "FLUX.1" else (0, 1, 2, 3)):
            takes = "two text encoders" if options.family == "FLUX.1" else "up to three"
            parser.error(f"{options.family} takes {takes}, not {count}")
    if options.cfg is None:
        options.cfg = CFG[options.family]
    return options


def models_of(options: argparse.Namespace) -> list[tuple[str, Path]]:
    """The folders of the user's own files, each with its kind."""
    kinds = [("diffusion_models", options.checkpoint), ("checkpoints", options.checkpoint)]
    kinds += [("text_encoders", file) for file in options.text_encoder]
    kinds += [("vae", options.vae)]
    return [(kind, file.resolve().parent) for kind, file in kinds if file]


def main() -> None:
    """Draw, and say where the pictures are."""
    options = options_of(sys.argv[1:])
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    graph = graph_of(options)
    log = out / "comfyui.log"
    print(f"Starting ComfyUI (its log: {log})", flush=True)
    with serving(ROOT / ".dev" / "base", log, models_of(options)) as server:
        print(f'Drawing "{options.prompt}", seed {options.seed}, without and with TACA')
        outputs = server.run(graph, lambda *progress: show_progress(graph, *progress))
        pictures = {}
        for name, label in (("plain", "plain"), ("taca", f"TACA, gamma {options.gamma:g}")):
            pictures[label] = open_picture(server, outputs[name]["images"][0])
    side_by_side(pictures, options.prompt).save(out / "side_by_side.png")
    plot_gamma(out / "gamma.png", *what_ran(outputs, log), options)
    (out / "graph.json").write_text(json.dumps(graph, indent=1))
    print(f"Pictures: {out / 'side_by_side.png'}\ngamma:    {out / 'gamma.png'}")


def what_ran(outputs: dict[str, Any], log: Path) -> tuple[list[float], int]:
    """The run's own sigmas, as core shows them (four decimals), and on how many TACA acted.

    The latter from TACA's line in the log: a rounded sigma could be on the wrong side of the
    threshold.
    """
    shown = re.findall(r"\d+\.\d*(?:e[-+]\d+)?", outputs["sigmas"]["text"][0])
    acted = re.findall(r"TACA: .* acts on (\d+) of \d+ steps", log.read_text("utf-8", "replace"))
    return [float(sigma) for sigma in shown[:-1]], int(acted[-1])


def open_picture(server: Server, image: dict[str, str]) -> Image.Image:
    """An output image of the server."""
    return Image.open(io.BytesIO(server.picture(image))).convert("RGB")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
