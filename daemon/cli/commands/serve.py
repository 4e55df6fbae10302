"""spilld serve: the daemon; spilld config: its settings."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import signal
from pathlib import Path
from typing import Any

from spilld.cli.engine_extra import check_engine_installed, engine_imports
from spilld.cli.preflight import check
from spilld.config.config import Config
from spilld.config.settings import file_text, given, settings
from spilld.errors import SpilldError
from spilld.monitoring import logs

log = logging.getLogger(__name__)


def add(commands: Any) -> None:
    """Add the commands to the parser."""
    parser = commands.add_parser(
        "serve", help="run the daemon", usage="%(prog)s [--config FILE] [--SETTING VALUE ...]"
    )
    parser.set_defaults(run=run)
    parser.description = (
        "Run the daemon until SIGTERM or Ctrl-C. Each setting is an option, and a line in the file that "
        "`spilld config` prints; an option counts more than the file. Sizes are bytes, or 8G, 512MiB, 1.5TB."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, in TOML (default: none)")
    for setting in settings():
        parser.add_argument("--" + setting.name.replace("_", "-"), metavar=setting.metavar, help=setting.help)
    shown = commands.add_parser(
        "config", help="print every setting of `serve`, explained, as a file for --config"
    )
    shown.set_defaults(run=lambda _: print(file_text(), end=""))


def run(options: argparse.Namespace) -> int:
    """Run the daemon; the exit status.

    Errors go to the log if that is for machines; otherwise they are printed in one line, as by every command.
    """
    faulthandler.enable(2)  # systemd sends SIGABRT to a daemon that hangs; the log then has its stacks
    values = given(options)

    def read() -> Config:
        return Config.load(options.config, values)

    logs.set_up("json" if options.log_format == "json" else "text", "info")
    # A SIGHUP while the model loads stays pending, and is a reload once the server runs.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP} if options.config else set())
    try:
        config = read()
        logs.set_up(config.log_format, config.log_level)
        check_engine_installed()
        check(config)
        # Otherwise torch's threads would spin between its loops, on the cores that our kernels use.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        with engine_imports():
            from spilld.assembly import serve

        serve(config, read if options.config else None)
    except SpilldError as error:
        if not logs.for_machines():
            raise
        log.critical(error.message)
        return 1
    except Exception:
        log.critical("the daemon ends by a bug of spilld's", exc_info=True)
        return 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0
