"""One tiny model for each family, in its published key layout, read by core's own loader.

What the tests know of a family is written here once more, from its source and not from the pack:
how its joint sequence is made up. To add one, add a ``Case``.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams
from safetensors.torch import save_file

from support import qwen_image21


@dataclass(frozen=True)
class Case:
    """A tiny model and a call of it.

    Parameters
    ----------
    name : str
        For messages.
    transformer : str
        ``module:Class`` below ``comfy.ldm``, ComfyUI versions without it are skipped; or the pack's
        ``UViT``.
    config : dict
        Sizes for the class, which core's detection cannot make this small by itself.
    latent : tuple
        Shape of the latents, without the batch; or a shape for each of nested latents.
    text : tuple
        Tokens and width of the conditioning.
    spans : callable
        Text tokens, image tokens of a frame -> the joint sequence in its order: (kind, length) with
        kind image, text or other, and False behind those that are keys only.
    joint : int
        How many of the model's attentions are over that sequence.
    conds : callable
        What else the conditioning holds, seeded; given the number of text tokens, and the height
        and width of the latents.
    detected : dict
        What detection is to say beside ``config``; None takes a key out.
    published : callable
        The state dict of the class -> as the checkpoint has it, where core renames.
    alone : str
        Why core takes no two rows together; empty where it does.
    tokens : int
        Image tokens of a frame.
    fixed : str
        Why there are no other sizes; empty where there are.
    pieces : str
        Why torch.compile takes no block of it in one piece; empty where it does.
    options : bool
        Whether core hands its attention ``transformer_options``.
    needs : str
        A method of the class; ComfyUI versions without it are skipped.
    """

    name: str
    transformer: str
    config: dict[str, Any]
    latent: tuple[Any, ...]
    text: tuple[int, int]
    spans: Callable[[int, int], list[tuple[Any, ...]]]
    joint: int
    conds: Callable[..., dict[str, Any]] = field(default=lambda text, *size: {})
    detected: dict[str, Any] = field(default_factory=dict)
    published: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda state: state)
    alone: str = ""
    tokens: int = 12
    fixed: str = ""
    pieces: str = ""
    options: bool = True
    needs: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the latents, or the first of them."""
        shape = self.latent if isinstance(self.latent[0], int) else self.latent[0]
        return shape[-2], shape[-1]

    def wide(self) -> Case:
        """The same, 2 x 5 tokens in place of 4 x 3."""
        if self.fixed:
            return self
        height, width = self.size
        size = (height // 4 * 2, width // 3 * 5)
        if isinstance(self.latent[0], int):
            latent = (*self.latent[:-2], *size)
        else:
            latent = ((*self.latent[0][:-2], *size), *self.latent[1:])
        return replace(self, latent=latent, tokens=10)


def text_image(text, tokens):
    return [("text", text), ("image", tokens)]


def image_text(text, tokens):
    return [("image", tokens), ("text", text)]


def class_of(case):
    """The class of the case's model in ComfyUI; None where there is none."""
    module, _, name = case.transformer.partition(":")
    try:
        transformer = getattr(importlib.import_module(f"comfy.ldm.{module}"), name, None)
    except ImportError:
        return None
    return transformer if hasattr(transformer, case.needs or "forward") else None


def load(case, folder, monkeypatch, seed=0):
    """The model as core's UNETLoader reads it from a file, or a U-ViT as the pack does."""
    path = folder / f"{case.name}-{seed}.safetensors"
    if case.transformer == "UViT":
        network, files, model = (
            sys.modules[f"taca_pack.uvit.{name}"] for name in ("network", "files", "model")
        )
        config = network.UViTConfig(**case.config)
        if not path.exists():
            save_file(seeded(network.UViT(config), seed), path, files.metadata_of(config, 0.25))
        return model.load_uvit(str(path))
    transformer = class_of(case)
    if not path.exists():
        model = transformer(
            **case.config,
            dtype=torch.float32,
            device="cpu",
            operations=comfy.ops.disable_weight_init,
        )
        save_file(case.published(seeded(model, seed)), path)
    detect = comfy.model_detection.detect_unet_config

    def detect_tiny(*args, **kwargs):
        found = detect(*args, **kwargs)
        if found is None and "image_model" in case.detected:
            found = {}
        if found is None:  # not its own keys: core converts them and asks again
            return None
        found |= case.config | case.detected
        return {k: v for k, v in found.items() if case.detected.get(k, True) is not None}

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", detect_tiny)
    for config in comfy.supported_models.models:  # what core does not detect but knows
        known = {k: v for k, v in config.unet_extra_config.items() if k not in case.config}
        monkeypatch.setattr(config, "unet_extra_config", known)
    loaded = comfy.sd.load_diffusion_model(str(path))
    assert type(loaded.model.diffusion_model) is transformer
    return loaded


def in_keys_of_diffusers(mapping, state):
    """A state dict by core's own map of diffusers' names to its own, the other way round."""
    theirs, taken = {}, set()
    for name, ours in mapping.items():
        key, part, *changes = (ours, None) if isinstance(ours, str) else ours
        # Some have other names in LoRAs or, whole, in FLUX.2.
        if key not in state or (key, part) in taken or (part is None and key in taken):
            continue
        taken |= {key, (key, part)}
        value = state[key].narrow(*part) if part else state[key]
        for change in changes:
            value = change(value)
        theirs[name] = value.clone()
    return theirs


def seeded(model, seed):
    """Weights large enough for attention to be uneven, so that gamma shows."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            value = tensor
        elif tensor.ndim >= 2:
            value = torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5
        elif "norm" in key and key.endswith(("weight", "scale")):
            value = 1.7 + 0.2 * torch.randn(tensor.shape, generator=generator)
        else:
            value = 0.1 * torch.randn(tensor.shape, generator=generator)
        state[key] = value.contiguous()
    return state


def conditioning(case, seed=1, shorter=0):
    """A seeded CONDITIONING for the case, of all its text tokens or fewer."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width = case.text[0] - shorter, case.text[1]
    conds = {"pooled_output": None, **case.conds(tokens, *case.size)}
    return [[torch.randn(1, tokens, width, generator=generator), conds]]


def empty(case, batch=1):
    """An empty LATENT for the case."""
    if isinstance(case.latent[0], int):
        return {"samples": torch.zeros(batch, *case.latent)}
    from comfy.nested_tensor import NestedTensor  # not in every ComfyUI

    return {"samples": NestedTensor([torch.zeros(batch, *shape) for shape in case.latent])}


def pooled(width):
    """``conds`` with a pooled vector."""
    return lambda *sizes: {"pooled_output": torch.randn(1, width, generator=torch.manual_seed(4))}


def masked(last):
    """``conds`` with an attention mask that takes out the last text tokens."""

    def conds(text, *size):
        mask = torch.ones(1, text, dtype=torch.long)
        mask[:, -last:] = 0
        return {"attention_mask": mask}

    return conds


def references(*shapes):
    """``conds`` with reference latents of these shapes."""

    def conds(text, *size):
        generator = torch.manual_seed(6)
        return {"reference_latents": [torch.randn(1, *s, generator=generator) for s in shapes]}

    return conds


def together(*conds):
    """``conds`` with what each of these holds."""
    return lambda *sizes: {key: value for each in conds for key, value in each(*sizes).items()}


QWEN = {
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "axes_dims_rope": (8, 12, 12),
}
QWEN_CLASS = "qwen_image.model:QwenImageTransformer2DModel"

QWEN_CASES = [
    Case("Qwen-Image", QWEN_CLASS, QWEN, (16, 1, 8, 6), (9, 48), text_image, 2),
    Case("Qwen-Image, masked", QWEN_CLASS, QWEN, (16, 1, 8, 6), (9, 48), text_image, 2, masked(3)),
    Case(
        "Qwen-Image-Edit",
        QWEN_CLASS,
        QWEN,
        (16, 1, 8, 6),
        (9, 48),
        lambda t, n: [("text", t), ("image", n + 16 + 4)],
        2,
        references((16, 1, 8, 8), (16, 1, 4, 4)),
    ),
]


def also(**more):
    """``conds`` with these."""
    return lambda text, *size: more


def pixeldit_checkpoint(prefix):
    """Core splits the pixel blocks' modulation in two."""

    def published(state):
        result = {}
        for key, value in state.items():
            if "modulation_msa." in key:
                halves = value, state[key.replace("_msa.", "_mlp.")]
                parts = [x.unflatten(0, (-1, 3, PIXELDIT["pixel_hidden_size"])) for x in halves]
                key, value = key.replace("_msa.", ".0."), torch.cat(parts, 1).flatten(0, 2)
            if "modulation_mlp." not in key:
                result[prefix + key] = value
        return result

    return published


MAGE_FLOW = {
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 2560,
    "axes_dims_rope": (8, 12, 12),
}
JOYIMAGE = {"hidden_size": 256, "num_attention_heads": 2, "text_dim": 48, "num_layers": 2}
COGVIDEO = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "time_embed_dim": 64,
    "text_embed_dim": 48,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": False,
}
COGVIDEO_CLASS = "cogvideo.model:CogVideoXTransformer3DModel"
PIXELDIT = {
    "num_groups": 2,
    "hidden_size": 64,
    "pixel_hidden_size": 8,
    "patch_depth": 2,
    "pixel_attn_hidden_size": 64,
    "pixel_num_groups": 2,
    "pixel_depth": 1,
    "txt_embed_dim": 48,
    "txt_max_length": 7,
}
PID = {"lq_hidden_dim": 16, "lq_num_res_blocks": 1}
# A block asserts the published size of its MLP.
MOCHI = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size_x": 48,
    "hidden_size_y": 32,
    "mlp_ratio_x": 256.0,
    "learn_sigma": False,
    "in_channels": 12,
    "qk_norm": True,
    "qkv_bias": False,
    "use_t5": True,
    "t5_feat_dim": 48,
    "timestep_scale": 1000.0,
}
MINIMAX = {
    "hidden_size": 64,
    "num_layers": 2,
    "token_refiner_num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_hidden_size": 128,
    "text_dim": 48,
    "timestep_input_dim": 64,
    "time_embed_hidden_size": 64,
    "time_embed_dim": 32,
    "rope_inv_freq_len": 4,
}
MINIMAX_ALONE = "core refuses more than one row"
ERNIE = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_layers": 2,
    "ffn_hidden_size": 128,
    "text_in_dim": 48,
    "rope_axes_dim": (8, 12, 12),
}

UVIT = {
    "blocks": 5,
    "width": 128,
    "side": 8,
    "text_tokens": 9,
    "text_width": 48,
    "image_blocks": 1,
}

OTHER_CASES = [
    Case(
        "U-ViT",
        "UViT",
        UVIT,
        (4, 8, 8),
        (9, 48),
        lambda t, n: [("image", n), ("other", 1), ("text", t)],
        3,
        tokens=16,
        fixed="its pictures and prompts have one size",
    ),
    Case(
        "U-ViT with text as keys",
        "UViT",
        UVIT | {"caption_blocks": 2, "conditioning": "cross-attention"},
        (4, 8, 8),
        (9, 48),
        lambda t, n: [("image", n), ("other", 1), ("text", t, False)],
        3,
        tokens=16,
        fixed="its pictures and prompts have one size",
    ),
    Case(
        "JoyImage",
        "joyimage.model:JoyImageTransformer3DModel",
        JOYIMAGE,
        (16, 1, 8, 6),
        (9, 48),
        image_text,
        2,
    ),
    Case(
        "JoyImage-Edit",
        "joyimage.model:JoyImageTransformer3DModel",
        JOYIMAGE,
        (16, 1, 8, 6),
        (9, 48),
        lambda t, n: [("image", n + 16 + 4), ("text", t)],
        2,
        references((16, 1, 8, 8), (16, 1, 4, 4)),
    ),
    Case(
        "Mage-Flow",
        "mage_flow.model:MageFlowTransformer2DModel",
        MAGE_FLOW,
        (128, 4, 3),
        (9, 2560),
        text_image,
        2,
        masked(3),
    ),
    Case(
        "Mage-Flow-Edit",
        "mage_flow.model:MageFlowTransformer2DModel",
        MAGE_FLOW,
        (128, 4, 3),
        (9, 2560),
        lambda t, n: [("text", t), ("image", n + 16 + 4)],
        2,
        references((128, 4, 4), (128, 2, 2)),
    ),
    Case(
        "CogVideoX",
        COGVIDEO_CLASS,
        COGVIDEO,
        (16, 3, 8, 6),
        (9, 48),
        lambda t, n: [("text", t), ("image", 3 * n)],
        2,
    ),
    # Two frames a token, of which the last is padded; the first frame is given in 16 channels more.
    Case(
        "CogVideoX 1.5 I2V",
        COGVIDEO_CLASS,
        COGVIDEO | {"patch_size_t": 2, "in_channels": 32, "ofs_embed_dim": 64},
        (16, 3, 8, 6),
        (9, 48),
        lambda t, n: [("text", t), ("image", 2 * n)],
        2,
    ),
    # The model takes no more than its longest prompt.
    Case(
        "PixelDiT",
        "pixeldit.model:PixDiT_T2I",
        PIXELDIT,
        (3, 64, 48),
        (9, 48),
        lambda t, n: [("text", min(t, 7)), ("image", n)],
        2,
        published=pixeldit_checkpoint("core."),
    ),
    Case(
        "PiD",
        "pixeldit.pid:PidNet",
        PIXELDIT | PID,
        (3, 64, 48),
        (5, 48),
        text_image,
        2,
        also(lq_latent=torch.ones(1, 16, 2, 2), degrade_sigma=torch.zeros(1)),
        published=pixeldit_checkpoint(""),
    ),
    Case(
        "Mochi",
        "genmo.joint_model.asymm_models_joint:AsymmDiTJoint",
        MOCHI,
        (12, 2, 8, 6),
        (9, 48),
        lambda t, n: [("image", 2 * n), ("text", t - 3)],
        2,
        masked(3),
    ),
    # Video and audio, which has two channels.
    Case(
        "MiniMax-H3",
        "minimax.model:MiniMaxH3Model",
        MINIMAX,
        ((24, 2, 8, 6), (32, 2, 5)),
        (9, 48),
        lambda t, n: [("text", t), ("other", 2 * 5), ("image", 2 * n)],
        2,
        alone=MINIMAX_ALONE,
    ),
    # The first frame is given, and the prompt holds a picture of two tokens.
    Case(
        "MiniMax-H3 I2V",
        "minimax.model:MiniMaxH3Model",
        MINIMAX,
        ((24, 2, 8, 6), (32, 2, 5)),
        (9, 48),
        lambda t, n: [
            ("text", 2),
            ("image", 2),
            ("text", t - 4),
            ("image", n),
            ("other", 2 * 5),
            ("image", 2 * n),
        ],
        2,
        lambda text, *size: {
            "minimax_keyframes": [
                {"resolved_frame_index": 0, "latent": torch.ones(1, 24, 1, *size)}
            ],
            "minimax_token_tags": torch.tensor([1, 1, 0, 0, 1, 1, 1, 1, 1][:text]),
        },
        alone=MINIMAX_ALONE,
    ),
    Case(
        "Ernie-Image",
        "ernie.model:ErnieImageModel",
        ERNIE,
        (128, 4, 3),
        (9, 48),
        image_text,
        2,
        options=False,
        pieces="dynamo does not trace how its attention, handed no options, gets them",
    ),
]

LUMINA = {
    "patch_size": 2,
    "in_channels": 16,
    "dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "multiple_of": 32,
    "qk_norm": True,
    "cap_feat_dim": 48,
    "axes_dims": [8, 12, 12],
}
LUMINA_CLASS = "lumina.model:NextDiT"
Z_IMAGE = LUMINA | {
    "dim": 256,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "rope_theta": 256.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 8,
}
Z_IMAGE_PIXEL = Z_IMAGE | {
    "patch_size": 8,
    "in_channels": 3,
    "decoder_hidden_size": 32,
    "decoder_num_res_blocks": 1,
    "decoder_in_channels": 192,
}
EXPERTS = "core looks at which experts it chose"
HIDREAM_O1 = {
    "text_config_overrides": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_dims": [4, 2, 2],
    },
    "vision_config_overrides": {
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "depth": 1,
        "num_position_embeddings": 16,
    },
}
HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "caption_channels": [48, 40],
    "text_emb_dim": 24,
    "num_routed_experts": 2,
    "num_activated_experts": 1,
    "axes_dims_rope": [16, 8, 8],
    "max_resolution": [16, 16],
    "llama_layers": [0, 1, 2, 2],
}
OMNIGEN = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 32,
    "axes_dim_rope": [8, 12, 12],
    "timestep_scale": 1000.0,
}
OMNIGEN_CLASS = "omnigen.omnigen2:OmniGen2Transformer2DModel"
BOOGU_CLASS = "boogu.model:BooguTransformer2DModel"
IDEOGRAM = {
    "in_channels": 128,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "intermediate_size": 64,
    "adaln_dim": 16,
    "llm_features_dim": 48,
    "mrope_section": [6, 5, 5],
}
IDEOGRAM_CLASS = "ideogram4.model:Ideogram4Transformer2DModel"
KREA = {
    "features": 64,
    "tdim": 32,
    "txtdim": 24,
    "heads": 2,
    "kvheads": 1,
    "layers": 2,
    "txtlayers": 3,
    "txtheads": 2,
    "txtkvheads": 2,
}
KREA_CLASS = "krea2.model:SingleStreamDiT"
LENS = {
    "in_channels": 128,
    "out_channels": 32,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "enc_hidden_dim": 16,
    "axes_dims_rope": (8, 12, 12),
    "selected_layer_index": (0, 1, 2),
}


def eights(tokens):
    """As many tokens, filled up to a multiple of eight."""
    return -(-tokens // 8) * 8


def filled(text, tokens):
    return [("text", eights(text)), ("image", eights(tokens))]


def llama(text, *size):
    """``conds`` with HiDream's Llama tokens, of every layer, and its pooled vector."""
    tokens = torch.randn(1, 3, 5, 40, generator=torch.manual_seed(7))
    return {"conditioning_llama3": tokens, **pooled(24)(text)}


def whole(*shapes):
    """``conds`` with a mask that takes out nothing, and reference latents of these shapes."""
    refs = references(*shapes) if shapes else also()
    return lambda text, *size: {
        "attention_mask": torch.ones(1, text, dtype=torch.long),
        **refs(text, *size),
    }


def omni(text, *size):
    """``conds`` of Z-Image Omni: two references with a text each, one looked at by SigLIP."""
    generator = torch.manual_seed(8)
    look = SimpleNamespace(
        image_sizes=[(3, 32, 48)], last_hidden_state=torch.randn(1, 6, 24, generator=generator)
    )
    return {
        "clip_vision_outputs": [look],
        "reference_latents_text_embeds": [
            torch.randn(1, tokens, 48, generator=generator) for tokens in (5, 3)
        ],
        **references((16, 8, 8), (16, 4, 4))(text),
    }


def words(text, *size):
    """``conds`` with HiDream-O1's token ids: three of the prompt's frame, words, and the time's."""
    ids = torch.randint(1000, (text,), generator=torch.manual_seed(text))
    ids[:3], ids[-1] = torch.tensor([151644, 872, 198]), 151673
    return {"text_input_ids": ids[None]}


def looked_at():
    """``conds`` with a picture of 32 x 64 for HiDream-O1."""
    return {"reference_latents": [torch.rand(1, 32, 64, 3, generator=torch.manual_seed(11))]}


SINGLE_STREAM_CASES = [
    Case("Lumina 2", LUMINA_CLASS, LUMINA, (16, 8, 6), (9, 48), text_image, 2),
    Case(
        "NewBie",
        LUMINA_CLASS,
        LUMINA | {"clip_text_dim": 24},
        (16, 8, 6),
        (9, 48),
        text_image,
        2,
        pooled(24),
    ),
    # Text and image are filled up to a multiple of pad_tokens_multiple with learned tokens.
    Case("Z-Image", LUMINA_CLASS, Z_IMAGE, (16, 8, 6), (9, 48), filled, 2),
    Case("Z-Image, masked", LUMINA_CLASS, Z_IMAGE, (16, 8, 6), (9, 48), filled, 2, masked(3)),
    # Texts of 5, 3 and 9 tokens; SigLIP's 6, and padding for the reference and the image without.
    Case(
        "Z-Image Omni",
        LUMINA_CLASS,
        Z_IMAGE | {"siglip_feat_dim": 24},
        (16, 8, 6),
        (9, 48),
        lambda t, n: [
            ("text", 8 + 8 + eights(t)),
            ("other", 8 + 8 + 8),
            ("image", 16 + 8 + eights(n)),
        ],
        2,
        omni,
    ),
    Case(
        "Z-Image with references and no SigLIP",
        LUMINA_CLASS,
        Z_IMAGE,
        (16, 8, 6),
        (9, 48),
        lambda t, n: [("text", 8 + 8 + eights(t)), ("image", 16 + 8 + eights(n))],
        2,
        omni,
    ),
    Case(
        "Z-Image, pixel space",
        "lumina.model:NextDiTPixelSpace",
        Z_IMAGE_PIXEL,
        (3, 32, 24),
        (9, 48),
        filled,
        2,
        detected={"image_model": "zimage_pixel"},
    ),
    Case(
        "HiDream-I1",
        "hidream.model:HiDreamImageTransformer2DModel",
        HIDREAM,
        (16, 8, 6),
        (9, 48),
        lambda t, n: [("image", n), ("text", t + 5 + 5)],
        4,
        llama,
        pieces=EXPERTS,
    ),
    # The picture to edit lies beside the one that is drawn.
    Case(
        "HiDream-E1",
        "hidream.model:HiDreamImageTransformer2DModel",
        HIDREAM,
        (16, 8, 6),
        (9, 48),
        lambda t, n: [("image", 2 * n), ("text", t + 5 + 5)],
        4,
        together(llama, lambda text, *size: {"concat_latent_image": torch.ones(1, 16, *size)}),
        pieces=EXPERTS,
    ),
    # The text is read by itself: it is keys only. The token that tells the time is neither.
    Case(
        "HiDream-O1",
        "hidream_o1.model:HiDreamO1Transformer",
        HIDREAM_O1,
        (3, 128, 96),
        (9, 1),
        lambda t, n: [("text", t - 1, False), ("other", 1), ("image", n)],
        2,
        words,
    ),
    # Core makes the reference as large as the picture; the vision encoder's 9 x 14 tokens lie
    # between two more.
    Case(
        "HiDream-O1, editing",
        "hidream_o1.model:HiDreamO1Transformer",
        HIDREAM_O1,
        (3, 128, 96),
        (9, 1),
        lambda t, n: [
            ("text", 3, False),
            ("other", 128, False),
            ("text", t - 4, False),
            ("other", 1),
            ("image", n + (2 * 5 if n == 12 else 3 * 7)),
        ],
        2,
        lambda text, *size: words(text) | looked_at(),
    ),
    Case(
        "OmniGen2",
        OMNIGEN_CLASS,
        OMNIGEN | {"text_feat_dim": 48},
        (16, 8, 6),
        (9, 48),
        text_image,
        2,
        whole(),
    ),
    Case(
        "OmniGen2, editing",
        OMNIGEN_CLASS,
        OMNIGEN | {"text_feat_dim": 48},
        (16, 8, 6),
        (9, 48),
        lambda t, n: [("text", t), ("image", 16 + 4 + n)],
        2,
        whole((16, 8, 8), (16, 4, 4)),
    ),
    Case(
        "Boogu",
        BOOGU_CLASS,
        OMNIGEN | {"num_double_stream_layers": 2, "instruction_feat_dim": 48},
        (16, 8, 6),
        (9, 48),
        text_image,
        4,
        whole(),
    ),
    Case(
        "Boogu, editing",
        BOOGU_CLASS,
        OMNIGEN | {"num_double_stream_layers": 2, "instruction_feat_dim": 48},
        (16, 8, 6),
        (9, 48),
        lambda t, n: [("text", t), ("image", 16 + 4 + n)],
        4,
        whole((16, 8, 8), (16, 4, 4)),
    ),
    Case("Ideogram 4", IDEOGRAM_CLASS, IDEOGRAM, (128, 4, 3), (9, 48), text_image, 2),
    Case(
        "Ideogram 4, masked",
        IDEOGRAM_CLASS,
        IDEOGRAM,
        (128, 4, 3),
        (9, 48),
        text_image,
        2,
        masked(3),
    ),
    Case("Krea 2", KREA_CLASS, KREA, (16, 1, 8, 6), (9, 72), text_image, 2),
    Case(
        "Krea 2, editing",
        KREA_CLASS,
        KREA,
        (16, 1, 8, 6),
        (9, 72),
        lambda t, n: [("text", t), ("image", n + 16 + 4)],
        2,
        lambda text, *size: {
            "reference_latents_method": "index_timestep_zero",
            **references((16, 1, 8, 8), (16, 1, 4, 4))(text),
        },
        needs="process_img",
    ),
    Case(
        "Lens",
        "lens.model:LensTransformer2DModel",
        LENS,
        (128, 4, 3),
        (9, 48),
        image_text,
        2,
        masked(3),
    ),
]


def regional(text, height, width):
    """``conds`` with a mask over text and image, as core's Redux node and regional prompts make."""
    grid = height // 2, width // 2
    tokens = text + grid[0] * grid[1]
    mask = 2 * torch.randn(1, tokens, tokens, generator=torch.manual_seed(7))
    return {"attention_mask": mask, "attention_mask_img_shape": grid}


def glyphs(tokens):
    """``conds`` with ByT5's tokens."""
    return lambda text, *size: {
        "conditioning_byt5small": torch.randn(1, tokens, 1472, generator=torch.manual_seed(8))
    }


def vision(tokens):
    """``conds`` with a picture as SigLIP sees it."""
    states = torch.randn(1, tokens, 1152, generator=torch.manual_seed(9))
    return lambda text, *size: {"clip_vision_output": SimpleNamespace(last_hidden_state=states)}


FLUX2 = {
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "context_in_dim": 48,
    "hidden_size": 64,
    "mlp_ratio": 3.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 8, 8, 8],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "guidance_embed": True,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
LONGCAT = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": None,
    "context_in_dim": 3584,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [1, 2],
}
FLUX1 = LONGCAT | {
    "context_in_dim": 48,
    "vec_in_dim": 32,
    "guidance_embed": True,
    "mlp_ratio": 4.0,
    "txt_ids_dims": [],
}
SD3 = {
    "input_size": None,
    "in_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "num_patches": 32 * 32,
    "pos_embed_max_size": 32,
    "pos_embed_scaling_factor": None,
    "adm_in_channels": 32,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 48, "out_features": 128},
    },
}
SD35 = SD3 | {"qk_norm": "rms"}
SD3_CLASS = "modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper"
OVIS = LONGCAT | {"context_in_dim": 48, "yak_mlp": True, "txt_norm": True}
CHROMA = {
    "in_channels": 64,
    "out_channels": 64,
    "context_in_dim": 48,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 32,
    "n_layers": 2,
    "txt_ids_dims": [],
    "vec_in_dim": None,
}
RADIANCE = CHROMA | {
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 16,
    "nerf_hidden_size": 8,
    "nerf_mlp_ratio": 2,
    "nerf_depth": 1,
    "nerf_max_freqs": 2,
    "nerf_tile_size": 512,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32,
    "use_x0": True,
}
if "use_sequential_txt_ids" in ChromaRadianceParams.__dataclass_fields__:  # from 0.26 on
    RADIANCE["use_sequential_txt_ids"] = True
AURA = {
    "dim": 64,
    "n_layers": 4,
    "n_double_layers": 2,
    "n_heads": 2,
    "global_conddim": 64,
    "cond_seq_dim": 2048,
    "max_seq": 64,
}
HUNYUAN = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 48,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 256,
    "patch_size": [1, 2, 2],
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
HUNYUAN15 = HUNYUAN | {
    "in_channels": 65,
    "out_channels": 32,
    "vec_in_dim": None,
    "patch_size": [1, 1, 1],
    "guidance_embed": False,
    "byt5": True,
    "use_cond_type_embedding": True,
    "vision_in_dim": 1152,
    "meanflow_sum": True,
}
HUNYUAN_IMAGE = HUNYUAN | {
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "patch_size": [1, 1],
    "axes_dim": [16, 16],
    "byt5": True,
    "meanflow": True,
}
REFINER = HUNYUAN_IMAGE | {
    "in_channels": 128,
    "patch_size": [1, 1, 1],
    "axes_dim": [8, 12, 12],
    "byt5": False,
}
MASK = "core fills the mask of one row"
FLUX_CLASS, HUNYUAN_CLASS = "flux.model:Flux", "hunyuan_video.model:HunyuanVideo"
CHROMA_CLASS = "chroma.model:Chroma"


def bfl(state):
    """FLUX's names of norms, of which core makes its own."""
    norm = re.compile(r"(_norm|\.norms\.\d+)\.weight$")
    return {norm.sub(r"\1.scale", key): value for key, value in state.items()}


def tencent(state):
    """HunyuanVideo's names, of which core makes FLUX's."""
    names = (
        (r"mlp\.0\.(weight|bias)$", r"mlp.fc1.\1"),
        (r"mlp\.2\.(weight|bias)$", r"mlp.fc2.\1"),
        (r"(txt_in\.t_embedder|time_in|vector_in|guidance_in)\.in_layer\.", r"\1.mlp.0."),
        (r"(txt_in\.t_embedder|time_in|vector_in|guidance_in)\.out_layer\.", r"\1.mlp.2."),
        (r"(txt_in\.c_embedder)\.in_layer\.", r"\1.linear_1."),
        (r"(txt_in\.c_embedder)\.out_layer\.", r"\1.linear_2."),
        (r"(_mod|modulation)\.lin\.", r"\1.linear."),
        (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
        (r"_attn\.norm\.(q|k)\w+_norm\.(weight|scale)$", r"_attn_\1_norm.weight"),
        (r"\.norm\.(q|k)\w+_norm\.(weight|scale)$", r".\1_norm.weight"),
    )
    renamed = {}
    for key, value in state.items():
        for ours, theirs in names:
            key = re.sub(ours, theirs, key)
        renamed[key] = value
    return renamed


FLUX_LIKE_CASES = [
    Case(
        "FLUX.1", FLUX_CLASS, FLUX1, (16, 8, 6), (9, 48), text_image, 4, pooled(32), published=bfl
    ),
    Case(
        "FLUX.1 schnell",
        FLUX_CLASS,
        FLUX1 | {"guidance_embed": False},
        (16, 8, 6),
        (9, 48),
        text_image,
        4,
        pooled(32),
        published=bfl,
    ),
    Case(
        "FLUX.1 Kontext",
        FLUX_CLASS,
        FLUX1,
        (16, 8, 6),
        (9, 48),
        lambda t, n: [("text", t), ("image", n + 16)],
        4,
        together(pooled(32), references((16, 8, 8))),
        published=bfl,
    ),
    # Its last block's text gives keys and is not asked for more.
    Case("SD3", SD3_CLASS, SD3, (16, 8, 6), (9, 48), text_image, 2, pooled(32)),
    Case("SD3.5-Large", SD3_CLASS, SD35, (16, 8, 6), (9, 48), text_image, 2, pooled(32)),
    Case(
        "SD3.5-Medium",
        SD3_CLASS,
        SD35 | {"x_block_self_attn_layers": [0]},
        (16, 8, 6),
        (9, 48),
        text_image,
        2,
        pooled(32),
    ),
    # Core fills up its text to 512 tokens.
    Case(
        "FLUX.2",
        FLUX_CLASS,
        FLUX2,
        (128, 4, 3),
        (9, 48),
        lambda t, n: [("text", 512), ("image", n)],
        4,
        published=bfl,
    ),
    Case(
        "FLUX.2 with references",
        FLUX_CLASS,
        FLUX2,
        (128, 4, 3),
        (9, 48),
        lambda t, n: [("text", 512), ("image", n + 16 + 4)],
        4,
        references((128, 4, 4), (128, 2, 2)),
        published=bfl,
    ),
    Case(
        "FLUX.2 Klein, references without noise",
        FLUX_CLASS,
        FLUX2 | {"guidance_embed": False},
        (128, 4, 3),
        (9, 48),
        lambda t, n: [("text", 512), ("image", n + 4)],
        4,
        together(references((128, 2, 2)), also(reference_latents_method="index_timestep_zero")),
        published=bfl,
    ),
    Case("LongCat-Image", FLUX_CLASS, LONGCAT, (16, 8, 6), (9, 3584), text_image, 4),
    Case("Ovis-Image", FLUX_CLASS, OVIS, (16, 8, 6), (9, 48), text_image, 4),
    Case("Chroma", CHROMA_CLASS, CHROMA, (16, 8, 6), (9, 48), text_image, 4, published=bfl),
    Case(
        "Chroma, regional",
        CHROMA_CLASS,
        CHROMA,
        (16, 8, 6),
        (9, 48),
        text_image,
        4,
        regional,
        published=bfl,
    ),
    Case(
        "Chroma Radiance",
        "chroma_radiance.model:ChromaRadiance",
        RADIANCE,
        (3, 64, 48),
        (9, 48),
        text_image,
        4,
    ),
    Case(
        "AuraFlow",
        "aura.mmdit:MMDiT",
        AURA,
        (4, 8, 6),
        (9, 2048),
        lambda t, n: [("other", 8), ("text", t), ("image", n)],
        4,
    ),
    Case(
        "HunyuanVideo",
        HUNYUAN_CLASS,
        HUNYUAN,
        (16, 3, 8, 6),
        (9, 48),
        lambda t, n: [("text", t), ("image", 3 * n)],
        4,
        together(pooled(768), masked(3)),
        alone=MASK,
        published=tencent,
    ),
    # The reference comes first.
    Case(
        "HunyuanVideo Custom",
        HUNYUAN_CLASS,
        HUNYUAN,
        (16, 3, 8, 6),
        (9, 48),
        lambda t, n: [("text", t), ("image", n + 3 * n)],
        4,
        together(pooled(768), lambda text, *size: {"ref_latent": torch.ones(1, 16, 1, *size)}),
        alone="core gives positions to the reference of one row",
        published=tencent,
    ),
    Case(
        "HunyuanVideo I2V",
        HUNYUAN_CLASS,
        HUNYUAN | {"in_channels": 33},
        (16, 3, 8, 6),
        (9, 48),
        lambda t, n: [("text", t), ("image", 3 * n)],
        4,
        together(pooled(768), also(guiding_frame_index=0)),
        alone="core modulates the first frame of one row",
        published=tencent,
    ),
    Case(
        "HunyuanVideo 1.5",
        HUNYUAN_CLASS,
        HUNYUAN15,
        (32, 3, 4, 3),
        (9, 48),
        lambda t, n: [("text", 5 + t), ("image", 3 * n)],
        4,
        glyphs(5),
    ),
    Case(
        "HunyuanVideo 1.5, masked",
        HUNYUAN_CLASS,
        HUNYUAN15,
        (32, 3, 4, 3),
        (9, 48),
        lambda t, n: [("text", t), ("image", 3 * n)],
        4,
        masked(3),
        alone=MASK,
    ),
    Case(
        "HunyuanVideo 1.5 I2V",
        HUNYUAN_CLASS,
        HUNYUAN15,
        (32, 3, 4, 3),
        (9, 48),
        lambda t, n: [("other", 7), ("text", 5 + t), ("image", 3 * n)],
        4,
        together(glyphs(5), vision(7)),
    ),
    Case(
        "HunyuanImage 2.1",
        HUNYUAN_CLASS,
        HUNYUAN_IMAGE,
        (64, 4, 3),
        (9, 48),
        lambda t, n: [("text", t + 5), ("image", n)],
        4,
        glyphs(5),
    ),
    Case(
        "HunyuanImage 2.1, masked",
        HUNYUAN_CLASS,
        HUNYUAN_IMAGE,
        (64, 4, 3),
        (9, 48),
        text_image,
        4,
        masked(3),
        alone=MASK,
    ),
    Case("HunyuanImage 2.1 Refiner", HUNYUAN_CLASS, REFINER, (64, 1, 4, 3), (9, 48), text_image, 4),
]

qwen_image21.install()
QWEN21 = {
    "in_channels": 64,
    "out_channels": 64,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "context_in_dim": 48,
}
QWEN21_CLASS = "qwen_image21.model:QwenImage21Transformer2DModel"
QWEN21_REFS = references((64, 4, 4), (64, 2, 2))

# A text is causal, and nothing attends to the picture but itself.
QWEN21_CASES = [
    Case(
        "Qwen-Image 2.1, a stand-in",
        QWEN21_CLASS,
        QWEN21,
        (64, 4, 3),
        (9, 48),
        lambda t, n: [("text", t, False), ("image", n)],
        2,
        detected={"image_model": "qwen_image21"},
    ),
    Case(
        "Qwen-Image 2.1, a stand-in with references",
        QWEN21_CLASS,
        QWEN21,
        (64, 4, 3),
        (9, 48),
        lambda t, n: [("text", t, False), ("image", 16 + 4, False), ("image", n)],
        2,
        QWEN21_REFS,
        detected={"image_model": "qwen_image21"},
    ),
    Case(
        "Qwen-Image 2.1, a stand-in with references in the text",
        QWEN21_CLASS,
        QWEN21,
        (64, 4, 3),
        (9, 48),
        lambda t, n: [
            ("text", 2, False),
            ("image", 16, False),
            ("text", 3, False),
            ("image", 4, False),
            ("text", t - 5, False),
            ("image", n),
        ],
        2,
        together(QWEN21_REFS, also(image_slots=[2, 5])),
        detected={"image_model": "qwen_image21"},
    ),
]

CASES = [*FLUX_LIKE_CASES, *OTHER_CASES, *QWEN_CASES, *SINGLE_STREAM_CASES, *QWEN21_CASES]


def exists(case):
    return case.transformer == "UViT" or class_of(case) is not None


def named(*names):
    return [case for case in CASES if case.name in names]


ONE_EACH = list({case.transformer: case for case in reversed(CASES)}.values())[::-1]
"""The first case of each class of transformer, and those that take another way through it."""
ONE_EACH += named("FLUX.2", "HunyuanVideo 1.5", "Z-Image")
