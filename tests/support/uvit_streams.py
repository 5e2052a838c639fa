"""Intermediate fusion by the facts of its author's code, in NumPy's float64; shares nothing."""

import numpy as np
from scipy.special import erf, softmax


def streams(weights, x, t, context, heads=2, gamma=1.0):
    """The noise that a U-ViT of the author's parameter names predicts.

    Which variant it is, and how many blocks of each kind it has, is asked of the names too. gamma
    multiplies the logits of the image's queries and the text's keys.
    """
    w = {name: weight.double().numpy() for name, weight in weights.items()}
    x, t, context = (each.double().numpy() for each in (x, t, context))
    batch, channels, side, _ = x.shape
    width, _, p, _ = w["patch_embed.proj.weight"].shape
    grid = side // p
    number = grid * grid
    cross = "mid_block.attn.q.weight" in w

    def linear(name, z):
        return z @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def normalised(name, z):
        z = z - z.mean(-1, keepdims=True)
        z = z / np.sqrt((z * z).mean(-1, keepdims=True) + 1e-5)
        return z * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(q, k, v, is_text):
        out = np.empty_like(q)
        for head in np.split(np.arange(width), heads):
            logits = q[..., head] @ k[..., head].swapaxes(1, 2) / np.sqrt(len(head))
            image = np.arange(q.shape[1]) < number  # the time token comes after the image's
            logits = np.where(image[:, None] & is_text, gamma * logits, logits)
            out[..., head] = softmax(logits, -1) @ v[..., head]
        return out

    def block(name, z, text=None, skip=None):
        """``z`` is what asks; ``text``, with cross, the keys beside it."""
        if skip is not None:
            z = linear(f"{name}.skip_linear", np.concatenate([z, skip], 2))
        everything = z if text is None else np.concatenate([z, text], 1)
        seen = normalised(f"{name}.norm1", everything)
        if cross:
            q = linear(f"{name}.attn.q", seen[:, : z.shape[1]])
            k, v = np.split(linear(f"{name}.attn.kv", seen), 2, -1)
        else:
            q, k, v = np.split(linear(f"{name}.attn.qkv", seen), 3, -1)
        is_text = np.arange(seen.shape[1]) > number
        z = z + linear(f"{name}.attn.proj", attention(q, k, v, is_text))
        hidden = linear(f"{name}.mlp.fc1", normalised(f"{name}.norm2", z))
        return z + linear(f"{name}.mlp.fc2", hidden * (1 + erf(hidden / np.sqrt(2))) / 2)

    def named(part):
        found = {name.split(".")[1] for name in w if name.startswith(part + ".")}
        return [f"{part}.{i}" for i in sorted(map(int, found))]

    pieces = x.reshape(batch, channels, grid, p, grid, p).transpose(0, 2, 4, 1, 3, 5)
    kernel = w["patch_embed.proj.weight"].reshape(width, -1)
    image = pieces.reshape(batch, number, -1) @ kernel.T + w["patch_embed.proj.bias"]
    rates = np.exp(-np.log(10000) * np.arange(width // 2) / (width // 2))
    time = np.concatenate([np.cos(t[:, None] * rates), np.sin(t[:, None] * rates)], 1)
    position = w["pos_embed"]
    z = np.concatenate([image, time[:, None]], 1) + position[:, : number + 1]
    text = linear("context_embed", context) + position[:, number + 1 :]

    kept = []
    for name in named("image_blocks"):
        kept.append(z := block(name, z))
    for name in named("caption_blocks"):
        text = block(name, text)
    if not cross:
        z = np.concatenate([z, text], 1)
    beside = text if cross else None
    for name in named("joint_blocks"):
        kept.append(z := block(name, z, beside))
    z = block("mid_block", z, beside)
    for name in named("joint_skip_blocks"):
        z = block(name, z, beside, kept.pop())
    z = z[:, : number + 1]
    for name in named("image_skip_blocks"):
        z = block(name, z, None, kept.pop())
    assert not kept

    out = linear("decoder_pred", normalised("norm", z))[:, :number]
    out = out.reshape(batch, grid, grid, p, p, channels).transpose(0, 5, 1, 3, 2, 4)
    padded = np.pad(out.reshape(batch, channels, side, side), ((0, 0), (0, 0), (1, 1), (1, 1)))
    final = np.zeros((batch, channels, side, side)) + w["final_layer.bias"][:, None, None]
    for i in range(3):
        for j in range(3):
            window = padded[:, :, i : i + side, j : j + side]
            final += np.einsum("oc,bchw->bohw", w["final_layer.weight"][..., i, j], window)
    return final
