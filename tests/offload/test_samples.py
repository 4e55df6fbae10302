"""Records for measurements: numbers as models have them, in every record and format."""

from __future__ import annotations

import numpy as np
import pytest

from spilld.offload.kernels.codec import samples
from spilld.offload.record import (
    SEALED,
    Element,
    Format,
    Layout,
)

from . import reference


@pytest.mark.parametrize("element", list(Element))
@pytest.mark.parametrize("form", SEALED)
@pytest.mark.parametrize("count", [1, 11])
def test_every_record_is_of_normal_numbers(form: Format, element: Element, count: int) -> None:
    layout = Layout(form, element, 2, 64)
    records = np.full((count, layout.record_bytes), 0xFF, np.uint8)
    samples.fill(layout, records)
    for record in records:
        for numbers in reference.values(layout, record):
            assert abs(numbers.mean()) < 0.1
            assert abs(numbers.std() - 1) < 0.1
