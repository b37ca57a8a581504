"""From messages to prompt tokens, with one checkpoint's own tokenizer and chat template."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from arkor_ray.errors import AdapterError, InvalidRequestError, ModelError
from arkor_ray.schemas.model import LOAD_ERRORS, needs_remote_code, wants_remote_code
from arkor_ray.serving.tool_history import history_forms


class ChatTokenizer:
    """A tokenizer with its chat template. Rendering follows training: the template's text, no special tokens added."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer = tokenizer
        self._name = name
        # Fast tokenizers refuse to be used from two threads at once.
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls, source: str | Path, *, name: str, revision: str | None = None, trust_remote_code: bool = False
    ) -> ChatTokenizer:
        """From a Hub id or a directory; `name` is what messages call it. Raises ModelError."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        except LOAD_ERRORS as error:
            if not trust_remote_code and wants_remote_code(error):
                raise needs_remote_code(name) from error
            raise ModelError(f"The tokenizer of {name} cannot be loaded: {error}") from error
        return cls(tokenizer, name)

    @property
    def template_text(self) -> str:
        """The chat template, or all of them where the tokenizer has several; empty without any."""
        template = self.tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template or ""

    def encode_chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> tuple[int, ...]:
        """Prompt tokens up to where the assistant's answer begins."""
        if self.tokenizer.chat_template is None:
            raise InvalidRequestError(f"messages: {self._name} has no chat template", param="messages")
        forms = history_forms(messages, self.template_text)
        with self._lock:
            for form in forms:
                try:
                    text = self.tokenizer.apply_chat_template(
                        form, tools=tools or None, tokenize=False, add_generation_prompt=True
                    )
                    break
                except Exception as error:  # whatever the template's own code raises
                    if form is forms[-1]:
                        raise InvalidRequestError(
                            f"messages: the chat template of {self._name} refuses them: {error}", param="messages"
                        ) from error
            return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        with self._lock:
            return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decoder(self, shown: Collection[str] = ()) -> Callable[[list[int]], str]:
        """As `decode`, but the special tokens in `shown` stay in the text."""
        if not shown:  # most requests: to list the vocabulary's special tokens takes a while
            return self.decode
        special = set(self.tokenizer.all_special_ids)
        added = self.tokenizer.get_added_vocab()
        hidden = special - {added[token] for token in shown if token in added}
        if hidden == special:
            return self.decode

        def decode(ids: list[int]) -> str:
            kept = [i for i in ids if i not in hidden]
            with self._lock:
                return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        return decode

    def are_text(self, tokens: Collection[str]) -> bool:
        """Whether none of them is a special token of this tokenizer."""
        return not set(tokens) & set(self.tokenizer.all_special_tokens)

    def backend(self) -> Any | None:
        """A copy of the `tokenizers.Tokenizer` inside; None for a tokenizer written in Python."""
        with self._lock:
            return copy.copy(getattr(self.tokenizer, "backend_tokenizer", None))

    def end_ids(self, generation_config: Any) -> frozenset[int]:
        """Tokens that end an answer: those of the base model's generation config and the tokenizer's own."""
        listed = getattr(generation_config, "eos_token_id", None)
        ids = set(listed if isinstance(listed, list) else [listed]) | {self.tokenizer.eos_token_id}
        return frozenset(i for i in ids if i is not None)

    def check_template(self, sha256: str | None, adapter_id: str) -> None:
        """Raises AdapterError unless the template is the one that training used, by the hash of its text."""
        template = self.tokenizer.chat_template
        found = hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None
        if sha256 is not None and found != sha256:
            raise AdapterError(f"Adapter {adapter_id}: its chat template is not the one that training used.")
