"""`arkor-ray up`, `down` and `status`: the whole service on this machine, in the foreground."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from arkor_ray.errors import ArkorError, ConflictError, InvalidRequestError, ServiceUnavailableError

if TYPE_CHECKING:
    from arkor_ray.settings import Settings

DataDir = Annotated[
    Path, typer.Option(help="Database, objects and caches of this instance.", envvar="ARKOR_RAY_DATA_DIR")
]
DEFAULT_DATA_DIR = Path(".arkor-ray")


def up(
    host: Annotated[str, typer.Option(envvar="ARKOR_RAY_HOST", help="Address the API listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="ARKOR_RAY_PORT", help="Port of the API; 0 takes a free one.")] = 8000,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    alias: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="Adds a model: a Hub id, an absolute directory or s3://BUCKET/PREFIX."),
    ] = None,
    storage: Annotated[
        str, typer.Option(envvar="ARKOR_RAY_STORAGE_URL", help="file:///DIR or s3://BUCKET/PREFIX.")
    ] = "",
    database_url: Annotated[
        str,
        typer.Option(
            envvar="ARKOR_RAY_DATABASE_URL",
            help="SQLite (default) or PostgreSQL. One with a password belongs into the variable: all users of a machine see "
            "its command lines.",
        ),
    ] = "",
    ray_address: Annotated[str | None, typer.Option(help="Joins this Ray instead of starting one.")] = None,
) -> None:
    """Starts the service and stays; Ctrl-C (or SIGTERM) ends it cleanly. Jobs under way resume at the next start."""
    from arkor_ray.embedded import Instance, LocalRay, check_free, read_instance

    _stop_on_signals()
    data_dir = data_dir.expanduser().absolute()
    try:
        settings = _settings(host, port, data_dir, alias or [], storage, database_url)
        if read_instance(data_dir) is None:  # else it is told who runs there, rather than that its port is taken
            check_free(settings.host, settings.port)  # before anything is made
        with Instance(data_dir) as instance:
            from arkor_ray.service import check_reachable  # after the extras are known to be installed
            from arkor_ray.telemetry import logs, tracing

            os.environ[logs.FORMAT_VARIABLE] = settings.log_format
            logs.configure()
            tracing.configure()  # here too, so that an extra that is missing is said at once
            check_reachable(settings)
            if ray_address is None:  # on a cluster the other nodes would not have it
                settings = _with_demo_base(settings)
            with LocalRay(settings, address=ray_address) as local_ray:
                _stop_on_signals()  # again: connecting to Ray has put handlers of its own in their place
                settings = local_ray.settings
                if not (settings.models or settings.catalogue.models or settings.models_allow_local_paths):
                    print(
                        "warning: no base model for any job; set ARKOR_RAY_MODELS on every node and here",
                        file=sys.stderr,
                    )
                _serve(settings)
                instance.announce(settings.api_url, metrics_url=local_ray.metrics_url)
                print(f"arkor-ray is ready at {settings.api_url}", flush=True)
                local_ray.wait()
    except KeyboardInterrupt:
        print("arkor-ray has stopped", flush=True)
    finally:
        _ignore_signals()  # Ray has its own ending to do, and there is nothing left to cut short


def down(data_dir: DataDir = DEFAULT_DATA_DIR) -> None:
    """Ends the instance of this data directory, as Ctrl-C in its terminal would."""
    from arkor_ray.embedded import read_instance

    instance = read_instance(data_dir.expanduser().absolute())
    if instance is None:
        print(f"No arkor-ray is running in {data_dir}")
        return
    if not instance["pid"]:  # it is just starting or just ending: 0 would mean our own process group
        raise ConflictError(f"The arkor-ray in {data_dir} is starting or stopping; try again")
    os.kill(instance["pid"], signal.SIGTERM)
    deadline = time.monotonic() + 30
    while read_instance(data_dir.expanduser().absolute()) is not None:
        if time.monotonic() > deadline:
            raise ServiceUnavailableError(f"Process {instance['pid']} has not ended 30 s after SIGTERM")
        time.sleep(0.1)
    print("arkor-ray has stopped")


def status(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Whether the instance of this data directory runs, and whether its parts answer. Exit code 1 if not."""
    import json

    import httpx

    from arkor_ray.embedded import read_instance

    instance = read_instance(data_dir.expanduser().absolute())
    answer: dict[str, Any] = {"running": instance is not None, "ready": False, "url": None, "checks": {}}
    if instance is not None and instance.get("url"):
        answer |= {"url": instance["url"], "metrics_url": instance.get("metrics_url")}
        try:
            response = httpx.get(f"{instance['url']}/readyz", timeout=10)
            answer |= {"ready": response.status_code == 200, "checks": response.json().get("checks", {})}
        except httpx.HTTPError as error:
            answer["checks"] = {"api": f"{type(error).__name__}: {error}"}
    if as_json:
        print(json.dumps(answer))
    elif instance is None:
        print(f"No arkor-ray is running in {data_dir}")
    else:
        print(
            f"arkor-ray (pid {instance['pid']}) {'is ready' if answer['ready'] else 'is not ready'} at {answer['url']}"
        )
        for part, said in answer["checks"].items():
            print(f"  {part}: {said}")
        if answer.get("metrics_url"):
            print(f"  metrics: {answer['metrics_url']}")
    if not answer["ready"]:
        raise typer.Exit(1)


def _stop_on_signals() -> None:
    """From here on a signal raises, wherever we are; what was started so far is stopped on the way out."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, _frame: Any) -> None:
    # A second signal must not cut the clean stop short; it has its own time limits.
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _settings(host: str, port: int, data_dir: Path, alias: list[str], storage: str, database_url: str) -> Settings:
    """Settings of this instance: command line over environment over defaults."""
    try:
        from arkor_ray.settings import Settings
    except ImportError as error:
        raise InvalidRequestError(f"{error.name} is not installed: pip install 'arkor-ray[all]'") from error
    from arkor_ray.embedded import free_ports

    given = {"host": host, "port": port or free_ports(1)[0], "data_dir": data_dir}
    given |= {"storage_url": storage} if storage else {}
    given |= {"database_url": database_url} if database_url else {}
    settings = Settings.load(**given)
    aliases = dict(settings.models)
    for entry in alias:
        name, equals, model = entry.partition("=")
        if not (name and equals and model):
            raise InvalidRequestError(f"--alias {entry}: write NAME=MODEL", param="alias")
        aliases = {known: to for known, to in aliases.items() if known.lower() != name.lower()} | {name: model}
    return Settings.load(**given, models=aliases)


def _with_demo_base(settings: Settings) -> Settings:
    """The same with the demo base in the catalogue, unless a model of its name is there."""
    from arkor_ray.settings import DEMO_BASE, Settings

    if settings.base_models.named(DEMO_BASE) is not None:
        return settings
    models = {**settings.models, DEMO_BASE: str(_demo_base(settings.demo_base_cache))}
    given = {name: getattr(settings, name) for name in Settings.model_fields}
    return Settings.load(**{**given, "models": models})


def _demo_base(cache_dir: Path) -> Path:
    """The tiny base model of the catalogue, made on first use with a progress bar."""
    from rich.progress import Progress

    from arkor_ray.demo.base_model import ensure_demo_base, find_demo_base

    if found := find_demo_base(cache_dir):
        return found
    with Progress(console=Console(file=sys.stderr), transient=False) as bars:
        task = bars.add_task("Making the demo base model (first use only)", total=1.0)
        return ensure_demo_base(
            cache_dir, progress=lambda done, what: bars.update(task, completed=done, description=what)
        )


def _serve(settings: Settings) -> None:
    from arkor_ray import service

    try:
        service.start(settings)
    except ArkorError:
        raise
    except RuntimeError as error:
        if "address already in use" in str(error).lower():
            raise ConflictError(
                f"Port {settings.port} of {settings.host} is taken; choose another with --port"
            ) from error
        raise
