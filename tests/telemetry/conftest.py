from __future__ import annotations

import pytest

from tests.telemetry.recorded import Recorded


@pytest.fixture
def recorded_apart() -> Recorded:
    """Not yet where metrics go."""
    return Recorded()
