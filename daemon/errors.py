"""Every error a client or an operator can meet. Each says what to do.

SpilldError                   code (stable, on the wire), message, retryable
├── InvalidRequest            invalid_request      a field has a value that cannot be served
│   └── PromptTooLong         prompt_too_long      longer than the model or the store can hold
├── ProtocolError             protocol_error       a frame is malformed
│   ├── WrongVersion          wrong_version        the peer speaks another protocol version
│   └── FrameTooLarge         frame_too_large
├── ContextNotFound           context_not_found    the handle or session is unknown or has expired
├── RequestNotFound           request_not_found    there is nothing to resume under this id
├── TransferNotFound          transfer_not_found   the transfer is unknown, or over
├── CorruptArchive            corrupt_archive      the file is no archive, or not whole
├── ForeignArchive            foreign_archive      an archive of another model, or of a newer spilld
├── ForeignSession            foreign_session      a session of another model
├── Cancelled                 cancelled
├── DeadlineExceeded          deadline_exceeded
├── Draining                  draining             the daemon is stopping (retryable)
├── Overloaded                overloaded           queue or store is full now (retryable)
├── AccessDenied              access_denied        the client's key, or the lack of one, does not allow this
├── StorageFailed             storage_failed       KV was lost and recomputing did not help
├── InternalError             internal             a bug in spilld
├── ConfigError               config               the daemon cannot start like this
│   ├── BudgetError           budget               a budget holds no window or run, or the machine lacks it
│   ├── DeviceUnusable        device               there is no such device, or it cannot be used
│   ├── StateFolderError      state_folder         missing, read-only, or in use by another daemon
│   └── ModelError            model
│       ├── UnknownModel      unknown_model
│       ├── CorruptModel      corrupt_model
│       └── UnsupportedModel  unsupported_model
└── Unreachable               unreachable          client side: no daemon answers (retryable)
"""

from __future__ import annotations

from typing import ClassVar


class SpilldError(Exception):
    """Base class of every error that a client or an operator can meet.

    `code` is stable, on the wire too; `retryable` says whether the same request may succeed later.
    `request_id` is the id of the request that the error is about; it is empty where there is none or it could
    not be read.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = ""


class InvalidRequest(SpilldError):
    """A field of a request has a value that cannot be served."""

    code = "invalid_request"


class PromptTooLong(InvalidRequest):
    """The prompt is longer than the model or the store can hold."""

    code = "prompt_too_long"


class ProtocolError(SpilldError):
    """A frame is malformed."""

    code = "protocol_error"


class WrongVersion(ProtocolError):
    """The peer speaks another version of the protocol."""

    code = "wrong_version"


class FrameTooLarge(ProtocolError):
    """A frame is larger than the protocol allows."""

    code = "frame_too_large"


class ContextNotFound(SpilldError):
    """The context handle or session is unknown or has expired."""

    code = "context_not_found"


class RequestNotFound(SpilldError):
    """There is nothing to resume under this request id."""

    code = "request_not_found"


class TransferNotFound(SpilldError):
    """The transfer is unknown or has ended."""

    code = "transfer_not_found"


class CorruptArchive(SpilldError):
    """The file is not an archive, or is incomplete."""

    code = "corrupt_archive"


class ForeignArchive(SpilldError):
    """The archive is of another model, or of a newer spilld."""

    code = "foreign_archive"


class ForeignSession(SpilldError):
    """The session is of another model."""

    code = "foreign_session"


class Cancelled(SpilldError):
    """The request was cancelled."""

    code = "cancelled"


class DeadlineExceeded(SpilldError):
    """The request did not end in time."""

    code = "deadline_exceeded"


class Draining(SpilldError):
    """The daemon is stopping and takes no new requests."""

    code = "draining"
    retryable = True


class Overloaded(SpilldError):
    """The queue or the store is full now, or the client is over its limits."""

    code = "overloaded"
    retryable = True


class AccessDenied(SpilldError):
    """The client's key, or the lack of one, does not allow this."""

    code = "access_denied"


class StorageFailed(SpilldError):
    """KV was lost, and computing it again did not help."""

    code = "storage_failed"


class InternalError(SpilldError):
    """There is a bug in spilld."""

    code = "internal"


class ConfigError(SpilldError):
    """The daemon or a command cannot run with this configuration."""

    code = "config"


class BudgetError(ConfigError):
    """A budget holds no window or run, or the machine has less."""

    code = "budget"


class DeviceUnusable(ConfigError):
    """There is no such device, or it cannot be used."""

    code = "device"


class StateFolderError(ConfigError):
    """The state folder is missing, read-only, or in use by another daemon."""

    code = "state_folder"


class ModelError(ConfigError):
    """The model cannot be served."""

    code = "model"


class UnknownModel(ModelError):
    """There is no model of this name."""

    code = "unknown_model"


class CorruptModel(ModelError):
    """The model's files are damaged or incomplete."""

    code = "corrupt_model"


class UnsupportedModel(ModelError):
    """The model is of a kind that spilld does not serve."""

    code = "unsupported_model"


class Unreachable(SpilldError):
    """No daemon answers; raised by clients only."""

    code = "unreachable"
    retryable = True


def error_for(code: str, message: str) -> SpilldError:
    """Make the error that a code on the wire names; an unknown code gives a SpilldError."""
    return _BY_CODE.get(code, SpilldError)(message)


def _tree(root: type[SpilldError]) -> list[type[SpilldError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


_BY_CODE = {error.code: error for error in _tree(SpilldError)}
