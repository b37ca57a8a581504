from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from arkor_ray.demo import pretrain as pretrain_module
from arkor_ray.demo.corpus import make_corpus
from arkor_ray.demo.pretrain import Recipe, _loss, _new_model, make_base, pack, pretrain
from arkor_ray.demo.tokenizer import train_tokenizer

RECIPE = Recipe(
    conversations=90, vocab_size=400, hidden_size=32, intermediate_size=64, layers=2, row_tokens=256, rows_per_step=2
)


@pytest.fixture(autouse=True)
def one_thread():
    # Threads that spin for each other cost far more than they bring at this size.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([m["content"] for c in RECIPE.corpus() for m in c], RECIPE.vocab_size, RECIPE.context)


def test_the_digest_follows_every_field_and_the_corpus(monkeypatch):
    digest = RECIPE.digest()
    assert digest == Recipe(**vars(RECIPE)).digest()
    assert digest != Recipe(**{**vars(RECIPE), "learning_rate": 1e-3}).digest()
    monkeypatch.setattr(pretrain_module, "make_corpus", lambda count, seed: make_corpus(count, seed + 1))
    assert digest != RECIPE.digest()


def test_rows_hold_whole_conversations_in_order(tokenizer):
    conversations = make_corpus(30)
    rows = pack(conversations, tokenizer, 256)
    assert all(len(row.tokens) == len(row.learned) == len(row.positions) == len(row.members) <= 256 for row in rows)
    whole = [token for row in rows for token in row.tokens]
    expected = [t for c in conversations for t in tokenizer.apply_chat_template(c, return_dict=True)["input_ids"]]
    assert whole == expected
    assert sum(row.members[-1] + 1 for row in rows) == 30
    assert all(row.positions[0] == 0 for row in rows)


def test_a_conversation_longer_than_a_row_is_cut(tokenizer):
    rows = pack(make_corpus(3), tokenizer, 20)
    assert [len(row.tokens) for row in rows] == [20, 20, 20]


def test_a_packed_row_has_the_loss_of_its_conversations_read_alone(tokenizer):
    conversations = make_corpus(6)
    model = _new_model(RECIPE, tokenizer)
    packed = _loss(model, pack(conversations, tokenizer, 1024))
    total, count = 0.0, 0
    for conversation in conversations:
        (row,) = pack([conversation], tokenizer, 1024)
        tokens = torch.tensor([row.tokens])
        labels = torch.where(torch.tensor([row.learned]), tokens, -100)
        learned = sum(row.learned)
        total += model(input_ids=tokens, labels=labels).loss.item() * learned
        count += learned
    assert packed.item() == pytest.approx(total / count, abs=1e-5)


def test_reading_the_corpus_lowers_the_loss_the_same_way_each_time(tokenizer):
    rows = pack(RECIPE.corpus(), tokenizer, RECIPE.row_tokens)
    ends = []
    for _ in range(2):
        model = _new_model(RECIPE, tokenizer)
        before = _loss(model, rows[-4:]).item()
        pretrain(model, rows, RECIPE, lambda done, what: None)
        ends.append(_loss(model, rows[-4:]).item())
        assert ends[-1] < before - 0.5
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


def test_the_folder_is_one_that_transformers_loads_and_that_chats(tmp_path):
    told = []
    make_base(tmp_path, Recipe(**{**vars(RECIPE), "conversations": 12}), lambda done, what: told.append((done, what)))
    shares = [done for done, _ in told]
    assert shares == sorted(shares) and shares[0] == 0.0 and any("loss" in what for _, what in told)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == "qwen3" and model.config.max_position_embeddings >= 1024
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    question = [{"role": "user", "content": "Hello!"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]


def test_a_spent_budget_ends_the_run_softly(tokenizer, monkeypatch):
    rows = pack(RECIPE.corpus(), tokenizer, RECIPE.row_tokens)
    steps = -(-len(rows) // RECIPE.rows_per_step)
    seconds = iter(range(100))  # each look at the clock is a second later
    monkeypatch.setattr(pretrain_module.time, "process_time", lambda: next(seconds))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    rates = []
    step = torch.optim.AdamW.step

    def watched(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    slow = Recipe(**{**vars(RECIPE), "max_seconds": 8.0})
    pretrain(_new_model(slow, tokenizer), rows, slow, lambda done, what: None)
    assert len(rates) == 7 < steps
    assert rates[-1] < 0.25 * max(rates)
