"""All benchmarks, one after the other, and the goals of all of them in one table.

`make bench` runs this, once the systems of peers.py are built. What they print with --json goes to
results.jsonl beside this file as it comes; peers.py draws its plots anew. One that fails is named at the end.
Takes an hour with the environment variable REPEATS=1, longer with the medians of three that are the rule.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness import Goal, Result, say, show

BENCH = Path(__file__).parent
RESULTS = BENCH / "results.jsonl"
OPTIONS = {"peers.py": ["--plots", str(BENCH / "plots")]}
OTHERS = ("eviction.py", "restore.py", "load.py", "peers.py")
SCRIPTS = (*sorted(BENCH.glob("bench_*.py")), *(BENCH / name for name in OTHERS))


def lines(script: Path) -> Iterator[str]:
    """What a benchmark prints with --json, as it comes. Raises CalledProcessError."""
    say(f"== {script.name}")
    command = [sys.executable, str(script), "--json", *OPTIONS.get(script.name, [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [script.name])


def result(fields: dict[str, object]) -> Result:
    """A Result from its JSON."""
    goal = fields.pop("goal")
    judged = {"ratio", "met"}
    known = {name: value for name, value in fields.items() if name not in judged}
    return Result(**known, goal=Goal(**goal) if isinstance(goal, dict) else None)  # type: ignore[arg-type]


def main() -> None:
    judged, failed = [], []
    with RESULTS.open("w") as kept:
        for script in SCRIPTS:
            results = []
            try:
                for line in lines(script):
                    kept.write(line)
                    kept.flush()
                    if "environment" not in (fields := json.loads(line)):
                        results.append(result(fields))
            except subprocess.CalledProcessError as error:
                failed.append(str(error))
            if results:
                show(results[0].bench, results)
            judged += [one for one in results if one.goal is not None]
    if judged:
        show("goals", judged)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    main()
