"""Prints sessions, archives, the check of the store and the counters for people."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from spilld.client.client import Client
from spilld.errors import StateFolderError
from spilld.offload.errors import FolderUnusable
from spilld.printable import printable
from spilld.protocol.messages import Welcome

from .engine_extra import engine_imports


def sessions(client: Client) -> None:
    """Print the sessions, and where their KV is."""
    table = Table("session", "model", "tokens", "device", "host", "disk", "used", "")
    for info in client.sessions():
        sizes = [size(info.kv_bytes.get(tier, 0)) for tier in ("device", "host", "disk")]
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.used))
        marks = [word for word, on in (("pinned", info.pinned), ("running", info.running)) if on]
        if info.ttl_s is not None:
            marks.append(f"expires after {info.ttl_s:g} s")
        names = (escape(printable(name)) for name in (info.name, info.model))
        table.add_row(*names, f"{info.tokens:,}", *sizes, used, ", ".join(marks))
    Console().print(table)


def export_session(client: Client, name: str, file: Path) -> None:
    """Write a session to a new file, and print what is in it."""
    exported = client.export_session(name, file)
    Console().print(
        f"{file}: {exported.tokens:,} tokens, the KV of {exported.cached_tokens:,}, {size(exported.nbytes)}",
        markup=False,
        soft_wrap=True,
    )


def import_session(client: Client, name: str, file: Path) -> None:
    """Make a session from a file, and print how much must be computed again."""
    imported = client.import_session(file, name)
    said = f"{name}: {imported.session.tokens:,} tokens, {imported.cached_tokens:,} need not be computed"
    note = f"; {imported.note}" if imported.note else ""
    Console().print(said + note, markup=False, soft_wrap=True)


def check(folder: Path, repair: bool, as_json: bool) -> bool:
    """Verify the store in a folder, and print what was found.

    Args:
        folder: The store's folder.
        repair: Whether what is damaged is removed.
        as_json: Whether to print one JSON object.

    Returns:
        Whether the store is clean.

    Raises:
        ConfigError: The folder cannot be used, or the engine's packages are not installed.
    """
    with engine_imports():
        from spilld.offload.maintenance.check import check as verify

    console = Console(stderr=as_json)
    try:
        with Bar(TextColumn("reading"), BarColumn(), console=console, transient=True) as bar:
            task = bar.add_task("reading", total=None)
            report = verify(
                folder,
                repair=repair,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except FolderUnusable as error:
        raise StateFolderError(f"{error}; stop the daemon, or name its folder with --state") from error
    if as_json:
        print(json.dumps({**asdict(report), "clean": report.clean}))
        return report.clean
    for line in (report.index, *(f"run {run} is lost" for run in report.lost), *report.damaged):
        if line:
            console.print(f"[red]{escape(line)}[/]", soft_wrap=True)
    verdict = "clean" if report.clean else "forgotten, to be computed again" if repair else "DAMAGED"
    console.print(
        f"{folder}: {report.runs:,} runs, {report.extents:,} extents read, {size(report.run_bytes)}; "
        f"{size(report.orphan_bytes)} belong to no run; {verdict}",
        soft_wrap=True,
    )
    return report.clean


def stats(client: Client, welcome: Welcome, as_json: bool) -> None:
    """Print the daemon's counters: with sizes for people, or exact as JSON."""
    values = {"model": welcome.model, **client.stats()}
    if as_json:
        print(json.dumps(values))
        return
    Console().print(stats_table(values))


def stats_table(values: Mapping[str, object]) -> Table:
    """Make a table of counters and gauges, one a row."""
    table = Table(show_header=False, box=None)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), escape(size(value) if name.endswith("_bytes") else str(value)))
    return table


def size(value: object) -> str:
    """Write bytes for people: MiB with two decimals."""
    return f"{value / 2**20:,.2f} MiB" if isinstance(value, int) else str(value)
