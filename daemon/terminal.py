"""What a person sees: progress while a prompt is prefilled, the answer as it comes, tables."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Unpack

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from spilld.offload.errors import FolderUnusable

from .calls import Options
from .client import Client, Done, Generation, Message, Progress, Token
from .errors import ContextNotFound, StateFolderError
from .extra import engine

ABOUT = "{text}\n\n"
UNSAVED = (
    "spilld: the session could not be written to disk, as the daemon's log says: it goes on, is kept once "
    "there is room, but is lost if the daemon is killed before"
)
QUESTION = "Question: {question}\nAnswer:"


def ask(client: Client, text: str | None, question: str, **options: Unpack[Options]) -> None:
    """Ask once about a text or a session, raw: works with base and chat models alike."""
    about = "\n\n" if text is None else ABOUT.format(text=text)
    prompt = about + QUESTION.format(question=question)
    options["stop"] = ["\nQuestion:"]
    show(client.generate(prompt, **options), Console())


def chat(
    client: Client, system: str | None, session: str | None, max_tokens: int, temperature: float
) -> None:
    """A conversation that stays in the daemon; Ctrl-C ends an answer, Ctrl-D the chat. Without a session its
    context goes with the chat."""
    console = Console()
    goes_on = session is not None and any(info.name == session for info in client.sessions())
    said = [Message(role="system", content=system)] if system and not goes_on else []
    where: dict[str, str | None] = {"session": session, "context": None}
    console.print(f"[dim]{client.hello().model}: Ctrl-C ends an answer, Ctrl-D the chat[/]")
    for line in _lines(console):
        said.append(Message(role="user", content=line))
        new = said[-1:] if goes_on else said
        try:
            done = _answer(client, new, where, console, max_tokens, temperature)
        except ContextNotFound:  # it expired meanwhile: everything is still here, so send it all
            where["context"] = None
            done = _answer(client, said, where, console, max_tokens, temperature)
        except KeyboardInterrupt:
            console.print("[dim](stopped)[/]")
            continue
        said.append(Message(role="assistant", content=done.text))
        goes_on = True
        where["context"] = done.context if session is None else None
    if where["context"] is not None:
        client.release(where["context"])


def _answer(
    client: Client,
    messages: list[Message],
    where: Mapping[str, str | None],
    console: Console,
    max_tokens: int,
    temperature: float,
) -> Done:
    generation = client.generate(
        messages,
        session=where["session"],
        context=where["context"],
        keep=True,
        max_tokens=max_tokens,
        temperature=temperature,
    )
    return show(generation, console)


def _lines(console: Console) -> Iterator[str]:
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def show(generation: Generation, console: Console) -> Done:
    """Draw the prefill's progress, then stream the answer. Closing (Ctrl-C) cancels the request."""
    shown = 0
    with generation, prefill_bar(console) as bar:
        for event in generation:
            if isinstance(event, Progress):
                bar.update(bar.task_ids[0], completed=event.done, total=event.total)
                if event.done == event.total:
                    bar.stop()
            elif isinstance(event, Token):
                shown += len(event.text)
                console.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
            elif isinstance(event, Done):
                console.print(event.text[shown:], markup=False, highlight=False, soft_wrap=True)
    if not generation.result.saved:
        print(UNSAVED, file=sys.stderr)
    return generation.result


@contextmanager
def prefill_bar(console: Console) -> Iterator[Bar]:
    columns = (TextColumn("prefill"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        bar.add_task("prefill", total=None)
        yield bar


def sessions(client: Client) -> None:
    """The sessions, and where their KV lies."""
    table = Table("session", "model", "tokens", "device", "host", "disk", "used", "")
    for info in client.sessions():
        sizes = [size(info.kv_bytes.get(tier, 0)) for tier in ("device", "host", "disk")]
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.used))
        marks = [word for word, on in (("pinned", info.pinned), ("running", info.running)) if on]
        if info.ttl_s is not None:
            marks.append(f"expires after {info.ttl_s:g} s")
        table.add_row(
            escape(info.name), escape(info.model), f"{info.tokens:,}", *sizes, used, ", ".join(marks)
        )
    Console().print(table)


def export_session(client: Client, name: str, file: Path) -> None:
    """Write a session to a new file, and say what is in it."""
    exported = client.export_session(name, file)
    Console().print(
        f"{file}: {exported.tokens:,} tokens, the KV of {exported.cached_tokens:,}, {size(exported.nbytes)}",
        markup=False,
        soft_wrap=True,
    )


def import_session(client: Client, name: str, file: Path) -> None:
    """Make a session of a file, and say what must be computed again."""
    imported = client.import_session(file, name)
    said = f"{name}: {imported.session.tokens:,} tokens, {imported.cached_tokens:,} need not be computed"
    note = f"; {imported.note}" if imported.note else ""
    Console().print(said + note, markup=False, soft_wrap=True)


def check(folder: Path, repair: bool, as_json: bool) -> bool:
    """Verify the store in a folder and say what was found; whether it is clean. Raises ConfigError."""
    with engine():
        from spilld.offload.check import check as verify

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


def stats(client: Client, as_json: bool) -> None:
    """The daemon's counters; sizes for people, or exact as JSON."""
    values = {"model": client.hello().model, **client.stats()}
    if as_json:
        print(json.dumps(values))
        return
    Console().print(stats_table(values))


def stats_table(values: Mapping[str, object]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), escape(size(value) if name.endswith("_bytes") else str(value)))
    return table


def size(value: object) -> str:
    """Bytes for people: MiB with two decimals."""
    return f"{value / 2**20:,.2f} MiB" if isinstance(value, int) else str(value)
