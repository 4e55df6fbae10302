"""The engine: the same request gives the same tokens, whatever happens around it; events, numbers, limits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spilld.assembly import build_engine
from spilld.config.config import Config
from spilld.config.config_readers import Bytes
from spilld.engine.step import StepExecutor
from spilld.errors import (
    BudgetError,
    InvalidRequest,
    PromptTooLong,
    StateFolderError,
)
from spilld.kv.attention_span import BLOCK, boundary, sealed_by
from spilld.models.model import Model
from spilld.offload.host import residency
from spilld.protocol.messages import (
    Accepted,
    Done,
    Progress,
    Sampling,
    Token,
)

from .harness import (
    Harness,
    column_bytes,
    engine,
    greedy,
    random_split,
    reference,
    said,
    shared,
    smallest_host_budget,
    some_tokens,
    window_bytes,
)

FORMATS = ("exact", "int8", "k8v4", "int4")
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.8, top_p=0.9, seed=11)}
PROMPT = some_tokens(1, 1500)
ANSWER = 45
"""The answer crosses the grid at 1536: a cell is sealed while decoding."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return shared(tmp_path_factory, "llama")


# The same tokens.


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("form", FORMATS)
class TestSameTokens:
    def ask(self, harness: Harness, sampling: Sampling, prompt: list[int] = PROMPT) -> list[int]:
        tokens = harness.ask(prompt, max_tokens=ANSWER, ignore_eos=True, sampling=sampling)
        assert len(tokens) == ANSWER
        return tokens

    @pytest.fixture
    def alone(self, model: Model, form: str, sampling: Sampling, tmp_path: Path) -> list[int]:
        with engine(model, tmp_path / "alone", format=form, disk_budget=0) as harness:
            return self.ask(harness, sampling)

    @pytest.mark.parametrize("seed", [1, 2])
    def test_in_small_chunks_spilled_at_random(
        self, model: Model, form: str, sampling: Sampling, alone: list[int], tmp_path: Path, seed: int
    ) -> None:
        settings: dict[str, Any] = {
            "host_budget": smallest_host_budget(model, form, 128),
            "chunk_tokens": 128,
            "disk_budget": "64MiB",
        }
        with engine(model, tmp_path / "s", random_split(seed), format=form, **settings) as harness:
            assert self.ask(harness, sampling) == alone
            usage = harness.done().usage
            assert usage.read_bytes["disk"] > usage.read_bytes["host"] / 10

    def test_among_others_spilled_at_random(
        self, model: Model, form: str, sampling: Sampling, alone: list[int], tmp_path: Path
    ) -> None:
        settings: dict[str, Any] = {"host_budget": smallest_host_budget(model, form), "disk_budget": "64MiB"}
        with engine(model, tmp_path / "s", random_split(3), format=form, **settings) as harness:
            harness.add("a", some_tokens(2, 900), max_tokens=60, ignore_eos=True)
            harness.add("b", some_tokens(3, 70), max_tokens=30, ignore_eos=True, prompt_logprobs=1)
            harness.add("r", PROMPT, max_tokens=ANSWER, ignore_eos=True, sampling=sampling)
            harness.add("c", some_tokens(4, 1300), max_tokens=3, sampling=Sampling(temperature=1.0, seed=1))
            harness.run()
            assert harness.tokens("r") == alone
            assert all(isinstance(events[-1], Done) for events in harness.events.values())

    def test_in_pieces(self, model: Model, form: str, sampling: Sampling, tmp_path: Path) -> None:
        settings: dict[str, Any] = {"host_budget": smallest_host_budget(model, form), "disk_budget": "64MiB"}
        pieces = [PROMPT[:700], PROMPT[700:703], PROMPT[703:1450]]
        context, whole = None, list[int]()
        with engine(model, tmp_path / "s", random_split(4), format=form, **settings) as harness:
            for piece in pieces:
                answer = harness.ask(piece, context=context, keep=True, max_tokens=1, ignore_eos=True)
                context = harness.done().context
                whole += piece + answer
            last = PROMPT[1450:]
            fields: dict[str, Any] = {"max_tokens": ANSWER, "ignore_eos": True, "sampling": sampling}
            continued = harness.ask(last, context=context, **fields)
            assert harness.done().usage.cached_tokens == len(whole) - 1
            assert self.ask(harness, sampling, whole + last) == continued


def test_the_same_tokens_with_sliding_windows_and_softcap(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """A window of 300: one chunk has queries that see none of a tile that their neighbours see."""
    model = shared(tmp_path_factory, "gemma2", sliding_window=300)
    with engine(model, tmp_path / "a", format="exact", disk_budget=0) as harness:
        alone = harness.ask(PROMPT, max_tokens=20, ignore_eos=True)
    assert alone == greedy(reference(model.folder, "eager"), PROMPT, 20)
    settings: dict[str, Any] = {
        "host_budget": smallest_host_budget(model, "exact", 128),
        "chunk_tokens": 128,
        "disk_budget": "64MiB",
    }
    with engine(model, tmp_path / "s", random_split(5), format="exact", **settings) as harness:
        assert harness.ask(PROMPT, max_tokens=20, ignore_eos=True) == alone


# What is said.


def test_events_and_usage(model: Model, tmp_path: Path) -> None:
    with engine(
        model,
        tmp_path / "s",
        random_split(6),
        host_budget=smallest_host_budget(model, "k8v4"),
        disk_budget="64MiB",
    ) as harness:
        tokens = harness.ask(PROMPT, max_tokens=ANSWER, ignore_eos=True)
        accepted, *middle, done = harness.events["r"]
        assert isinstance(accepted, Accepted)
        assert (accepted.prompt_tokens, accepted.cached_tokens) == (len(PROMPT), 0)
        progress = [event for event in middle if isinstance(event, Progress)]
        assert [(p.done, p.total) for p in progress] == [(d, 1500) for d in (512, 1024, 1500)]
        assert middle == [*progress, *middle[3:]]
        assert [event.token for event in middle[3:] if isinstance(event, Token)] == tokens
        assert isinstance(done, Done)
        assert (done.reason, done.context, done.prompt_logprobs) == ("length", None, None)
        usage = done.usage
        assert (usage.prompt_tokens, usage.generated_tokens, usage.cached_tokens) == (1500, ANSWER, 0)
        assert usage.prefill_ms > 0 < usage.decode_ms
        assert usage.disk_read_bytes >= usage.read_bytes["disk"] > 0
        assert usage.format == "k8v4"
        stats = harness.engine.stats()
        assert (usage.prefetch_hits, usage.prefetch_stalls) == (
            stats["prefetch_hits"],
            stats["prefetch_stalls"],
        )
        assert usage.prefetch_hits + usage.prefetch_stalls > 0
        computed = len(PROMPT) + ANSWER - 1
        stored = sealed_by(computed - 1) - 1
        column = column_bytes(model, "k8v4")
        assert usage.kv_bytes["device"] == (computed - stored * BLOCK) * token_bytes(model)
        assert usage.kv_bytes["host"] + usage.kv_bytes["disk"] == stored * column
        assert usage.kv_bytes["disk"] > 0
        more = harness.ask(PROMPT, "another's", tenant="another", max_tokens=ANSWER + 1, ignore_eos=True)
        assert more[:-1] == tokens
        read = harness.done("another's").usage.read_bytes
        step = {tier: read[tier] - usage.read_bytes[tier] for tier in read}
        assert step["host"] + step["disk"] == stored * column
        assert step["device"] == (computed + 1 - stored * BLOCK) * token_bytes(model)


def token_bytes(model: Model) -> int:
    return model.geometry.token_numbers * 4


def test_logprobs_are_those_of_plain_transformers(model: Model, tmp_path: Path) -> None:
    prompt = PROMPT[:700]
    with engine(model, tmp_path / "s", format="exact") as harness:
        tokens = harness.ask(prompt, max_tokens=20, ignore_eos=True, logprobs=4, keep=True)
        events = [event for event in harness.events["r"] if isinstance(event, Token)]
        more = PROMPT[700:800]
        harness.ask(more, context=harness.done().context, max_tokens=1, prompt_logprobs=2)
        continued = harness.done().prompt_logprobs
        harness.ask(PROMPT[:1], max_tokens=1, prompt_logprobs=0)
        single = harness.done().prompt_logprobs
    with torch.inference_mode():
        logits = reference(model.folder)(input_ids=torch.tensor([prompt + tokens + more])).logits[0]
    wanted = logits.log_softmax(-1)
    for position, event in enumerate(events, len(prompt)):
        assert event.logprob == pytest.approx(wanted[position - 1, event.token].item(), abs=1e-4)
        assert len(event.top) == 4
        assert event.top[0][0] == event.token, "greedy takes the likeliest"
        for token, logprob in event.top:
            assert logprob == pytest.approx(wanted[position - 1, token].item(), abs=1e-4)
    assert continued is not None
    assert [entry.token for entry in continued] == more
    for position, entry in enumerate(continued, len(prompt) + len(tokens)):
        assert entry.logprob == pytest.approx(wanted[position - 1, entry.token].item(), abs=1e-4)
        assert len(entry.top) == 2
    assert single is not None
    assert [(entry.token, entry.logprob, entry.top) for entry in single] == [(PROMPT[0], None, ())]


def test_max_tokens_stop_and_eos(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "s") as harness:
        tokens = harness.ask(PROMPT[:100], max_tokens=40, ignore_eos=True)
        whole = harness.done()
        assert whole.reason == "length"
        assert (
            whole.text
            == model.tokenizer.decode(PROMPT[:100] + tokens)[len(model.tokenizer.decode(PROMPT[:100])) :]
        )
        for start, length in ((0, 1), (7, 4), (20, 9)):
            stop = whole.text[start : start + length]
            cut = whole.text[: whole.text.index(stop)]
            found = harness.ask(PROMPT[:100], max_tokens=40, ignore_eos=True, stop=(stop, "never said"))
            done = harness.done()
            assert (done.reason, done.text) == ("stop", cut)
            assert tokens[: len(found)] == found
            assert "".join(e.text for e in harness.events["r"] if isinstance(e, Token)) == cut
        assert harness.ask(PROMPT[:100], max_tokens=1, ignore_eos=True) == tokens[:1]
        assert harness.done().usage.generated_tokens == 1


def test_end_of_text(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "s") as harness:
        tokens = harness.ask(PROMPT[:100], max_tokens=12, ignore_eos=True)
    last = next(i for i, token in enumerate(tokens) if i > 2 and token not in tokens[:i])
    ending = replace(model, geometry=replace(model.geometry, eos=frozenset({tokens[last]})))
    with engine(ending, tmp_path / "s") as harness:
        assert harness.ask(PROMPT[:100], max_tokens=12, keep=True) == tokens[: last + 1]
        done = harness.done()
        assert done.reason == "eos"
        assert done.usage.generated_tokens == last + 1
        assert done.text == whole_text(model, PROMPT[:100], tokens[:last])
        assert harness.ask(PROMPT[:100], max_tokens=12, ignore_eos=True) == tokens
        assert harness.ask([], context=done.context, max_tokens=4) == [tokens[last]], "it ends again"
        follow = harness.ask(PROMPT[200:210], context=done.context, max_tokens=4, ignore_eos=True)
        assert harness.done().usage.cached_tokens == 100 + last - 1, "the last one's logits are had anew"
        fresh = harness.ask(PROMPT[:100] + tokens[:last] + PROMPT[200:210], max_tokens=4, ignore_eos=True)
        assert follow == fresh, "the end-of-text is no part of the context"


def whole_text(model: Model, prompt: list[int], tokens: list[int]) -> str:
    decode = model.tokenizer.decode
    return decode(prompt + tokens)[len(decode(prompt)) :]


# Limits.


def test_the_longest_request_runs_and_a_longer_one_is_refused(model: Model, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"host_budget": smallest_host_budget(model), "disk_budget": 0}
    with engine(model, tmp_path / "s", **settings) as harness:
        longest = harness.engine.longest
        assert longest < model.geometry.max_positions, "the host budget decides"
        prompt = some_tokens(5, longest)
        with pytest.raises(
            PromptTooLong, match=f"have {longest} tokens; at most {longest - 1} .*raise host_budget or"
        ):
            harness.add("x", prompt, max_tokens=1)
        tokens = harness.ask(prompt[:-3], max_tokens=100, ignore_eos=True)
        assert len(tokens) == 3, "cut to what fits"
        assert harness.done().reason == "length"
        assert "x" not in harness.events


def test_longest_is_what_the_tiers_hold(model: Model, tmp_path: Path) -> None:
    """Every block of the longest sequence has a place, and one more cell would not."""
    for columns in range(16, 24):
        with engine(
            model, tmp_path / "s", host_budget=columns * column_bytes(model, "k8v4"), disk_budget=0
        ) as harness:
            last = harness.engine.longest - 1
            assert boundary(last) // BLOCK - 1 <= columns < boundary(last + 1) // BLOCK - 1


def test_what_is_too_long_is_told_what_to_do(model: Model, tmp_path: Path) -> None:
    allowed = model.geometry.max_positions
    with engine(model, tmp_path / "a") as harness:
        with pytest.raises(PromptTooLong, match=rf"the model allows {allowed}; shorten it, or serve a model"):
            harness.ask(some_tokens(5, allowed), max_tokens=1)
        harness.ask(some_tokens(5, 8), session="s", max_tokens=1)
        with pytest.raises(PromptTooLong, match="fork the session with fewer tokens, or begin another, or"):
            harness.ask(some_tokens(5, allowed), session="s", max_tokens=1)
    with (
        engine(model, tmp_path / "b", max_context=300) as harness,
        pytest.raises(PromptTooLong, match="max_context is 300; shorten it, or raise max_context"),
    ):
        harness.ask(some_tokens(5, 300), max_tokens=1)


def test_max_context_limits(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "s", max_context=300) as harness:
        with pytest.raises(PromptTooLong, match="have 300 tokens; at most 299"):
            harness.add("x", PROMPT[:300])
        assert len(harness.ask(PROMPT[:299], max_tokens=9, ignore_eos=True)) == 1
        with pytest.raises(InvalidRequest, match="no tokens"):
            harness.add("x", [])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["host_budget", "device_budget"])
def test_a_budget_that_is_too_small_says_what_is_enough(
    model: Model, form: str, name: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"format": form, "disk_budget": "1MiB", "chunk_tokens": 256, name: 1000}
    with pytest.raises(BudgetError) as refusal, engine(model, tmp_path / "s", **settings):
        pass
    enough = max(Bytes().read(text, name) for text in re.findall(r"[\d.]+ [KMG]iB", str(refusal.value)))
    settings[name] = int(enough * 0.95)
    with pytest.raises(BudgetError), engine(model, tmp_path / "s", **settings):
        pass
    settings[name] = enough
    with engine(model, tmp_path / "s", **settings) as harness:
        assert len(harness.ask(PROMPT[:700], max_tokens=5, ignore_eos=True)) == 5


def test_a_disk_budget_that_is_too_small(model: Model, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="disk"), engine(model, tmp_path / "s", disk_budget=4096):
        pass


def test_state_folders_that_cannot_be_used(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for state in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/spilld")):
        config = Config.load(None, {"dtype": "float32", "state": str(state)})
        with pytest.raises(StateFolderError, match="`state`"):
            build_engine(config, model, lambda _client, _event: None)
    with engine(model, tmp_path / "s"), pytest.raises(StateFolderError, match="in use by another"):
        build_engine(
            Config.load(None, {"dtype": "float32", "state": str(tmp_path / "s")}),
            model,
            lambda _client, _event: None,
            residency.plan,
        )


def test_one_window_serves_one_after_the_other(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "s", device_budget=window_bytes(model)) as harness:
        for name in "abc":
            harness.add(name, PROMPT[:50], max_tokens=5, ignore_eos=True)
        harness.run()
        assert harness.tokens("a") == harness.tokens("b") == harness.tokens("c")
        assert harness.engine.stats()["device_used_bytes"] == 0


def test_a_client_with_many_requests_does_not_hold_up_another(model: Model, tmp_path: Path) -> None:
    """Two windows, twelve requests before it in line: it has one of the first two."""
    budget = str(2 * window_bytes(model))
    with engine(model, tmp_path / "s", device_budget=budget) as harness:
        fields: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True}
        for number in range(12):
            harness.add(f"greedy {number}", some_tokens(number, 300), tenant="greedy", **fields)
        harness.add("other", some_tokens(99, 300), tenant="other", **fields)
        while said(harness, "other") < 4:
            assert harness.engine.turn()
        ended = sum(said(harness, f"greedy {number}") == 4 for number in range(12))
        assert ended <= 2
        harness.run()
        assert all(said(harness, f"greedy {number}") == 4 for number in range(12))


def test_no_look_finds_a_token_computed_that_was_not_generated(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may look in the middle of a step: what both counts grow by is the same."""
    sample, seen = StepExecutor._sample, []

    def look(*arguments: Any) -> None:
        seen.append(harness.engine.stats())
        sample(*arguments)

    monkeypatch.setattr(StepExecutor, "_sample", look)
    with engine(model, tmp_path) as harness:
        harness.ask(some_tokens(1, 30), max_tokens=6, ignore_eos=True)
        seen.append(harness.engine.stats())
    ahead = [int(str(stats["computed_tokens"])) - int(str(stats["generated_tokens"])) for stats in seen]
    assert len(ahead) == 7
    assert set(ahead[1:]) == {29}
