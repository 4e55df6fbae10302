"""Where an answer's text is cut, tokens are found that show it: its own, then the rest of one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spilld.tokenizer.cut import LOOK_BACK, cut
from spilld.tokenizer.detokenizer import Detokenizer
from spilld.tokenizer.tokenizer import Tokenizer

from .tiny_models import END, SPECIAL, VOCAB

WORDS = [
    "the",
    "model",
    "hello",
    "Question:",
    "\n",
    "\n\n",
    " ",
    "  ",
    "日本語",
    "😀",
    "é",
    "e\u0301",
    "1234",
    "...",
    "a b",
]
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join) | st.text(max_size=60)


def pushed(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.push(token) for token in answer]


def check(tokenizer: Tokenizer, prompt: list[int], answer: list[int], length: int) -> None:
    """Cut behind so many characters."""
    pieces = pushed(tokenizer, prompt, answer)
    ends, text = list(accumulate(map(len, pieces))), "".join(pieces)[:length]
    kept = cut(tokenizer, prompt, answer, ends, text)
    detokenizer = Detokenizer(tokenizer, prompt)
    shown = "".join([*map(detokenizer.push, kept), detokenizer.finish()])
    assert shown == text
    whole = max((i for i, piece in enumerate(pieces, 1) if piece and ends[i - 1] <= len(text)), default=0)
    sure = max(0, whole - LOOK_BACK)
    assert kept[:sure] == answer[:sure]


@settings(max_examples=200)
@given(data=st.data(), before=st.sampled_from(["", "Once", "a\n", "the model: "]), text=TEXT)
def test_any_text_anywhere(tokenizer: Tokenizer, data: st.DataObject, before: str, text: str) -> None:
    prompt = tokenizer.encode(before)
    whole = tokenizer.encode(before + text)
    answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else tokenizer.encode(text, start=False)
    length = data.draw(st.integers(0, len("".join(pushed(tokenizer, prompt, answer)))))
    check(tokenizer, prompt, answer, length)


@settings(max_examples=200)
@given(data=st.data(), answer=st.lists(st.integers(len(SPECIAL), VOCAB - 1), min_size=1, max_size=60))
def test_any_tokens_anywhere(tiny: Tokenizer, data: st.DataObject, answer: list[int]) -> None:
    """As a model with random weights has it: no tokenizer would write them so."""
    prompt = tiny.encode("the model")
    length = data.draw(st.integers(0, len("".join(pushed(tiny, prompt, answer)))))
    check(tiny, prompt, answer, length)


@pytest.mark.parametrize(
    ("which", "text", "length"),
    [
        ("smollm2", "the" + "\ufffd" * 9, 3),
        ("fallback", "\x80" + "0" * 15 + "𐀀𐀀𐀀\ufffd\ufffd\ufffd", 19),
        ("fallback", "𐀀𐀀é" + "\ufffd" * 5, 3),
        ("fallback", "é\ufffd\ufffd𐀀\x80", 1),
        ("fallback", "\ufffd" * 6 + " ", 0),
        ("fallback", "000" + "\ufffd" * 9 + " 𐀀", 10),
        ("fallback", "\ufffd" * 30 + "0" * 16 + "é𐀀𐀀𐀀𐀀" + "\ufffd" * 5 + "𐀀𐀀𐀀𐀀é", 52),
        ("tiny", "\ufffd" * 11, 0),
        ("tiny", "é " + "\ufffd" * 9 + "é", 9),
    ],
)
def test_what_was_held_back_does_not_stay(
    which: str, text: str, length: int, request: pytest.FixtureRequest
) -> None:
    """More of it than is tokenised anew: replacement characters look like unfinished ones."""
    tokenizer = request.getfixturevalue(which)
    check(tokenizer, [], tokenizer.encode(text, start=False), length)


def test_broken_bytes_do_not_stay(smollm2: Tokenizer) -> None:
    assert smollm2.decode([218]) == "\ufffd"
    for behind in ([], smollm2.encode("ok", start=False)):
        check(smollm2, [], [218] * 12 + behind, 0)


def test_what_never_shows_stays(tiny: Tokenizer) -> None:
    answer = [*tiny.encode("the model", start=False), END, *tiny.encode("\ufffd" * 9, start=False)]
    ends = list(accumulate(map(len, pushed(tiny, [], answer))))
    assert cut(tiny, [], answer, ends, "the model") == answer[: answer.index(END) + 1]


def test_a_token_is_cut_in_two(smollm2: Tokenizer) -> None:
    prompt, answer = smollm2.encode("It is"), smollm2.encode(" wonderful")
    assert len(answer) == 1
    kept = cut(smollm2, prompt, answer, [10], " won")
    assert kept == smollm2.encode(" won")


def test_half_a_character_does_not_stay(smollm2: Tokenizer) -> None:
    """Its bytes came in tokens of their own, whose text is empty."""
    answer = smollm2.encode("ok 🦖", start=False)
    ends = list(accumulate(map(len, pushed(smollm2, [], answer))))
    assert ends[-3] == ends[-2] < ends[-1], "the character is several tokens"
    for text in ("o", "ok", "ok "):
        assert smollm2.decode(cut(smollm2, [], answer, ends, text)) == text
