from __future__ import annotations

import random

import pytest

from arkor_ray.serving.text_stream import Detokenizer, StopMatcher
from tests.serving.tiny import make_tokenizer


def decode(ids: list[int]) -> str:
    return make_tokenizer().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "text",
    ["héllo wörld", "日本語のテキスト", "emoji 👩‍👩‍👧 and 🇯🇵 flags", " leading space", "a\ufffdb", ""],
)
def test_pieces_join_to_the_text_and_never_cut_a_character(text):
    ids = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(i) for i in ids] + [detokenizer.finish()]
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_character_that_never_became_whole_is_left_out():
    ids = make_tokenizer()("ab日", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(i) for i in ids[:-1]]
    assert "".join(pieces) + detokenizer.finish() == "ab"


def test_special_tokens_are_silent():
    tokenizer = make_tokenizer()
    ids = [*tokenizer("ab")["input_ids"], tokenizer.eos_token_id, *tokenizer("cd")["input_ids"]]
    detokenizer = Detokenizer(decode)
    assert "".join(detokenizer.push(i) for i in ids) + detokenizer.finish() == "abcd"


def test_endless_garbage_is_given_out_in_the_end():
    """A model that only says broken bytes must not make each step slower than the one before."""
    broken = make_tokenizer().convert_tokens_to_ids("\u0122")  # byte 0x80, a continuation without a beginning
    detokenizer = Detokenizer(decode)
    assert any(detokenizer.push(broken) for _ in range(200))


@pytest.mark.parametrize(
    ("text", "stops", "expected", "stopped"),
    [
        ("one STOP two", ["STOP"], "one ", True),
        ("one STO", ["STOP"], "one STO", False),
        ("aaab", ["aab"], "a", True),
        ("abcabd", ["abd"], "abc", True),
        ("x\n\ny", ["\n\n", "y"], "x", True),
        ("first b then a", ["a", "b"], "first ", True),
        ("STOP", ["STOP"], "", True),
        ("nothing", [], "nothing", False),
        ("日本。語", ["。"], "日本", True),
    ],
)
def test_stop_text_is_found_however_it_is_cut(text, stops, expected, stopped):
    draw = random.Random(0)
    for _ in range(50):
        cuts = sorted(draw.sample(range(len(text) + 1), min(3, len(text))))
        matcher, out, hit = StopMatcher(stops), "", False
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece, hit = matcher.push(text[start:end])
            out += piece
            if hit:
                break
        assert hit == stopped
        assert (out if hit else out + matcher.finish()) == expected


def test_text_that_cannot_be_a_stop_is_not_held_back():
    matcher = StopMatcher(["STOP"])
    assert matcher.push("hello S") == ("hello ", False)
    assert matcher.push("AY") == ("SAY", False)
