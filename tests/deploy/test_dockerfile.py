"""The Dockerfile, as far as it can be held to something without a Docker daemon."""

from __future__ import annotations

import fnmatch
import re
import tomllib

from tests.deploy.files import CLUSTER, EXTRAS, ROOT

LINES = re.sub(r"\\\n\s*", " ", (CLUSTER / "Dockerfile").read_text()).splitlines()
INSTRUCTIONS = [line.split(maxsplit=1) for line in LINES if line and not line.startswith("#")]


def of(name: str) -> list[str]:
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


def stages() -> dict[str, str]:
    """What each stage is built from."""
    return {m.group(2): m.group(1) for rest in of("FROM") if (m := re.fullmatch(r"(\S+) AS (\S+)", rest))}


def test_there_is_an_image_for_each_role_and_one_for_all():
    assert {name for name, base in stages().items() if base == "runtime"} == {
        "control-plane",
        "training",
        "serving",
        "all",
    }
    known = {*stages(), "${BASE_IMAGE}"}
    assert set(stages().values()) <= known
    assert {m for rest in of("COPY") for m in re.findall(r"--from=(\S+)", rest)} <= known


def test_what_is_copied_is_there_and_docker_may_see_it():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [rest.split() for rest in of("COPY") if "--from" not in rest]
    sources = {word.removeprefix("./") for words in copied for word in words[:-1] if not word.startswith("--")}
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), f"{source} is ignored"
    assert not any(fnmatch.fnmatch("cluster/arkor.env", pattern) for pattern in allowed)


def test_each_image_has_the_extras_of_its_role():
    installed = [
        set(found.split(",")) for rest in of("RUN") for found in re.findall(r"pip install '\.\[([\w,]+)\]'", rest)
    ]
    assert all(extras <= EXTRAS for extras in installed)
    base = {"server", "s3", "postgres", "otel"}
    assert sorted(map(sorted, installed)) == sorted(map(sorted, ({"all"}, base, base | {"train"}, base | {"serve"})))


def test_versions_are_held_and_the_python_is_one_we_support():
    assert any("PIP_CONSTRAINT=/src/constraints.txt" in rest for rest in of("ENV"))
    (python,) = (rest.partition("=")[2] for rest in of("ARG") if rest.startswith("PYTHON_VERSION="))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={python}"


def test_it_runs_without_root_and_without_secrets():
    assert of("USER") == ["1000:1000"]
    names = " ".join(of("ARG") + of("ENV"))
    assert not re.search(r"PASSWORD|SECRET|TOKEN", names)
    assert "RAY_AUTH_MODE=token" in names
    assert "ARKOR_RAY_ANONYMOUS=0" in names
