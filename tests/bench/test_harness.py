"""The harness of the benchmarks: numbers that mislead are worse than none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import goals
import pytest
from harness import Goal, Result, disk_rates, in_child, main, medians

KEYS = ["bench", "metric", "case", "unit", "ours", "baseline", "ratio", "limit", "goal", "met"]


def result(ours: float, baseline: float | None = None, goal: Goal | None = None) -> Result:
    return Result(
        bench="b", metric="m", case="c", unit="s", ours=ours, baseline=baseline, limit=0.5, goal=goal
    )


@pytest.mark.parametrize(
    ("ours", "baseline", "goal", "met"),
    [
        (1.0, 2.0, Goal("ratio", 0.5), True),
        (1.1, 2.0, Goal("ratio", 0.5), False),
        (0.1, None, Goal("ours", 0.1), True),
        (0.2, 9.0, Goal("ours", 0.1), False),
        (0.2, 9.0, None, None),
        (float("nan"), None, Goal("ours", 0.1), False),
    ],
)
def test_a_goal_is_judged_by_what_it_bounds(
    ours: float, baseline: float | None, goal: Goal | None, met: bool | None
) -> None:
    found = result(ours, baseline, goal)
    assert found.met is met
    assert found.ratio == (None if baseline is None else ours / baseline)


def test_a_goal_on_a_ratio_needs_a_baseline() -> None:
    with pytest.raises(ValueError, match="no baseline"):
        result(1.0, None, Goal("ratio", 1.0))


def test_json_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--json"])
    main("What is it?", lambda: ({"disk": 1.0}, [result(1.0, 2.0, Goal("ratio", 1.0)), result(3.0)]))
    first, *rest = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(first) == ["environment"]
    assert {"date", "cpu", "cores", "memory", "torch", "numba", "transformers"} <= first["environment"].keys()
    assert first["environment"]["limits"] == {"disk": 1.0}
    assert [list(line) for line in rest] == [KEYS, KEYS]
    assert rest[0]["goal"] == {"of": "ratio", "at_most": 1.0}
    assert (rest[0]["ratio"], rest[0]["met"]) == (0.5, True)


def test_a_table_is_not_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setenv("COLUMNS", "120")
    main("What is it?", lambda: ({}, [result(1.0, 2.0, Goal("ratio", 0.1))]))
    assert "ratio <= 0.1" in capsys.readouterr().out


def test_all_benchmarks_are_read_back(tmp_path: Path) -> None:
    for one in (result(1.0, 2.0, Goal("ratio", 0.1)), result(1.0), result(0.1, None, Goal("ours", 0.2))):
        assert goals.result(json.loads(json.dumps(asdict(one)))) == one
    script = tmp_path / "bench_x.py"
    script.write_text("import sys; print(sys.argv[1:])")
    assert list(goals.lines(script)) == ["['--json']\n"]
    script.write_text("raise SystemExit(3)")
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        list(goals.lines(script))


def test_a_benchmark_that_fails_is_named_after_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = json.dumps(asdict(result(1.0, 2.0, Goal("ratio", 0.75))))
    broken, whole = tmp_path / "broken.py", tmp_path / "whole.py"
    broken.write_text(f"print({line!r}); raise SystemExit(3)")
    whole.write_text(f"print({line!r})")
    monkeypatch.setattr(goals, "SCRIPTS", (broken, whole))
    monkeypatch.setattr(goals, "RESULTS", tmp_path / "results.jsonl")
    with pytest.raises(SystemExit, match=r"broken\.py.* exit status 3"):
        goals.main()
    assert (tmp_path / "results.jsonl").read_text() == 2 * (line + "\n")
    assert capsys.readouterr().out.count("ratio <= 0.75") == 4, "in its own table and in that of the goals"


def test_contenders_take_turns_and_medians_are_per_number() -> None:
    order = []

    def contender(name: str, values: list[float]) -> Iterator[dict[str, float]]:
        for value in values:
            order.append(name)
            yield {"s": value, "other": -value}

    runs = {"a": contender("a", [1.0, 9.0, 2.0]), "b": contender("b", [5.0, 4.0, 6.0])}
    found = medians({name: run.__next__ for name, run in runs.items()}, repeats=3)
    assert order == ["a", "b"] * 3
    assert found == {"a": {"s": 2.0, "other": -2.0}, "b": {"s": 5.0, "other": -5.0}}


def test_a_child_is_another_process_and_its_failure_is_ours() -> None:
    assert in_child(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        in_child(int, "x")
    with pytest.raises(EOFError):
        in_child(os._exit, 3)


def test_disk_rates_read_what_they_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rates = disk_rates([1, 2], read_bytes=64 << 10, file_bytes=2 << 20)
    assert rates.keys() == {1, 2}
    assert all(rate > 1e6 for rate in rates.values())
    assert not any(tmp_path.iterdir())
