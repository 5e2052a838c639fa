"""A real ComfyUI in this process, for the demo's training, tests and benchmarks.

Importing this sets it up: the one in COMFYUI_PATH, with the attention of ``--attention``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, os.environ["COMFYUI_PATH"])

import comfy.options

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

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


def load_pack(folder: Path = ROOT, name: str = "taca_pack") -> ModuleType:
    """A node pack, loaded as core loads one; once for each name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def parts(*names: str) -> list[ModuleType]:
    """Modules of this pack's ``taca/``."""
    pack = load_pack().__name__
    return [importlib.import_module(f"{pack}.taca.{name}") for name in names]
