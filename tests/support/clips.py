"""Text encoders as core's loader makes them, of seeded weights and tiny."""

import functools
import importlib

import comfy.model_patcher
import comfy.sd
import torch

TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
TINY_T5 = {"num_layers": 1, "d_model": 64, "d_kv": 8, "d_ff": 16, "num_heads": 2}
TINY_CLIP = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
}
CAUSAL = "qwen25_7b", "qwen3_4b", "qwen3_2b", "qwen25_3b", "qwen3vl_4b", "qwen3vl_8b", "llama"
OPTIONS = {f"{name}_model_config": TINY for name in CAUSAL}
OPTIONS |= {
    "t5xxl_model_config": TINY_T5,
    "clip_l_model_config": TINY_CLIP,
    "clip_g_model_config": TINY_CLIP,
}
CPU = torch.device("cpu")
FLUX = "flux.FluxTokenizer", "flux.FluxClipModel"
SD3_WITHOUT_T5 = "sd3_clip.SD3Tokenizer", "sd3_clip.SD3ClipModel"

CLIPS = {
    "Qwen-Image": ("qwen_image.QwenImageTokenizer", "qwen_image.QwenImageTEModel"),
    "Z-Image": ("z_image.ZImageTokenizer", "z_image.ZImageTEModel"),
    "FLUX.2 Klein": ("flux.KleinTokenizer", "flux.klein_te"),
    "Krea 2": ("krea2.Krea2Tokenizer", "krea2.Krea2TEModel"),
    "Ovis-Image": ("ovis.OvisTokenizer", "ovis.OvisTEModel"),
    "LongCat-Image": ("longcat_image.LongCatImageTokenizer", "longcat_image.LongCatImageTEModel"),
    "OmniGen2": ("omnigen2.Omnigen2Tokenizer", "omnigen2.Omnigen2Model"),
    "Boogu": ("boogu.BooguTokenizer", "boogu.BooguTEModel"),
    "Mage-Flow": ("mage_flow.MageFlowTokenizer", "mage_flow.MageFlowTEModel"),
    "JoyImage": ("joyimage.JoyImageTokenizer", "joyimage.JoyImageTEModel"),
    "HiDream-O1": ("hidream_o1.HiDreamO1Tokenizer", "hidream_o1.HiDreamO1TE"),
    "HunyuanVideo": ("hunyuan_video.HunyuanVideoTokenizer", "hunyuan_video.HunyuanVideoClipModel"),
}


def part(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"comfy.text_encoders.{module}"), name)


def clip_of(tokenizer, encoder, folder=None, file=None, **how):
    """A CLIP as core's loader makes it, of seeded weights and tiny; ``file`` has its tokenizer."""
    if folder or file:
        return _made(tokenizer, encoder, folder, file, **how)
    return _kept(tokenizer, encoder, repr(OPTIONS), **how)


@functools.lru_cache(4)
def _kept(tokenizer, encoder, options, **how):
    """One that the next test may have too: reading a tokenizer takes a second."""
    return _made(tokenizer, encoder, None, None, **how)


def _made(tokenizer, encoder, folder, file, **how):
    clip = comfy.sd.CLIP(no_init=True)
    held = {} if file is None else {"tokenizer_data": file}
    clip.tokenizer = part(tokenizer)(embedding_directory=folder, **held)
    clip.tokenizer_options, clip.layer_idx = {}, None
    clip.use_clip_schedule, clip.apply_hooks_to_conds = False, None
    build = part(encoder)
    build = build() if build.__name__ in ("klein_te", "flux2_te", "hidream_clip") else build
    if encoder.endswith("HiDreamO1TE"):
        clip.cond_stage_model = build()
        return clip
    encoder = build(device="meta", dtype=torch.float32, model_options=dict(OPTIONS), **how)
    generator = torch.Generator().manual_seed(0)
    for module in encoder.modules():
        if "visual" in module._modules:  # large, and not asked
            module._modules["visual"] = torch.nn.Identity()
        for key, weight in module._parameters.items():
            if weight is not None:
                noise = 0.3 * torch.randn(weight.shape, generator=generator)
                module._parameters[key] = torch.nn.Parameter(noise, requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.arange(buffer.numel()).view(buffer.shape)
    clip.cond_stage_model = encoder
    clip.patcher = comfy.model_patcher.ModelPatcher(encoder, CPU, CPU)
    clip.patcher.is_clip = True
    return clip
