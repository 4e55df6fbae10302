"""CUDA kernels on the CPU: a fiber per thread, and a detector for what a GPU would do only sometimes."""

from .compiler import Unavailable, compile_kernel
from .launcher import Emulated, EmulatorError, Order, Staging

__all__ = ["Emulated", "EmulatorError", "Staging", "Order", "Unavailable", "compile_kernel"]
