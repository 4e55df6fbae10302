"""Every supported family gives the logits of plain transformers, over all tiers, in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spilld.models.families.rope import fix_rope
from spilld.models.model import load
from spilld.protocol.messages import PromptLogprob

from .harness import column_bytes, engine, greedy, load_tiny, random_split, reference, some_tokens
from .tiny_models import FAMILIES, LONGROPE_ORIGINAL, MODULES, VOCAB, build

LENGTH = 1400


@pytest.mark.parametrize("family", [f for f in (*FAMILIES, *MODULES) if f != "phi3-longrope"])
def test_exact_records_give_transformers_logits(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / family)
    model = load_tiny(folder)
    plain = reference(folder, "eager")  # Gemma2 has no other
    prompt = np.random.default_rng(7).integers(4, VOCAB, LENGTH).tolist()
    with torch.inference_mode():
        wanted = plain(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    budget = 17 * column_bytes(model, "exact")
    with engine(
        model, tmp_path / "s", random_split(1), format="exact", host_budget=budget, disk_budget="64MiB"
    ) as harness:
        tokens = harness.ask(prompt, max_tokens=12, ignore_eos=True, prompt_logprobs=5)
        done = harness.done()
        assert done.usage.kv_bytes["disk"] > 0, "nothing lies on disk"
        if None in model.geometry.sliding_windows:
            assert done.usage.read_bytes["disk"] > 0, "nothing was read from disk"
        assert done.prompt_logprobs is not None
        _check(done.prompt_logprobs, prompt, wanted.numpy())
        assert tokens == greedy(plain, prompt, 12)
        assert harness.ask(prompt, max_tokens=12, ignore_eos=True) == tokens


def test_queries_are_scaled_by_position_in_a_packed_batch(tmp_path: Path) -> None:
    """Llama 4 beside itself: rows of two sequences, at positions of their own."""
    folder = build("llama4_text", tmp_path / "m")
    plain, prompts = reference(folder), [some_tokens(4, 700), some_tokens(5, 333)]
    with engine(load_tiny(folder), tmp_path / "s", format="exact", chunk_tokens=128) as harness:
        for name, prompt in zip("ab", prompts, strict=True):
            harness.add(name, prompt, max_tokens=16, ignore_eos=True)
        harness.run()
        found = [harness.tokens(name) for name in "ab"]
    assert found == [greedy(plain, prompt, 16) for prompt in prompts]


@pytest.mark.parametrize(
    ("longest", "length"), [(LONGROPE_ORIGINAL, 40), (4096, LONGROPE_ORIGINAL + 1), (4096, 1100)]
)
def test_longrope_is_transformers_own_by_the_longest_context(
    longest: int, length: int, tmp_path: Path
) -> None:
    """Short factors where no more than the original length is served, else the long ones."""
    folder = build("phi3-longrope", tmp_path / "m")
    model = load(folder, "float32", cache=tmp_path, max_context=longest)
    prompt = some_tokens(4, length)
    with engine(model, tmp_path / "s", format="exact", max_context=longest) as harness:
        found = harness.ask(prompt, max_tokens=16, ignore_eos=True)
    assert found == greedy(reference(folder), prompt, 16)


def test_longrope_has_long_factors_for_short_prompts_if_more_is_served(tmp_path: Path) -> None:
    """The stated difference from transformers, which changes factors when a sequence grows."""
    folder, prompt = build("phi3-longrope", tmp_path / "m"), torch.tensor([some_tokens(4, 40)])
    plain = reference(folder)
    served = load(folder, "float32", "sdpa", cache=tmp_path, max_context=4096)
    rotary = plain.model.rotary_emb
    with torch.inference_mode():
        assert not torch.allclose(served.module(prompt).logits, plain(prompt).logits, atol=0.1)
        fix_rope(plain, 4096)
        assert torch.equal(rotary.inv_freq, served.module.model.rotary_emb.inv_freq)
        assert torch.equal(served.module(prompt).logits, plain(prompt).logits)


def _check(found: tuple[PromptLogprob, ...], prompt: list[int], wanted: np.ndarray) -> None:
    assert [entry.token for entry in found] == prompt
    assert found[0].logprob is None
    for position, entry in enumerate(found[1:]):
        assert entry.logprob == pytest.approx(wanted[position, prompt[position + 1]], abs=1e-4)
        for token, logprob in entry.top:
            assert logprob == pytest.approx(wanted[position, token], abs=1e-4)
