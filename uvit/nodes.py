"""Load U-ViT, Train U-ViT, Save U-ViT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..nodes import drawing
from ..nodes.preview import say
from .files import PUBLISHED_LATENT_SCALE
from .model import load_uvit, save_uvit
from .network import Sizes, central
from .training import Data, Recipe, Training

CATEGORY = "U-ViT"


class LoadUViT(io.ComfyNode):
    """A file -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadUViT",
            display_name="Load U-ViT",
            category=CATEGORY,
            description=(
                "Loads a U-ViT: the published text-to-image ones (mscoco_uvit_small.pth and "
                "mscoco_uvit_small_deep.pth, 256 x 256 pixels) or one from Save U-ViT. Its sizes "
                "and its fusion of text and image are read from the file."
            ),
            search_aliases=["u-vit", "uvit", "intermediate fusion", "mscoco"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip=(
                        "A file in models/diffusion_models. The published ones go with CLIP-L "
                        "(Load CLIP, type stable_diffusion) and Stable Diffusion's VAE."
                    ),
                )
            ],
            outputs=[io.Model.Output(tooltip="For any of ComfyUI's samplers.")],
        )

    @classmethod
    def execute(cls, unet_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        return io.NodeOutput(load_uvit(path))


class TrainUViT(io.ComfyNode):
    """Latents and their captions -> a U-ViT trained on them from nothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrainUViT",
            display_name="Train U-ViT",
            category=CATEGORY,
            description=(
                "Trains a new U-ViT on your own pictures, with early or intermediate fusion of "
                "text. A run that is stopped keeps its checkpoint, and goes on from it when it is "
                "started again with the same settings."
            ),
            search_aliases=["u-vit", "uvit", "train from scratch", "intermediate fusion"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Latent.Input(
                    "latents",
                    tooltip=(
                        "The pictures, encoded, all square and of one size: from Make Training "
                        "Dataset or Load Training Dataset."
                    ),
                ),
                io.Conditioning.Input(
                    "positive", tooltip="Their captions, encoded, in the same order."
                ),
                io.Conditioning.Input(
                    "negative",
                    tooltip="The empty prompt, encoded. Give the same one when you sample.",
                ),
                io.Combo.Input(
                    "fusion",
                    options=["intermediate", "early"],
                    default="intermediate",
                    tooltip=(
                        "Where text joins the image: in the middle blocks only, or in all of them, "
                        "as in the published U-ViT."
                    ),
                ),
                io.Int.Input(
                    "text_blocks",
                    default=3,
                    min=1,
                    max=99,
                    step=2,
                    tooltip=(
                        "With intermediate fusion, how many central blocks see the text, an odd "
                        "number: the fewer, the less there is to compute."
                    ),
                ),
                io.Combo.Input(
                    "conditioning",
                    options=["concatenation", "cross-attention"],
                    default="concatenation",
                    tooltip=(
                        "How it joins: as more tokens of one sequence, as in the published U-ViT, "
                        "or by an attention of its own from image to text."
                    ),
                ),
                io.Int.Input(
                    "blocks",
                    default=13,
                    min=1,
                    max=99,
                    step=2,
                    tooltip="Transformer blocks, an odd number: 13 is the published small U-ViT, "
                    "17 the deep one.",
                ),
                io.Int.Input(
                    "width",
                    default=512,
                    min=64,
                    max=4096,
                    step=64,
                    tooltip="Channels of a token: 512 in the published small ones.",
                ),
                io.Int.Input(
                    "steps",
                    default=10000,
                    min=1,
                    max=10_000_000,
                    tooltip="Steps in all, those of an earlier run included. 1,000,000 were "
                    "published.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=32,
                    min=1,
                    max=4096,
                    tooltip="Pictures a step. 256 were published.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=2e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    round=False,
                    tooltip="Of AdamW. 0.0002 is published.",
                ),
                io.Int.Input(
                    "warm_up",
                    default=500,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps in which the learning rate rises. 5,000 were published.",
                ),
                io.Float.Input(
                    "ema",
                    default=0.9999,
                    min=0.0,
                    max=0.999999,
                    step=1e-6,
                    round=False,
                    advanced=True,
                    tooltip=(
                        "The weights are averaged over about 1 / (1 - ema) steps, and the average "
                        "is what you get. 0.9999 is published; take 0.99 for a thousand steps."
                    ),
                ),
                io.Float.Input(
                    "p_uncond",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of pictures trained with the empty prompt, which CFG needs.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["bf16", "fp32"],
                    default="bf16",
                    advanced=True,
                    tooltip="What the network computes in. Its weights are fp32 in any case.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=False,  # else the page draws another, and none goes on
                    tooltip="Of the first weights, and of the noise.",
                ),
                io.String.Input(
                    "checkpoint",
                    default="uvit",
                    tooltip=(
                        "Name of the checkpoint in output/uvit. If there is one by this name, the "
                        "training goes on from it."
                    ),
                ),
                io.Int.Input(
                    "checkpoint_every",
                    default=500,
                    min=1,
                    max=1_000_000,
                    advanced=True,
                    tooltip="Steps between two checkpoints.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The trained U-ViT, to sample or for Save U-ViT."),
                io.Image.Output("loss", tooltip="A plot of the loss, to save."),
            ],
        )

    @classmethod
    def execute(cls, latents: list[Any], positive: list[Any], negative: list[Any],
                **settings: list[Any]) -> io.NodeOutput:  # fmt: skip
        given = {name: value[0] for name, value in settings.items()}
        with torch.inference_mode(False), torch.enable_grad():
            training = begin(latents, positive, negative, given)
            bar = comfy.utils.ProgressBar(given["steps"])

            def watch(running: Training) -> None:
                bar.update_absolute(running.step, given["steps"])
                comfy.model_management.throw_exception_if_processing_interrupted()

            training.run(given["steps"], given["checkpoint_every"], watch)
        image = drawing.to_tensor(plot(training.losses))
        said = f"{training.step} steps; {training.path.name} is in output/uvit."
        say(said)
        shown = {**ui.PreviewImage(image, cls=cls).as_dict(), **ui.PreviewText(said).as_dict()}
        return io.NodeOutput(load_uvit(str(training.path)), image, ui=shown)


def begin(latents: list[Any], positive: list[Any], negative: list[Any],
          given: dict[str, Any]) -> Training:  # fmt: skip
    """The training that a node's inputs describe."""
    pictures, context, empty = data_of(latents, positive, negative)
    channels, side = pictures.shape[1:3]
    # Stable Diffusion's VAE gets the published scale; others are brought to a deviation of 1.
    scale = PUBLISHED_LATENT_SCALE if channels == 4 else round(1 / pictures.std().item(), 4)
    blocks = given["blocks"]
    count = blocks if given["fusion"] == "early" else min(given["text_blocks"], blocks)
    first, last = central(blocks, count)
    sizes = Sizes(
        blocks=blocks, width=given["width"], channels=channels, side=side,
        text_tokens=context.shape[1], text_width=context.shape[2], first=first, last=last,
        conditioning=given["conditioning"],
    )  # fmt: skip
    recipe = Recipe(
        given["batch_size"], given["learning_rate"], given["warm_up"], given["ema"],
        given["p_uncond"], given["precision"] == "bf16", given["seed"],
    )  # fmt: skip
    name = given["checkpoint"].strip()
    if not re.fullmatch(r"[\w\- ]+", name):
        raise ValueError(
            f"Train U-ViT: {name!r} is no name for a checkpoint; take letters, digits, - and _."
        )
    path = Path(folder_paths.get_output_directory(), "uvit", f"{name}.safetensors")
    comfy.model_management.unload_all_models()
    data = Data(pictures * scale, context, empty, scale)
    training = Training(
        sizes, recipe, data, path, comfy.model_management.get_torch_device()
    )  # fmt: skip
    if training.step > given["steps"]:
        raise ValueError(
            f"Train U-ViT: {path.name} has {training.step} steps already: ask for more than that, "
            f"or give another name for the checkpoint."
        )
    return training


def data_of(latents: list[Any], positive: list[Any],
            negative: list[Any]) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Latents, captions and the empty prompt of datasets, each as one tensor."""
    samples = [latent["samples"] for latent in latents]
    shapes = {tuple(sample.shape[1:]) for sample in samples}
    if len(shapes) > 1 or any(len(s) != 3 or s[1] != s[2] for s in shapes):
        found = ", ".join(sorted(" x ".join(map(str, shape)) for shape in shapes))
        raise ValueError(
            f"Train U-ViT takes square pictures of one size; these latents are {found}. Resize and "
            f"crop the pictures before you encode them."
        )
    pictures = torch.cat(samples).float().cpu().clone()
    if pictures.shape[-1] % 2:
        raise ValueError(
            f"Train U-ViT puts 2 x 2 latents into a token, and these are {pictures.shape[-1]} "
            f"wide: with Stable Diffusion's VAE pictures must be a multiple of 16 wide."
        )
    captions = [text for conditioning in positive for text, _ in conditioning]
    empty = [text for conditioning in negative for text, _ in conditioning]
    lengths = {tuple(text.shape[1:]) for text in (*captions, *empty)}
    if len(lengths) > 1:
        found = ", ".join(sorted(f"{tokens} x {width}" for tokens, width in lengths))
        raise ValueError(
            f"Train U-ViT takes prompts of one length, the empty one too; these are {found} "
            f"(tokens x channels). Shorten the captions to CLIP's 77 tokens."
        )
    context = torch.cat(captions).float().cpu().clone()
    if len(context) == 1:
        context = context.expand(len(pictures), -1, -1)
    if len(context) != len(pictures):
        raise ValueError(
            f"Train U-ViT got {len(pictures)} pictures and {len(context)} captions: each picture "
            f"needs its own, in the same order."
        )
    return pictures, context, empty[0][:1].float().cpu().clone()


def plot(losses: list[float], parts: int = 200) -> Image.Image:
    """The loss over the steps, averaged over stretches of them."""
    length = max(1, -(-len(losses) // parts))
    stretches = [losses[i : i + length] for i in range(0, len(losses), length)]
    points = [
        (min((i + 0.5) * length, len(losses)), sum(part) / len(part))
        for i, part in enumerate(stretches)
    ]
    top = drawing.round_up(max(value for _, value in points))
    picture = Image.new("RGB", (720, 360), drawing.PAPER)
    axes = drawing.Axes(picture, (70, 40, 690, 300), (0, len(losses)), (0.0, top))
    marks = {float(len(losses) * i // 4): str(len(losses) * i // 4) for i in range(5)}
    axes.frame("step", "loss", [0, top / 2, top], marks)
    axes.line(points, drawing.COLOURS[1])
    return picture


class SaveUViT(io.ComfyNode):
    """MODEL -> a file for Load U-ViT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveUViT",
            display_name="Save U-ViT",
            category=CATEGORY,
            description=(
                "Saves a U-ViT as a safetensors file that says all Load U-ViT needs, where Load "
                "U-ViT finds it."
            ),
            search_aliases=["u-vit", "uvit", "export model"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="From Train U-ViT or Load U-ViT; LoRAs become part of it."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/uvit",
                    tooltip="Folder and name in ComfyUI's output folder. Load U-ViT lists what is "
                    "in output/diffusion_models, after a refresh of the page.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, model: Any, filename_prefix: str) -> io.NodeOutput:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = Path(folder, f"{name}_{counter:05}_.safetensors")
        save_uvit(model, str(file))
        said = f"Saved {file.name}."
        say(said)
        return io.NodeOutput(ui=ui.PreviewText(said))


NODES = [LoadUViT, TrainUViT, SaveUViT]
