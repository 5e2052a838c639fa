"""What users can drag onto the canvas."""

from . import lora, options, patch, preview, report, schedule, score, sweep, training

NODES = [
    node
    for module in (patch, schedule, options, preview, report, sweep, score, lora, training)
    for node in module.NODES
]
