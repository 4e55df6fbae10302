"""Is spilld faster than llama.cpp, vLLM and transformers with the same weights on this CPU?

SmolLM2-135M, two threads each, greedy, one request at a time: the prefill of prompts of 512, 2,048 and 7,900
tokens (Python's documentation), and the mean of 32 decode steps at contexts of 512, 2,048 and 8,000. Every
system is a process of its own and loads once; they take turns after a warm-up, and who is not asked is
stopped. Each run of a case has a prompt with a beginning that no earlier one had, the same for all systems,
so that no prefix cache helps. Medians of 3, with the least and the most.

Ours is a daemon in bfloat16 with format k8v4 and all KV in host memory, timed at its client. llama.cpp is
built for this CPU and runs the GGUF file that the weights of the others were converted from, as it is, with
flash attention and its KV in f16 or q8_0; the goal is judged against the faster. vLLM and transformers run in
bfloat16. A system that cannot run here has rows that say why, and no number.

Also: eight streams of spilld at 2,048 tokens against one, milliseconds a token of all of them; and decode at
32,768 tokens against llama.cpp, both beyond what the model was trained for. No prompt of that length is
computed, which would take llama.cpp an hour: its cache holds the K and V of 2,048 tokens again and again,
ours what lies in memory.

`make bench-peers` builds the systems. What bounds the result is told in bench_transformers.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from harness import (
    REPEATS,
    Result,
    command_line,
    disk_rates,
    document,
    environment,
    gemm_rate,
    in_child,
    int8_gemm_rate,
    memory_rate,
    report,
    say,
)
from ours import THREADS, Prompts, ask, daemon, measure_streams
from rich.console import Console
from rich.table import Table
from rows import (
    COUNT,
    LLAMA_CPP,
    OURS,
    TRANSFORMERS,
    VLLM,
    Case,
    Metric,
    Times,
    numbers,
    spread,
)
from rows import rows as rows_of
from systems.child import Child, NotRun
from work import Work

from spilld import Client
from spilld.config.named_models import PACKAGED
from spilld.demo.demo import MODEL
from spilld.models.catalog import default_cache, resolve
from spilld.offload.record import Element

PEERS = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"

CASES = (
    Case(512, 512, decode_goal=1.0, prefill_goals=(1 / 3, 1.0)),
    Case(2048, 2048, decode_goal=0.7, prefill_goals=(1 / 3, 1 / 1.1)),
    Case(7900, 8000, decode_goal=0.45, prefill_goals=(1 / 3, 1 / 1.1)),
)
LONG = Case(32768, 32768, decode_goal=0.4)
LONG_PREFILLED = 2048
TEXT_TOKENS = 100_000
WARM_UP = 600
Generate = Callable[[Sequence[int], int], list[float]]
"""(prompt, count) to the arrivals of count tokens, in seconds from the request."""


@dataclass
class Systems:
    """What takes turns, what cannot and why, and their versions."""

    generate: dict[str, Generate] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def lose(self, name: str, reason: NotRun) -> None:
        """A system has failed, and is out from here on."""
        self.not_run[name] = str(reason)
        del self.generate[name]


@dataclass
class Found:
    """The times of a case by system, and who has none."""

    case: Case
    runs: dict[str, list[Times]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)


def start(stack: ExitStack, folder: Path) -> Systems:
    """All of them, for up to 8,192 tokens."""
    context = 8192
    commands = {name: llama_cpp(name, context) for name in LLAMA_CPP}
    commands[VLLM] = (PEERS, "vllm", [folder, context, THREADS], {})
    commands[TRANSFORMERS] = (Path(sys.executable), "transformers", [folder, THREADS], {})
    found = start_children(stack, commands)
    say(f"starting {OURS}")
    client = stack.enter_context(Client(daemon(stack, folder, max_context=context)))
    return Systems({OURS: partial(ask, client), **found.generate}, found.not_run, found.versions)


def start_long(stack: ExitStack, folder: Path) -> Systems:
    """Ours and llama.cpp, of which none prefills a long prompt."""
    context = LONG.context + 2 * COUNT
    ours = (Path(sys.executable), "steps", [folder, context], {"OMP_WAIT_POLICY": "passive"})
    commands: dict[str, Command] = {OURS: ours}
    commands |= {name: llama_cpp(name, context, LONG_PREFILLED) for name in LLAMA_CPP}
    return start_children(stack, commands)


Command = tuple[Path, str, list[object], dict[str, str]]
"""A Python, a module of systems, its arguments, and what it finds in its environment."""


def llama_cpp(name: str, context: int, *most: int) -> Command:
    (gguf,) = PACKAGED[MODEL].files(MODEL)
    return PEERS, "llama_cpp", [gguf, context, THREADS, name.split()[1], *most], {}


def start_children(stack: ExitStack, commands: Mapping[str, Command]) -> Systems:
    found = Systems()
    for name, command in commands.items():
        say(f"starting {name}")
        try:
            child = stack.enter_context(closing(Child(*command)))
        except NotRun as reason:
            found.not_run[name] = str(reason)
        else:
            found.generate[name] = child.generate
            found.versions |= child.versions
    return found


def take_turns(systems: Systems, case: Case, prompts: Prompts, repeats: int) -> Found:
    """Time a case. A system that fails is out from here on."""
    found = Found(case, {name: [] for name in systems.generate})
    for repeat in range(repeats):
        prompt = prompts.next(case.prompt)
        for name, generate in list(systems.generate.items()):
            try:
                times = Times.of(generate(prompt, case.count))
            except NotRun as reason:
                systems.lose(name, reason)
                del found.runs[name]
                continue
            found.runs[name].append(times)
            figures = f"prefill {times.prefill:.4g} s, decode {times.decode:.4g} ms/token"
            say(f"{repeat + 1}/{repeats} {case.context} tokens, {name}: {figures}")
    found.not_run = dict(systems.not_run)
    return found


def warm_up(systems: Systems, prompts: Prompts) -> None:
    for name, generate in list(systems.generate.items()):
        say(f"warm-up: {name}")
        try:
            generate(prompts.next(WARM_UP), COUNT)
        except NotRun as reason:
            systems.lose(name, reason)


def measure_limits() -> dict[str, float]:
    """Rates of the machine, per second."""
    say("limits")
    return {
        "memory_bytes_s": in_child(memory_rate),
        "float32_flops": in_child(gemm_rate, "float32"),
        "bfloat16_flops": in_child(gemm_rate, "bfloat16"),
        "int8_ops": in_child(int8_gemm_rate),
        **{f"disk_bytes_s_{threads}_threads": rate for threads, rate in disk_rates().items()},
    }


def judged(found: Found, folder: Path, limits: Mapping[str, float]) -> list[Result]:
    """The rows of a case; where there is no goal for the prefill, none for it."""
    case = found.case
    rows = rows_of(case, "decode", found.runs, found.not_run, Work.of(folder, case.context).decode_ms(limits))
    if case.prefill_goals is not None:
        bound = Work.of(folder, case.prompt).prefill_s(limits)
        rows += rows_of(case, "prefill", found.runs, found.not_run, bound)
    return rows


def series(found: Sequence[Found], metric: Metric) -> dict[str, list[tuple[float, float, float, float]]]:
    """What systems.plot draws: (length, median, least, most) by system; of the prefill in tokens/s, and only
    of cases in which prompts are computed."""
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for one in found:
        if metric == "prefill" and one.case.prefill_goals is None:
            continue
        for system in one.runs:
            if seen := numbers(one.runs, system, metric):
                length = one.case.context if metric == "decode" else one.case.prompt
                values = seen if metric == "decode" else [length / seconds for seconds in seen]
                point = (length, statistics.median(values), min(values), max(values))
                points.setdefault(system, []).append(point)
    return points


def plot(found: Sequence[Found], folder: Path) -> None:
    """decode.png and prefill.png, by the peers' Python. Raises CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {metric: series(found, metric) for metric in ("decode", "prefill")}
    command: list[str | Path] = [PEERS, "-m", "systems.plot", folder.resolve()]
    subprocess.run(command, cwd=Path(__file__).parent, input=json.dumps(data), text=True, check=True)


def show_spread(found: Sequence[Found]) -> None:
    table = Table("case", "system", "prefill, s", "decode, ms/token", title="least to most")
    for one in found:
        for system, metrics in spread(one.runs).items():
            bounds = (f"{low:.4g} to {high:.4g}" for low, high in metrics.values())
            table.add_row(f"{one.case.context} tokens", system, *bounds)
    Console().print(table)


def arguments() -> argparse.Namespace:
    parser = command_line(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="runs of each system and case")
    known = [case.context for case in CASES]
    parser.add_argument("--contexts", type=int, nargs="+", choices=known, default=known, help="which cases")
    parser.add_argument("--no-streams", action="store_true", help="leave the concurrent streams out")
    parser.add_argument("--no-long", action="store_true", help=f"leave decode at {LONG.context} tokens out")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write decode.png and prefill.png")
    return parser.parse_args()


def main() -> None:
    wanted = arguments()
    stamp = environment()
    folder = resolve(MODEL, default_cache(), Element.BFLOAT16)
    prompts = Prompts(document(folder, TEXT_TOKENS))
    limits = measure_limits()
    with ExitStack() as stack:
        systems = start(stack, folder)
        warm_up(systems, prompts)
        chosen = [case for case in CASES if case.context in wanted.contexts]
        found = [take_turns(systems, case, prompts, wanted.repeats) for case in chosen]
    results = [row for one in found for row in judged(one, folder, limits)]
    if not wanted.no_streams:
        results.append(measure_streams(folder, prompts, wanted.repeats))
    if not wanted.no_long:
        with ExitStack() as stack:
            longer = start_long(stack, folder)
            warm_up(longer, prompts)
            found.append(take_turns(longer, LONG, prompts, wanted.repeats))
        results += judged(found[-1], folder, limits)
    if wanted.plots:
        plot(found, wanted.plots)
    spreads = {one.case.name("decode"): spread(one.runs) for one in found}
    peers = {"threads": THREADS, "repeats": wanted.repeats, "peers": systems.versions, "spread": spreads}
    report(wanted.json, {**stamp, **peers, "limits": limits}, results)
    if not wanted.json:
        show_spread(found)


if __name__ == "__main__":
    main()
