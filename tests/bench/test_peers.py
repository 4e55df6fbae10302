"""The comparison with other systems: what is said of whom, and what a system that cannot run looks like."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ours import STRIDE, Prompts
from peers import CASES, LONG, Found, Systems, series, take_turns
from rows import COUNT, LLAMA_CPP, OURS, TRANSFORMERS, VLLM, Case, Times, best, overlap_ms, rows, spread
from systems import child
from systems.child import Child, NotRun
from systems.llama_state import repeated

BENCH = child.BENCH
CASE = Case(100, 120, decode_goal=0.5, prefill_goals=(1 / 3, 1.0))
F16, Q8_0 = LLAMA_CPP
RUNS = {
    OURS: [Times(1.0, 10.0), Times(2.0, 30.0), Times(9.0, 20.0)],
    F16: [Times(9.0, 30.0), Times(9.0, 50.0), Times(9.0, 40.0)],
    Q8_0: [Times(4.0, 60.0), Times(3.0, 60.0), Times(4.0, 10.0)],
    TRANSFORMERS: [Times(8.0, 90.0)] * 3,
}
NOT_RUN = {VLLM: "signal SIGILL"}


def test_the_last_steps_of_a_case_are_at_its_context() -> None:
    assert CASE.count == 1 + 20 + COUNT
    arrivals = [5.0 + step for step in range(21)] + [25.0 + 0.5 * step for step in range(1, COUNT + 1)]
    assert len(arrivals) == CASE.count
    assert Times.of(arrivals) == Times(prefill=5.0, decode=500.0)


def test_too_few_tokens_are_no_time() -> None:
    with pytest.raises(ValueError, match="32 tokens"):
        Times.of([float(i) for i in range(COUNT)])


def test_the_best_kv_type_is_chosen_for_each_metric() -> None:
    assert best(RUNS, LLAMA_CPP, "decode") == F16
    assert best(RUNS, LLAMA_CPP, "prefill") == Q8_0
    assert best(RUNS, [VLLM], "decode") is None
    assert best({**RUNS, F16: []}, LLAMA_CPP, "decode") == Q8_0


def test_only_the_best_llama_cpp_is_judged() -> None:
    found = {row.case: row for row in rows(CASE, "decode", RUNS, NOT_RUN, limit=5.0)}
    assert list(found) == [
        f"120 tokens, against {F16}",
        f"120 tokens, against {Q8_0}",
        f"120 tokens, against {TRANSFORMERS}",
        f"120 tokens, against {VLLM} (not run: signal SIGILL)",
    ]
    judged = found[f"120 tokens, against {F16}"]
    assert (judged.ours, judged.baseline, judged.ratio, judged.met) == (20.0, 40.0, 0.5, True)
    assert (judged.unit, judged.limit) == ("ms/token", 5.0)
    assert [row.met for row in found.values()] == [True, None, None, None]


def test_prefill_has_a_goal_for_each_of_two() -> None:
    found = {row.case: row for row in rows(CASE, "prefill", {**RUNS, VLLM: [Times(1.5, 1.0)]}, {}, None)}
    assert found[f"100 tokens, against {Q8_0}"].met is False  # 2 s against 4 s
    assert found[f"100 tokens, against {VLLM}"].met is False
    assert found[f"100 tokens, against {F16}"].goal is None
    assert {row.unit for row in found.values()} == {"s"}


def test_who_did_not_run_has_no_number_and_no_goal() -> None:
    row = rows(CASE, "prefill", RUNS, NOT_RUN, None)[-1]
    assert row.case.endswith("(not run: signal SIGILL)")
    assert (row.ours, row.baseline, row.ratio, row.goal, row.met) == (2.0, None, None, None, None)


def test_the_cases_of_the_goals() -> None:
    assert [(case.prompt, case.context) for case in (*CASES, LONG)] == [
        (512, 512),
        (2048, 2048),
        (7900, 8000),
        (32768, 32768),
    ]
    assert all(case.context + COUNT <= 8192 for case in CASES)


def test_spread_is_from_least_to_most() -> None:
    assert spread({F16: RUNS[F16]}) == {F16: {"prefill": [9.0, 9.0], "decode": [30.0, 50.0]}}


def test_plots_have_tokens_a_second() -> None:
    found = [Found(CASE, RUNS)]
    assert series(found, "prefill")[OURS] == [(100, 50.0, 100 / 9, 100.0)]
    assert series(found, "decode")[F16] == [(120, 40.0, 30.0, 50.0)]


def test_a_prompt_that_nobody_computes_is_in_no_plot() -> None:
    found = [Found(CASE, RUNS), Found(LONG, {OURS: [Times(0.1, 70.0)]})]
    assert [point[0] for point in series(found, "prefill")[OURS]] == [100]
    assert [point[0] for point in series(found, "decode")[OURS]] == [120, LONG.context]


def test_streams_are_timed_while_all_run() -> None:
    assert overlap_ms([[0.0, 1.0, 2.0, 3.0], [1.5, 2.5, 3.5]]) == pytest.approx(1e3 * 1.5 / 3)
    with pytest.raises(ValueError, match="same time"):
        overlap_ms([[0.0, 1.0], [2.0, 3.0]])


def test_prompts_begin_differently_until_the_text_ends() -> None:
    prompts = Prompts(list(range(2 * STRIDE)))
    assert [prompts.next(STRIDE)[0] for _ in range(2)] == [0, STRIDE]
    with pytest.raises(ValueError, match="no 397 tokens"):
        prompts.next(STRIDE)


def test_a_repeated_state_has_its_cells_again_and_again() -> None:
    def state(cells: int, *planes: list[int]) -> bytes:
        head = np.array([7, 0, 1, cells], np.uint32).tobytes()
        table = np.array([[position, 1, 0] for position in range(cells)], np.int32).tobytes()
        rows = [b"\2\0\0\0" + (3).to_bytes(8, "little") + bytes(plane) for plane in planes]
        return head + table + np.array([0, 1], np.uint32).tobytes() + b"".join(rows)

    before = state(2, [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12])
    after = state(3, [1, 2, 3, 4, 5, 6, 1, 2, 3], [7, 8, 9, 10, 11, 12, 7, 8, 9])
    assert repeated(before, 3) == after
    with pytest.raises(ValueError, match="transposed"):
        repeated(before[:40] + b"\1" + before[41:], 3)


def test_a_system_that_fails_is_out_from_there_on() -> None:
    asked = []

    def fails_second(prompt: object, count: int) -> list[float]:
        asked.append(count)
        if len(asked) == 2:
            raise NotRun("signal SIGKILL")
        return [float(i) for i in range(count)]

    systems = Systems({OURS: lambda _, count: [float(i) for i in range(count)], VLLM: fails_second})
    prompts = Prompts(list(range(4000)))
    first = take_turns(systems, CASE, prompts, repeats=3)
    second = take_turns(systems, CASE, prompts, repeats=1)
    assert [list(found.runs) for found in (first, second)] == [[OURS], [OURS]]
    assert first.not_run == second.not_run == {VLLM: "signal SIGKILL"}
    assert len(asked) == 2


SYSTEM = """
import os, signal, sys
from systems.serving import serve

def load():
    if sys.argv[1] == "refuses":
        raise RuntimeError("no such model")
    if sys.argv[1] == "crashes":
        print("illegal", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGILL)
    print("noise")
    return {"system": "1.0"}, answer

def answer(prompt, count):
    if not prompt:
        os._exit(3)
    return [float(token) for token in prompt][:count]

serve(load)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "serving.py").write_text((child.BENCH / "systems" / "serving.py").read_text())
    (tmp_path / "systems" / "fake.py").write_text(SYSTEM)
    monkeypatch.setattr(child, "BENCH", tmp_path)
    return "fake"


def test_a_child_answers_whatever_it_prints(module: str) -> None:
    system = Child(Path(sys.executable), module, ["works"])
    assert system.versions == {"system": "1.0"}
    assert system.generate([3, 4, 5], 2) == [3.0, 4.0]
    assert system.generate([6], 1) == [6.0]
    with pytest.raises(NotRun, match="exit status 3, having said: noise"):
        system.generate([], 1)
    system.close()


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("refuses", "^RuntimeError: no such model$"),
        ("crashes", "^signal SIGILL, having said: illegal$"),
    ],
)
def test_a_child_that_cannot_start_says_why(module: str, argument: str, reason: str) -> None:
    with pytest.raises(NotRun, match=reason):
        Child(Path(sys.executable), module, [argument])


DRIVER = """
import os, sys
from pathlib import Path
from systems import child

child.BENCH = Path(sys.argv[1])
print(child.Child(Path(sys.executable), "fake", ["works"])._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def runs(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_stopped_child_does_not_outlive_its_driver(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    ended = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    give_up = time.monotonic() + 20
    while runs(int(ended.stdout)):
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_an_environment_that_was_not_made() -> None:
    with pytest.raises(NotRun, match=r"^no \.venv-peers: make bench-peers$"):
        Child(Path("/nowhere/.venv-peers/bin/python"), "vllm", [])
