"""Words that weigh, dense in float64; and conditionings that carry them."""

import sys

import torch

Words = sys.modules["taca_pack.taca.words"].Words
PromptTokens = sys.modules["taca_pack.taca.prompt_tokens"].PromptTokens
attach = sys.modules["taca_pack.taca.conditioning"].attach


def dense(q, k, v, w, is_image, factor=1.0, mask=None, hidden=None):
    """sum w e^s v / sum |w| e^s for image queries, plain attention for others; float64.

    w ``(b, n)`` over keys; hidden ``(b, n, n)`` has the text that does not see the other.
    """
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 * factor
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 3 else mask
        logits = (
            logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    odds = (logits - logits.amax(-1, keepdim=True)).exp()
    w = w.double()[:, None, None, :].expand_as(odds)
    w = torch.where(is_image[None, None, :, None], w, 1.0)
    if hidden is not None:
        w = w.masked_fill(hidden[:, None] & ~is_image[None, None, :, None], 0.0)
    return (w * odds) @ v / (w.abs() * odds).sum(-1, keepdim=True)


def weighed(conditioning, weights, any_model=True, **how):
    """A conditioning with these weights."""
    table = ((),) * (len(weights) - how.get("num_avoided", 0))
    words = Words(PromptTokens("", table), tuple(weights), (("it", 2.0),), **how)
    return attach(conditioning, words, any_model=any_model)


def dense_words(weights, gamma=1.0, inside=lambda sigma: True, threshold=0.97, num_avoided=0):
    """Core's override: weights where a joint attention is over these text tokens and an image."""

    def override(
        func,
        q,
        k,
        v,
        heads,
        mask=None,
        skip_reshape=False,
        skip_output_reshape=False,
        transformer_options=None,
        **kwargs,
    ):
        if not skip_reshape:
            q, k, v = (x.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        n, sigma = k.shape[2], float(transformer_options["sigmas"][0])
        num_text = next((t for t in weights if isinstance(t, int) and n - t in (64, 32)), 0)
        chunks = transformer_options["cond_or_uncond"]
        w = torch.ones(len(chunks), n)
        is_image = torch.arange(n) >= num_text
        if num_text and inside(sigma):
            for row, chunk in zip(w, chunks, strict=True):
                row[:num_text] = torch.tensor(weights.get((num_text, chunk), weights[num_text]))
        w = w.repeat_interleave(len(q) // len(chunks), 0)
        factor = torch.ones(n, n, dtype=torch.float64)
        if num_text and sigma >= threshold:
            factor[num_text:, :num_text] = torch.as_tensor(gamma)  # of all, or of each text token
        hidden = None
        if num_avoided and num_text == 10:
            is_avoided = ~is_image & (torch.arange(n) >= num_text - num_avoided)
            is_own = ~is_image & ~is_avoided
            hidden = is_avoided[:, None] & is_own | is_own[:, None] & is_avoided
            hidden = hidden[None]
        out = dense(q, k, v, w, is_image, factor, mask, hidden).to(q)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return override


def by_reference(model, override):
    """A clone of a model in which this override attends."""
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


PROMPT = [1.0, 2.0, 1.0, 0.0, -1.0, 0.5, 1.0]
