"""Python and the packages: which extras are whole, whether versions are new enough, whether the heavy ones load."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from arkor_ray.doctor.findings import Finding, fail, ok, warning

DISTRIBUTION = "arkor-ray"
EXTRAS = ("server", "train", "serve", "s3", "postgres")
NEEDED = ("server", "train", "serve")  # the others are for storage and databases that a service need not have

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(\[[^\]]*\])?\s*(>=\s*(?P<lowest>[0-9][0-9.]*))?\s*(;\s*extra == ['\"](?P<extra>[^'\"]+)['\"])?"
)


@dataclass(frozen=True)
class Requirement:
    name: str
    lowest: str  # "" where any version will do
    extra: str  # "" for the base install


def parse_requirements(lines: Sequence[str]) -> list[Requirement]:
    """Our own package's requirements, in the form that its metadata has them."""
    found = []
    for line in lines:
        match = _REQUIREMENT.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"{line!r} is no requirement of the form NAME>=VERSION")
        found.append(Requirement(match["name"], match["lowest"] or "", match["extra"] or ""))
    return found


def check_python(running: Sequence[int], lowest: str) -> Finding:
    version = ".".join(map(str, running[:3]))
    if tuple(running[:3]) < _release(lowest):
        return fail("python", f"Python {version}", f"install Python {lowest} or newer")
    return ok("python", f"Python {version} at {sys.executable}")


def check_packages(requirements: Sequence[Requirement], version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """`version_of` gives a package's installed version, None if it is not."""
    whole, lacking, old = [], {}, []
    for extra in ("", *EXTRAS):
        mine = [each for each in requirements if each.extra == extra]
        missing = [each.name for each in mine if version_of(each.name) is None]
        if missing:
            lacking[extra] = missing
        elif extra:
            whole.append(extra)
        old += [
            each for each in mine if (version := version_of(each.name)) and _release(version) < _release(each.lowest)
        ]
    if lacking.get(""):
        yield fail("packages", f"not installed: {', '.join(lacking[''])}", "pip install arkor-ray")
    said = f"extras installed: {', '.join(whole) or 'none'}"
    absent = [f"{extra} (lacks {', '.join(lacking[extra])})" for extra in EXTRAS if extra in lacking]
    said += f"; not installed: {', '.join(absent)}" if absent else ""
    if any(extra in lacking for extra in NEEDED):
        meaning = "enough for the client and the command line, not for a service; "
        yield warning("packages", f"{meaning}{said}", "pip install 'arkor-ray[all]'")
    else:
        yield ok("packages", said)
    if old:
        shown = sorted({f"{each.name} {version_of(each.name)} (needs {each.lowest})" for each in old})
        yield fail("versions", f"too old: {', '.join(shown)}", "pip install --upgrade 'arkor-ray[all]'")


def installed_requirements() -> tuple[list[Requirement], str]:
    """Of this package as it is installed, and the lowest Python. Raises PackageNotFoundError if it is only a folder."""
    lines = importlib.metadata.requires(DISTRIBUTION) or []
    lowest = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"].removeprefix(">=")
    return parse_requirements(lines), lowest


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_installation() -> Iterator[Finding]:
    try:
        requirements, lowest = installed_requirements()
    except importlib.metadata.PackageNotFoundError:
        yield fail("packages", "arkor_ray is imported from a folder and not installed", "pip install -e '.[all]'")
        return
    yield check_python(sys.version_info[:3], lowest)
    yield from check_packages(requirements, installed_version)


def _release(version: str) -> tuple[int, ...]:
    """1.2.0rc1 is taken for 1.2.0: what tells them apart does not matter for a lower bound; 1.2 equals 1.2.0."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
