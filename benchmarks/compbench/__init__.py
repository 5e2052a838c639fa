"""T2I-CompBench and GenEval through ComfyUI: ``python dev.py run benchmarks/compbench --help``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "hosting"))  # comfy_server
