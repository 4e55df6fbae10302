"""spilld check, doctor and demo: commands that need the engine, and no daemon."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spilld.cli.engine_extra import engine_imports
from spilld.cli.signals import ended_by_signals
from spilld.config.config import Config


def add(commands: Any) -> None:
    """Add the commands to the parser."""
    verify = commands.add_parser("check", help="verify what is stored on disk, while no daemon runs")
    verify.set_defaults(run=check)
    verify.add_argument(
        "--config", type=Path, metavar="FILE", help="the daemon's settings, for its `state` (default: none)"
    )
    verify.add_argument("--state", metavar="FOLDER", help="the state folder (default: as `serve` has it)")
    verify.add_argument(
        "--repair",
        action="store_true",
        help="forget what is damaged: it is computed again (default: only look)",
    )
    verify.add_argument("--json", action="store_true", help="one JSON object (default: lines)")
    look = commands.add_parser("doctor", help="what this machine has, its rates, and what to change")
    look.set_defaults(run=doctor)
    look.add_argument("--config", type=Path, metavar="FILE", help="the daemon's settings (default: none)")
    look.add_argument("--model", metavar="NAME", help="say what this model takes (default: none)")
    shown = commands.add_parser("demo", help="a long document, most of its KV on disk, two questions")
    shown.set_defaults(run=demo)
    shown.add_argument(
        "--tokens", type=int, default=7600, metavar="N", help="length of the document (default: %(default)s)"
    )
    shown.add_argument(
        "--json", action="store_true", help="one JSON object as the last line (default: tables)"
    )
    shown.add_argument(
        "--verify", action="store_true", help="compare with plain transformers in float32 (default: do not)"
    )


def check(options: argparse.Namespace) -> int:
    """Verify what is stored; the exit status is 1 if something is damaged."""
    from spilld.cli.tables import check

    config = Config.load(options.config, {"state": options.state})
    return 0 if check(config.state / "kv", options.repair, options.json) else 1


def doctor(options: argparse.Namespace) -> None:
    """Print what this machine has and how fast it is, or what a model takes of it."""
    config = Config.load(options.config, {"model": options.model})
    if options.model:
        with engine_imports():
            from spilld.cli.model_size import report

        for what, found in report(config):
            print(f"{what}: {found}", flush=True)
        return
    with engine_imports():
        from spilld.cli.doctor import examine

    for finding in examine(config):
        print(f"{finding.what}: {finding.found}", flush=True)
        if finding.advice:
            print(f"    {finding.advice}", flush=True)


def demo(options: argparse.Namespace) -> int:
    """Run the demo; its exit status."""
    with engine_imports():
        from spilld.demo.demo import demo

    with ended_by_signals():
        return demo(options.tokens, options.json, options.verify)
