"""What a person sees: progress while a prompt is prefilled, the answer as it comes, tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from .client import Client, Done, Generation, Message, Progress, Token
from .errors import ContextNotFound

QUESTION = "{text}\n\nQuestion: {question}\nAnswer:"


def ask(address: str | None, text: str, question: str, max_tokens: int, temperature: float) -> None:
    """Ask once about a text, raw: works with base and chat models alike."""
    prompt = QUESTION.format(text=text, question=question)
    with Client(address) as client:
        show(
            client.generate(prompt, max_tokens=max_tokens, temperature=temperature, stop=["\nQuestion:"]),
            Console(),
        )


def chat(address: str | None, system: str | None, max_tokens: int, temperature: float) -> None:
    """A conversation whose context stays in the daemon; Ctrl-C ends an answer, Ctrl-D the chat."""
    console = Console()
    messages = [Message(role="system", content=system)] if system else []
    handle: str | None = None
    with Client(address) as client:
        console.print(f"[dim]{client.hello().model}: Ctrl-C ends an answer, Ctrl-D the chat[/]")
        for line in _lines(console):
            messages.append(Message(role="user", content=line))
            sent = messages if handle is None else messages[-1:]
            try:
                generation = client.generate(
                    sent, context=handle, keep=True, max_tokens=max_tokens, temperature=temperature
                )
                done = show(generation, console)
            except ContextNotFound:  # it expired meanwhile: everything is still here, so send it all
                handle = None
                done = show(
                    client.generate(messages, keep=True, max_tokens=max_tokens, temperature=temperature),
                    console,
                )
            except KeyboardInterrupt:
                console.print("[dim](stopped)[/]")
                messages.pop()
                handle = None
                continue
            handle = done.context
            messages.append(Message(role="assistant", content=done.text))
        if handle is not None:
            client.release(handle)


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
    return generation.result


@contextmanager
def prefill_bar(console: Console) -> Iterator[Bar]:
    columns = (TextColumn("prefill"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        bar.add_task("prefill", total=None)
        yield bar


def stats(address: str | None, as_json: bool) -> None:
    """The daemon's counters; sizes for people, or exact as JSON."""
    with Client(address) as client:
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
