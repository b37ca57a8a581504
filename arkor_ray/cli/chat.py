"""`arkor-ray chat`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from arkor_ray.cli.checkpoints import Final, Step, chosen
from arkor_ray.cli.connection import ApiUrl, ProjectSlug, connect
from arkor_ray.client.calls import FINAL, AdapterRef
from arkor_ray.client.client import Client
from arkor_ray.errors import ArkorError, InvalidRequestError, NotFoundError
from arkor_ray.schemas.job import JobStatus


def chat(
    job_id: Annotated[
        str | None, typer.Option("--job", help="Talk to an adapter of this job.", show_default=False)
    ] = None,
    step: Step = None,
    final: Final = False,
    base: Annotated[str | None, typer.Option(help="Talk to this base model instead.", show_default=False)] = None,
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", help="Ask this and end; '-' reads it from standard input.", show_default=False),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="Instructions before the first message.", show_default=False)
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.", show_default=False)] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 always takes the likeliest token.", show_default=False)
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.", show_default=False)] = None,
    api_url: ApiUrl = None,
    project: ProjectSlug = None,
) -> None:
    """Talk to a job's adapter or to a base model. Without --message: a conversation, until Ctrl-D.

    Without --step or --final it is the final adapter of a completed job, else its newest checkpoint.
    """
    if (job_id is None) == (base is None):
        raise InvalidRequestError("give exactly one of --job and --base", param="job")
    ref = chosen(step, final)
    if base is not None and ref is not None:
        raise InvalidRequestError("--step and --final belong to --job", param="base")
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    with connect(api_url, project) as client:
        target: dict[str, Any] = {"base_model": base}
        if job_id is not None:
            ref = _newest(client, job_id) if ref is None else _existing(client, job_id, ref)
            target = {"job_id": job_id, "step": ref}
            typer.echo("final adapter" if ref == FINAL else f"checkpoint at step {ref}", err=True)
        conversation = [{"role": "system", "content": system}] if system else []
        arguments = {**target, **options}
        if message is not None:
            conversation.append({"role": "user", "content": sys.stdin.read() if message == "-" else message})
            print_answer(client, conversation, arguments)
        else:
            converse(client, conversation, arguments)


def converse(client: Client, conversation: list[dict[str, Any]], arguments: dict[str, Any]) -> None:
    """Questions from standard input, answers to standard output, until one of them ends.

    A question that the service refuses is taken back, so that the next one starts from a sound conversation.
    """
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question:
            continue
        conversation.append({"role": "user", "content": question})
        try:
            answer = print_answer(client, conversation, arguments)
        except KeyboardInterrupt:
            print()
            conversation.pop()
        except ArkorError as error:
            typer.echo(f"error: {error.message}", err=True)
            conversation.pop()
        else:
            conversation.append({"role": "assistant", "content": answer})


def print_answer(client: Client, conversation: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
    pieces = []
    for piece in client.chat_text(conversation, **arguments):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print(flush=True)
    return "".join(pieces)


def _newest(client: Client, job_id: str) -> AdapterRef:
    if client.get_job(job_id).status is JobStatus.COMPLETED:
        return FINAL
    steps = [each.step for each in client.list_checkpoints(job_id) if each.kind == "checkpoint"]
    if not steps:
        raise NotFoundError(f"Job {job_id} has saved no checkpoint; --base MODEL talks to its base model")
    return max(steps)


def _existing(client: Client, job_id: str, ref: AdapterRef) -> AdapterRef:
    """Looked up before a conversation is begun with it."""
    refs = [FINAL if each.kind == FINAL else each.step for each in client.list_checkpoints(job_id)]
    if ref not in refs:
        asked = "final adapter" if ref == FINAL else f"checkpoint at step {ref}"
        there = ", ".join("the final one" if each == FINAL else f"step {each}" for each in refs)
        raise NotFoundError(f"Job {job_id} has no {asked}; it has {there or 'saved none so far'}")
    return ref
