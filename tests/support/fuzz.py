"""How many inputs the random tests try."""

import os

from hypothesis import HealthCheck, Phase, settings

CASES = int(os.environ.get("TACA_FUZZ", "300"))


def many(count):
    """So many examples of what takes long: none is made smaller, and fixtures are shared."""
    return settings(
        max_examples=count, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
