"""A CUDA driver without a GPU: cuda.bindings loads it as libcuda.so.1, and a FakeDevice is what it drives."""

from .compiler import compile_driver
from .functions import FakeDriver

__all__ = ["FakeDriver", "compile_driver"]
