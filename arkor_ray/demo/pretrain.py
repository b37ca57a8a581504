"""Makes the demo's base model: `python -m arkor_ray.demo.pretrain DIRECTORY RECIPE`, the recipe as JSON.

A process of its own, so that neither torch nor its threads stay behind in the service that asked for the model. It
tells how far it is in lines of JSON, `{"done": 0.25, "what": "..."}`, on standard output.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arkor_ray.demo.corpus import Messages, make_corpus
from arkor_ray.demo.tokenizer import CHAT_TEMPLATE, train_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

Progress = Callable[[float, str], None]  # share done, 0 to 1, and what is being done


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the base model becomes. The defaults take about 50 s on two cores."""

    conversations: int = 9500
    seed: int = 0
    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    context: int = 2048
    initializer_range: float = 0.1  # near 1 / sqrt(hidden_size): with less, attention takes long to find anything
    row_tokens: int = 384
    rows_per_step: int = 3
    learning_rate: float = 5e-3
    warmup: float = 0.05  # share of the run
    decay: float = 0.6  # share of the run, at its end
    clip: float = 1.0
    # A slow machine ends early, with a model that read less: CPU time per thread, so that a merely busy one does not.
    max_seconds: float = 80.0

    def corpus(self) -> list[Messages]:
        return make_corpus(self.conversations, self.seed)

    def digest(self) -> str:
        """Names the model: another recipe, corpus or chat template has another digest."""
        content = json.dumps([asdict(self), CHAT_TEMPLATE, self.corpus()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Row:
    """Conversations side by side, at most `row_tokens` long together."""

    tokens: list[int]
    learned: list[bool]  # tokens that an assistant says
    positions: list[int]  # within the conversation
    members: list[int]  # which conversation of the row


def main() -> None:
    directory, recipe = Path(sys.argv[1]), Recipe(**json.loads(sys.argv[2]))
    # Libraries print to standard output too; what they say goes where errors go.
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    make_base(directory, recipe, lambda done, what: print(json.dumps({"done": done, "what": what}), file=reports))


def make_base(directory: Path, recipe: Recipe, progress: Progress) -> None:
    """Train tokenizer and model as `recipe` says and write both as one transformers folder."""
    import torch

    torch.set_num_threads(min(4, _cores()))  # a model this small gains nothing from more
    progress(0.0, "writing the corpus")
    conversations = recipe.corpus()
    progress(0.02, "training the tokenizer")
    texts = (message["content"] for conversation in conversations for message in conversation)
    tokenizer = train_tokenizer(texts, recipe.vocab_size, recipe.context)
    rows = pack(conversations, tokenizer, recipe.row_tokens)
    model = _new_model(recipe, tokenizer)
    pretrain(model, rows, recipe, lambda done, what: progress(0.05 + 0.93 * done, what))
    progress(0.98, "saving")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def pack(conversations: list[Messages], tokenizer: PreTrainedTokenizerFast, row_tokens: int) -> list[Row]:
    """Lay conversations into rows in the order given; the end of one that is longer than a row is cut off."""
    encoded: Any = tokenizer.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    rows = [Row([], [], [], [])]
    for tokens, assistant in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        tokens, assistant = tokens[:row_tokens], assistant[:row_tokens]
        if len(rows[-1].tokens) + len(tokens) > row_tokens:
            rows.append(Row([], [], [], []))
        row = rows[-1]
        row.members.extend([row.members[-1] + 1 if row.members else 0] * len(tokens))
        row.tokens.extend(tokens)
        row.learned.extend(bool(flag) for flag in assistant)
        row.positions.extend(range(len(tokens)))
    return rows


def pretrain(model: Qwen3ForCausalLM, rows: list[Row], recipe: Recipe, progress: Progress) -> None:
    """Read the rows once, in order, learning what the assistant says."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    steps = -(-len(rows) // recipe.rows_per_step)
    threads, begin = torch.get_num_threads(), time.process_time()
    for step in range(steps):
        spent = (time.process_time() - begin) / threads / recipe.max_seconds
        done = max(step / steps, spent)
        if done >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _rate(done, recipe)
        loss = _loss(model, rows[step * recipe.rows_per_step : (step + 1) * recipe.rows_per_step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            progress(done, f"step {step}/{steps}, loss {loss.item():.2f}")


def _new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(recipe.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.key_value_heads,
            head_dim=recipe.hidden_size // recipe.heads,
            max_position_embeddings=recipe.context,
            initializer_range=recipe.initializer_range,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _rate(done: float, recipe: Recipe) -> float:
    """Up, flat, down to nothing. By the share done rather than by steps, so that an early end is a soft one too."""
    return min(1.0, (done + 1e-3) / recipe.warmup, (1.0 - done) / recipe.decay)


def _loss(model: Qwen3ForCausalLM, rows: list[Row]) -> torch.Tensor:
    """Mean over the learned tokens. A token attends to its own conversation only."""
    import torch

    length = max(len(row.tokens) for row in rows)

    def padded(lists: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([values + [fill] * (length - len(values)) for values in lists])

    tokens = padded([row.tokens for row in rows], 0)
    learned = padded([[int(flag) for flag in row.learned] for row in rows], 0).bool()
    positions = padded([row.positions for row in rows], 0)
    members = padded([row.members for row in rows], -1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (members[:, :, None] == members[:, None, :]) & causal
    hidden = model.model(input_ids=tokens, position_ids=positions, attention_mask=mask[:, None]).last_hidden_state
    # The output layer sees only where the loss looks.
    logits = model.lm_head(hidden[:, :-1][learned[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:][learned[:, 1:]])


def _cores() -> int:
    # Those that this process may use, where the system tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
