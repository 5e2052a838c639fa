"""An independent dense float64 reference: attention, one call of a model, and a whole run.

It shares nothing with the pack: the text length is told, gamma is a matrix over the logits, and
the window is the authors' "first n steps".
"""

import copy

import comfy.model_management
import torch


def dense_attention(q, k, v, factor, mask=None):
    """Softmax of ``factor * q k / sqrt(D) + mask``, in float64; q, k, v ``(B, heads, N, D)``."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 * factor
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    return logits.softmax(-1) @ v


def factor_matrix(length, text, gamma):
    """Factors of the logits: gamma where a query outside ``text`` meets a key inside; (N, N)."""
    is_text = torch.zeros(length, dtype=torch.bool)
    is_text[text] = True
    return torch.where(~is_text[:, None] & is_text[None, :], gamma, 1.0).double()


def dense_override(gamma, text, length, calls=None):
    """An attention override for core: Eq. 10 where the attention is over ``length`` tokens.

    gamma : float or one per row; text : number of leading text tokens.
    """

    def override(
        func, q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs
    ):
        if not skip_reshape:
            q, k, v = (x.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        rows = [gamma] * q.shape[0] if isinstance(gamma, float) else gamma
        if k.shape[2] == length:
            factor = torch.stack([factor_matrix(length, slice(text), g) for g in rows])[:, None]
            if calls is not None:
                calls.append(length)
        else:
            factor = 1.0
        if mask is not None:
            mask = mask[:, None] if mask.ndim == 3 else mask
        out = dense_attention(q, k, v, factor, mask)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return override


def to_float64(model):
    """A float64 copy of a loaded model's transformer."""
    transformer = copy.deepcopy(model.model.diffusion_model).double()
    transformer.dtype = torch.float64
    return transformer


def velocity(transformer, model, x, sigma, text, override, extra):
    """The transformer's output for x at sigma (one per row); float64."""
    options = {"optimized_attention_override": override}
    t = model.model.model_sampling.timestep(sigma).double()
    conds = {
        name: [x.double() for x in value] if isinstance(value, list) else value.double()
        for name, value in extra.items()
    }
    # Core's fast RoPE takes no float64; the one it trains with does.
    comfy.model_management.in_training = True
    try:
        return transformer(
            x.double(),
            t,
            context=text.double(),
            transformer_options=options,
            **conds,
        )
    finally:
        comfy.model_management.in_training = False


def image_tokens(latent):
    """Image tokens of a latent ``(B, C, H, W)``, two by two."""
    return -(-latent.shape[-2] // 2) * -(-latent.shape[-1] // 2)


def euler(model, noise, sigmas, positive, negative, cfg, gamma, first_steps, extra, concat=None):
    """A whole Euler run with the authors' gate: gamma in the first steps, for both halves of CFG,
    or one gamma each; ``concat`` is what the model gets as further channels.

    Returns latents as core's sampler does, in float64.
    """
    transformer = to_float64(model)
    x = noise.double() * sigmas[0]
    more_channels = [] if concat is None else [concat.double()]
    for i in range(len(sigmas) - 1):
        sigma, following = sigmas[i].double(), sigmas[i + 1].double()
        outputs = []
        gammas = gamma if isinstance(gamma, tuple) else (gamma, gamma)
        for text, more, factor in zip((positive, negative), extra, gammas, strict=True):
            length = text.shape[1] + image_tokens(x)
            override = dense_override(factor if i < first_steps else 1.0, text.shape[1], length)
            seen = torch.cat([x, *more_channels], 1)
            outputs.append(velocity(transformer, model, seen, sigma[None], text, override, more))
        v = outputs[1] + cfg * (outputs[0] - outputs[1])
        x = x + (following - sigma) * v
    return model.model.process_latent_out(x)


TEXT, SIZE = 7, (16, 16)


def dense(model, gamma=1.4, text=TEXT, size=SIZE, more=0, threshold=0.0, calls=None):
    """The model with Eq. 10 in dense float64, in all calls at t >= threshold."""
    lengths = [text + image_tokens(torch.empty(1, 16, *size)) + more]
    return dense_in(model, lengths, gamma, text, threshold, calls)


def dense_in(model, lengths, gamma=1.4, text=TEXT, threshold=0.0, calls=None):
    """The same in attention of several lengths; ``calls`` gets t of each call."""

    def override(func, q, k, v, heads, **kwargs):
        length = k.shape[2 if kwargs.get("skip_reshape") else 1]
        t = 1000 * float(kwargs["transformer_options"]["sigmas"][0])
        if calls is not None and t not in calls[-1:]:
            calls.append(t)
        adjusted = length in lengths and t >= threshold
        inner = dense_override(gamma if adjusted else 1.0, text, length)
        return inner(func, q, k, v, heads, **kwargs).to(q.dtype)

    return attending(model, override)


def attending(model, override):
    """The model with an attention override in ComfyUI's one slot, for good."""
    model = model.clone()
    options = model.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = override
    return model
