"""Attention of random tensors: torch's kernel, and the factors of Eq. 10."""

import torch


def sdpa(q, k, v, mask):
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )


def factors(tokens, gamma):
    """gamma where image meets text, one matrix a row; written from Eq. 10, token by token."""
    kinds = [span.kind for span in tokens for _ in range(span.length)]
    matrix = torch.ones(len(gamma), 1, len(kinds), len(kinds), dtype=torch.float64)
    for i, query in enumerate(kinds):
        for j, key in enumerate(kinds):
            if query == "image" and key == "text":
                matrix[:, 0, i, j] = gamma.double()
    return matrix


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5
