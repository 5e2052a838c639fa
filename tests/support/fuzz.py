"""How many inputs the random tests try."""

import os

from hypothesis import HealthCheck, Phase, settings

CASES = int(os.environ.get("TACA_FUZZ", "300"))


def many(count):
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
