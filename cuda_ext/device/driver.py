"""The CUDA driver, through cuda.bindings: its statuses are exceptions here."""

from __future__ import annotations

import threading
from typing import Any

from spilld.cuda_ext.compile.build import INSTALL, CompilerMissing, check_driver
from spilld.cuda_ext.errors import (
    DeviceError,
    LaunchFailed,
    NoDevice,
    OutOfMemory,
)

_NO_MEMORY = {"OUT_OF_MEMORY"}
_NO_DEVICE = {"NO_DEVICE", "INVALID_DEVICE", "DEVICE_UNAVAILABLE", "DEVICE_NOT_LICENSED", "STUB_LIBRARY"}
# After these the context cannot be used; the driver answers each call with the same status.
_LOST = {
    *("ILLEGAL_ADDRESS", "LAUNCH_TIMEOUT", "ASSERT", "HARDWARE_STACK_ERROR", "ILLEGAL_INSTRUCTION"),
    *("MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE", "INVALID_PC", "LAUNCH_FAILED", "ECC_UNCORRECTABLE"),
    *("NVLINK_UNCORRECTABLE", "CONTAINED", "TENSOR_MEMORY_LEAK", "CONTEXT_IS_DESTROYED", "UNKNOWN"),
}


class Refused(DeviceError):
    """A driver call failed; `status` is the driver's name for it, without CUDA_ERROR_."""

    def __init__(self, function: str, status: str) -> None:
        super().__init__(f"{function} failed: {status}")
        self.status = status


class Driver:
    """Calls functions of the driver by name."""

    def __init__(self) -> None:
        """Load and initialise the driver.

        Raises:
            NoDevice: cuda.bindings or the compiler of kernels is missing.
            DriverMissing: There is no NVIDIA driver.
            DriverTooOld: The driver is too old for the kernels.
        """
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise NoDevice(f"cuda.bindings, which calls the driver, is not installed: {INSTALL}") from error
        try:
            check_driver()
        except CompilerMissing as error:
            raise NoDevice(str(error)) from error
        self.api: Any = driver
        self._context: Any = None
        self._thread = threading.local()
        self("cuInit", 0)

    def attach(self, context: Any) -> None:
        """Make all calls of any thread work in this context; the driver's current context is per thread."""
        self._context, self._thread = context, threading.local()

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Call a function of the driver.

        Returns:
            What the function returns beside its status: None, one value, or a tuple.

        Raises:
            OutOfMemory: The GPU has no memory left.
            LaunchFailed: Earlier work failed, and the context is lost.
            NoDevice: The GPU cannot be used.
            Refused: The call failed for any other reason.
        """
        if self._context is not None and not hasattr(self._thread, "attached"):
            self._thread.attached = True
            self("cuCtxSetCurrent", self._context)
        status, *results = getattr(self.api, function)(*arguments)
        if int(status) != 0:
            raise _error(function, status.name.removeprefix("CUDA_ERROR_"))
        return results[0] if len(results) == 1 else tuple(results) or None


def _error(function: str, status: str) -> DeviceError:
    if status in _NO_MEMORY:
        return OutOfMemory(
            f"{function}: the GPU has no memory left; lower device_budget, or stop other programs that use it"
        )
    if status in _LOST:
        return LaunchFailed(f"{function}: {status}; what was on the GPU is lost, restart the daemon")
    if status in _NO_DEVICE:
        return NoDevice(f"{function}: {status}; nvidia-smi says which GPUs the driver sees")
    return Refused(function, status)
