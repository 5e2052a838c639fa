"""What users can drag onto the canvas."""

from . import patch, schedule

NODES = [*patch.NODES, *schedule.NODES]
