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
    """The device has no such memory left. What was asked for was not taken; everything else is as it was."""


class RegistrationRefused(DeviceError):
    """The host memory cannot be pinned. None of it is."""


class NoDevice(DeviceError):
    """There is no device that could be used."""


class LaunchFailed(DeviceError):
    """Work on the device ended in an error, maybe that of an earlier call. Nothing works on it any more."""
