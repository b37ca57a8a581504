"""Masks against renderings that were checked by hand."""

from __future__ import annotations

import pytest

from arkor_ray.training.chat_format import Conversation, PlainText, RowError
from arkor_ray.training.supervision import ExampleEncoder
from tests.training.tiny import CHATML, make_tokenizer

GENERATION = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Qwen 3: an empty thinking block in the last turn, which goes once a user has answered.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As the large Gemma 4: the thinking block stands in the generation prompt alone.
PROMPTED_THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think></think>{% endif %}"
)
PLAIN_WORDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SHORTENED_HISTORY = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last else m.content[:2] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
UPPER = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | upper }}<|end|>{% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LATE_SYSTEM = (  # the system message is put into the last user turn, as Mistral's templates do
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>"
    "{% if m.role == 'user' and (loop.last or loop.index0 == loop.length - 2) and messages[0].role == 'system' %}"
    "{{ messages[0].content }} {% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def conversation(*turns: tuple[str, str], trained: tuple[bool, ...] | None = None) -> Conversation:
    messages = [{"role": role, "content": content} for role, content in turns]
    return Conversation(messages, trained or tuple(role == "assistant" for role, _ in turns))


ONE = conversation(("user", "w1 w2"), ("assistant", "w3"))
TWO = conversation(("system", "w9"), ("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5"))


def supervised_text(template: str, example: Conversation, **options) -> str:
    """What the mask covers, each run of tokens in brackets."""
    tokenizer = make_tokenizer(template)
    encoded = ExampleEncoder(tokenizer, **({"responses_only": True, "max_length": 999} | options)).encode(example)
    text, inside = "", False
    for token, on in zip(encoded.input_ids, encoded.supervised, strict=True):
        if on != inside:
            text, inside = text + ("[" if on else "]"), bool(on)
        if on:
            text += tokenizer.decode([int(token)])
    return text + ("]" if inside else "")


@pytest.mark.parametrize(
    ("template", "example", "expected"),
    [
        (CHATML, ONE, "[w3<|end|>]"),
        (CHATML, TWO, "[w2 w3<|end|>][w5<|end|>]"),
        (GENERATION, TWO, "[w2 w3<|end|>][w5<|end|>]"),
        (THINKING, ONE, "[<think>\n\n</think>\n\nw3<|end|>]"),
        (THINKING, TWO, "[w2 w3<|end|>][<think>\n\n</think>\n\nw5<|end|>]"),
        (PROMPTED_THINKING, TWO, "[w2 w3<|end|>][w5<|end|>]"),
        (PLAIN_WORDS, TWO, "[ w2 w3\n][ w5\n]"),  # the token " w2" holds the last character of the header
    ],
)
def test_every_assistant_turn_with_its_end_marker(template, example, expected) -> None:
    assert supervised_text(template, example) == expected


def test_only_the_trained_turns() -> None:
    example = conversation(
        ("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4"), trained=(False, False, False, True)
    )
    assert supervised_text(CHATML, example) == "[w4<|end|>]"


def test_content_that_looks_like_the_end_marker() -> None:
    assert supervised_text(CHATML, conversation(("user", "end"), ("assistant", "end"))) == "[end<|end|>]"


def test_an_opening_assistant_turn_is_context() -> None:
    example = conversation(("assistant", "w1"), ("user", "w2"), ("assistant", "w3"))
    assert supervised_text(CHATML, example) == "[w3<|end|>]"


def test_everything_when_not_responses_only() -> None:
    text = supervised_text(CHATML, ONE, responses_only=False)
    assert (
        text == "[\nw1 w2<|end|>\n<|assistant|>\nw3<|end|>\n]"
    )  # the first token has nothing before it to be predicted from


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (SHORTENED_HISTORY, "rewrites this assistant turn"),
        (UPPER, "changes the content"),
        (LATE_SYSTEM, "rewrites this assistant turn"),
        ("{{ raise_exception('no system') }}", "the chat template fails"),
    ],
)
def test_templates_that_rewrite_are_refused(template, reason) -> None:
    with pytest.raises(RowError, match=reason):
        ExampleEncoder(make_tokenizer(template), responses_only=True, max_length=999).encode(TWO)


def test_truncation_keeps_the_beginning(tokenizer) -> None:
    whole = ExampleEncoder(tokenizer, responses_only=True, max_length=999).encode(TWO)
    cut = ExampleEncoder(tokenizer, responses_only=True, max_length=len(whole.input_ids) - 4).encode(TWO)
    assert cut.input_ids.tolist() == whole.input_ids[:-4].tolist()
    assert cut.length_before == len(whole.input_ids)


def test_a_row_cut_before_its_answer_is_refused(tokenizer) -> None:
    with pytest.raises(RowError, match="no token to learn from within max_length 4"):
        ExampleEncoder(tokenizer, responses_only=True, max_length=4).encode(ONE)


def test_text_is_supervised_throughout_and_ends(tokenizer) -> None:
    encoded = ExampleEncoder(tokenizer, responses_only=True, max_length=999).encode(PlainText("w1 w2"))
    assert tokenizer.decode(encoded.input_ids) == "w1 w2<|end|>"
    assert encoded.supervised.tolist() == [False] + [True] * (len(encoded.input_ids) - 1)


def test_same_tokens_as_transformers_own_mask() -> None:
    tokenizer = make_tokenizer(GENERATION)
    theirs = tokenizer.apply_chat_template(
        TWO.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = ExampleEncoder(tokenizer, responses_only=True, max_length=999).encode(TWO)
    assert ours.input_ids.tolist() == theirs["input_ids"]
    assert ours.supervised.astype(int).tolist() == theirs["assistant_masks"]
