"""Load U-ViT, Train U-ViT, Save U-ViT."""

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..nodes.ui import pictures
from ..nodes.ui.schema import schema
from ..nodes.ui.text import show_text
from .loss_plot import loss_plot
from .model import load_uvit, save_uvit
from .node_inputs import has_weights, training_of
from .training import Training

log = logging.getLogger("taca")
CATEGORY = "TACA/research"
OWN_BLOCKS = {"caption_blocks": 3, "image_blocks": 3}
"""Blocks of the text alone and, at each end, of the image alone, as the paper's code sets them."""


class LoadUViT(io.ComfyNode):
    """A file -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list("diffusion_models")
        return schema(
            "LoadUViT",
            inputs=[io.Combo.Input("unet_name", options=files)],
            outputs=[io.Model.Output()],
            search_aliases=["u-vit", "uvit", "intermediate fusion", "mscoco"],
            category=CATEGORY,
        )

    @classmethod
    def execute(cls, unet_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        return io.NodeOutput(load_uvit(path))


class TrainUViT(io.ComfyNode):
    """Latents and their captions -> a new U-ViT trained on them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        fusions = ["intermediate", "early", "two streams"]
        conditionings = ["concatenation", "cross-attention"]
        return schema(
            "TrainUViT",
            inputs=[
                io.Latent.Input("latents"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Combo.Input("fusion", options=fusions, default="two streams"),
                io.Int.Input("text_blocks", default=3, min=1, max=99, step=2),
                io.Combo.Input("conditioning", options=conditionings, default="concatenation"),
                io.Int.Input("blocks", default=13, min=1, max=99, step=2),
                io.Int.Input("width", default=512, min=64, max=4096, step=64),
                io.Int.Input("steps", default=10000, min=1, max=10_000_000),
                io.Int.Input("batch_size", default=32, min=1, max=4096),
                io.Float.Input(
                    "learning_rate", default=2e-4, min=1e-7, max=1.0, step=1e-7, round=False
                ),
                io.Int.Input("warm_up", default=500, min=0, max=1_000_000),
                io.Float.Input(
                    "ema",
                    default=0.9999,
                    min=0.0,
                    max=0.999999,
                    step=1e-6,
                    round=False,
                    advanced=True,
                ),
                io.Float.Input("p_uncond", default=0.1, min=0.0, max=1.0, step=0.01, advanced=True),
                io.Combo.Input(
                    "precision", options=["bf16", "fp32"], default="bf16", advanced=True
                ),
                # No new seed after a run, which could not be resumed with it.
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, control_after_generate=False),
                io.String.Input("checkpoint", default="uvit"),
                io.Int.Input("checkpoint_every", default=500, min=1, max=1_000_000, advanced=True),
                # The last ones, and optional: saved workflows do not have them.
                *(
                    io.Int.Input(name, default=count, min=0, max=49, optional=True)
                    for name, count in OWN_BLOCKS.items()
                ),
            ],
            outputs=[io.Model.Output(), io.Image.Output("loss")],
            search_aliases=["u-vit", "uvit", "train from scratch", "intermediate fusion"],
            category=CATEGORY,
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        latents: list[io.Latent.Type],
        positive: list[io.Conditioning.Type],
        negative: list[io.Conditioning.Type],
        **settings: list[Any],
    ) -> io.NodeOutput:
        chosen = OWN_BLOCKS | {name: value[0] for name, value in settings.items()}
        with torch.inference_mode(False), torch.enable_grad():
            training = training_of(latents, positive, negative, chosen)
            advice = []
            if training.recipe.bf16 and not comfy.model_management.should_use_bf16(training.device):
                advice.append(
                    "Train U-ViT: this device has no bf16, and computes it many times slower: "
                    "choose fp32 as precision."
                )
            if has_weights([*positive, *negative]):
                advice.append("Train U-ViT: word weights do not act in training.")
            for each in advice:
                log.warning(each)
                show_text(" ".join(advice))
            bar = comfy.utils.ProgressBar(chosen["steps"])

            def after_step(running: Training) -> None:
                bar.update_absolute(running.step, chosen["steps"])
                comfy.model_management.throw_exception_if_processing_interrupted()

            training.run(chosen["steps"], chosen["checkpoint_every"], after_step)
        plot = pictures.to_tensor(loss_plot(training.losses))
        done = f"{training.step} steps; {training.path.name} is in output/uvit."
        message = " ".join([done, *advice])
        show_text(message)
        shown = {**ui.PreviewImage(plot, cls=cls).as_dict(), **ui.PreviewText(message).as_dict()}
        return io.NodeOutput(load_uvit(str(training.path)), plot, ui=shown)


class SaveUViT(io.ComfyNode):
    """MODEL -> a file for Load U-ViT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "SaveUViT",
            inputs=[
                io.Model.Input("model"),
                io.String.Input("filename_prefix", default="diffusion_models/uvit"),
            ],
            outputs=[],
            search_aliases=["u-vit", "uvit", "export model"],
            category=CATEGORY,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ModelPatcher, filename_prefix: str) -> io.NodeOutput:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = Path(folder, f"{name}_{counter:05}_.safetensors")
        save_uvit(model, str(file))
        message = f"Saved {file.name}."
        show_text(message)
        return io.NodeOutput(ui=ui.PreviewText(message))


NODES = [LoadUViT, TrainUViT, SaveUViT]
