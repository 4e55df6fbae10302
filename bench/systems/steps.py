"""spilld's engine without its daemon, K and V of a prompt being what lies in memory: for timing only.

python -m systems.steps FOLDER CONTEXT, with OMP_WAIT_POLICY=passive as the daemon sets it.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from pathlib import Path

from steps import Steps, in_host

from spilld.assembly import use_threads
from spilld.models.catalog import default_cache
from spilld.models.model import load as load_model
from spilld.offload.record import Element, Format

from .serving import Generate, serve


def load(folder: str, context: int) -> tuple[dict[str, str], Generate]:
    """A bfloat16 folder, k8v4; a thread a core."""
    use_threads(None)
    model = load_model(Path(folder), Element.BFLOAT16, weights="auto", cache=default_cache())

    def generate(prompt: list[int], count: int) -> list[float]:
        store = in_host(model, Format.K8V4, Element.BFLOAT16, context)
        steps = Steps(model, store, context, 1)
        steps.feed(prompt)
        steps.skip(len(prompt) - 1)
        token, asked = prompt[-1], time.perf_counter()
        arrivals: list[float] = []
        while len(arrivals) < count:
            token = int(steps.step(1, range(1))[0].argmax())
            steps.feed([token])
            arrivals.append(time.perf_counter() - asked)
        return arrivals

    return {"spilld": version("spilld")}, generate


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], int(sys.argv[2])))
