"""What users can drag onto the canvas."""

from . import lora, patch, schedule

NODES = [*patch.NODES, *schedule.NODES, *lora.NODES]
