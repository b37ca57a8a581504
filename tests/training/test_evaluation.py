"""Scores are arithmetic; the loss is held against what training itself says of the same rows."""

from __future__ import annotations

import json
import math

import pytest

from arkor_ray.errors import DatasetError
from arkor_ray.storage.adapter_files import read_adapter
from arkor_ray.storage.base_files import base_files
from arkor_ray.training.bare import run_bare
from arkor_ray.training.callbacks import ListEventSink
from arkor_ray.training.data import split_rows
from arkor_ray.training.evaluation import mean_losses, score_answers, table
from tests.training.tiny import make_rows, make_spec


def test_text_is_compared_as_it_is_but_for_the_white_space_around_it():
    scores = score_answers([("yes", "yes\n"), ("yes", "Yes"), ("no", None), ("no", "no")])
    assert scores == {"rows": 4, "exact_match": 0.5}
    assert score_answers([]) == {"rows": 0}


def test_json_answers_are_compared_field_by_field():
    wanted = {"category": "bug", "urgency": "low"}
    told = [
        json.dumps(wanted),
        json.dumps({"urgency": "low", "category": "bug"}),
        json.dumps({"category": "bug"}),
        "[1]",
        "{broken",
        None,
    ]
    scores = score_answers(
        [(json.dumps(wanted), given) for given in told] + [('{"category": null}', '{"category": null}')]
    )
    assert scores["valid_json"] == pytest.approx(4 / 7)
    assert scores["same_json"] == pytest.approx(3 / 7)
    assert scores["exact_match"] == pytest.approx(2 / 7)
    assert scores["fields"] == {"category": pytest.approx(4 / 7), "urgency": pytest.approx(2 / 6)}


def test_an_empty_object_is_an_answer_like_any_other():
    scores = score_answers([("{}", "{ }"), ("{}", "  "), ("{}", None), ("{}", '{"a": 1}')])
    assert (scores["valid_json"], scores["same_json"], scores["fields"]) == (0.5, 0.25, {})


def test_one_wanted_answer_that_is_no_object_makes_it_text():
    assert set(score_answers([('{"a": 1}', '{"a": 1}'), ("text", "text")])) == {"rows", "exact_match"}


def test_the_table_has_a_line_for_each_figure():
    report = {"adapter": {"loss": 0.5, "rows": 3, "fields": {"category": 1.0}}, "base": {"loss": 2.0, "rows": 3}}
    assert table(report) == [
        ["loss", "0.5000", "2.0000"],
        ["rows", "3", "3"],
        ["field category", "1.0000", "–"],
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base_model):
    """A short job with evaluation, the adapter that it left, and the rows that it held out."""
    spec = make_spec(tmp_path_factory.mktemp("run"), base_model, rows=21, evalSteps=8)
    sink = ListEventSink()
    run_bare(spec, sink)
    _, held_out = split_rows(list(enumerate(make_rows(21), start=1)), None, spec.config)
    adapter = read_adapter(spec.storage_url + "/adapters/job-1-final")
    return adapter, [row for _, row in held_out], [e["eval_loss"] for e in sink.of("log") if "eval_loss" in e][-1]


def losses_of(base_model, adapter, rows, **options):
    files = base_files(str(base_model), base_model.parent, name="base")
    return mean_losses(rows, files, adapter, "fp32", with_base=True, **options)


def test_the_loss_is_that_of_trainings_own_evaluation(finished, base_model):
    adapter, rows, eval_loss = finished
    found = losses_of(base_model, adapter, [*rows, {"text": 3}])
    assert found["adapter"].loss == pytest.approx(eval_loss, abs=1e-4)
    assert (found["adapter"].samples, found["adapter"].rejected_rows) == (len(rows), 1)
    assert found["adapter"].perplexity == pytest.approx(math.exp(found["adapter"].loss))
    assert found["base"].loss - found["adapter"].loss > 0.1, "the adapter has learned something"


def test_the_base_alone_is_the_base_beside_the_adapter(finished, base_model):
    adapter, rows, _ = finished
    beside, alone = losses_of(base_model, adapter, rows), losses_of(base_model, None, rows)
    assert set(alone) == {"base"}
    assert alone["base"].loss == pytest.approx(beside["base"].loss, abs=1e-6)


def test_rows_that_cannot_be_used_at_all_are_an_error(finished, base_model):
    with pytest.raises(DatasetError, match="None of the data set's 1 rows"):
        losses_of(base_model, finished[0], [{"text": ""}])
