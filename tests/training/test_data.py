from __future__ import annotations

import pytest

from arkor_ray.errors import DatasetError
from arkor_ray.training.batches import BatchPlan
from arkor_ray.training.data import split_rows, tokenize_rows, total_steps
from tests.training.tiny import make_rows, make_spec


def config(**wire):
    """A job's config without a need for files."""
    from arkor_ray.schemas.job import JobConfig

    source = {"type": "blob", "url": "https://example.com/x.jsonl"}
    return JobConfig.parse({"model": "m", "datasetSource": source, **wire})


def numbered(count: int) -> list[tuple[int, dict]]:
    return list(enumerate(make_rows(count), start=1))


def test_bad_rows_are_counted_and_named(tokenizer) -> None:
    rows = make_rows(4)
    rows[1] = {"messages": [{"role": "user", "content": "q"}]}
    rows[3] = "no json"
    prepared = tokenize_rows(rows, None, config(), tokenizer, 128)
    assert len(prepared.train) == 2
    assert prepared.preflight["rows"] == 4
    assert prepared.preflight["rejected_rows"] == 2
    assert prepared.preflight["rejected"] == [
        {"row": 2, "reason": "has no assistant turn to learn from"},
        {"row": 4, "reason": "is no JSON object"},
    ]


def test_preflight_tells_lengths_and_shares(tokenizer) -> None:
    prepared = tokenize_rows(make_rows(30), None, config(maxLength=40), tokenizer, 128)
    report = prepared.preflight
    assert report["format"] == "chatml" and report["train_on_responses_only"] is True
    assert report["max_length"] == 40 == max(prepared.train.lengths)
    assert report["truncated_samples"] > 0 and report["length"]["max"] > 40
    assert report["tokens"] == len(prepared.train.input_ids)
    assert report["supervised_tokens"] == int(prepared.train.supervised.sum())
    assert 0 < report["supervised_share"] < 1


def test_the_models_context_is_the_limit(tokenizer) -> None:
    assert tokenize_rows(make_rows(3), None, config(maxLength=4000), tokenizer, 32).preflight["max_length"] == 32


@pytest.mark.parametrize(
    ("rows", "wire", "reason"),
    [
        ([], {}, "has no rows"),
        ([{"text": " "}], {}, "row 1 'text' is empty"),
        ([{"messages": []}], {"datasetFormat": "alpaca"}, "row 1 'instruction' is missing"),
        ([{"question": "q"}], {}, "cannot be told from its columns"),
    ],
)
def test_nothing_usable_is_an_error_with_the_reason(tokenizer, rows, wire, reason) -> None:
    with pytest.raises(DatasetError, match=reason):
        tokenize_rows(rows, None, config(**wire), tokenizer, 128)


def test_loss_on_everything_when_asked(tokenizer) -> None:
    prepared = tokenize_rows(make_rows(3), None, config(trainOnResponsesOnly=False), tokenizer, 128)
    assert int(prepared.train.supervised.sum()) == len(prepared.train.input_ids) - 3


@pytest.mark.parametrize(
    ("wire", "held_out"),
    [
        ({}, 0),
        ({"evalSteps": 5}, 2),
        ({"evalSteps": 0}, 0),
        ({"datasetSplit": {"enabled": True}}, 2),
        ({"datasetSplit": {"enabled": True, "testSize": 0.5}}, 10),
        ({"datasetSplit": {"enabled": False}, "evalSteps": 5}, 0),
        ({"datasetSplit": "train", "evalSteps": 5}, 2),
    ],
)
def test_rows_held_out(wire, held_out) -> None:
    train, evaluation = split_rows(numbered(20), None, config(**wire))
    assert len(evaluation) == held_out
    assert sorted(n for n, _ in train + evaluation) == list(range(1, 21))


def test_eval_steps_alone_use_the_sources_own_split() -> None:
    own = make_rows(3, seed=5)
    train, evaluation = split_rows(numbered(20), own, config(evalSteps=5))
    assert len(train) == 20
    assert [row for _, row in evaluation] == own


def test_the_seed_of_the_split_decides_which_rows() -> None:
    def held(seed: int) -> list[int]:
        wire = {"datasetSplit": {"enabled": True, "seed": seed, "testSize": 0.3}}
        return [number for number, _ in split_rows(numbered(20), None, config(**wire))[1]]

    assert held(1) == held(1) != held(2)


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(DatasetError, match="at least 2"):
        split_rows(numbered(1), None, config(datasetSplit={"enabled": True}))


@pytest.mark.parametrize(
    ("wire", "steps"),
    [
        ({}, 3),
        ({"numTrainEpochs": 2.5}, 8),
        ({"maxSteps": 100}, 100),
        ({"maxSteps": 2, "numTrainEpochs": 9}, 2),
        ({"maxSteps": 100, "dryRun": True}, 10),
    ],
)
def test_total_steps(wire, steps) -> None:
    plan = BatchPlan(samples=21, global_batch=8, micro_batch=8, world_size=1, seed=0)
    assert total_steps(config(**wire), plan) == steps


def test_dry_run_reads_50_rows(tokenizer) -> None:
    assert tokenize_rows(make_rows(80), None, config(dryRun=True), tokenizer, 128).preflight["rows"] == 50


def test_a_second_attempt_does_not_need_the_source(base_model, tmp_path, tokenizer) -> None:
    from arkor_ray.training.data import prepare_data

    spec = make_spec(tmp_path, base_model)
    first = prepare_data(spec, tokenizer, 128)
    (tmp_path / "rows.jsonl").unlink()
    again = prepare_data(spec, tokenizer, 128)
    assert again.train.input_ids.tolist() == first.train.input_ids.tolist()
