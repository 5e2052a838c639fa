"""Runs of the families' tiny models, ours and with dense float64 attention."""

import sys
from functools import partial

import pytest
import torch
from comfy.patcher_extension import WrappersMP

import nodes
from support import families, words
from support.reference import dense_attention

TABLE = sys.modules["taca_pack.taca.families"]


def sample(model, case, steps=1, cfg=1.0, seed=3, batch=1, shorter=0, positive=None):
    """A run through core's KSampler function, with a negative prompt that may be shorter."""
    positive = positive or families.conditioning(case)
    negative = families.conditioning(case, seed=5, shorter=shorter)
    samples = nodes.common_ksampler(
        model, seed, steps, cfg, "euler", "simple", positive, negative, families.empty(case, batch)
    )[0]["samples"]
    return torch.cat([s.flatten() for s in samples.unbind()]) if samples.is_nested else samples


def factors(spans, gamma):
    """Factors of the logits ``(queries, keys)`` of a sequence: Eq. 10."""
    kinds, asks = [], []
    for kind, length, *more in spans:
        kinds += [kind] * length
        asks += [not more] * length
    is_image, is_text = (
        torch.tensor([kind == wanted for kind in kinds]) for wanted in ("image", "text")
    )
    adjusted = torch.where(is_image[:, None] & is_text[None, :], gamma, 1.0).double()
    return adjusted[torch.tensor(asks)]


def dense(model, case, gamma, calls=None, texts=(), looks=None, weights=None):
    """The model with dense attention in place of every kernel, and Eq. 10 in the joint ones, which
    are told by their lengths, for prompts of so many tokens. Keys can have weights, by place."""
    joint = [factors(case.spans(text, case.tokens), gamma) for text in texts or case.text[:1]]
    by_shape = {adjusted.shape: adjusted for adjusted in joint}

    def override(
        func, q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs
    ):
        if not skip_reshape:
            q, k, v = (x.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        adjusted = by_shape.get((q.shape[2], k.shape[2]))
        if adjusted is not None and calls is not None:
            calls.append(q.shape[0])
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        if adjusted is not None and looks is not None:
            looks(q, k, adjusted, mask)
        if adjusted is not None and weights:
            out = weighted(q, k, v, case, weights, mask).to(q.dtype)
        else:
            out = dense_attention(q, k, v, 1.0 if adjusted is None else adjusted, mask).to(q.dtype)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = override

    def around(executor, *args, **kwargs):
        module = sys.modules[type(executor.class_obj.diffusion_model).__module__]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "optimized_attention", partial(override, None))
            return executor(*args, **kwargs)

    if not case.options:
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "dense", around)
    return model


def weighted(q, k, v, case, weights, mask):
    """Attention whose keys weigh for image queries."""
    spans = case.spans(case.text[0], case.tokens)
    asks = [kind for kind, length, *more in spans for _ in range(length) if not more]
    w = torch.ones(1, k.shape[2])
    w[0, list(weights)] = torch.tensor(list(weights.values()))
    return words.dense(q, k, v, w, torch.tensor([kind == "image" for kind in asks]), mask=mask)


def tell(record_property, model, case, texts):
    """For ``support/family_table.py``: a model's family, and the tokens it is tested with."""
    record_property("family", TABLE.family_of(model.model.diffusion_model).name)
    for text in texts:
        for kind in ("text", "image"):
            spans = case.spans(text, case.tokens)
            record_property(kind, sum(length for each, length, *_ in spans if each == kind))
