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
│   ├── DeviceUnusable    device               there is no such device, or it cannot be used
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
    """Base class. `code` is stable, on the wire too; `retryable`: the same request may pass later.

    `request_id` names the request that it is about, empty where there is none or it could not be read.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = ""


class InvalidRequest(SpilldError):
    code = "invalid_request"


class PromptTooLong(InvalidRequest):
    code = "prompt_too_long"


class ProtocolError(SpilldError):
    code = "protocol_error"


class WrongVersion(ProtocolError):
    code = "wrong_version"


class FrameTooLarge(ProtocolError):
    code = "frame_too_large"


class ContextNotFound(SpilldError):
    code = "context_not_found"


class RequestNotFound(SpilldError):
    code = "request_not_found"


class TransferNotFound(SpilldError):
    code = "transfer_not_found"


class CorruptArchive(SpilldError):
    code = "corrupt_archive"


class ForeignArchive(SpilldError):
    code = "foreign_archive"


class ForeignSession(SpilldError):
    code = "foreign_session"


class Cancelled(SpilldError):
    code = "cancelled"


class DeadlineExceeded(SpilldError):
    code = "deadline_exceeded"


class Draining(SpilldError):
    code = "draining"
    retryable = True


class Overloaded(SpilldError):
    code = "overloaded"
    retryable = True


class AccessDenied(SpilldError):
    code = "access_denied"


class StorageFailed(SpilldError):
    code = "storage_failed"


class InternalError(SpilldError):
    code = "internal"


class ConfigError(SpilldError):
    code = "config"


class BudgetError(ConfigError):
    code = "budget"


class DeviceUnusable(ConfigError):
    code = "device"


class StateFolderError(ConfigError):
    code = "state_folder"


class ModelError(ConfigError):
    code = "model"


class UnknownModel(ModelError):
    code = "unknown_model"


class CorruptModel(ModelError):
    code = "corrupt_model"


class UnsupportedModel(ModelError):
    code = "unsupported_model"


class Unreachable(SpilldError):
    code = "unreachable"
    retryable = True


def error_for(code: str, message: str) -> SpilldError:
    """The error that a code on the wire names; a code unknown to this version becomes a SpilldError."""
    return _BY_CODE.get(code, SpilldError)(message)


def _tree(root: type[SpilldError]) -> list[type[SpilldError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


_BY_CODE = {error.code: error for error in _tree(SpilldError)}
