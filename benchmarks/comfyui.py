"""ComfyUI for the benchmarks: importing this sets it up, with the attention of ``--attention``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, os.environ["COMFYUI_PATH"])

import comfy.options

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args  # noqa: E402

# Core chooses its attention while it is imported, so this option is read before. Core itself says
# which package one needs.
parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
choices = ("pytorch", "sage", "flash", "xformers")
parser.add_argument("--attention", choices=choices, default="pytorch")
asked = parser.parse_known_args()[0].attention
args.cpu = not torch.cuda.is_available()
if args.cpu and asked != "pytorch":
    raise SystemExit(f"--attention {asked} needs a GPU, and torch finds none: take pytorch.")
args.use_sage_attention, args.use_flash_attention = asked == "sage", asked == "flash"
args.use_pytorch_cross_attention = asked == "pytorch"


def load_pack() -> tuple[Any, Any, Any]:
    """The pack's modules ``patch``, ``schedule`` and ``lora_file``, loaded as core loads a pack."""
    if "taca_pack" not in sys.modules:
        file = Path(__file__).resolve().parent.parent / "__init__.py"
        spec = importlib.util.spec_from_file_location("taca_pack", file)
        sys.modules["taca_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["taca_pack"])
    names = ("patch", "schedule", "lora_file")
    patch, schedule, lora = (importlib.import_module(f"taca_pack.taca.{name}") for name in names)
    return patch, schedule, lora
