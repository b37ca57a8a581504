"""Which tokens the loss looks at: from a conversation and a chat template to token ids and a mask.

The mask needs no `{% generation %}` markers in the template. For each assistant turn the conversation is rendered
twice more: up to the turn with the generation prompt, which is what serving will feed the model, and up to and with
the turn. The turn's characters are what the second adds to the first, less white space after the end-of-turn marker.
When the whole conversation does not carry exactly these characters at that place, because the template rewrites
history, the row is rejected: a mask that is a little off trains the wrong thing without a sign.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arkor_ray.errors import ModelError
from arkor_ray.training.chat_format import Conversation, PlainText, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """`input_ids` int32 and `supervised` bool, both (length,). `supervised[t]`: the loss covers predicting token t from those
    before it; never true for t = 0. `length_before` counts tokens before truncation."""

    input_ids: np.ndarray
    supervised: np.ndarray
    length_before: int


class ExampleEncoder:
    """Renders and tokenises examples for one tokenizer.

    With `responses_only`, a conversation is supervised on its trained assistant turns, content and end-of-turn marker;
    otherwise, and for plain text, on every token. Longer examples lose their end at `max_length` tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, responses_only: bool, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._responses_only = responses_only
        self._max_length = max_length

    def encode(self, example: Conversation | PlainText) -> Encoded:
        """Raises RowError when the row cannot be rendered, masked, or has nothing left to supervise."""
        if isinstance(example, PlainText):
            ids = self._tokenizer(example.text, verbose=False)["input_ids"]
            eos = self._tokenizer.eos_token_id
            if eos is not None and (not ids or ids[-1] != eos):
                ids = [*ids, eos]
            supervised = np.ones(len(ids), dtype=bool)
        else:
            text, spans = self.render(example)
            encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids = encoding["input_ids"]
            if self._responses_only:
                supervised = _tokens_in(encoding["offset_mapping"], spans)
            else:
                supervised = np.ones(len(ids), dtype=bool)
        length = len(ids)
        supervised[:1] = False
        ids, supervised = np.asarray(ids[: self._max_length], dtype=np.int32), supervised[: self._max_length]
        if not supervised.any():
            cut = f" within max_length {self._max_length} (the row has {length})" if length > self._max_length else ""
            raise RowError(f"has no token to learn from{cut}")
        return Encoded(ids, supervised, length)

    def render(self, example: Conversation) -> tuple[str, list[Span]]:
        """The conversation as text, and the character spans of its trained turns. Raises RowError."""
        text = self._template(example.messages, example.tools)
        if not self._responses_only:
            return text, []
        # An assistant turn that opens the conversation answers nothing, and no generation prompt leads to it.
        turns = [index for index, on in enumerate(example.trained) if on and index > 0]
        return text, [self._turn_span(example, index, text) for index in turns]

    def _turn_span(self, example: Conversation, index: int, text: str) -> Span:
        messages, tools = example.messages, example.tools
        prompt = self._template(messages[:index], tools, add_generation_prompt=True)
        through = self._template(messages[: index + 1], tools)
        content = messages[index]["content"].strip()
        if not through.startswith(prompt):
            # The generation prompt says more than history shows, such as an empty thinking block. What both share is
            # the turn's header, if the content follows it directly.
            prompt = _common_prefix(prompt, through)
            header_known = len(prompt) >= len(self._template(messages[:index], tools))
            if not content or not header_known or not through.startswith(content, len(prompt)):
                raise RowError(f"messages[{index}]: the template's generation prompt does not lead to this turn")
        body = through[len(prompt) :]
        at = body.rfind(content) if content else 0  # no content: a turn of tool calls only
        if at < 0:
            raise RowError(f"messages[{index}]: the template changes the content of this assistant turn")
        closing = body[at + len(content) :]
        if closing.strip():
            closing = closing.rstrip()
        # Either the turn stands in the whole conversation as it did alone, or only what comes between its header and
        # its content is dropped once it is history (again, an empty thinking block).
        for candidate in (body[: at + len(content)] + closing, content + closing):
            if text.startswith(prompt) and text.startswith(candidate, len(prompt)):
                return len(prompt), len(prompt) + len(candidate)
        raise RowError(
            f"messages[{index}]: the template rewrites this assistant turn once others follow, so which tokens are the "
            "answer cannot be told; end the row at this turn, or use another template"
        )

    def _template(self, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options))
        except ValueError as error:
            if self._tokenizer.chat_template is None:
                raise ModelError(
                    "The base model's tokenizer has no chat template; only 'text' rows can be used."
                ) from error
            raise RowError(f"the chat template fails: {error}") from error
        except Exception as error:  # Jinja's own errors, and those of code in the template
            raise RowError(f"the chat template fails: {type(error).__name__}: {error}") from error


def template_sha256(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Identifies the chat template's text, None when there is none."""
    template = tokenizer.chat_template
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None


def _tokens_in(offsets: list[Span], spans: list[Span]) -> np.ndarray:
    """Tokens that share at least one character with a span."""
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        mask |= (starts < end) & (ends > start) & (ends > starts)
    return mask


def _common_prefix(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]
