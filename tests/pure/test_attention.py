"""Eq. 10 by split queries, against dense float64, for any order of tokens, mask and layout."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.attention import factors, random, sdpa
from support.reference import dense_attention

attention = sys.modules["taca_pack.taca.attention"]
Span = sys.modules["taca_pack.taca.spans"].Span
adjusted = attention.temperature_adjusted_attention
KINDS = st.sampled_from(["text", "image", "other"])


@settings(max_examples=150)
@given(
    runs=st.lists(st.tuples(KINDS, st.integers(1, 9)), min_size=1, max_size=4),
    batch=st.integers(1, 3),
    gammas=st.lists(st.floats(0, 3), min_size=3, max_size=3),
    per_row=st.booleans(),
    mask_kind=st.sampled_from(["none", "full", "heads", "rows", "bool"]),
    grouped=st.booleans(),
)
def test_equals_dense(runs, batch, gammas, per_row, mask_kind, grouped):
    tokens = [Span(*run) for run in runs]
    n = sum(span.length for span in tokens)
    gamma = torch.tensor(gammas[:batch] if per_row else gammas[:1])
    q, k, v = (random(batch, 1 if grouped and i else 2, n, 8, seed=i) for i in range(3))
    shape = {
        "full": (batch, 1, n, n),
        "heads": (batch, 2, n, n),
        "rows": (batch, 1, 1, n),
        "bool": (batch, 1, n, n),
    }
    mask = None if mask_kind == "none" else random(*shape[mask_kind], seed=9)
    if mask_kind == "bool":
        mask = (mask > -1.5) | torch.eye(n, dtype=torch.bool)
    result = adjusted(sdpa, q, k, v, gamma, tokens, mask)
    expected = dense_attention(q, k, v, factors(tokens, gamma.expand(batch)), mask)
    torch.testing.assert_close(result.double(), expected, atol=5e-6, rtol=1e-5)


@settings(max_examples=30)
@given(text=st.integers(1, 12), image=st.integers(1, 30), gamma=st.floats(0, 3))
def test_both_layouts_agree(text, image, gamma):
    """(B, N, heads * D) as SD3 calls it gives what (B, heads, N, D) as FLUX calls it gives."""
    tokens, gamma = (Span("text", text), Span("image", image)), torch.tensor([gamma])
    q, k, v = (random(2, 2, text + image, 8, seed=i) for i in range(3))

    def flat(x):
        return x.transpose(1, 2).flatten(2)

    def attend_flat(q, k, v, mask):
        return flat(sdpa(*(x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (q, k, v)), mask))

    ours = adjusted(attend_flat, *map(flat, (q, k, v)), gamma, tokens, dim=1, out_dim=1)
    torch.testing.assert_close(ours, flat(adjusted(sdpa, q, k, v, gamma, tokens)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gamma_is_applied_in_float32(dtype):
    """Keys are gamma * k rounded once; 1.2 itself is not rounded to 1.203 first."""
    k = random(1, 2, 6, 8).to(dtype)
    seen = []

    def attend(q, keys, v, mask):
        seen.append(keys)
        return q

    adjusted(attend, k, k, k, torch.tensor([1.2]), (Span("text", 4), Span("image", 2)))
    scaled, plain = seen  # keys of the image's queries, and of the text's
    assert plain is k
    assert scaled.dtype == dtype
    assert torch.equal(scaled[:, :, :4], (k[:, :, :4].float() * 1.2).to(dtype))
    assert torch.equal(scaled[:, :, 4:], k[:, :, 4:])


def test_inputs_are_left_alone():
    q, k, v = (random(1, 2, 6, 8, seed=i) for i in range(3))
    before = [x.clone() for x in (q, k, v)]
    adjusted(sdpa, q, k, v, torch.tensor([2.0]), (Span("text", 4), Span("image", 2)))
    assert all(torch.equal(*pair) for pair in zip((q, k, v), before, strict=True))


def test_wrong_number_of_gammas_is_an_error():
    q = random(3, 2, 6, 8)
    with pytest.raises(ValueError, match=r"shape \(2,\) for an attention of 3 rows"):
        adjusted(sdpa, q, q, q, torch.ones(2), (Span("text", 4), Span("image", 2)))
