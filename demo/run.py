"""The demo: the same noise without and with TACA, on a real ComfyUI (``python dev.py demo``).

Without arguments it draws 48 captions with the demo's own small model, judges every picture by a
program, and writes a sheet, the attention to text and ``result.json``. With ``--checkpoint`` it
runs FLUX.1 or SD3.5: give the text encoders and the VAE too, unless the checkpoint holds them.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import world
from PIL import Image
from safetensors import SafetensorError, safe_open
from sheets import marked, plot_gamma, side_by_side, stacked

sys.path.append(str(Path(__file__).resolve().parent.parent / "hosting"))

from comfy_server import ROOT, Server, serving

Graph = dict[str, Any]
MODEL = "taca_demo_suppressed_mmdit.safetensors"
ABOUT = (
    "The demo's model is a small one (SD3's architecture, 3 blocks) that had learnt to follow its "
    "captions and was then trained on careless ones, so that it listens too little to its text."
)
OWN_PROMPT = "a red circle left of a blue square"
MEASURED = ROOT / "benchmarks" / "results" / "suppression.json"
CFG = {"demo": 3.0, "FLUX.1": 1.0, "SD3.5": 7.0}


def node(class_type: str, **inputs: object) -> dict[str, Any]:
    """One node of a graph in API format."""
    return {"class_type": class_type, "inputs": inputs}


def demo_model(options: argparse.Namespace) -> Graph:
    """Loaders, text and decoder of the demo's own model; ids "model", "positive", "decode"."""
    return {
        "model": node("UNETLoader", unet_name=MODEL, weight_dtype="default"),
        "positive": node("TACADemoTextEncode", text="\n".join(options.prompts)),
        "negative": node("TACADemoTextEncode", text=""),
        "latent": node(
            "EmptySD3LatentImage", width=128, height=128, batch_size=len(options.prompts)
        ),
        "decode": node("TACADemoDecode", upscale=1),
    }


def own_model(options: argparse.Namespace) -> Graph:
    """The same ids for the user's FLUX or SD3.5."""
    clips = {f"clip_name{i + 1}": path.name for i, path in enumerate(options.text_encoder)}
    graph: Graph = {}
    if clips:
        graph["model"] = node(
            "UNETLoader", unet_name=options.checkpoint.name, weight_dtype="default"
        )
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
        "positive": node("CLIPTextEncode", clip=clip, text=options.prompts[0]),
        "negative": node("CLIPTextEncode", clip=clip, text=""),
        "latent": node(
            "EmptySD3LatentImage", width=options.size, height=options.size, batch_size=1
        ),
        "decode": node("VAEDecode", vae=vae),
    }


def graph_of(options: argparse.Namespace) -> Graph:
    """The whole graph: the model's part, then a sampler, a decoder and a picture each way."""
    graph = own_model(options) if options.checkpoint else demo_model(options)
    decode = graph.pop("decode")
    positive = ["positive", 0]
    if options.family == "FLUX.1":
        graph["guidance"] = node("FluxGuidance", conditioning=positive, guidance=3.5)
        positive = ["guidance", 0]
    graph["taca_model"] = node(
        "TACAPatchModel",
        model=["model", 0],
        gamma=options.gamma,
        timestep_threshold=options.threshold,
    )
    for name, model in (("plain", ["model", 0]), ("taca", ["taca_model", 0])):
        graph[f"{name}_sample"] = node(
            "KSampler",
            model=model,
            seed=options.seed,
            steps=options.steps,
            cfg=options.cfg,
            sampler_name="euler",
            scheduler="simple",
            positive=positive,
            negative=["negative", 0],
            latent_image=["latent", 0],
            denoise=1.0,
        )
        inputs = decode["inputs"] | {"samples": [f"{name}_sample", 0]}
        graph[f"{name}_image"] = node(decode["class_type"], **inputs)
        graph[name] = node("SaveImage", images=[f"{name}_image", 0], filename_prefix=name)
    graph["scheduler"] = node(
        "BasicScheduler",
        model=["taca_model", 0],
        scheduler="simple",
        steps=options.steps,
        denoise=1.0,
    )
    graph["sigmas"] = node("PreviewAny", source=["scheduler", 0])
    return graph


def report_of(caption: str, options: argparse.Namespace) -> Graph:
    """A run of one caption that shows where its attention goes, beside what ``graph_of`` has."""
    last = len(caption.split())
    words = {" ".join(caption.split()[i : i + 2]): i for i in (1, last - 2)}
    return {
        "report_text": node("TACADemoTextEncode", text=caption),
        "report_latent": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "report_noise": node("RandomNoise", noise_seed=options.seed),
        "report_sampler": node("KSamplerSelect", sampler_name="euler"),
        "report_guider": node(
            "CFGGuider",
            model=["taca_model", 0],
            positive=["report_text", 0],
            negative=["negative", 0],
            cfg=options.cfg,
        ),
        "report_sample": node(
            "TACAAttentionReport",
            noise=["report_noise", 0],
            guider=["report_guider", 0],
            sampler=["report_sampler", 0],
            sigmas=["scheduler", 0],
            latent_image=["report_latent", 0],
            words=", ".join(f"{word}={i}-{i + 1}" for word, i in words.items()),
        ),
        "shares": node("SaveImage", images=["report_sample", 1], filename_prefix="shares"),
        "heat_maps": node("SaveImage", images=["report_sample", 2], filename_prefix="heat_maps"),
    }


class Progress:
    """A bar on one line over all pictures of both ways."""

    def __init__(self, count: int) -> None:
        self.count, self.done = 2 * count, dict.fromkeys(("plain_sample", "taca_sample"), 0.0)

    def __call__(self, what: str, step: int, steps: int) -> None:
        if what in self.done:
            self.done[what] = step / steps
            share = sum(self.done.values()) / 2
            bar = "#" * int(30 * share)
            end = "\n" if share == 1 else ""
            print(
                f"\r  [{bar:<30}] {int(self.count * share)} of {self.count} pictures",
                end=end,
                flush=True,
            )


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
    parser.add_argument("--prompt", help="one of your own, in place of the demo's captions")
    parser.add_argument("--captions", type=int, default=48, metavar="N", help="of the demo's model")
    parser.add_argument("--gamma", type=float, default=1.2)
    parser.add_argument("--threshold", type=float, default=970.0, help="timestep, 0..1000")
    parser.add_argument("--seed", type=int, default=0)
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
    options.prompts = [options.prompt or OWN_PROMPT]
    if not options.checkpoint and not options.prompt:
        held_out = world.captions("held-out")
        if not 1 <= options.captions <= len(held_out):
            parser.error(f"--captions must be 1 to {len(held_out)}")
        # Evenly over the list, whatever the pictures look like.
        options.prompts = [
            held_out[i * len(held_out) // options.captions] for i in range(options.captions)
        ]
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
    """Draw, and say what came out and where the pictures are."""
    options = options_of(sys.argv[1:])
    out, captions = options.out, options.prompts
    out.mkdir(parents=True, exist_ok=True)
    graph = graph_of(options)
    if not options.checkpoint:
        print(ABOUT)
        graph |= report_of(captions[0], options)
    (out / "graph.json").write_text(json.dumps(graph, indent=1))
    log = out / "comfyui.log"
    print(f"Starting ComfyUI (its log: {log})", flush=True)
    with serving(ROOT / ".dev" / "base", log, models_of(options)) as server:
        what = f"{len(captions)} held-out captions" if len(captions) > 1 else f'"{captions[0]}"'
        print(f"Drawing {what}, seed {options.seed}, without and with TACA", flush=True)
        outputs = server.run(graph, Progress(len(captions)))

        def pictures(name: str) -> list[Image.Image]:
            return [open_picture(server, image) for image in outputs[name]["images"]]

        drawn = {way: pictures(way) for way in ("plain", "taca")}
        report = [] if options.checkpoint else [*pictures("shares"), *pictures("heat_maps")]
    sigma, inside = what_ran(outputs, log)
    plot_gamma(out / "gamma.png", sigma, inside, options.gamma, options.threshold)
    taca = f"TACA, gamma {options.gamma:g}"
    if options.checkpoint:
        shown = {"plain": drawn["plain"][0], taca: drawn["taca"][0]}
        side_by_side(shown, captions[0]).save(out / "side_by_side.png")
        print(f"Acted on {inside} of {len(sigma)} steps.")
        print(f"Pictures: {out / 'side_by_side.png'}\ngamma:    {out / 'gamma.png'}")
        return
    right = {way: judge(drawn[way], captions) for way in drawn}
    rows = {
        label: list(zip(drawn[way], right[way], strict=True))
        for way, label in (
            ("plain", "without\nTACA"),
            ("taca", "with TACA\n" + taca.split(", ")[1]),
        )
    }
    marked(captions[:12], rows).save(out / "sheet.png")
    stacked(report).save(out / "attention.png")
    result = {
        "captions": len(captions),
        "plain": {"right": sum(right["plain"])},
        "taca": {
            "right": sum(right["taca"]),
            "gamma": options.gamma,
            "threshold": options.threshold,
            "steps": inside,
        },
        "seed": options.seed,
        "cfg": options.cfg,
        "steps": len(sigma),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1))
    print(
        f"right: {sum(right['plain'])} of {len(captions)} without, {sum(right['taca'])} of "
        f"{len(captions)} with TACA{measured(options)}; acted on {inside} of {len(sigma)} steps"
    )
    print(f"The first of them:  {out / 'sheet.png'}")
    print(f"Attention to text:  {out / 'attention.png'}\ngamma over steps:   {out / 'gamma.png'}")
    print("Your own FLUX.1 or SD3.5: python dev.py demo --checkpoint FILE --prompt TEXT")
    print("                          (--help says how to name text encoders and VAE)")


def judge(pictures: list[Image.Image], captions: list[str]) -> list[bool]:
    """Whether each picture shows all that its caption says."""
    arrays = [np.asarray(picture, np.float32) / 255 for picture in pictures]
    return [world.check(*pair)["everything"] for pair in zip(arrays, captions, strict=True)]


def measured(options: argparse.Namespace) -> str:
    """What the same setting gives over many pictures, if that has been measured."""
    if not MEASURED.exists():
        return ""
    window = {970.0: "paper", 802.0: "snr", 0.0: "all"}.get(options.threshold)
    found = {
        setting["window"]: setting
        for setting in json.loads(MEASURED.read_text("utf-8"))["settings"]
        if (setting["model"], setting["cfg"]) == ("base0-dose0.35", options.cfg)
        and (setting["window"], setting["gamma"]) in (("-", 1), (window, options.gamma))
    }
    if len(found) < 2 or options.steps != 28:
        return ""
    plain, taca = (100 * found[key]["right"] / found[key]["pictures"] for key in ("-", window))
    return f" (over {found['-']['pictures']} pictures: {plain:.0f} % and {taca:.0f} %)"


def what_ran(outputs: dict[str, Any], log: Path) -> tuple[list[float], int]:
    """The run's own sigmas, as core shows them (four decimals), and on how many TACA acted.

    The latter from TACA's line in the log: a rounded sigma could be on the wrong side of the
    threshold.
    """
    shown = re.findall(r"\d+\.\d*(?:e[-+]\d+)?", outputs["sigmas"]["text"][0])
    acted = re.findall(r"TACA: .* acted on (\d+) of \d+ steps", log.read_text("utf-8", "replace"))
    return [float(sigma) for sigma in shown[:-1]], int(acted[-1])


def open_picture(server: Server, image: dict[str, str]) -> Image.Image:
    """An output image of the server."""
    return Image.open(io.BytesIO(server.picture(image))).convert("RGB")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
