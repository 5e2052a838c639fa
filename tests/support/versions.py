"""What not every ComfyUI has."""

import pytest

try:
    from comfy_api.input import CurveInput
except ImportError:  # ComfyUI before 0.20.1
    CurveInput = None


needs_curves = pytest.mark.skipif(CurveInput is None, reason="this ComfyUI has no curves")
