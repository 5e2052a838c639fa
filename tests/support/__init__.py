"""What the tests stand on: tiny models, references, stand-ins, servers and the page."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
