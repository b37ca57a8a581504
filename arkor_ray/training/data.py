"""From a job's data set to the samples it trains and evaluates on, with the preflight report. Runs once, in the driver."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from arkor_ray.errors import DatasetError
from arkor_ray.schemas.dataset import DatasetFormatName, HoldOut
from arkor_ray.schemas.job import JobConfig
from arkor_ray.storage.object_store import ObjectStore
from arkor_ray.training.batches import BatchPlan, TokenizedDataset
from arkor_ray.training.chat_format import Conversation, PlainText, RowError, detect_format, parse_row
from arkor_ray.training.data_sources import Row, load_rows
from arkor_ray.training.job_spec import JobSpec
from arkor_ray.training.supervision import Encoded, ExampleEncoder, template_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

DRY_RUN_ROWS = 50
DRY_RUN_STEPS = 10
SHOWN_REJECTIONS = 20

NumberedRow = tuple[int, Row]


@dataclass(frozen=True)
class PreparedData:
    """`preflight` is the data of the `dataset.preflight` event: plain JSON."""

    train: TokenizedDataset
    evaluation: TokenizedDataset | None
    preflight: dict[str, Any]


def prepare_data(
    spec: JobSpec, tokenizer: PreTrainedTokenizerFast, max_length: int, store: ObjectStore | None = None
) -> PreparedData:
    """Fetches, splits, renders and tokenises. `max_length` is the model's context; the job's own limit may be lower.

    Raises DatasetError when nothing usable is left, ServiceUnavailableError when the source cannot be reached.
    """
    rows = load_rows(spec.job_id, spec.config, store or spec.open_store(), spec.dataset_policy)
    return tokenize_rows(rows["train"], rows.get("eval"), spec.config, tokenizer, max_length)


def tokenize_rows(
    rows: list[Row],
    own_evaluation_rows: list[Row] | None,
    config: JobConfig,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
) -> PreparedData:
    """Loss on responses only is the default for every format but text, where all tokens are supervised.

    Rows that cannot be used are left out, counted, and reported with their number (from 1) and the reason. Raises
    DatasetError when none is left, with the report as its field `preflight`.
    """
    limit = DRY_RUN_ROWS if config.dry_run else None
    train_rows, eval_rows = split_rows(list(enumerate(rows[:limit], start=1)), own_evaluation_rows, config)
    max_length = min(max_length, config.max_length or max_length)
    encoder = ExampleEncoder(
        tokenizer, responses_only=config.train_on_responses_only is not False, max_length=max_length
    )
    train, evaluation = RowTokenizer(encoder, config.dataset_format), RowTokenizer(encoder, config.dataset_format)
    train.add_all(train_rows)
    evaluation.add_all(eval_rows)
    preflight: dict[str, Any] = {
        "format": train.format_name,
        "rows": train.rows + evaluation.rows,
        "rejected_rows": len(train.rejected) + len(evaluation.rejected),
        "rejected": [{"row": n, "reason": why} for n, why in (train.rejected + evaluation.rejected)[:SHOWN_REJECTIONS]],
        "train_samples": len(train.samples),
        "eval_samples": len(evaluation.samples),
        "train_on_responses_only": train.format_name != "text" and config.train_on_responses_only is not False,
        "template_sha256": template_sha256(tokenizer),
        "max_length": max_length,
    }
    if not train.samples:
        raise DatasetError(nothing_left(train), preflight=preflight)
    if eval_rows and not evaluation.samples:
        raise DatasetError("Evaluation rows: " + nothing_left(evaluation), preflight=preflight)
    preflight |= _length_report(train.samples, max_length)
    return PreparedData(train.dataset(), evaluation.dataset() if evaluation.samples else None, preflight)


def split_rows(
    rows: list[NumberedRow], own_evaluation_rows: list[Row] | None, config: JobConfig
) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """Training and evaluation rows: an explicit split object decides; without one, `eval_steps` alone asks for evaluation on
    the source's own split, else on 10 % held out with seed 42."""
    hold_out = config.dataset_split if isinstance(config.dataset_split, HoldOut) else None
    if hold_out is None and config.eval_steps is not None and config.eval_steps.steps != 0:
        if own_evaluation_rows:
            limit = DRY_RUN_ROWS if config.dry_run else None
            return rows, list(enumerate(own_evaluation_rows[:limit], start=1))
        hold_out = HoldOut(enabled=True)
    if hold_out is None or not hold_out.enabled:
        return rows, []
    if len(rows) < 2:
        raise DatasetError(f"The data set has {len(rows)} rows; holding some out for evaluation needs at least 2.")
    held = min(len(rows) - 1, math.ceil(len(rows) * hold_out.test_size))
    order = np.random.default_rng(hold_out.seed).permutation(len(rows))
    chosen = set(order[:held].tolist())
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def total_steps(config: JobConfig, plan: BatchPlan) -> int:
    """Optimizer steps of the whole run; `max_steps` beats epochs, and neither means one epoch."""
    steps = config.max_steps or math.ceil((config.num_train_epochs or 1.0) * plan.steps_per_epoch)
    return min(steps, DRY_RUN_STEPS) if config.dry_run else steps


@dataclass
class RowTokenizer:
    """Rows on their way to samples; `format_name` None: that of the first row."""

    encoder: ExampleEncoder
    format_name: DatasetFormatName | None = None
    rows: int = 0
    samples: list[Encoded] = field(default_factory=list)
    rejected: list[tuple[int, str]] = field(default_factory=list)

    def add_all(self, rows: Iterable[NumberedRow]) -> None:
        for number, row in rows:
            self.rows += 1
            try:
                self.samples.append(self.encoder.encode(self._parse(row)))
            except (RowError, UnicodeError) as error:
                self.rejected.append((number, str(error)))

    def _parse(self, row: Row) -> Conversation | PlainText:
        if not isinstance(row, dict):
            raise RowError("is no JSON object")
        if self.format_name is None:
            self.format_name = detect_format(row)
        return parse_row(row, self.format_name)

    def dataset(self) -> TokenizedDataset:
        return TokenizedDataset(
            np.concatenate([s.input_ids for s in self.samples]),
            np.concatenate([s.supervised for s in self.samples]),
            np.concatenate([[0], np.cumsum([len(s.input_ids) for s in self.samples])]).astype(np.int64),
        )


def nothing_left(done: RowTokenizer) -> str:
    """A sentence about a data set without a row to use."""
    if not done.rows:
        return "The data set has no rows."
    first = "; ".join(f"row {number} {reason}" for number, reason in done.rejected[:3])
    return f"None of the data set's {done.rows} rows can be used: {first}."


def _length_report(samples: list[Encoded], max_length: int) -> dict[str, Any]:
    lengths = np.array([s.length_before for s in samples])
    kept = np.array([len(s.input_ids) for s in samples])
    supervised = sum(int(np.count_nonzero(s.supervised)) for s in samples)
    quantiles = {f"p{q}": int(np.percentile(lengths, q)) for q in (50, 90, 99)}
    return {
        "tokens": int(kept.sum()),
        "supervised_tokens": supervised,
        "supervised_share": round(supervised / int(kept.sum()), 4),
        "length": {**quantiles, "max": int(lengths.max())},
        "truncated_samples": int(np.count_nonzero(lengths > max_length)),
        "truncated_share": round(float(np.mean(lengths > max_length)), 4),
    }
