"""What an attention kernel can do, tried on a few tokens."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules import attention
from torch import Tensor

from .compiler import kernel_name
from .reach import OVERRIDE

log = logging.getLogger("taca")


def for_masks(
    options: Mapping[str, Any], like: Tensor, known: dict[str, bool]
) -> Callable[..., Tensor] | None:
    """The attention to run in place of a call's own if that takes no masks; else None.

    ``known`` has the results for the kernels tried in this run, by name; ``like`` has the model's
    dtype and device.
    """
    kernel: Any = attention.optimized_attention
    other = options.get(OVERRIDE)
    name = kernel_name(other or kernel)
    if name not in known:
        rest = {key: value for key, value in options.items() if key != OVERRIDE}
        tried = partial(other, kernel) if other else kernel
        known[name] = takes_masks(partial(tried, transformer_options=rest), like)
        if not known[name]:
            log.warning(
                "TACA: the attention %s takes no masks. Where words weigh, PyTorch's runs in its "
                "place.",
                name,
            )
    return None if known[name] else attention.attention_pytorch


def takes_masks(kernel: Callable[..., Tensor], like: Tensor) -> bool:
    """Whether a kernel adds a mask of one row for all queries to its logits."""
    q = torch.ones(1, 16, 128, dtype=like.dtype, device=like.device)
    hidden = torch.arange(16, device=like.device) % 2 == 1
    mask = torch.zeros(1, 1, 1, 16, dtype=like.dtype, device=like.device)
    mask = mask.masked_fill(hidden, -torch.inf)
    try:
        seen = kernel(q, q, q * hidden[:, None], 2, mask=mask)
    except Exception:  # a kernel may refuse by any error
        return False
    return bool(seen.abs().max() < 1e-3)
