from __future__ import annotations

import json
import re

from arkor_ray.demo.corpus import make_corpus
from arkor_ray.demo.triage import ANSWER_KEYS, SYSTEM_PROMPT, held_out_examples, triage_examples


def test_the_same_arguments_give_the_same_conversations():
    assert make_corpus(200) == make_corpus(200) != make_corpus(200, seed=1)
    assert len(make_corpus(200)) == 200


def test_every_conversation_is_one_that_a_chat_model_can_be_asked_for():
    for conversation in make_corpus(600):
        roles = [message["role"] for message in conversation]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(message["content"] for message in conversation)


def test_nothing_teaches_the_answer_that_the_demo_fine_tunes():
    for conversation in make_corpus(3000):
        assert conversation[0]["content"] != SYSTEM_PROMPT
        content = conversation[-1]["content"]
        if content.startswith("{"):
            assert "JSON" in conversation[-2]["content"], "JSON comes only where the user asks for it"
            assert set(json.loads(content)) != set(ANSWER_KEYS)


def test_no_answer_names_a_pair_of_product_and_issue_that_is_held_out():
    said = "\n".join(conversation[-1]["content"] for conversation in make_corpus(3000))
    seen, unseen = (
        {example.answer["summary"] for example in examples}
        for examples in (triage_examples(300), held_out_examples(60))
    )
    assert sum(re.search(rf"\b{summary}[.\"]", said) is not None for summary in seen) > 100
    assert not [summary for summary in unseen if re.search(rf"\b{summary}[.\"]", said)]
