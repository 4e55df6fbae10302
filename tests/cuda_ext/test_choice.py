"""How records are divided between the device and the CPU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spilld.cuda_ext.transfer_costs import (
    Costs,
    Rates,
    seconds,
    to_fetch,
)

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


def test_rates_follow_the_number_of_queries() -> None:
    """Copies are made once; what computes runs again for every 16 queries, by flash attention for 256."""
    one = Rates(fetch_bytes=20e9, fetch_s=1e-5, cpu_bytes=16e9, cpu_s=1e-6)
    many = Rates(fetch_bytes=10e9, fetch_s=2e-5, cpu_bytes=1e9, cpu_s=2e-6)
    costs = Costs(one, many, copy_bytes=25e9, flash_bytes=5e9)
    assert costs.rates(1).fetch_bytes == pytest.approx(20e9)
    assert costs.rates(1).cpu_bytes == pytest.approx(16e9)
    assert costs.rates(16).fetch_bytes == pytest.approx(10e9)
    assert costs.rates(16).cpu_bytes == pytest.approx(1e9)
    assert 1 / costs.rates(48).fetch_bytes == pytest.approx(1 / 25e9 + 3 * (1 / 10e9 - 1 / 25e9))
    for queries, times in ((17, 1), (256, 1), (257, 2)):
        flashed = costs.rates(queries, flash=True)
        assert 1 / flashed.fetch_bytes == pytest.approx(1 / 25e9 + times / 5e9)
        assert flashed.cpu_bytes == costs.rates(queries).cpu_bytes
    assert costs._replace(flash_bytes=0.0).rates(48, flash=True) == costs.rates(48)


@pytest.mark.parametrize("wrong", [{"fetch_bytes": 0.0}, {"cpu_bytes": -1.0}, {"fetch_s": -1.0}])
def test_rates_are_rates(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="no rates"):
        Rates(**({"fetch_bytes": 1e9, "fetch_s": 0.0, "cpu_bytes": 1e9, "cpu_s": 0.0} | wrong))
