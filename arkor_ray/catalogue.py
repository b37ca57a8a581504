"""The operator's list of base models: a YAML file, and the names given by ARKOR_RAY_MODELS or --alias.

```yaml
models:
  - name: acme/chat-8b                   # also where it is, unless source says otherwise
    revision: v1.0
    aliases: [unsloth/gemma-4-E4B-it]
    serving: {replicas: 2, max_length: 8192}
  - name: house-model
    source: s3://models/house-model      # or /an/absolute/directory
    trust_remote_code: true
    training: {max_workers: 2}
```

What is wrong in it is said in one sentence that names the entry.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from arkor_ray.schemas.model import CatalogueEntry, ServingResources, TrainingResources, split_reference

_KEYS: dict[str, Iterable[str]] = {
    "": CatalogueEntry.model_fields,
    "serving": ServingResources.model_fields,
    "training": TrainingResources.model_fields,
}


class Catalogue(BaseModel):
    """Entries in the order of the file. No name stands for two of them, whatever its case, and no two are one base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[CatalogueEntry] = []

    @classmethod
    def of(cls, entries: Iterable[CatalogueEntry]) -> Catalogue:
        """Raises ValueError with a sentence about the first name or base that is there twice."""
        owners: dict[str, CatalogueEntry] = {}
        bases: dict[str, CatalogueEntry] = {}
        entries = list(entries)
        for entry in entries:
            for name in entry.names:
                owner = owners.setdefault(name.lower(), entry)
                if owner is not entry:
                    raise ValueError(
                        f"{name} names two base models, {owner.reference} (entry {owner.name}) and {entry.reference} "
                        f"(entry {entry.name}); names compare without regard to case, so choose another for one of them"
                    )
            if len({name.lower() for name in entry.names}) < len(entry.names):
                raise ValueError(f"entry {entry.name}: a name is there twice; names compare without regard to case")
            first = bases.setdefault(entry.reference, entry)
            if first is not entry:
                raise ValueError(
                    f"entries {first.name} and {entry.name} are the same base model, {entry.reference}; "
                    f"write one, with the other's name under its aliases"
                )
        return cls.model_construct(models=entries)

    def with_names(self, models: dict[str, str]) -> Catalogue:
        """And `models`, reference by name. A name for a base that has an entry is one more alias of that entry."""
        entries = {entry.reference: entry for entry in self.models}
        for name, reference in models.items():
            entry = _entry(name, reference)
            entry = entries.get(entry.reference, entry)
            known = {known.lower() for known in entry.names}
            if name.lower() not in known:
                entry = entry.model_copy(update={"aliases": [*entry.aliases, name]})
            entries[entry.reference] = entry
        return Catalogue.of(entries.values())

    def names(self) -> list[str]:
        """Every name, aliases included."""
        return [name for entry in self.models for name in entry.names]

    def named(self, name: str) -> CatalogueEntry | None:
        """The entry that a user's name stands for; names compare case-insensitively."""
        wanted = name.strip().lower()
        return next((e for e in self.models if wanted in (known.lower() for known in e.names)), None)

    def of_base(self, reference: str) -> CatalogueEntry:
        """What is said about a base model; the defaults when nothing is."""
        return next((e for e in self.models if e.reference == reference), None) or CatalogueEntry.unlisted(reference)


def read_catalogue(path_or_text: str | Path) -> Catalogue:
    """From a YAML file; or from the text itself, as `Settings.environment` passes it to other processes.

    So all processes of `arkor-ray up` have what was read at its start, also after the file was edited. Raises ValueError.
    """
    import yaml  # here, so that a service without such a file does not pay for it

    text, where = str(path_or_text), "it"
    try:
        if not text.lstrip().startswith("{"):
            path = Path(text).expanduser().absolute()
            text, where = path.read_text(encoding="utf-8"), str(path)
        content = yaml.load(text, Loader=_unique_keys_loader())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error
    if not isinstance(content, dict) or set(content) != {"models"} or not isinstance(content["models"], list):
        raise ValueError(f"{where} must hold one key, models, with a list of base models")
    return Catalogue.of(_checked(item, number) for number, item in enumerate(content["models"], start=1))


def _entry(name: str, reference: str) -> CatalogueEntry:
    source, revision = split_reference(reference)
    try:
        return CatalogueEntry(name=name, source=source, revision=revision)
    except ValidationError as error:
        raise ValueError(f"ARKOR_RAY_MODELS or --alias {name}={reference}: {_reason(error)}") from error


def _checked(item: Any, number: int) -> CatalogueEntry:
    if not isinstance(item, dict):
        raise ValueError(f"entry {number} must hold keys and values, at least name: (got {item!r})")
    try:
        return CatalogueEntry.model_validate(item)
    except ValidationError as error:
        raise ValueError(f"entry {item.get('name') or number}: {_reason(error)}") from error


def _reason(error: ValidationError) -> str:
    """One sentence out of pydantic's findings, with the remedy where the type of the fault tells it."""
    found = error.errors(include_url=False)
    # A misspelt key comes first: what else is wrong may only follow from it.
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    field = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    match first["type"]:
        case "extra_forbidden":
            parent, _, key = field.rpartition(".")
            near = difflib.get_close_matches(key, _KEYS.get(parent, ()), n=1)
            return f"there is no key {field}" + (f"; did you mean {near[0]}?" if near else "")
        case "missing":
            return f"{field} is missing"
        case "bool_type":
            reason = "must be true or false"
        case "string_type":
            reason = "must be text; put it in quotes"
        case "list_type":
            reason = "must be a list, such as [NAME]"
        case "model_type" | "dict_type":
            reason = "must hold keys and values"
    return f"{field}: {reason} (got {first['input']!r})" if field else reason


def _unique_keys_loader() -> Any:
    """A safe loader that refuses a key given twice, of which YAML's own would silently take the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"the key {twice} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader
