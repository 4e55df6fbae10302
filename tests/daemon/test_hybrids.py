"""Models whose layers mix attention with a state: they go on from checkpoints and compute what is between."""

from __future__ import annotations

from copy import copy
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from spilld.assembly import load_model
from spilld.attention.state_layers import MixerCache, keep_states
from spilld.config.config import Config
from spilld.errors import BudgetError, UnsupportedModel
from spilld.kv.attention_span import CELL
from spilld.kv.checkpoint import ANCHOR_CELLS, CHECKPOINT_BLOCKS, checkpoint_cells, state_blocks
from spilld.kv.geometry import Geometry
from spilld.kv.recurrent_state import LayerState, RecurrentState, StateShape
from spilld.kv.state_geometry import StateGeometry
from spilld.models.model import Model, load_module
from spilld.models.probe import probe
from spilld.offload.record import BLOCK, Element, Format, Layout
from spilld.offload.store_layout import StoreLayout
from spilld.offload.system import PAGE, page_aligned
from spilld.protocol.messages import ChangeSession, Progress, Token
from spilld.scheduler import scheduler

from .harness import (
    Harness,
    column_bytes,
    disk_tier,
    engine,
    greedy,
    load_tiny,
    random_split,
    reference,
    said,
    some_tokens,
    window_bytes,
)
from .test_archive import exported, imported
from .test_restart import killed
from .tiny_hybrids import HYBRIDS, build_hybrid

PROMPT, LONG = some_tokens(3, 700), some_tokens(5, 1400)
FIELDS: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}
SIBLINGS = ("qwen3_5_moe_text", "lfm2_moe")
"""Families whose layers are those of others."""
GRID = 64
"""Of the model that most tests take."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_tiny(build_hybrid("qwen3_5_text", tmp_path_factory.mktemp("hybrid")))


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the first layer computes by the rule for several."""
    counts, update = [], MixerCache.update_conv_state

    def counted(self: MixerCache, tokens: torch.Tensor, layer: int, **others: Any) -> torch.Tensor:
        if not layer:
            counts.append(tokens.shape[-1])
        return update(self, tokens, layer, **others)

    monkeypatch.setattr(MixerCache, "update_conv_state", counted)
    return counts


def crowded(model: Model) -> dict[str, Any]:
    """Settings under which there is one sequence at a time."""
    states = StateShape.of(model.geometry, torch.float32)
    assert states is not None
    return {
        "format": "exact",
        "device_budget": window_bytes(model) + states.sequence_bytes,
        "host_budget": 17 * column_bytes(model, "exact"),
        "disk_budget": "64MiB",
    }


def alone(model: Model, state: Path, prompt: list[int], **fields: Any) -> list[int]:
    """The tokens of a request that finds nothing."""
    with engine(model, state, format="exact") as harness:
        return harness.ask(prompt, **FIELDS | fields)


def cached(harness: Harness, request_id: str = "r") -> int:
    return harness.done(request_id).usage.cached_tokens


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=pytest.mark.slow) if family in SIBLINGS else family for family in HYBRIDS],
)
def test_they_compute_what_transformers_does(family: str, tmp_path: Path) -> None:
    """Over all tiers, in chunks of either size, alone and beside another."""
    folder = build_hybrid(family, tmp_path / family)
    model, plain = load_tiny(folder), reference(folder)
    with torch.inference_mode():
        wanted = plain(input_ids=torch.tensor([LONG])).logits[0].log_softmax(-1)
    answers = [greedy(plain, LONG, 12), greedy(plain, PROMPT[:333], 12)]
    for chunk in (128, 512):
        settings = {**crowded(model), "device_budget": None, "chunk_tokens": chunk}
        with engine(model, tmp_path / "s", random_split(1), **settings) as harness:
            harness.add("a", LONG, **FIELDS, prompt_logprobs=0)
            harness.add("b", PROMPT[:333], **FIELDS)
            harness.run()
            assert [harness.tokens("a"), harness.tokens("b")] == answers
            assert harness.done("a").usage.read_bytes["disk"] > 0, "nothing was read from disk"
            told = harness.done("a").prompt_logprobs
            assert told is not None
            for position, entry in enumerate(told[1:]):
                assert entry.logprob == pytest.approx(float(wanted[position, entry.token]), abs=1e-4)


def test_a_prompt_is_taken_over_up_to_its_last_token(model: Model, tmp_path: Path) -> None:
    """Which is computed by the same rule again, from the same state."""
    with engine(model, tmp_path / "s", **crowded(model)) as harness:
        first = harness.ask(PROMPT, **FIELDS, logprobs=3)
        told = [event for event in harness.events["r"] if isinstance(event, Token)]
        assert cached(harness) == 0
        assert harness.ask(PROMPT, **FIELDS, logprobs=3) == first
        assert cached(harness) == len(PROMPT) - 1
        again = [event for event in harness.events["r"] if isinstance(event, Token)]
        for old, new in zip(told, again, strict=True):
            assert new.logprob == pytest.approx(old.logprob, abs=1e-6), "tiers merge in another order"
        beside = [*PROMPT[:-1], 7, 8, 9]
        found = harness.ask(beside, **FIELDS)
        assert cached(harness) == len(PROMPT) - 1, "another last token is a continuation"
        shorter = harness.ask(PROMPT[:-40], **FIELDS)
        assert cached(harness) == 0, "a state does not step back"
    assert found == alone(model, tmp_path / "1", beside)
    assert shorter == alone(model, tmp_path / "2", PROMPT[:-40])


def test_prompts_that_begin_alike_share_what_they_have(model: Model, tmp_path: Path) -> None:
    """The second saves where it parts from the first, for the third."""
    prompts = [[*PROMPT, *some_tokens(seed, 500)] for seed in (11, 12, 13)]
    with engine(model, tmp_path / "s", **crowded(model)) as harness:
        found, taken = [], []
        for prompt in prompts:
            found.append(harness.ask(prompt, **FIELDS))
            taken.append(cached(harness))
    assert taken == [0, 0, len(PROMPT) // GRID * GRID]
    assert found[2] == alone(model, tmp_path / "1", prompts[2])


@pytest.mark.parametrize("evicted", [False, True], ids=["in memory", "from disk"])
def test_the_next_turn_goes_on_where_the_answer_ended(model: Model, evicted: bool, tmp_path: Path) -> None:
    more = some_tokens(4, 150)
    with engine(model, tmp_path / "s", **crowded(model)) as harness:
        answer = harness.ask(PROMPT, session="s", **FIELDS)
        if evicted:
            harness.ask(some_tokens(9, 300), **FIELDS)
        found = harness.ask(more, session="s", **FIELDS)
        if evicted:
            assert cached(harness) == len(PROMPT) + len(answer) - 1
        harness.engine.manage(
            ChangeSession(request_id="f", session="s", action="fork", into="t", tokens=len(PROMPT) + 5)
        )
        forked = harness.ask(more, session="t", **FIELDS)
        assert cached(harness) == len(PROMPT) - 1, "the newest checkpoint before the fork"
    assert found == alone(model, tmp_path / "1", [*PROMPT, *answer, *more])
    assert forked == alone(model, tmp_path / "2", [*PROMPT, *answer[:5], *more])


def test_what_is_appended_is_computed_before_it_is_asked_about(
    model: Model, together: list[int], tmp_path: Path
) -> None:
    with engine(model, tmp_path / "s", format="exact") as harness:
        harness.ask(PROMPT, session="s", max_tokens=0)
        assert together == [512, 187]
        found = harness.ask([], session="s", **FIELDS)
        assert together == [512, 187]
    assert found == alone(model, tmp_path / "1", PROMPT)


def test_prompts_are_computed_on_a_grid(model: Model, together: list[int], tmp_path: Path) -> None:
    """From where they go on up to a multiple, from there as from the beginning; the last token alone."""
    with engine(model, tmp_path / "s", format="exact") as harness:
        harness.ask(PROMPT, session="s", **FIELDS)
        harness.ask(some_tokens(4, 150), session="s", **FIELDS)
    assert together == [512, 187, 768 - 711, 861 - 768]


def test_an_answer_that_is_cut_is_not_gone_back_in(model: Model, tmp_path: Path) -> None:
    """What is behind the cut cannot be taken out of the state: it is computed again."""
    with engine(model, tmp_path / "s", format="exact") as harness:
        harness.ask(PROMPT, **FIELDS)
        told = [event.text for event in harness.events["r"] if isinstance(event, Token)]
        harness.ask(PROMPT, session="s", stop=("".join(told[5:9])[1:-1],), **FIELDS)
        kept = list(harness.engine.sessions.store.get("", "s").tokens)
        assert len(PROMPT) < len(kept) < len(PROMPT) + 11
        found = harness.ask([5, 6, 7], session="s", **FIELDS)
        assert cached(harness) == len(PROMPT) - 1
    assert found == alone(model, tmp_path / "1", [*kept, 5, 6, 7])


@pytest.mark.parametrize("tokens", [0, 5])
def test_it_makes_way_and_comes_back(
    model: Model, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "QUANTUM_S", 0.0)
    with engine(model, tmp_path / "s", **crowded(model)) as harness:
        harness.add("long", PROMPT, **FIELDS, tenant="a")
        while said(harness, "long") < tokens or not harness.events.get("long"):
            harness.engine.turn()
        harness.add("short", PROMPT[100:400], **FIELDS, tenant="b")
        harness.run()
        assert int(str(harness.engine.stats()["preemptions"])) >= 1
        assert harness.engine.stats()["computed_tokens"] == len(PROMPT) + 300 + 2 * 11, "some is done again"
        found = harness.tokens("long"), harness.tokens("short")
    assert found == (alone(model, tmp_path / "1", PROMPT), alone(model, tmp_path / "2", PROMPT[100:400]))


@pytest.mark.parametrize("tokens", [0, 7])
def test_a_killed_process_goes_on(model: Model, tokens: int, together: list[int], tmp_path: Path) -> None:
    fields = FIELDS | {"max_tokens": 30}
    with engine(model, tmp_path / "s", **crowded(model)) as harness:
        harness.add("r", PROMPT, **fields)
        while said(harness, "r") < tokens or not harness.events.get("r"):
            harness.engine.turn()
        before = list(harness.events["r"])
        copy = killed(tmp_path / "s")
    together.clear()
    with engine(model, copy, **crowded(model)) as harness:
        for left in harness.engine.left_behind():
            harness.engine.restore(left)
        harness.resume("r", len(before))
        harness.run()
        told = [*before, *harness.events["r"]]
        again = int(str(harness.engine.stats()["computed_tokens"]))
        assert (again <= 30) == bool(tokens), "it goes on behind the prompt once that is computed"
        assert bool(together) != bool(tokens), "what was computed one by one is computed so again"
    found = [event.token for event in told if isinstance(event, Token)]
    assert found == alone(model, tmp_path / "1", PROMPT, **fields)


def test_a_daemon_that_stops_saves_the_state(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "s", keep_state=True, **crowded(model)) as harness:
        harness.add("r", PROMPT, **FIELDS)
        while said(harness, "r") < 5:
            harness.engine.turn()
        before = list(harness.events["r"])
        harness.engine.suspend()
    with engine(model, tmp_path / "s", **crowded(model)) as harness:
        for left in harness.engine.left_behind():
            harness.engine.restore(left)
        harness.resume("r", len(before))
        harness.run()
        assert harness.engine.stats()["computed_tokens"] == 12 - 5
        told = [*before, *harness.events["r"]]
    found = [event.token for event in told if isinstance(event, Token)]
    assert found == alone(model, tmp_path / "1", PROMPT)


@pytest.mark.parametrize("at", [1, 5, 14])
def test_a_step_that_fails_leaves_the_states_as_they_were(
    model: Model, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails once, in a layer behind others that have made new states."""
    calls, put = count(), RecurrentState.put

    def failing(self: RecurrentState, layer: int, found: LayerState) -> None:
        if layer == 2 and next(calls) == at:
            raise RuntimeError("once")
        put(self, layer, found)

    monkeypatch.setattr(RecurrentState, "put", failing)
    with engine(model, tmp_path / "s", format="exact") as harness:
        harness.add("a", PROMPT, **FIELDS)
        harness.add("b", PROMPT[:150], **FIELDS | {"max_tokens": 30})
        harness.run()
        found = harness.tokens("a"), harness.tokens("b")
    assert next(calls) > at, "it did not fail"
    wanted = (alone(model, tmp_path / "1", PROMPT), alone(model, tmp_path / "2", PROMPT[:150], max_tokens=30))
    assert found == wanted


def test_an_archive_holds_the_state(model: Model, tmp_path: Path) -> None:
    more = some_tokens(4, 20)
    with engine(model, tmp_path / "s", **crowded(model)) as harness:
        answer = harness.ask(PROMPT, session="s", **FIELDS)
        done, content = exported(harness)
        assert done.cached_tokens == len(PROMPT) + len(answer) - 1
        wanted = harness.ask(more, session="s", **FIELDS)
    with engine(model, tmp_path / "t", **crowded(model)) as harness:
        assert imported(harness, content).cached_tokens == done.cached_tokens
        assert harness.ask(more, session="s", **FIELDS) == wanted
        assert cached(harness) == done.cached_tokens


def test_a_damaged_checkpoint_is_not_used(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "s", **crowded(model)) as harness:
        wanted = harness.ask(PROMPT, **FIELDS)
        tier = disk_tier(harness)
        checkpoints = [place for place in tier.runs() if tier.contents(place.run).tokens]
        assert checkpoints
        ones = page_aligned(PAGE)
        ones[:] = 1
        for place in checkpoints:
            last = (place.identity.count - 1) * tier.layouts.raw.record_bytes[0]  # it begins with the state
            tier.system.pwritev(place.file, [ones.data], place.offset(0) + (last // PAGE + 2) * PAGE)
        assert harness.ask(PROMPT, **FIELDS) == wanted
        assert cached(harness) == 0


def test_a_sequence_takes_its_state_from_the_device_budget(model: Model, tmp_path: Path) -> None:
    settings = crowded(model)
    budget = settings["device_budget"]
    with engine(model, tmp_path / "s", **settings) as harness:
        assert harness.engine.stats()["device_budget_bytes"] == pytest.approx(budget, abs=PAGE)
        assert harness.engine.stats()["device_used_bytes"] == 0
    with (
        pytest.raises(BudgetError, match="the state of one sequence"),
        engine(model, tmp_path / "t", **settings | {"device_budget": budget - 1}),
    ):
        pass


def test_a_gpu_does_not_take_it_yet(model: Model) -> None:
    chosen = {"device": "cuda", "device_budget": "1GiB", "dtype": "float32", "weights": "bf16"}
    settings = {"model": str(model.folder), "cache": str(model.folder / "cache"), **chosen}
    with pytest.raises(UnsupportedModel, match="recurrent state"):
        load_model(Config.load(None, settings))


def test_a_step_takes_at_least_the_tokens_of_the_grid(model: Model, tmp_path: Path) -> None:
    with engine(model, tmp_path / "s", format="exact", chunk_tokens=5) as harness:
        found = harness.ask(PROMPT[:150], **FIELDS)
        told = [event.done for event in harness.events["r"] if isinstance(event, Progress)]
    assert told == [64, 128, 149, 150]
    assert found == alone(model, tmp_path / "1", PROMPT[:150])


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("nemotron_h", {"chunk_size": 10**9}, "compute 1000000000 tokens together"),
        ("nemotron_h", {"chunk_size": 0}, "compute 0 tokens together"),
        ("nemotron_h", {"layers_block_type": ["linear_attention", "mlp"]}, "without attention"),
        ("qwen3_5_text", {"linear_num_key_heads": 4}, "a layer asks for a convolution over 160 x 4"),
        (
            "qwen3_5_text",
            {"linear_value_head_dim": 16, "linear_key_head_dim": 32},
            "convolution over 160 x 4",
        ),
        ("lfm2", {"layer_types": ["conv", "conv", "full_attention"]}, "layer 1 has 0 modules with a state"),
    ],
)
def test_a_config_that_says_something_else(
    family: str, changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """Than the module does, or than can be served."""
    module = load_module(build_hybrid(family, tmp_path / family), "float32", "spilld")
    config = copy(module.config)
    vars(config).update(changes)

    def check() -> None:
        geometry = Geometry.of(config, module.generation_config, None)
        keep_states(module, geometry)
        probe(module, geometry)

    with pytest.raises(UnsupportedModel, match=why):
        check()


@pytest.mark.parametrize("form", ["exact", "k8v4", "int4"])
@pytest.mark.parametrize("numbers", [10, 10**5, 10**7])
def test_checkpoints_take_at_most_a_tenth_of_the_records(form: str, numbers: int) -> None:
    """Unless the state is small: then there are as many as of other models."""
    layouts = StoreLayout.uniform(Layout(Format(form), Element.BFLOAT16, 2, 128), 16)
    states = StateShape((StateGeometry(0, (8, 4), (numbers,), 64),), torch.bfloat16)
    cells = checkpoint_cells(states, layouts)
    taken = (CHECKPOINT_BLOCKS + state_blocks(states, layouts.raw)) * layouts.raw.column_bytes
    assert 10 * taken <= cells * CELL // BLOCK * layouts.column_bytes
    assert cells == ANCHOR_CELLS or 10 * taken > (cells - 1) * CELL // BLOCK * layouts.column_bytes
    assert checkpoint_cells(None, layouts) == ANCHOR_CELLS


@pytest.mark.slow
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_long_life_of_every_kind(family: str, tmp_path: Path) -> None:
    """Killed amid an answer, forked in it, moved to another daemon: always what transformers says."""
    folder = build_hybrid(family, tmp_path / family)
    model, plain = load_tiny(folder), reference(folder)
    prompt, more, fields = some_tokens(6, 1500), some_tokens(7, 100), FIELDS | {"max_tokens": 64}
    wanted = greedy(plain, prompt, 64)
    with engine(model, tmp_path / "s", **crowded(model), chunk_tokens=128) as harness:
        harness.add("r", prompt, session="s", **fields)
        while said(harness, "r") < 20:
            harness.engine.turn()
        before = list(harness.events["r"])
        copy = killed(tmp_path / "s")
    with engine(model, copy, **crowded(model)) as harness:
        for left in harness.engine.left_behind():
            harness.engine.restore(left)
        harness.resume("r", len(before))
        harness.run()
        told = [*before, *harness.events["r"]]
        assert [event.token for event in told if isinstance(event, Token)] == wanted
        harness.engine.manage(
            ChangeSession(request_id="f", session="s", action="fork", into="t", tokens=len(prompt) + 30)
        )
        found = harness.ask(more, session="t", **fields)
        assert found == greedy(plain, [*prompt, *wanted[:30], *more], 64)
        _, content = exported(harness)
    with engine(model, tmp_path / "t", **crowded(model)) as harness:
        imported(harness, content)
        found = harness.ask(more, session="s", **fields)
        assert cached(harness) == len(prompt) + 63
        assert found == greedy(plain, [*prompt, *wanted, *more], 64)
