"""TACA before and behind every node of core that takes a MODEL and gives one, with its defaults."""

import asyncio

import pytest
import torch

import nodes
from support import tiny
from support.reference import TEXT, dense
from support.tiny import KINDS, sample

WIDGETS = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False, "COMBO": None}
OTHERWISE = {"TorchCompileModel"}
"""What has tests of its own: the reference is not in a compiled model."""


@pytest.fixture(scope="module")
def core_nodes():
    """Class, the names of its models and its other inputs, of each such node, by id."""
    before = dict(nodes.NODE_CLASS_MAPPINGS)
    asyncio.run(nodes.init_builtin_extra_nodes())
    found = dict(nodes.NODE_CLASS_MAPPINGS)
    nodes.NODE_CLASS_MAPPINGS.clear()
    nodes.NODE_CLASS_MAPPINGS.update(before)
    chosen = {}
    for name, node in found.items():
        if "MODEL" not in node.RETURN_TYPES or name.startswith("ModelMerge") or name in OTHERWISE:
            continue
        inputs = node.INPUT_TYPES().get("required", {})
        models = [each for each, (kind, *_) in inputs.items() if kind == "MODEL"]
        rest = {each: default(*about) for each, about in inputs.items() if each not in models}
        if models and all(each is not NotImplemented for each in rest.values()):
            chosen[name] = node, models, rest
    return chosen


def default(kind, options=None):
    """What a widget holds at first; NotImplemented for what is no widget, or lists no files."""
    options = options or {}
    choices = kind if isinstance(kind, list) else options.get("options")
    if choices is not None:
        return options.get("default", choices[0] if choices else NotImplemented)
    return options.get("default", WIDGETS[kind]) if kind in WIDGETS else NotImplemented


def run(chosen, model):
    node, models, rest = chosen
    inputs = {**rest, **dict.fromkeys(models, model)}
    if hasattr(node, "define_schema"):
        output = node.execute(**inputs).result
    else:
        output = getattr(node(), node.FUNCTION)(**inputs)
    return output[node.RETURN_TYPES.index("MODEL")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_node_of_core(folder, apply_taca, core_nodes, kind):
    """Each equals the same node over attention that is dense; what fails without TACA is left out.

    So a node that a later ComfyUI brings is here without a change.
    """
    model, settings = tiny.load(folder, kind), {"steps": 2, "text": (TEXT, TEXT)}
    wrong, tried = {}, []
    for name, chosen in core_nodes.items():
        try:
            plain = sample(run(chosen, model), kind, **settings)
        except Exception:  # noqa: S112 - a node of UNets may raise anything on this model
            continue
        expected = sample(run(chosen, dense(model)), kind, **settings)
        assert not torch.equal(plain, expected), name
        for ours in (
            run(chosen, apply_taca(model, 1.4, 0.0)),
            apply_taca(run(chosen, model), 1.4, 0.0),
        ):
            apart = (sample(ours, kind, **settings) - expected).abs().max() / expected.abs().max()
            if not apart < 1e-4:
                wrong[name] = float(apart)
        tried.append(name)
    assert not wrong
    assert {"RescaleCFG", "ModelSamplingFlux", "CFGZeroStar"} <= set(tried)
