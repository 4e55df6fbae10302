"""How records are divided between the device and the CPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spilld.cuda_ext.choice import Rates, seconds, to_fetch

rates = st.builds(
    Rates,
    fetch_bytes=st.floats(1e8, 1e11),
    fetch_s=st.floats(0, 1e-2),
    cpu_bytes=st.floats(1e8, 1e11),
    cpu_s=st.floats(0, 1e-2),
)


@given(st.integers(0, 60), st.integers(64, 1 << 20), rates, st.integers(0, 80))
def test_no_other_division_is_sooner(records: int, record_bytes: int, rates: Rates, room: int) -> None:
    chosen = to_fetch(records, record_bytes, rates, room)
    assert 0 <= chosen <= min(records, room)
    best = min(seconds(records, n, record_bytes, rates) for n in range(min(records, room) + 1))
    assert seconds(records, chosen, record_bytes, rates) == pytest.approx(best, rel=1e-9)


def test_the_faster_gets_more_and_the_only_one_everything() -> None:
    pcie4 = Rates(fetch_bytes=24e9, fetch_s=0, cpu_bytes=12e9, cpu_s=0)
    assert to_fetch(90, 1000, pcie4, 90) == 60
    assert to_fetch(90, 1000, pcie4, 10) == 10
    slow_calls = Rates(fetch_bytes=24e9, fetch_s=1, cpu_bytes=12e9, cpu_s=0)
    assert to_fetch(90, 1000, slow_calls, 90) == 0
    no_cpu = Rates(fetch_bytes=24e9, fetch_s=0, cpu_bytes=12e9, cpu_s=1)
    assert to_fetch(90, 1000, no_cpu, 90) == 90


@pytest.mark.parametrize("wrong", [{"fetch_bytes": 0.0}, {"cpu_bytes": -1.0}, {"fetch_s": -1.0}])
def test_rates_are_rates(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="no rates"):
        Rates(**({"fetch_bytes": 1e9, "fetch_s": 0.0, "cpu_bytes": 1e9, "cpu_s": 0.0} | wrong))
