"""Seeds bugs into every line of every kernel and runs the matrix on each: `python -m tests.cuda_ext.mutants`.

A mutant is caught if a case of the matrix that reaches it fails, or if it crashes or does not end. One that
survives must be in equivalent.toml, with the proof that it computes the same. The last line is
`seeded N, caught N, equivalent N, missed N`; the exit status is 1 unless missed is 0.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import signal
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from spilld.cuda_ext.compile.variant import KERNELS, Variant
from spilld.models.catalog import default_cache

from .cases import Case, cases
from .emulator import Emulated, compile_kernel
from .mutation import RUNTIME, Mutant, mutate

EQUIVALENT = Path(__file__).parent / "equivalent.toml"
PROCESSES = 2
NOT_EMULATED = "intrinsics.cuh"
"""Its lines are the GPU's; the emulator has its own in their place."""


@dataclass(frozen=True)
class Trial:
    """A case, ready to run, and what it does to the kernels without bugs."""

    case: Case
    library: ctypes.CDLL
    kernel: Emulated
    seconds: float
    reached: bytes

    def run(self, mutant: int) -> None:
        signal.alarm(2 + int(20 * self.seconds))
        ctypes.c_int.in_dll(self.library, "mutant_awake").value = mutant
        self.case.check(self.kernel)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, help="so many mutants, drawn by chance")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--files", nargs="*", help="only those of these kernel files")
    options = parser.parse_args()
    cache = Path(os.environ.get("SPILLD_TEST_CACHE") or default_cache()) / "mutants"
    folder, mutants = seed(cache / "kernels")
    chosen = [m for m in mutants if not options.files or m.file in options.files]
    if options.sample:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    trials = prepare(folder, len(mutants), cache)
    survivors = [mutant for mutant, alive in hunt(chosen, trials) if alive]
    return report(chosen, survivors, whole=len(chosen) == len(mutants))


def seed(folder: Path) -> tuple[Path, list[Mutant]]:
    """A copy of the kernels with every bug in it, asleep."""
    folder.mkdir(parents=True, exist_ok=True)
    mutants: list[Mutant] = []
    for path in sorted(KERNELS.iterdir()):
        text = path.read_text()
        if path.name == NOT_EMULATED:
            text = RUNTIME + text
        else:
            text, some = mutate(path.name, text, len(mutants))
            mutants += some
        target = folder / path.name
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    return folder, mutants


def prepare(folder: Path, count: int, cache: Path) -> list[Trial]:
    """The cases, quickest first. Raises what a case raises: without a bug, all must pass."""
    every = [case for case in cases() if case.always]
    variants = list(dict.fromkeys(case.variant for case in every))

    def build(made: Variant) -> Path:
        defines = {**dict(made.defines), "MUTANTS": count}
        return compile_kernel(folder / made.source.name, defines, cache)

    with ThreadPoolExecutor(PROCESSES) as pool:
        paths = dict(zip(variants, pool.map(build, variants), strict=True))
    libraries = {made: (ctypes.CDLL(str(path)), Emulated(path)) for made, path in paths.items()}
    trials = [_baseline(case, *libraries[case.variant], count) for case in every]
    return sorted(trials, key=lambda trial: trial.seconds)


def _baseline(case: Case, library: ctypes.CDLL, kernel: Emulated, count: int) -> Trial:
    reached = (ctypes.c_ubyte * count).in_dll(library, "mutants_reached")
    ctypes.memset(reached, 0, count)
    began = time.perf_counter()
    case.check(kernel)
    return Trial(case, library, kernel, time.perf_counter() - began, bytes(reached))


def hunt(mutants: Sequence[Mutant], trials: Sequence[Trial]) -> Iterator[tuple[Mutant, bool]]:
    """Each mutant, and whether it is alive after every case that reaches it; a process for each."""
    running: dict[int, Mutant] = {}
    waiting = list(reversed(mutants))
    while waiting or running:
        while waiting and len(running) < PROCESSES:
            mutant = waiting.pop()
            child = os.fork()
            if child == 0:
                os._exit(_survives(mutant, trials))
            running[child] = mutant
        child, status = os.wait()
        yield running.pop(child), status == 0


def _survives(mutant: Mutant, trials: Sequence[Trial]) -> int:
    """0 if it does, as the status of a process is; a signal or an alarm ends it, too."""
    sys.stderr.close()
    for trial in trials:
        if trial.reached[mutant.number]:
            try:
                trial.run(mutant.number)
            except Exception:  # noqa: BLE001  a bug may raise anything, and is caught then
                return 1
    return 0


def report(chosen: Sequence[Mutant], survivors: Sequence[Mutant], *, whole: bool) -> int:
    proofs = tomllib.loads(EQUIVALENT.read_text())["equivalent"]
    used: set[int] = set()
    missed = []
    for mutant in sorted(survivors, key=lambda mutant: mutant.number):
        mine = [i for i, proof in enumerate(proofs) if _proves(proof, mutant)]
        used.update(mine)
        if not mine:
            missed.append(mutant)
            print(f"missed {mutant.file}:{mutant.line}:{mutant.column} {mutant.change}\n    {mutant.code}")
    stale = [proof for i, proof in enumerate(proofs) if i not in used] if whole else []
    for proof in stale:
        print(f"no survivor has this proof: {proof}")
    equivalent = len(survivors) - len(missed)
    caught = len(chosen) - len(survivors)
    print(f"seeded {len(chosen)}, caught {caught}, equivalent {equivalent}, missed {len(missed)}")
    return 1 if missed or stale else 0


def _proves(proof: Mapping[str, str], mutant: Mutant) -> bool:
    """A proof names a file, the whole line, and changes of it."""
    same = proof["file"] == mutant.file and proof["code"] == mutant.code
    return same and mutant.change in proof["changes"]


if __name__ == "__main__":
    sys.exit(main())
