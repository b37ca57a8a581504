"""How well an adapter does on rows it has not seen: the loss of training's own evaluation, and answers beside those wanted."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from arkor_ray.errors import ArkorError, DatasetError
from arkor_ray.schemas.checkpoint import BasePrecision
from arkor_ray.schemas.job import Precision
from arkor_ray.serving.batch import Sampling, Speaker, answer_all
from arkor_ray.storage.adapter_files import AdapterFiles
from arkor_ray.storage.base_files import BaseFiles
from arkor_ray.storage.locations import fetch_base
from arkor_ray.training.data import RowTokenizer, nothing_left
from arkor_ray.training.data_sources import Row
from arkor_ray.training.questions import questions_of
from arkor_ray.training.supervision import ExampleEncoder

BATCH = 8  # rows in a forward pass


@dataclass(frozen=True)
class LossReport:
    """`loss` in nats per supervised token, the mean over all `tokens` of them in `samples` rows."""

    loss: float
    tokens: int
    samples: int
    rejected_rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity}


def evaluate(
    rows: Sequence[Row],
    speaker: Speaker,
    *,
    against_base: bool,
    sampling: Sampling | None,
    max_length: int | None = None,
    responses_only: bool = True,
    replicas: int | None = None,
) -> dict[str, dict[str, Any]]:
    """On the Ray that this process is connected to: by "adapter" and "base", the losses' JSON and what `score_answers` says.

    Without `sampling`, no answers. Rows without an answer to compare with are left out of the answers' scores.
    """
    import ray

    gpu = ray.cluster_resources().get("GPU", 0) >= 1
    speaker = replace(speaker, precision=speaker.resolved_precision(gpu=gpu))
    measure = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0, max_calls=1)(_mean_losses)
    try:
        losses = ray.get(measure.remote(rows, speaker, against_base, max_length, responses_only))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ArkorError) else error from error
    report: dict[str, dict[str, Any]] = {who: loss.to_json() for who, loss in losses.items()}
    if sampling is None:
        return report
    questions = {index: asked for index, asked in questions_of(rows)[0].items() if asked.answer is not None}
    requests: list[tuple[int, dict[str, Any]]] = []
    asked_of: dict[int, tuple[str, int]] = {}
    for who in report:
        for index, question in questions.items():
            asked_of[len(requests)] = (who, index)
            as_base = {"as_base": True} if who == "base" else {}
            requests.append((len(requests), question.request() | as_base))
    given: dict[tuple[str, int], str | None] = {}
    for results in answer_all(requests, speaker, sampling, replicas=replicas) if requests else ():
        given |= {asked_of[result["index"]]: result.get("answer") for result in results}
    for who in report:
        report[who] |= score_answers([(asked.answer or "", given[who, index]) for index, asked in questions.items()])
    return report


def table(report: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of a table for people, one for each figure; the columns are those of the report."""
    figures = {
        who: {
            **{k: v for k, v in told.items() if k != "fields"},
            **{f"field {k}": v for k, v in told.get("fields", {}).items()},
        }
        for who, told in report.items()
    }
    names = list(dict.fromkeys(name for told in figures.values() for name in told))
    return [[name.replace("_", " "), *(_shown(told.get(name)) for told in figures.values())] for name in names]


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "–" if value is None else str(value)


def _mean_losses(
    rows: Sequence[Row], speaker: Speaker, with_base: bool, max_length: int | None, responses_only: bool
) -> dict[str, LossReport]:
    files = fetch_base(speaker.base_model)
    assert speaker.precision is not None, "resolved by the caller"
    return mean_losses(
        rows,
        files,
        speaker.adapter,
        speaker.precision,
        with_base=with_base,
        max_length=max_length,
        responses_only=responses_only,
    )


def mean_losses(
    rows: Sequence[Row],
    files: BaseFiles,
    adapter: AdapterFiles | None,
    precision: BasePrecision,
    *,
    with_base: bool,
    max_length: int | None = None,
    responses_only: bool = True,
) -> dict[str, LossReport]:
    """By "adapter" and "base": on the same rows, tokenised once, as training would.

    Raises DatasetError when no row can be used, ModelError when the base model cannot be loaded.
    """
    import numpy as np
    import torch
    from peft import PeftModel

    from arkor_ray.training.batches import collate
    from arkor_ray.training.loss import SelectiveLoss
    from arkor_ray.training.model import context_length, load_tokenizer, load_weights

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    computes: Precision = precision if precision != "nf4" else ("bf16" if device.type == "cuda" else "fp32")
    with tempfile.TemporaryDirectory(prefix="arkor-evaluation-") as temporary:
        folder = adapter.write(Path(temporary)) if adapter else None
        if adapter is not None and adapter.has_tokenizer:
            tokenizer = load_tokenizer(str(folder), name=adapter.source)
        else:
            tokenizer = load_tokenizer(files.path, **files.options)
        model: Any = load_weights(files.path, computes, device, load_in_4bit=precision == "nf4", **files.options)
        loss = SelectiveLoss(model)
        context = context_length(model.config)
        if folder is not None:
            # As training: LoRA weights in the precision that they were published in.
            model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    if precision != "nf4":  # which is where it belongs already
        model.to(device)
    model.eval()

    encoder = ExampleEncoder(tokenizer, responses_only=responses_only, max_length=min(context, max_length or context))
    tokenizing = RowTokenizer(encoder)
    tokenizing.add_all(enumerate(rows, start=1))
    if not tokenizing.samples:
        raise DatasetError(nothing_left(tokenizing))
    data = tokenizing.dataset()

    def measure() -> LossReport:
        summed = 0.0
        with torch.no_grad():
            for first in range(0, len(data), BATCH):
                indices = np.arange(first, min(first + BATCH, len(data)))
                summed += float(loss(model, collate(data, indices, tokenizer.pad_token_id), device))
        tokens = int(np.count_nonzero(data.supervised))
        return LossReport(summed / max(1, tokens), tokens, len(data), len(tokenizing.rejected))

    found = {"adapter": measure()} if adapter else {}
    if adapter is None:
        found["base"] = measure()
    elif with_base:
        with model.disable_adapter():
            found["base"] = measure()
    return found


def score_answers(answers: Sequence[tuple[str, str | None]]) -> dict[str, Any]:
    """Shares, each of all answers asked for, where an answer that failed counts as wrong.

    Args:
        answers: (wanted, given), given None where there was an error.

    Returns `rows`, `exact_match` (white space around it aside) and, where all wanted answers are JSON objects, `valid_json`
    (the answer is an object at all), `same_json` (it equals the wanted one as JSON) and `fields`: for each key of the
    wanted objects, how often its value is right, of the rows that have it.
    """
    if not answers:
        return {"rows": 0}
    scores: dict[str, Any] = {
        "rows": len(answers),
        "exact_match": _share(given is not None and given.strip() == wanted.strip() for wanted, given in answers),
    }
    wanted_objects = [_object(wanted) for wanted, _ in answers]
    if all(wanted is not None for wanted in wanted_objects):
        pairs = [
            (wanted, _object(given))
            for wanted, (_, given) in zip(wanted_objects, answers, strict=True)
            if wanted is not None
        ]
        fields = list(dict.fromkeys(key for wanted, _ in pairs for key in wanted))
        scores["valid_json"] = _share(given is not None for _, given in pairs)
        scores["same_json"] = _share(given == wanted for wanted, given in pairs)
        scores["fields"] = {
            key: _share(
                given is not None and key in given and given[key] == wanted[key]
                for wanted, given in pairs
                if key in wanted
            )
            for key in fields
        }
    return scores


def _object(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text) if text is not None else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _share(hits: Any) -> float:
    hits = list(hits)
    return sum(hits) / len(hits) if hits else 0.0
