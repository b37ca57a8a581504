"""`arkor-ray`: the list of commands, each loaded when it is called, and what happens to their errors."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from arkor_ray import __version__
from arkor_ray.errors import ArkorError

# Name, where the command or group of commands is, and its line in the help: `--help` loads none of them.
COMMANDS = {
    "up": ("arkor_ray.cli.up:up", "Start the service on this machine and stay."),
    "down": ("arkor_ray.cli.up:down", "End the service that runs on this machine."),
    "status": ("arkor_ray.cli.up:status", "Say whether the service on this machine answers."),
    "doctor": ("arkor_ray.cli.doctor:doctor", "Check what a service needs here, and say what to do."),
    "migrate": ("arkor_ray.cli.migrate:migrate", "Bring the database to this version's schema."),
    "demo": ("arkor_ray.cli.demo:demo", "Fine-tune a small model and watch it learn."),
    "jobs": ("arkor_ray.cli.jobs:app", "Create, list, follow and cancel fine-tuning jobs."),
    "checkpoints": ("arkor_ray.cli.checkpoints:app", "List and download a job's adapters."),
    "chat": ("arkor_ray.cli.chat:chat", "Talk to a checkpoint, a final adapter or a base model."),
    "models": ("arkor_ray.cli.models:models", "List the base models that jobs may name."),
    "endpoints": ("arkor_ray.cli.endpoints:app", "Publish adapters and base models, and make keys for them."),
    "tokens": ("arkor_ray.cli.tokens:app", "Create, list and revoke access tokens."),
    "storage": ("arkor_ray.cli.storage:app", "Remove from storage what no job needs any more."),
    "login": ("arkor_ray.cli.account:login", "Store a token for a service."),
    "whoami": ("arkor_ray.cli.account:whoami", "Show the service, the user and the organisations."),
}


class LazyGroup(TyperGroup):
    """Loads a command's module when the command is called. Expected errors end it with one line and exit code 1."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Enough for the help and for suggestions after a typo.
        self.commands = {name: TyperCommand(name, help=line) for name, (_, line) in COMMANDS.items()}
        self._only_listing = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if self._only_listing or cmd_name not in COMMANDS:
            return self.commands.get(cmd_name)
        return _load(cmd_name, COMMANDS[cmd_name][0])

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._only_listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._only_listing = False

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ArkorError as error:
            print(f"error: {' '.join(error.message.split())}", file=sys.stderr)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "arkor_ray"):
                raise
            print(f"error: this needs {package}, which is not installed: pip install 'arkor-ray[all]'", file=sys.stderr)
        raise typer.Exit(1)


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"arkor-ray {__version__}")
        raise typer.Exit


@app.callback()
def arkor_ray(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LoRA fine-tuning on Ray, with every checkpoint answering while training goes on."""


def main() -> None:
    """The entry point of the `arkor-ray` command."""
    app()


def _load(name: str, target: str) -> Any:
    module, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not isinstance(found, typer.Typer):
        command = found
        found = typer.Typer(add_completion=False)
        found.command(name)(command)
    loaded = typer.main.get_command(found)
    loaded.name = name
    return loaded


if __name__ == "__main__":
    main()
