"""What core calls deprecated is an error where the pack calls it; see conftest and pyproject."""

import warnings
from types import FunctionType

import comfy.samplers
import pytest


def warn():
    warnings.warn("old", DeprecationWarning, stacklevel=2)


def log():
    comfy.samplers.resolve_areas_and_cond_masks([], 8, 8, "cpu")


@pytest.mark.parametrize("call", [warn, log])
def test_a_deprecated_call_is_an_error_of_ours_alone(call):
    ours = FunctionType((lambda call: call()).__code__, {"__name__": "taca_pack.taca.it"})
    with pytest.raises(DeprecationWarning):
        ours(call)
    call()
