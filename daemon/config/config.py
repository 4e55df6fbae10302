"""The configuration: defaults, a TOML file, and what the command line overrides.

Each setting says here, and nowhere else, what it holds and what it is for: `spilld serve --help` and
systemd/spilld.toml (settings.py) are made from it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from spilld.auth.authorized_clients import MAX_OPEN, MAX_RATE
from spilld.errors import ConfigError
from spilld.fields import (
    FieldError,
    Flag,
    Int,
    Maybe,
    OneOf,
    Real,
    Text,
    readers,
)
from spilld.offload.record import SEALED, Element
from spilld.protocol.address import check_address, default_address, home
from spilld.toml_file import TomlFile

from .config_readers import (
    Bytes,
    FolderPath,
    ListenAddress,
    MetricsEndpoint,
)
from .named_models import PACKAGED

GIB = 2**30

WEIGHTS = ("auto", "bf16", "int8", "int4")
"""What steps read. auto: the codes of a quantised GGUF file or folder in bfloat16, else bf16, which
is the module's own weights in `dtype`. With device "cuda" and a torch that finds the GPU, auto is bf16, on
the GPU."""

DEVICES = ("cpu", "cuda")
"""Where windows, cached records and, if torch can, the weights that are not packed lie."""

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")


def _folder(service_variable: str, user_variable: str, fallback: str) -> Path:
    """Return the directory that systemd made for the service, else the user's XDG directory."""
    if given := os.environ.get(service_variable):
        return Path(given.split(":")[0])
    base = Path(os.environ.get(user_variable, ""))
    return (base if base.is_absolute() else home(user_variable) / fallback) / "spilld"


def _state() -> Path:
    return _folder("STATE_DIRECTORY", "XDG_STATE_HOME", ".local/state")


def _cache() -> Path:
    return _folder("CACHE_DIRECTORY", "XDG_CACHE_HOME", ".cache")


@dataclass(frozen=True)
class SettingHelp:
    """What a setting is for: the first sentence stands alone in --help, all of it in the file.

    example: a value to show in the file where the default is none, or depends on the user.
    """

    text: str
    example: object = None

    @property
    def sentence(self) -> str:
        """The first sentence, without its full stop."""
        return self.text.partition(". ")[0].removesuffix(".")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings. Sizes are in bytes, times in seconds."""

    model: Annotated[
        str,
        Text(1),
        SettingHelp(f"A known name ({', '.join(PACKAGED)}), a .gguf file, or a Hugging Face folder."),
    ] = "smollm2-135m"
    format: Annotated[
        str,
        OneOf(SEALED),
        SettingHelp(
            'How KV outside the window is stored: "exact", "int8", "k8v4" (keys of 8 bits, values of 4), or '
            '"int4". The last takes less room than "k8v4" and changes what the model says more '
            "(bench/README.md)."
        ),
    ] = "k8v4"
    dtype: Annotated[
        str, OneOf(tuple(Element)), SettingHelp('What the model computes in: "bfloat16" or "float32".')
    ] = "bfloat16"
    weights: Annotated[
        str,
        OneOf(WEIGHTS),
        SettingHelp(
            'What steps read: "auto", "bf16", "int8" or "int4". "int8" and "int4" are quantised in groups of '
            '32, of some families once and kept in the cache, else at each start; "bf16" is the weights in '
            "`dtype`; \"auto\" is a quantised GGUF file's or folder's own codes with dtype bfloat16, else as "
            '"bf16". With device = "cuda" and a torch that finds the GPU "auto" is "bf16", and these weights '
            'lie and are multiplied with on the GPU; "int8" and "int4" stay the CPU\'s.'
        ),
    ] = "auto"
    device: Annotated[
        str,
        OneOf(DEVICES),
        SettingHelp(
            'Where windows and cached records lie: "cpu", or "cuda", the first NVIDIA GPU. It takes the '
            "extra `cuda` and a device_budget. Nothing of it has run on a real GPU (cuda_ext/README.md)."
        ),
    ] = "cpu"
    device_budget: Annotated[
        int | None,
        Maybe(Bytes()),
        SettingHelp(
            "KV in device memory: windows, with the recurrent state of models that have one; on a GPU also "
            "cached records and what attention takes. Weights on a GPU, and what torch takes for a step, "
            "come on top (`spilld doctor` says how much the weights take). Unset: room for a few windows.",
            example="1GiB",
        ),
    ] = None
    host_budget: Annotated[int, Bytes(), SettingHelp("KV in host memory.")] = 2 * GIB
    disk_budget: Annotated[
        int,
        Bytes(),
        SettingHelp(
            "KV on disk; 0 is no disk tier. What `du` says of the segment files in state/kv never exceeds "
            "it. The index beside them is not counted (`disk_index_bytes` in `spilld stats`)."
        ),
    ] = 16 * GIB
    disk_floor: Annotated[
        int,
        Bytes(),
        SettingHelp(
            "What the file system must have free. The disk tier stops growing before, and evicts instead."
        ),
    ] = GIB
    memory_floor: Annotated[
        int,
        Bytes(),
        SettingHelp(
            "Memory that the kernel must have left for the daemon, of the machine and of its control group. "
            "With less, nothing is admitted beside what runs, idle contexts are given up, and KV moves from "
            "host memory to disk, until there is more. 0: never."
        ),
    ] = 256 * 2**20
    compaction_rate: Annotated[
        int,
        Bytes(),
        SettingHelp(
            "Bytes a second at which runs on disk move together, so that what was evicted between them is "
            "room again. It is done while no other write waits, and only when over an eighth of the files is "
            "holes. 0: never."
        ),
    ] = 32 * 2**20
    write_budget: Annotated[
        int | None,
        Maybe(Bytes()),
        SettingHelp(
            "Bytes a day that may be written to disk, because flash wears out. Up to a day's may be written "
            "at once. What host memory has no room for is always written and counts. When less than half is "
            "left, only prompts that come a second time are kept for later, and when nothing is left, none. "
            "Unset: no limit.",
            example="200GiB",
        ),
    ] = None
    state: Annotated[
        Path,
        FolderPath(),
        SettingHelp(
            "Where the disk tier and the sessions lie. Unset: $STATE_DIRECTORY, else $XDG_STATE_HOME/spilld, "
            "else ~/.local/state/spilld.",
            example="/var/lib/spilld",
        ),
    ] = field(default_factory=_state)
    cache: Annotated[
        Path,
        FolderPath(),
        SettingHelp(
            "Where converted models lie. Unset: $CACHE_DIRECTORY, else $XDG_CACHE_HOME/spilld, else "
            "~/.cache/spilld.",
            example="/var/cache/spilld",
        ),
    ] = field(default_factory=_cache)
    listen: Annotated[
        str,
        ListenAddress(),
        SettingHelp(
            "Where clients connect: ipc:// and a path, or tcp://HOST:PORT. The socket is its owner's alone, "
            "but for open_to_group; tcp://127.0.0.1:PORT is open to every local user unless there are keys, "
            "and without keys no other tcp address is served. Unset: ipc, spilld.sock in $RUNTIME_DIRECTORY, "
            "$XDG_RUNTIME_DIR/spilld, /run/spilld (root) or ~/.local/state/spilld.",
            example="ipc:///run/spilld/spilld.sock",
        ),
    ] = field(default_factory=default_address)
    open_to_group: Annotated[
        bool,
        Flag(),
        SettingHelp(
            "Whether an ipc socket is open to the group of the daemon's user, too. spilld.service says so on "
            "its command line, which overrides this."
        ),
    ] = False
    keys: Annotated[
        Path | None,
        Maybe(FolderPath()),
        SettingHelp(
            "A folder that `spilld keys` made: clients must have a key that its clients.toml names. The "
            "daemon's user must be able to read it. Unset: no keys.",
            example="/etc/spilld/keys",
        ),
    ] = None
    metrics: Annotated[
        str | None,
        Maybe(MetricsEndpoint()),
        SettingHelp(
            "Where Prometheus scrapes, HOST:PORT; only the loopback is allowed. It is served at /metrics "
            "over HTTP, where every local user can read it. Names of sessions, prompts and answers are not "
            "in it. Port 0: any; the log says which. Unset: nowhere.",
            example="127.0.0.1:9470",
        ),
    ] = None
    log_format: Annotated[
        str,
        OneOf(LOG_FORMATS),
        SettingHelp(
            'How the log is written, to stderr: "text", or "json", one object a line. An object has time, '
            "level, logger, message and, where there is one, exception. Text in the journal has systemd's "
            "priorities."
        ),
    ] = "text"
    log_level: Annotated[
        str,
        OneOf(LOG_LEVELS),
        SettingHelp(
            'The least that is logged: "debug", "info", "warning" or "error". The line that says that the '
            'daemon is ready is "info".'
        ),
    ] = "info"
    chunk_tokens: Annotated[int, Int(1, 65536), SettingHelp("Prompt tokens computed in one step.")] = 512
    max_gap_ms: Annotated[
        float,
        Real(0, 3600000, above=True),
        SettingHelp(
            "The longest gap between two tokens of an answer while prompts are computed, in milliseconds. "
            "While answers are running, as few prompt tokens are computed in a step as it takes for the step "
            "to last no longer than this. The more, the faster prompts are computed beside them."
        ),
    ] = 250.0
    max_context: Annotated[
        int | None,
        Maybe(Int(1)),
        SettingHelp("The longest context, in tokens. Unset: what the model can.", example=131072),
    ] = None
    max_queue: Annotated[
        int, Int(1, 65536), SettingHelp("Requests that may wait; more are refused as overloaded.")
    ] = 64
    max_open: Annotated[
        int,
        MAX_OPEN,
        SettingHelp(
            "Requests that one client may have open; more are refused as overloaded. A client is a key with "
            "all its connections, or without keys a connection. clients.toml may give a key limits of its "
            "own."
        ),
    ] = 32
    max_rate: Annotated[
        float,
        MAX_RATE,
        SettingHelp(
            "Messages a second that a client may send, and that many at once; more are refused as overloaded."
        ),
    ] = 1000.0
    max_connections: Annotated[
        int,
        Int(1, 65536),
        SettingHelp(
            "Clients that may be connected at a time, with one key half of them; who comes then is turned "
            "away. Fewer where the process may open fewer files (LimitNOFILE of the unit): 256 of these stay "
            "free for other things."
        ),
    ] = 1000
    drain_seconds: Annotated[
        float,
        Real(0, 86400),
        SettingHelp(
            "After the first SIGTERM: how long running requests may go on, in seconds. Keep TimeoutStopSec "
            "of the unit above it."
        ),
    ] = 30.0
    read_deadline_s: Annotated[
        float,
        Real(0, 86400, above=True),
        SettingHelp(
            "A read from disk that takes longer, in seconds, has failed, and its KV is recomputed. Keep "
            "WatchdogSec of the unit above it."
        ),
    ] = 30.0
    threads: Annotated[
        int | None, Maybe(Int(1, 4096)), SettingHelp("CPU threads. Unset: all cores.", example=8)
    ] = None
    context_ttl_s: Annotated[
        float,
        Real(0, above=True),
        SettingHelp(
            "A kept context (one without a session's name) that nobody has used for so many seconds is "
            "deleted."
        ),
    ] = 3600.0
    retention_s: Annotated[
        float,
        Real(0, above=True),
        SettingHelp(
            "A request whose client is gone goes on for so many seconds, and so long its end is kept for a "
            "client that asks again."
        ),
    ] = 120.0

    @classmethod
    def load(cls, path: Path | None = None, overrides: Mapping[str, object] | None = None) -> Config:
        """Load the defaults, changed by a TOML file, changed by `overrides`.

        Args:
            path: The file; None for none.
            overrides: Values by setting; None is a value that is not given.

        Raises:
            ConfigError: A setting is unknown or a value does not fit. It names the key, its value, what is
                allowed, and the line if it is in the file.
        """
        file = TomlFile(path) if path is not None else None
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        values = (file.values if file is not None else {}) | given

        def where(name: str) -> str:
            return "" if file is None or name in given else f"{file.where(name)}: "

        kind: type = cls
        known = readers(kind)
        if unknown := sorted(values.keys() - known):
            raise ConfigError(
                f"{where(unknown[0])}unknown setting {unknown[0]!r}; allowed: {', '.join(known)}"
            )
        fit: dict[str, Any] = {}
        for name, value in values.items():
            try:
                fit[name] = known[name].read(value, name)
            except (FieldError, ConfigError) as error:
                raise ConfigError(f"{where(name)}{error}") from None
        config = cls(**fit)
        try:
            check_address(config.listen, keyed=config.keys is not None)
        except ConfigError as error:
            raise ConfigError(f"{where('listen')}{error}") from None
        return config
