"""A U-ViT as a model of ComfyUI: read from a file, sampled by core, written to a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from .config import UViTConfig
from .files import DESCRIBED, check_weights, metadata_of, read_config, weights_of
from .network import UViT

SAVED_PREFIX = "model.diffusion_model."
"""Prefix of the weights' names in the files of ComfyUI's own saving nodes."""
POSITIONS = "diffusion_model.pos_embed"


class LatentFormat(comfy.latent_formats.LatentFormat):
    """The network reads latents multiplied by a scale."""

    def __init__(self, channels: int = 4, scale: float = 1.0) -> None:
        self.latent_channels, self.scale_factor = channels, scale
        if channels == 4:  # Stable Diffusion's VAE
            sd15 = comfy.latent_formats.SD15()
            self.latent_rgb_factors = sd15.latent_rgb_factors
            self.taesd_decoder_name = sd15.taesd_decoder_name


class ComfyUViT(UViT):
    """The network as ComfyUI calls it, with ComfyUI's attention and layers."""

    def __init__(
        self,
        config: UViTConfig,
        dtype: torch.dtype,
        device: torch.device | str | None,
        operations: Any,
        **_: Any,
    ) -> None:
        super().__init__(config, optimized_attention, operations, device, dtype)
        self.dtype = dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        transformer_options: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Tensor:
        """``UViT.forward`` with ComfyUI's timesteps, which count from 0 and not from 1."""
        return super().forward(x, t + 1, context, transformer_options)


class ModelConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks of a kind of model. Its default schedule is the published one."""

    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, config: UViTConfig, latent_scale: float) -> None:
        super().__init__({"config": config})  # the arguments of ComfyUViT
        self.latent_format = LatentFormat(config.channels, latent_scale)
        said = (torch.tensor(n, dtype=torch.float64) for n in (config.text_tokens, latent_scale))
        self.described = dict(zip(DESCRIBED, said, strict=True))

    def process_unet_state_dict_for_saving(
        self, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The weights as ComfyUI's own nodes save them, and what they do not tell."""
        return super().process_unet_state_dict_for_saving(state_dict | self.described)


def read_file(path: str) -> tuple[dict[str, Tensor], UViTConfig, float]:
    """The weights of a U-ViT, its config and its latent scale, all checked.

    Raises ValueError if the file cannot be read, or is not a complete U-ViT; names it.
    """
    name = Path(path).name
    try:
        state, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        state = dict(state)
    except Exception as error:  # of the file format, the system or the content: too many to list
        raise ValueError(
            f"{name} cannot be read as a file of weights: {error} Download it again."
        ) from error
    weights = weights_of(state, name)
    config, latent_scale = read_config(weights, metadata, name)
    weights = {key: weight for key, weight in weights.items() if key not in DESCRIBED}
    check_weights(weights, UViT(config, device="meta").state_dict(), name)
    return weights, config, latent_scale


def load_uvit(path: str, disable_dynamic: bool = False) -> ModelPatcher:
    """The U-ViT in a file, as a MODEL: ``.safetensors``, or the published ``.pth``.

    Of a ``.pth`` nothing but the weights is read. ``disable_dynamic`` is as in ComfyUI's loaders.

    Raises ValueError if the file is not a complete U-ViT; names it.
    """
    patcher = patcher_of(*read_file(path), disable_dynamic)
    # ComfyUI loads the model again with this, to train it or for another GPU.
    patcher.cached_patcher_init = (load_uvit, (path,))
    return patcher


def patcher_of(
    weights: dict[str, Tensor],
    config: UViTConfig,
    latent_scale: float,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """A MODEL of these weights, made as ComfyUI's own loaders do."""
    management = comfy.model_management
    model_config = ModelConfig(config, latent_scale)
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=list(model_config.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    cast = management.unet_manual_cast(dtype, load_device, model_config.supported_inference_dtypes)
    model_config.set_inference_dtype(dtype, cast)
    model_type = comfy.model_base.ModelType.EPS
    model = comfy.model_base.BaseModel(model_config, model_type, unet_model=ComfyUViT)
    kind = ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=load_device, offload_device=offload_device)
    patcher.add_callback(CallbacksMP.ON_LOAD, patch_positions)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(dict(weights), "", assign=patcher.is_dynamic())
    return patcher


def patch_positions(patcher: ModelPatcher, device: torch.device, *_: Any) -> None:
    """ComfyUI's ON_LOAD callback: merge into the positions what is merged into the other weights.

    ComfyUI patches weights of layers only, and these are in none.
    """
    if POSITIONS in patcher.backup:  # which dynamic VRAM leaves there before ComfyUI 0.26
        original = patcher.backup.pop(POSITIONS).weight
        comfy.utils.set_attr_param(patcher.model, POSITIONS, original)
    if POSITIONS in patcher.patches:
        patcher.patch_weight_to_device(POSITIONS, device_to=device)


def save_uvit(patcher: ModelPatcher, path: str) -> None:
    """Write a U-ViT, its LoRAs merged into the weights, to a safetensors file for ``load_uvit``.

    Raises ValueError if the model is not a U-ViT of this pack.
    """
    network = patcher.model.diffusion_model
    if not isinstance(network, ComfyUViT):
        raise ValueError(
            f"Save U-ViT takes a U-ViT, from Load U-ViT or Train U-ViT, and not a "
            f"{type(patcher.model).__name__}: to save other models take ComfyUI's nodes."
        )
    comfy.model_management.load_models_gpu([patcher])
    weights = {
        key.removeprefix(SAVED_PREFIX): value.contiguous()
        for key, value in patcher.state_dict_for_saving().items()
        if key.removeprefix(SAVED_PREFIX) not in DESCRIBED
    }
    latent_scale = patcher.model.latent_format.scale_factor
    comfy.utils.save_torch_file(weights, path, metadata=metadata_of(network.config, latent_scale))
