"""The demo: a document whose KV does not fit in fast memory, and two questions about it.

It runs a daemon of its own in a temporary folder, with at most 20 % of the KV in the device budget and 25 %
in the host budget, so that the rest must be on disk.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.table import Table

from spilld.cli.answer import Output, show
from spilld.cli.tables import size
from spilld.client.client import Client
from spilld.config.config import Config
from spilld.errors import InvalidRequest
from spilld.kv.attention_span import SINKS, WINDOW_TOKENS, boundary
from spilld.models.catalog import resolve
from spilld.offload.record import (
    BLOCK,
    Element,
    Format,
    Layout,
)
from spilld.protocol.messages import Done, Token

from .plain_transformers import greedy
from .spawn import import_rss_bytes, spawned

MODEL = "smollm2-135m"
KEY = "48213"
NEEDLE = f"\n\nThe pass key is {KEY}. Remember it. The pass key is {KEY}.\n\n"
FIRST = "\nWhat is the pass key? The pass key is"
SECOND = "\nOnce more, to be sure: what is the pass key? The pass key is"
ANSWER_TOKENS = 8
VERIFIED_TOKENS = 64
SLACK_BYTES = 200 * 2**20
"""What the daemon may use beyond what is accounted for."""


@dataclass
class Outcome:
    """The results, which --json prints."""

    context_tokens: int
    needle_found: bool
    kv_bytes: dict[str, int]
    workspace_bytes: int
    disk_read_bytes: int
    prefill_s: float
    decode_ms_per_token: float
    second_ttft_s: float
    peak_rss_bytes: int
    rss_bound_bytes: int
    matches_transformers: bool | None = None


@dataclass(frozen=True)
class Shape:
    """Sizes from the model's config.json: enough for the formula of FORMAT.md, without loading the model."""

    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, folder: Path) -> Shape:
        """Read the shape of the KV from a model folder."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(config["num_hidden_layers"], config["num_key_value_heads"], head_dim)

    def window_bytes(self, element: Element, tokens: int = WINDOW_TOKENS) -> int:
        """Return the size of a window of so many tokens, in bytes."""
        return tokens * 2 * self.layers * self.kv_heads * self.head_dim * element.nbytes

    def kv_bytes(self, tokens: int, form: Format, element: Element) -> int:
        """Return the size of a context: exact numbers for sinks and window, records for the rest."""
        stored = max(0, boundary(tokens - 1) - SINKS) // BLOCK
        column = self.layers * Layout(form, element, self.kv_heads, self.head_dim).record_bytes
        return self.window_bytes(element, tokens - stored * BLOCK) + stored * column


def demo(tokens: int, as_json: bool, verify: bool) -> int:
    """Run the demo.

    Args:
        tokens: Length of the document.
        as_json: Whether to print the outcome as one JSON object at the end.
        verify: Whether to compare with plain transformers.

    Returns:
        The exit status: 0 if the pass key was found and, with verify, the tokens equal those of transformers.

    Raises:
        InvalidRequest: `tokens` is too small or too large.
    """
    console = Console(stderr=as_json)
    cache = Config().cache
    console.print(
        f"A document of {tokens:,} tokens with a pass key hidden in its middle, for which the model is asked."
    )
    console.print(f"[bold]1.[/] the model, {MODEL}: converted once from its GGUF package into {cache}")
    folder = resolve(MODEL, cache, Element.BFLOAT16)
    prompt = document(folder, tokens)
    outcome = main_job(folder, prompt, console)
    if verify:
        console.print("[bold]5.[/] the same in float32 with format exact, against plain transformers:")
        outcome.matches_transformers = matches(resolve(MODEL, cache, Element.FLOAT32), prompt, console)
    console.print(f"Now with a model of yours: [bold]{sys.argv[0]} serve --help[/]", highlight=False)
    if as_json:
        print(json.dumps(asdict(outcome)))
    return 0 if outcome.needle_found and outcome.matches_transformers is not False else 1


def document(folder: Path, tokens: int) -> list[int]:
    """Make token ids of Python's own documentation, a pass key in the middle, a question at the end.

    Raises:
        InvalidRequest: The documentation is shorter, or `tokens` leave no room for the question.
    """
    from spilld.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    text = tokenizer.encode("".join(topics[name] for name in sorted(topics)))
    needle, question = (tokenizer.encode(part, start=False) for part in (NEEDLE, FIRST))
    rest = tokens - len(needle) - len(question)
    if not 0 < rest <= len(text):
        raise InvalidRequest(f"--tokens is {tokens}; allowed: up to {len(text)} and some for the question")
    return [*text[: rest // 2], *needle, *text[rest // 2 : rest], *question]


def main_job(folder: Path, prompt: Sequence[int], console: Console) -> Outcome:
    """Run the daemon, ask both questions, and measure."""
    settings = budgets(folder, len(prompt), Format.K8V4, Element.BFLOAT16)
    console.print(
        f"[bold]2.[/] a daemon of its own for {len(prompt):,} tokens: device budget "
        f"{size(settings['device_budget'])}, host budget {size(settings['host_budget'])}, the rest on "
        "disk; the first time it also compiles kernels"
    )
    with spawned(settings) as process, Client(process.address) as client:
        console.print(f"[bold]3.[/] prefill, then the first question:{FIRST}", style="default")
        prefill = client.generate(list(prompt), keep=True, max_tokens=ANSWER_TOKENS, stop=["."])
        output = Output(sys.stderr if console.stderr else sys.stdout)
        first = show(prefill, output, console)
        output.end_line()
        console.print(f"[bold]4.[/] a second one on the same context, without prefilling again:{SECOND}")
        second, ttft = second_question(client, first, console)
        stats = {name: value for name, value in client.stats().items() if isinstance(value, int)}
        peak = process.peak_rss_bytes
    parts = memory_parts(settings, folder, stats["workspace_bytes"], stats["staging_bytes"])
    outcome = Outcome(
        context_tokens=len(prompt),
        needle_found=KEY in first.text and KEY in second.text,
        kv_bytes=first.usage.kv_bytes,
        workspace_bytes=stats["workspace_bytes"],
        disk_read_bytes=first.usage.disk_read_bytes + second.usage.disk_read_bytes,
        prefill_s=round(first.usage.prefill_ms / 1e3, 3),
        decode_ms_per_token=round(decode_ms(first, second), 2),
        second_ttft_s=round(ttft, 3),
        peak_rss_bytes=peak,
        rss_bound_bytes=sum(parts.values()),
    )
    console.print(tiers_table(outcome, settings))
    console.print(memory_table(outcome, parts))
    console.print(
        f"prefill {outcome.prefill_s:.1f} s, then {outcome.decode_ms_per_token:.1f} ms a token; the second "
        f"question's first token after {outcome.second_ttft_s:.2f} s; "
        f"{size(outcome.disk_read_bytes)} read from disk"
    )
    return outcome


def budgets(folder: Path, tokens: int, form: Format, element: Element) -> dict[str, Any]:
    """Make settings of a daemon whose device has room for one window, and host memory for 25 % of the KV.

    Raises:
        InvalidRequest: A window is more than 20 % of the KV.
    """
    shape = Shape.of(folder)
    needed, window = shape.kv_bytes(tokens, form, element), shape.window_bytes(element)
    if window > 0.20 * needed:
        raise InvalidRequest(f"--tokens is {tokens}: too few, a window is more than 20 % of their KV")
    return {
        "model": MODEL,
        "format": str(form),
        "dtype": str(element),
        "device_budget": window,
        "host_budget": needed // 4,
        "disk_budget": 4 * needed,
    }


def second_question(client: Client, first: Done, console: Console) -> tuple[Done, float]:
    """Ask the second question: the answer, and the seconds until its first token."""
    asked = time.monotonic()
    ttft = 0.0
    stream = client.generate(SECOND, context=first.context, max_tokens=ANSWER_TOKENS, stop=["."])
    for event in stream:
        if isinstance(event, Token):
            ttft = ttft or time.monotonic() - asked
            console.print(event.text, end="", markup=False, highlight=False)
    console.print()
    return stream.result, ttft


def decode_ms(*answers: Done) -> float:
    """Return the mean time of a decode step; the first token of each answer came with the prefill."""
    steps = sum(answer.usage.generated_tokens - 1 for answer in answers)
    return sum(answer.usage.decode_ms for answer in answers) / max(1, steps)


def matches(folder: Path, prompt: Sequence[int], console: Console) -> bool:
    """Whether the answer and 64 tokens more equal those of plain transformers, with the same budgets."""
    count = ANSWER_TOKENS + VERIFIED_TOKENS
    settings = budgets(folder, len(prompt), Format.EXACT, Element.FLOAT32)
    with spawned(settings) as process, Client(process.address) as client:
        stream = client.generate(list(prompt), max_tokens=count, ignore_eos=True)
        ours = [event.token for event in stream if isinstance(event, Token)]
        kv_bytes = stream.result.usage.kv_bytes
    theirs = greedy(folder, Element.FLOAT32, prompt, count).tokens
    share = kv_bytes["disk"] / sum(kv_bytes.values())
    same = ours == theirs
    console.print(f"{count} greedy tokens, {share:.0%} of the KV on disk: {'equal' if same else 'DIFFERENT'}")
    return same


def tiers_table(outcome: Outcome, settings: dict[str, Any]) -> Table:
    """Make a table of KV bytes per tier after the first answer."""
    table = Table("tier", "KV", "share", "budget", title="where the KV lies")
    total = sum(outcome.kv_bytes.values())
    for tier, count in outcome.kv_bytes.items():
        table.add_row(tier, size(count), f"{count / total:.0%}", size(settings[f"{tier}_budget"]))
    table.add_row("all", size(total), "100%", "")
    return table


def memory_parts(
    settings: dict[str, Any], folder: Path, workspace_bytes: int, staging_bytes: int
) -> dict[str, int]:
    """Return what the daemon may use, in bytes: the sum bounds its peak memory."""
    return {
        "interpreter with torch, transformers, numba": import_rss_bytes(),
        "weights, and those that are packed": sum(
            path.stat().st_size for path in folder.rglob("*.safetensors")
        ),
        "device budget": settings["device_budget"],
        "host budget": settings["host_budget"],
        "workspace of a chunk": workspace_bytes,
        "staging": staging_bytes,
        "slack": SLACK_BYTES,
    }


def memory_table(outcome: Outcome, parts: dict[str, int]) -> Table:
    """Make a table of the parts of the daemon's memory."""
    table = Table("memory", "bytes", title="the daemon's peak memory")
    for name, count in parts.items():
        table.add_row(name, size(count), end_section=name == "slack")
    table.add_row("bound: the sum", size(outcome.rss_bound_bytes))
    table.add_row("peak RSS", size(outcome.peak_rss_bytes))
    return table
