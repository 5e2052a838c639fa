"""T2I-CompBench and GenEval through ComfyUI: ``python dev.py run benchmarks/compbench --help``."""
