"""A small stand-in for ComfyUI's Qwen-Image 2.1, for versions that do not have it yet.

Written from a description of that model, with its names where the pack meets them: the order of its
tokens, the arguments of its blocks, the attention that these are handed, and the prefix (text and
references) whose keys and values it keeps. Norms, feed-forward and positions are simpler.
"""

import importlib
import sys
from types import ModuleType

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import nn

PLACE = "comfy.ldm.qwen_image21"


def install():
    """Have core load the stand-in as its own, unless it has the model."""
    try:
        importlib.import_module(PLACE)
    except ImportError:
        package = sys.modules[PLACE] = ModuleType(PLACE)
        package.model = sys.modules[f"{PLACE}.model"] = sys.modules[__name__]
        comfy.supported_models.models.append(Config)


def attend(q, k, v, heads, options, mask=None, kernel=None):
    """Core's attention for ``(b, n, heads, d)``."""
    q, k, v = (x.flatten(2) for x in (q, k, v))
    return optimized_attention(
        q, k, v, heads, mask=mask, transformer_options=options, preferred_attention=kernel
    )


def block_causal_attention(segments, transformer_options, cache=None, block_index=0, prefix_len=0):
    """Each segment asks all up to its own end, one call of core's for each."""

    def attention(q, k, v, heads, preferred_attention=None):
        if cache is not None:
            cache[block_index] = k[:, :prefix_len], v[:, :prefix_len]
        rows = []
        for start, end, mask in segments:
            ask = q[:, start:end], k[:, :end], v[:, :end], heads
            rows.append(attend(*ask, transformer_options, mask, preferred_attention))
        return torch.cat(rows, 1)

    return attention


def prefix_cached_attention(prefix_k, prefix_v, transformer_options):
    """The picture asks the kept keys and its own."""

    def attention(q, k, v, heads, preferred_attention=None):
        keys, values = torch.cat([prefix_k, k], 1), torch.cat([prefix_v, v], 1)
        return attend(q, keys, values, heads, transformer_options, None, preferred_attention)

    return attention


class Attention(nn.Module):
    def __init__(self, dim, heads, operations, **how):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (
            operations.Linear(dim, dim, **how) for _ in range(4)
        )

    def forward(self, x, pe, attn_fn, prefix_len, transformer_options={}):  # noqa: B006
        places = x + pe
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1))
            for layer, y in ((self.to_q, places), (self.to_k, places), (self.to_v, x))
        )
        return self.to_out(attn_fn(q, k, v, self.heads, preferred_attention=None))


class Block(nn.Module):
    """Modulated by the time where the picture is, and always alike before it."""

    def __init__(self, dim, heads, operations, **how):
        super().__init__()
        self.norm1, self.norm2 = (operations.LayerNorm(dim, **how) for _ in range(2))
        self.attn = Attention(dim, heads, operations, **how)
        self.mlp = operations.Linear(dim, dim, **how)

    def forward(self, x, mod, pe, attn_fn, prefix_len, transformer_options={}):  # noqa: B006
        prefix, image = mod
        scale = torch.cat(
            [prefix.expand(len(x), prefix_len, -1), image.expand(-1, x.shape[1] - prefix_len, -1)],
            1,
        )
        y = self.norm1(x) * (1 + scale)
        x = x + self.attn(y, pe, attn_fn, prefix_len, transformer_options)
        return x + self.mlp(nn.functional.silu(self.norm2(x) * (1 + scale)))


class QwenImage21Transformer2DModel(nn.Module):
    def __init__(
        self,
        in_channels,
        out_channels,
        num_layers,
        attention_head_dim,
        num_attention_heads,
        context_in_dim,
        image_model=None,
        dtype=None,
        device=None,
        operations=None,
    ):
        super().__init__()
        self.dtype = dtype
        how = {"dtype": dtype, "device": device}
        dim = attention_head_dim * num_attention_heads
        self.txt_in = operations.Linear(context_in_dim, dim, **how)
        self.img_in = operations.Linear(in_channels, dim, **how)
        self.modulation = operations.Linear(1, dim, **how)
        self.transformer_blocks = nn.ModuleList(
            Block(dim, num_attention_heads, operations, **how) for _ in range(num_layers)
        )
        self.proj_out = operations.Linear(dim, out_channels, **how)
        self.reset_prefix_cache(False)

    def reset_prefix_cache(self, enabled):
        """At the begin and the end of a run."""
        self.prefix_cache, self.prefix_cache_enabled = [], enabled

    def kept(self, *inputs):
        """What is kept of a prefix, by block; and whether it is filled yet."""
        for known, blocks in self.prefix_cache:
            if len(known) == len(inputs) and all(map(torch.equal, known, inputs)):
                return blocks, True
        self.prefix_cache.append((inputs, {}))
        return self.prefix_cache[-1][1], False

    def sequence(self, x, context, references, slots):
        """``[text with references in it | picture]``, positions, and segments with their masks."""
        text = self.txt_in(context)
        slots = [*slots, *[text.shape[1]] * len(references)][: len(references)]
        parts, segments, begin, length = [], [], 0, 0
        for end, image in zip([*slots, text.shape[1]], [*references, x], strict=True):
            for part, is_text in ((text[:, begin:end], True), (self.tokens(image), False)):
                if part.shape[1]:
                    stop = length + part.shape[1]
                    causal = torch.ones(part.shape[1], stop, dtype=torch.bool).tril(length)
                    segments.append((length, stop, causal if is_text else None))
                    parts.append(part)
                    length = stop
            begin = end
        angles = torch.arange(length)[:, None] / torch.arange(1, text.shape[2] + 1)
        return torch.cat(parts, 1), angles.sin().to(text)[None], segments

    def tokens(self, image):
        return self.img_in(image.flatten(2).transpose(1, 2))

    def forward(
        self,
        x,
        timestep,
        context,
        ref_latents=None,
        image_slots=None,
        transformer_options={},  # noqa: B006
        **kwargs,
    ):
        references, slots = list(ref_latents or ()), list(image_slots or ())
        states, pe, segments = self.sequence(x, context, references, slots)
        num_before = states.shape[1] - x[0, 0].numel()
        times = torch.cat([timestep.to(x), timestep.new_zeros(1).to(x)])
        rows = torch.tanh(self.modulation(times[:, None]))[:, None]
        mod, options = (rows[-1:], rows[:-1]), transformer_options
        replaced = options.get("patches_replace", {}).get("dit", {})
        cache, is_filled, before = None, False, None
        if self.prefix_cache_enabled and num_before and not replaced:
            wanted = torch.tensor([*x.shape, *slots])
            cache, is_filled = self.kept(context, wanted, *references)
            before, states = states[:, :num_before], states[:, num_before:]
            pe_before, pe, rest = pe[:, :num_before], pe[:, num_before:], 0
        else:
            rest = num_before
        for i, block in enumerate(self.transformer_blocks):
            if cache is None:
                attention = block_causal_attention(segments, options, cache, i, rest)
            else:
                if not is_filled:
                    own = block_causal_attention(segments[:-1], options, cache, i, num_before)
                    before = block(before, mod, pe_before, own, num_before, options)
                attention = prefix_cached_attention(*cache[i], options)
            if ("single_block", i) in replaced:

                def run(args, block=block, attention=attention):
                    options = args["transformer_options"]
                    return {"img": block(args["img"], mod, args["pe"], attention, rest, options)}

                args = {
                    "img": states,
                    "pe": pe,
                    "attn_fn": attention,
                    "transformer_options": options,
                }
                states = replaced["single_block", i](args, {"original_block": run})["img"]
            else:
                states = block(states, mod, pe, attention, rest, options)
        return self.proj_out(states[:, rest:]).transpose(1, 2).unflatten(2, x.shape[2:])


class Latents(comfy.latent_formats.LatentFormat):
    latent_channels = 64


class QwenImage21(comfy.model_base.QwenImage):
    def __init__(self, model_config, device=None):
        comfy.model_base.BaseModel.__init__(
            self,
            model_config,
            comfy.model_base.ModelType.FLUX,
            device=device,
            unet_model=QwenImage21Transformer2DModel,
        )

    def extra_conds(self, **kwargs):
        slots = kwargs.get("image_slots")
        more = {} if slots is None else {"image_slots": comfy.conds.CONDConstant(slots)}
        return super().extra_conds(**kwargs) | more


class Config(comfy.supported_models.QwenImage):
    unet_config = {"image_model": "qwen_image21"}  # noqa: RUF012
    latent_format = Latents

    def get_model(self, state_dict, prefix="", device=None):
        return QwenImage21(self, device=device)
