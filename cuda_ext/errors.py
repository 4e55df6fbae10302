"""What can go wrong on a device.

DeviceError
    OutOfMemory       nothing was taken; smaller budgets or fewer other programs help
    RegistrationRefused   host memory cannot be pinned
    NoDevice          there is no GPU, or it lacks what is needed
    LaunchFailed      the device is lost: all that is on it is gone, and only a restart brings it back
"""

from __future__ import annotations


class DeviceError(Exception):
    """A device did not do what was asked; the message says why and what helps."""


class OutOfMemory(DeviceError):
    """The device has not enough memory left. What was asked for was not taken; nothing else has changed."""


class RegistrationRefused(DeviceError):
    """The host memory cannot be pinned. None of it is."""


class NoDevice(DeviceError):
    """There is no device that can be used."""


class LaunchFailed(DeviceError):
    """Work on the device failed, maybe that of an earlier call. The device cannot be used any more."""
