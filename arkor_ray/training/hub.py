"""A folder with an adapter or a merged model, put on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arkor_ray.errors import (
    ArkorError,
    AuthenticationError,
    ConflictError,
    InvalidRequestError,
    ServiceUnavailableError,
)
from arkor_ray.schemas.model import HUB_ID, split_reference


def push_folder(
    folder: Path,
    repo: str,
    *,
    base_model: str,
    merged: bool,
    token: str | None,
    private: bool,
    notes: Sequence[str] = (),
) -> str:
    """Makes the model repository `owner/name` and uploads the folder with a model card, in one commit. Returns its URL.

    A repository that has files already is not touched: raises ConflictError. `notes` are sentences for the card.
    Raises InvalidRequestError for a bad name, AuthenticationError without a token that may write there, and
    ServiceUnavailableError when the Hub is out of reach.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx  # the one whose errors it raises

    check(repo, token)
    api = HfApi(token=token)
    (folder / "README.md").write_text(_card(base_model, merged, notes), encoding="utf-8")
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        there = [name for name in api.list_repo_files(repo) if name != ".gitattributes"]
        if there:
            raise ConflictError(f"--push-to-hub {repo} has files already, such as {there[0]}; name a new repository.")
        what = "merged model" if merged else "LoRA adapter"
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {what}")
    except HfHubHTTPError as error:
        raise _refusal(repo, error.response.status_code, str(error).splitlines()[0]) from error
    except (httpx.TransportError, OSError) as error:
        raise ServiceUnavailableError(f"The Hub cannot be reached for {repo}: {error}") from error
    return str(url)


def check(repo: str, token: str | None) -> None:
    """Raises InvalidRequestError or AuthenticationError for what could not be pushed, without asking the Hub."""
    if not HUB_ID.fullmatch(repo):
        raise InvalidRequestError(f"--push-to-hub: {repo!r} must be owner/name", param="--push-to-hub")
    if not token:
        raise AuthenticationError("--push-to-hub needs a token that may write: set HF_TOKEN.")


def _refusal(repo: str, status: int, reason: str) -> ArkorError:
    if status in (401, 403):
        return AuthenticationError(f"The Hub does not let this HF_TOKEN write to {repo}: {reason}")
    if status >= 500 or status == 429:
        return ServiceUnavailableError(f"The Hub failed while {repo} was written: {reason}")
    return InvalidRequestError(f"The Hub refuses {repo}: {reason}", param="--push-to-hub")


def _card(base_model: str, merged: bool, notes: Sequence[str]) -> str:
    """A model card; a base model that is a folder of somebody's machine or bucket is not named."""
    source, _ = split_reference(base_model)
    lines = ["---", f"library_name: {'transformers' if merged else 'peft'}", "pipeline_tag: text-generation"]
    if HUB_ID.fullmatch(source):
        lines += [f"base_model: {source}", f"base_model_relation: {'finetune' if merged else 'adapter'}"]
    what = (
        "A model fine-tuned with LoRA, the adapter merged into its base." if merged else "A LoRA adapter in PEFT form."
    )
    return "\n".join([*lines, "---", "", what, *(f"\n{note}" for note in notes), ""])
