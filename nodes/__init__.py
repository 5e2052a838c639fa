"""What users can drag onto the canvas."""

from . import lora, patch, schedule, training

NODES = [*patch.NODES, *schedule.NODES, *lora.NODES, *training.NODES]
