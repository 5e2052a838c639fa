"""A U-ViT as a model of ComfyUI: read from a file, sampled by core, written to a file."""

from __future__ import annotations

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
from torch import Tensor

from .files import TRAINING, check_weights, metadata_of, read_sizes
from .network import Sizes, UViT

SAVED_PREFIX = "model.diffusion_model."
"""How ComfyUI's own nodes begin the names of the weights that they save."""


class LatentFormat(comfy.latent_formats.LatentFormat):
    """Latents times a scale."""

    def __init__(self, channels: int = 4, scale: float = 1.0) -> None:
        self.latent_channels, self.scale_factor = channels, scale
        if channels == 4:  # Stable Diffusion's VAE
            known = comfy.latent_formats.SD15()
            self.latent_rgb_factors = known.latent_rgb_factors
            self.taesd_decoder_name = known.taesd_decoder_name


class ComfyUViT(UViT):
    """The network as ComfyUI calls it, with ComfyUI's attention and layers."""

    def __init__(
        self, sizes: Sizes, dtype: torch.dtype, device: Any, operations: Any, **_: Any
    ) -> None:
        super().__init__(sizes, optimized_attention, operations, device, dtype)
        self.dtype = dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        transformer_options: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Tensor:
        """As ``UViT.forward``, with timesteps from 0 as ComfyUI counts them, and not from 1."""
        return super().forward(x, t + 1, context, transformer_options)


class Config(comfy.supported_models_base.BASE):
    """What ComfyUI asks of a kind of model. Its default schedule is the published one."""

    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, sizes: Sizes, latent_scale: float) -> None:
        super().__init__({"sizes": sizes})
        self.latent_format = LatentFormat(sizes.channels, latent_scale)


def read_file(path: str) -> tuple[dict[str, Tensor], Sizes, float]:
    """The weights of a U-ViT, its sizes and its latent scale, all checked.

    Raises
    ------
    ValueError
        If the file cannot be read, or is not a whole U-ViT; names it.
    """
    name = Path(path).name
    try:
        state, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        is_weights = all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
        )
    except Exception as error:  # of many kinds: of the format, of the system, of what is in it
        raise ValueError(
            f"{name} cannot be read as a file of weights: {error} Download it again."
        ) from error
    if not is_weights:
        raise ValueError(f"{name} is not a U-ViT: it holds more than weights.")
    prefix = SAVED_PREFIX if f"{SAVED_PREFIX}pos_embed" in state else ""
    weights = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.startswith(TRAINING)
    }
    sizes, latent_scale = read_sizes(weights, metadata, name)
    check_weights(weights, UViT(sizes, device="meta").state_dict(), name)
    return weights, sizes, latent_scale


def load_uvit(path: str, disable_dynamic: bool = False) -> Any:
    """A ModelPatcher of the U-ViT in a file.

    Parameters
    ----------
    path : str
        ``.safetensors``, or the published ``.pth``, of which weights alone are read.
    disable_dynamic : bool
        As ComfyUI's own loaders have it.

    Raises
    ------
    ValueError
        If the file is not a whole U-ViT; names it.
    """
    patcher = patcher_of(*read_file(path), disable_dynamic)
    # With it ComfyUI loads the model again, to train it or for another GPU.
    patcher.cached_patcher_init = (load_uvit, (path,))
    return patcher


def patcher_of(
    weights: dict[str, Tensor], sizes: Sizes, latent_scale: float, disable_dynamic: bool = False
) -> Any:
    """A ModelPatcher of these weights, as ComfyUI's own loaders make one."""
    management = comfy.model_management
    config = Config(sizes, latent_scale)
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    cast = management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    model = comfy.model_base.BaseModel(
        config, comfy.model_base.ModelType.EPS, unet_model=ComfyUViT
    )  # fmt: skip
    kinds = comfy.model_patcher
    kind = kinds.ModelPatcher if disable_dynamic else kinds.CoreModelPatcher
    patcher = kind(model, load_device=load_device, offload_device=offload_device)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(dict(weights), "", assign=patcher.is_dynamic())
    return patcher


def uvit_of(patcher: Any, node: str) -> tuple[UViT, float]:
    """The network of a MODEL and its latent scale.

    Raises
    ------
    ValueError
        If the model is not a U-ViT of this pack; names the node that asks.
    """
    network = patcher.model.diffusion_model
    if not isinstance(network, ComfyUViT):
        raise ValueError(
            f"{node} takes a U-ViT, from Load U-ViT or Train U-ViT, and not a "
            f"{type(patcher.model).__name__}: to save other models take ComfyUI's nodes."
        )
    return network, patcher.model.latent_format.scale_factor


def save_uvit(patcher: Any, path: str) -> None:
    """Write a U-ViT, with what LoRAs made of its weights, to a file for ``load_uvit``.

    Parameters
    ----------
    patcher : comfy.model_patcher.ModelPatcher
    path : str
        Of a safetensors file.
    """
    network, latent_scale = uvit_of(patcher, "Save U-ViT")
    comfy.model_management.load_models_gpu([patcher])
    weights = {
        key.removeprefix(SAVED_PREFIX): value if value.is_contiguous() else value.contiguous()
        for key, value in patcher.state_dict_for_saving().items()
    }
    comfy.utils.save_torch_file(weights, path, metadata=metadata_of(network.sizes, latent_scale))
