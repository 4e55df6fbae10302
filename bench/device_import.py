"""Whether all that the other stages import is here, and which tree it is."""

from __future__ import annotations

import importlib
import sys

NEEDED = {
    "zmq": "pyzmq",
    "pytest_timeout": "pytest-timeout",
    "cuda.core": "cuda-core",
    "cuda.bindings": "cuda-bindings",
    **{
        name: name for name in ("torch", "transformers", "numba", "msgpack", "xxhash", "pytest", "hypothesis")
    },
}


def main() -> int:
    missing = []
    for module, package in NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"{module}: {error}")
            missing.append(package)
    if missing:
        print(f"== missing: {' '.join(missing)}; cuda_ext/CHECK.md says how to bring them in .whl/")
        return 1
    assembly = importlib.import_module("spilld.assembly")
    torch = importlib.import_module("torch")
    found = "finds a GPU" if torch.cuda.is_available() else "finds no GPU"
    print(f"== {assembly.__file__}; torch {torch.__version__} {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
