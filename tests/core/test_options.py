"""TACA Options: what limits gamma, against the dense reference with the same limits."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nodes
from support import families, family_runs, tiny
from support.attention import factors, random, sdpa
from support.clips import CLIPS, SD3_WITHOUT_T5, clip_of
from support.clips import FLUX as FLUX_CLIP
from support.reference import dense_attention, euler
from support.tiny import KINDS, sample

options_module = sys.modules["taca_pack.taca.options"]
attention = sys.modules["taca_pack.taca.attention"]
Span = sys.modules["taca_pack.taca.spans"].Span
Options = options_module.Options
parse_blocks = sys.modules["taca_pack.taca.block_ranges"].parse_blocks
FLUX = {"double_blocks": 19, "single_blocks": 38}


@pytest.fixture
def limited(pack):
    """``model -> model`` with TACA and options, through the nodes."""

    def apply(model, gamma=1.5, threshold=970.0, positive_only=False, blocks="", prompt=None):
        node = pack["TACAOptions"].execute(positive_only, blocks)
        options = node.result[0]
        if prompt is not None:
            options = Options(positive_only, blocks, prompt)
        return pack["TACAPatchModel"].execute(model, gamma, threshold, None, options).result[0]

    return apply


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [(7, 7), (7, 12)])
def test_positive_only(folder, limited, kind, text):
    """The negative half stays plain, in one call with the positive or in one of its own."""
    model = tiny.load(folder, kind)
    conds = [tiny.conditioning(kind, text[0]), tiny.conditioning(kind, text[1], seed=5)]
    extra = [{"y": c[0][1]["pooled_output"]} for c in conds]
    if kind == "flux":
        extra = [e | {"guidance": torch.tensor([3.5])} for e in extra]
    noise = torch.randn(1, 16, 16, 16, generator=torch.manual_seed(3))
    sigmas = torch.tensor([1.0, 0.0])
    expected = euler(
        model, noise, sigmas, conds[0][0][0], conds[1][0][0], 3.0, (1.5, 1.0), 1, extra
    )
    ours = sample(limited(model, positive_only=True), kind, steps=1, text=text)
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)
    both = sample(limited(model), kind, steps=1, text=text)
    assert not torch.allclose(both, ours, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks(folder, limited, kind):
    """Only the named blocks; their complement acts elsewhere; all of them is all."""
    model = tiny.load(folder, kind)
    name = {"flux": "double 0-1, single 0", "sd3": "joint 0"}[kind]
    everything = {"flux": "double, single 0-1", "sd3": "joint"}[kind]
    calls = []

    def spy(func, q, k, v, heads, **kwargs):
        calls.append(q.shape[1 if q.ndim == 3 else 2])
        return func(q, k, v, heads, **kwargs)

    model.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = spy
    plain = sample(model, kind, steps=1, cfg=1.0)
    attentions = len(calls)
    calls.clear()
    some = sample(limited(model, blocks=name), kind, steps=1, cfg=1.0)
    assert len(calls) == attentions + {"flux": 3, "sd3": 1}[kind]
    full = sample(limited(model), kind, steps=1, cfg=1.0)
    assert torch.equal(sample(limited(model, blocks=everything), kind, steps=1, cfg=1.0), full)
    assert not torch.allclose(some, full, atol=0.01)
    assert not torch.allclose(some, plain, atol=0.01)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("double 0-19", "double 0-18"),
        ("joint 1", "has no 'joint' blocks; it has double 0-18"),
        ("double 5-2", "not within"),
        ("double 0 to 3", "cannot read"),
        ("3", "cannot read"),
        ("double 0-9,", "cannot read"),
        ("single -1", "cannot read"),
    ],
)
def test_bad_blocks_are_refused(line, says):
    with pytest.raises(ValueError, match=says):
        parse_blocks(line, FLUX)


def test_bad_blocks_are_refused_at_the_node(folder, limited):
    with pytest.raises(ValueError, match="double 0-1, single 0-1"):
        limited(tiny.load(folder, "flux"), blocks="double 0-9")


@given(
    ranges=st.lists(
        st.tuples(st.sampled_from(list(FLUX)), st.integers(0, 18), st.integers(0, 18)), min_size=1
    )
)
def test_ranges_are_unions(ranges):
    line = ", ".join(f"{n.split('_')[0]} {min(a, b)}-{max(a, b)}" for n, a, b in ranges)
    expected = {(n, i) for n, a, b in ranges for i in range(min(a, b), max(a, b) + 1)}
    assert set(parse_blocks(line, FLUX)) == expected


def test_each_text_token_has_its_own_gamma():
    tokens = [Span("text", 3), Span("image", 5), Span("text", 2)]
    q, k, v = (random(2, 2, 10, 8, seed=i) for i in range(3))
    gamma = torch.tensor([[1.0, 1.4, 2.0, 0.5, 1.0], [1.2, 1.2, 1.0, 1.0, 0.0]])
    result = attention.temperature_adjusted_attention(sdpa, q, k, v, gamma, tokens)
    factor = factors(tokens, torch.ones(2))
    factor[:, :, 3:8, :3], factor[:, :, 3:8, 8:] = (
        gamma[:, None, None, :3],
        gamma[:, None, None, 3:],
    )
    torch.testing.assert_close(
        result.double(), dense_attention(q, k, v, factor), atol=5e-6, rtol=1e-5
    )


def test_gamma_of_other_tokens_is_refused():
    q = random(1, 1, 4, 8)
    tokens = [Span("text", 2), Span("image", 2)]
    with pytest.raises(ValueError, match="2 text tokens"):
        attention.temperature_adjusted_attention(sdpa, q, q, q, torch.ones(1, 3), tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_tokens_only(folder, limited, kind):
    """The padding behind the prompt stays plain; the negative prompt is scaled as a whole."""
    model = tiny.load(folder, kind)
    prompt = (1.0,) * 4 + (0.0,) * 3
    results = [
        sample(limited(model, prompt=p), kind, steps=1, text=(7, 7))
        for p in (prompt, (1.0,) * 7, (0.0,) * 7)
    ]
    full = sample(limited(model), kind, steps=1, text=(7, 7))
    torch.testing.assert_close(results[1], full, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(results[0], full, atol=0.01)
    assert not torch.allclose(results[0], results[2], atol=0.01)


def test_another_prompt_is_told(folder, limited):
    with pytest.raises(ValueError, match=r"7 text tokens.*9"):
        sample(limited(tiny.load(folder, "flux"), prompt=(1.0,) * 9), "flux", steps=1)


def test_padding_is_told_from_prompt(pack):
    """FLUX's T5; SD3's CLIP-L and -G over each other, and no T5."""
    node = pack["TACAOptions"]
    weights = node.execute(False, "", clip_of(*FLUX_CLIP), "a red cat").result[0].prompt
    assert len(weights) == 256
    assert weights == (1.0,) * int(sum(weights)) + (0.0,) * (256 - int(sum(weights)))
    assert 4 <= sum(weights) <= 6
    clip = clip_of(*SD3_WITHOUT_T5, t5=False)
    weights = node.execute(False, "", clip, "a red cat").result[0].prompt
    assert weights == (1.0,) * 5 + (0.0,) * 72  # start, three words, end


@pytest.mark.parametrize("lengths", [(7, 9), (7, 7)])
def test_a_combined_prompt_has_its_own_pattern(folder, limited, lengths):
    """Of two prompts only the one that was given is limited to its own tokens."""
    model = tiny.load(folder, "flux")
    first, second = (tiny.conditioning("flux", n, seed=i) for i, n in enumerate(lengths, 1))
    own = (1.0,) * 4 + (0.0,) * 3

    def run(prompt, positive):
        patched = limited(model, prompt=prompt)
        empty = {"samples": torch.zeros(1, 16, 16, 16)}
        return nodes.common_ksampler(patched, 3, 1, 1.0, "euler", "simple", positive, [], empty)[0][
            "samples"
        ]

    expected = (run(own, first) + run(None, second)) / 2
    torch.testing.assert_close(run(own, [*first, *second]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["flux", "Qwen-Image"])
def test_the_text_with_its_weights_names_the_prompt(folder, pack, monkeypatch, kind):
    """One string goes to TACA Text Encode, to TACA Options and to the report: as without clip and
    prompt there. FLUX's CLIP would weigh its brackets, Qwen-Image's would read them as text."""
    clip = clip_of(*FLUX_CLIP) if kind == "flux" else clip_of(*CLIPS[kind])
    text, (other,) = "a (red:2) cat on a (mat:0.5)", tiny.conditioning("flux", 256)
    [(made, extras)] = pack["TACATextEncode"].execute(clip, text).result[0]
    if kind == "flux":
        model, empty = tiny.load(folder, "flux"), {"samples": torch.zeros(1, 16, 16, 16)}
        positive = [other, [made, {**extras, "pooled_output": torch.zeros(1, 32)}]]
    else:
        [case] = families.named(kind)
        model, empty = families.load(case, folder, monkeypatch), families.empty(case)
        positive = [[made.repeat(1, 1, 3), extras]]
    drawn, maps = [], []
    for told in ((clip, text), (None, None)):
        options = pack["TACAOptions"].execute(False, "", *told, prompt_only=True).result[0]
        patched = pack["TACAPatchModel"].execute(model, 1.5, 0.0, None, options).result[0]
        watched, report = pack["TACAWatchAttention"].execute(patched, "red, mat", *told).result
        run = watched, 3, 1, 1.0, "euler", "simple", positive, [], empty
        drawn.append(nodes.common_ksampler(*run)[0]["samples"])
        maps.append(torch.stack(report.maps))
    assert torch.equal(*drawn)
    assert torch.equal(*maps)


AROUND = {
    "FLUX.2": lambda own: [*[0.0] * (512 - len(own)), *own],
    "Z-Image": lambda own: [*own, *[0.0] * (16 - len(own))],
    "Z-Image Omni": lambda own: [*[0.0] * 16, *own, *[0.0] * (16 - len(own))],
    "HunyuanVideo 1.5": lambda own: [*[1.0] * 5, *own],
    "HunyuanImage 2.1": lambda own: [*own, *[1.0] * 5],
    "HiDream-I1": lambda own: [*own, *[1.0] * 10],
    "HiDream-O1": lambda own: own[:-1],
    "Mochi": lambda own: own[:6],
    "PixelDiT": lambda own: own[:7],
    "Qwen-Image": lambda own: own,
}


@pytest.mark.parametrize("name", AROUND)
def test_the_prompts_own_tokens_in_every_family(name, tmp_path, limited, monkeypatch):
    """What a model puts around its conditioning, or leaves out, against dense attention."""
    [case] = [case for case in families.CASES if case.name == name]
    if families.class_of(case) is None:
        pytest.skip(f"this ComfyUI has no {name}")
    model = families.load(case, tmp_path, monkeypatch)
    own = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    spans = case.spans(case.text[0], case.tokens)
    weights = iter(AROUND[name](own))
    keys = [next(weights) if kind == "text" else 0.0 for kind, n, *_ in spans for _ in range(n)]
    assert not [*weights]
    rows = [kind == "image" for kind, n, *more in spans if not more for _ in range(n)]
    factor = 1.0 + 0.4 * torch.tensor(rows).double()[:, None] * torch.tensor(keys).double()
    monkeypatch.setattr(family_runs, "factors", lambda *args: factor)
    expected = family_runs.sample(family_runs.dense(model, case, 1.4), case)
    ours = family_runs.sample(limited(model, 1.4, prompt=tuple(own)), case)
    monkeypatch.undo()
    plain = family_runs.sample(model, case)
    assert (ours - expected).abs().max() < 5e-3 * (plain - expected).abs().max()


def test_an_unknown_clip_is_told(pack):
    class Other:
        def tokenize(self, text):
            return {"qwen": [[(1, 1.0)]]}

    with pytest.raises(ValueError, match=r"cannot tell the tokens of this CLIP .Other."):
        pack["TACAOptions"].execute(False, "", Other(), "a")
    with pytest.raises(ValueError, match="both clip and prompt"):
        pack["TACAOptions"].execute(False, "", None, "a")
