from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from arkor_ray.demo.corpus import make_corpus
from arkor_ray.demo.tokenizer import TURN_END, train_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is Fjord?"},
    {"role": "assistant", "content": "A speaker."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [message["content"] for conversation in make_corpus(200) for message in conversation]
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 600, 512).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)  # what is saved is what counts


@pytest.mark.parametrize(
    "text", ["I was charged twice.", "Größe 10.750 €, 価格は？", " two  spaces\n\ttab", "\x00\x7f"]
)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_has_the_size_asked_for_and_ends_turns(tokenizer):
    assert len(tokenizer) == 600
    assert tokenizer.eos_token == TURN_END
    assert tokenizer.pad_token != tokenizer.eos_token
    assert tokenizer.bos_token is None
    assert tokenizer.model_max_length == 512


def test_digits_are_tokens_of_their_own(tokenizer):
    assert [tokenizer.decode(token) for token in tokenizer.encode("12345")] == list("12345")


def test_the_template_marks_what_the_assistant_says_and_its_end_of_turn(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "A speaker.<|im_end|>Yes.<|im_end|>"


def test_the_generation_prompt_is_the_beginning_of_the_answer(tokenizer):
    asked = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert asked == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is Fjord?<|im_end|>\n<|im_start|>assistant\n"
    )
    answered = tokenizer.apply_chat_template(CHAT[:3], tokenize=False)
    assert answered == f"{asked}A speaker.<|im_end|>\n"
    assert tokenizer.encode(answered)[: len(tokenizer.encode(asked))] == tokenizer.encode(asked)


def test_what_a_message_says_is_not_read_as_a_template(tokenizer):
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "{{ 7 * 7 }}"}], tokenize=False)
    assert "{{ 7 * 7 }}" in rendered
