"""Lint, types and tests on all versions that the package supports: `make matrix`, or one session by its name.

    nox --list
    nox -s "suite(python=3.12, torch=2.14.1)"          one session; `-- tests/test_gates.py` gives pytest arguments
    nox -s table                                       writes docs/versions.md from the results that there are

A session installs into an environment of its own, records what it ran in docs/versions.json, in place of what its
combination of versions had there, and writes the table anew. So the table can be made by runs one after another. A run
of some tests only is not recorded.
"""

import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import nox

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent
RESULTS = ROOT / "docs/versions.json"
TABLE = ROOT / "docs/versions.md"

nox.options.sessions = ["suite"]
nox.options.stop_on_first_error = False
nox.options.error_on_missing_interpreters = True
nox.needs_version = ">=2025.2.9"


TOOLS = {"hatchling", "mypy", "nox", "pytest", "pytest-timeout", "pytest-xdist", "ruff"}

# --- versions --------------------------------------------------------------------------------------------------------


def known() -> dict[str, str]:
    """The one known good set: the lines of constraints.txt by their package. A package can have several lines."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    names = {re.split(r"==", line)[0] for line in lines}
    return {name: "\n".join(line for line in lines if line.startswith(f"{name}==")) for name in names}


def bounds() -> dict[str, str]:
    """The lower bounds in pyproject.toml of what the package runs with, not of its tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["dev"], *extras["examples"]]
    found = [re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", requirement) for requirement in requirements]
    assert all(found), f"not all requirements are of the form name>=version: {requirements}"
    return {match[1]: match[2] for match in found if match is not None and match[1] not in TOOLS}


KNOWN = {name: known()[name].partition("==")[2] for name in ("torch", "lightning")}
OLDEST = bounds()

# Every Python with the known good torch; the oldest of everything together; the two newest torches. torch 2.15 is the
# newest that the registry has, and needs Python 3.11.
COMBINATIONS = [
    ("3.10", OLDEST["torch"], OLDEST["lightning"]),
    ("3.10", KNOWN["torch"], KNOWN["lightning"]),
    ("3.11", KNOWN["torch"], KNOWN["lightning"]),
    ("3.12", KNOWN["torch"], KNOWN["lightning"]),
    ("3.13", KNOWN["torch"], KNOWN["lightning"]),
    ("3.12", "2.14.1", KNOWN["lightning"]),
    ("3.13", "2.15.0", KNOWN["lightning"]),
]


def constraints(torch: str, lightning: str) -> str:
    """The known good set with another torch and Lightning; with the oldest torch all lower bounds and the tools."""
    if torch == OLDEST["torch"]:
        # What those bring is free: old versions do not go with what is known to go with the new ones.
        chosen = {name: lines for name, lines in known().items() if name in TOOLS}
        chosen.update({name: f"{name}=={version}" for name, version in OLDEST.items()})
    else:
        chosen = known()
        del chosen["sympy"]  # some versions of torch require one exact version of it
    chosen["torch"] = f"torch=={torch}"
    for name in ("lightning", "pytorch-lightning"):
        chosen[name] = f"{name}=={lightning}"
    return "\n".join(chosen.values()) + "\n"


# --- sessions --------------------------------------------------------------------------------------------------------


@nox.session
@nox.parametrize(
    ("python", "torch", "lightning"),
    [nox.param(p, t, lightning, id=f"python={p}, torch={t}") for p, t, lightning in COMBINATIONS],
)
def suite(session: nox.Session, torch: str, lightning: str) -> None:
    """Runs lint, types and all tests, each also where one before it failed, and records what came out."""
    pins = Path(session.create_tmp(), "constraints.txt")
    pins.write_text(constraints(torch, lightning))
    # By the environment, so that it reaches what pip builds the package in as well; see Makefile.
    session.env.update(PIP_CONSTRAINT=str(pins), PIP_BUILD_CONSTRAINT=str(pins), OMP_NUM_THREADS="1")
    session.install(*shlex.split(os.environ.get("TORCH_ARGS", "")), f"torch=={torch}")
    session.install("-e", ".[dev,examples]")

    report = Path(session.create_tmp(), "report.xml")
    report.unlink(missing_ok=True)
    started = time.monotonic()
    lint = _passes(session, "ruff", "check", ".") and _passes(session, "ruff", "format", "--check", ".")
    # What one version of torch needs an ignore for another may not. Of the oldest, whose own annotations leave out
    # much that it has, only what they say is held against the package.
    missing = ("attr-defined", "no-untyped-call", "no-any-return") if torch == OLDEST["torch"] else ()
    types = _passes(
        session,
        "mypy",
        "--no-warn-unused-ignores",
        f"--python-version={session.python}",
        *(f"--disable-error-code={code}" for code in missing),
    )
    arguments = session.posargs or ["-n", "2", "--dist", "loadgroup"]
    tests = _passes(session, "pytest", "-q", f"--junitxml={report}", *arguments)
    seconds = time.monotonic() - started

    if not session.posargs:
        _record(
            {
                "python": _output(session, "import platform; print(platform.python_version())"),
                **{name: _version(session, name) for name in ("torch", "lightning")},
                "lint": lint,
                "types": types,
                **_counts(report),
                "seconds": round(seconds),
                "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
                "commit": _commit(),
            }
        )
        _write_table()
    if not session.virtualenv.reuse_existing:  # with `nox -r` it stays; torch with CUDA takes some gigabytes
        shutil.rmtree(session.virtualenv.location)
    failed = [what for what, ok in {"lint": lint, "types": types, "tests": tests}.items() if not ok]
    if failed:
        session.error(f"failed: {', '.join(failed)}")


@nox.session(venv_backend="none")
def table(session: nox.Session) -> None:
    """Writes docs/versions.md from docs/versions.json."""
    _write_table()


def _passes(session: nox.Session, *command: str) -> bool:
    # As a module: the path in the first line of an installed script can be too long for the kernel.
    try:
        session.run("python", "-m", *command)
    except nox.command.CommandFailed:
        return False
    return True


def _output(session: nox.Session, code: str) -> str:
    output = session.run("python", "-c", code, silent=True, log=False)
    assert isinstance(output, str)
    return output.strip()


def _version(session: nox.Session, package: str) -> str:
    return _output(session, f"from importlib.metadata import version; print(version('{package}'))")


def _counts(report: Path) -> dict[str, Any]:
    """Passed, failed and skipped tests, and the failed ones' names; all zero if pytest got to no test."""
    if not report.exists():
        return {"passed": 0, "failed": 0, "skipped": 0, "failures": ["no report: pytest did not get to its end"]}
    cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    failures = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None and c not in failures]
    return {
        "passed": len(cases) - len(failures) - len(skipped),
        "failed": len(failures),
        "skipped": len(skipped),
        "failures": sorted({f"{c.get('classname', '')}::{c.get('name', '')}" for c in failures}),
    }


def _commit() -> str:
    """The commit that was tested, with a plus sign if the files differ from it."""
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "--", ":!docs") else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


# --- the table -------------------------------------------------------------------------------------------------------

HEAD = """\
# Versions

What `make matrix` ran, one row per combination of versions, written by the same command from `versions.json`. Lint is
`ruff check` and `ruff format --check`, types is `mypy --strict`; seconds are those of lint, types and tests without the
installation, on whatever machine it was. {oldest} are the lower bounds in
`pyproject.toml`: their row has everything else that the package, its tests and its examples run with at its lower
bound, too. That torch's own annotations leave out much of what it has, so that names that are not there are no error in
that row's types.

| Python | torch | Lightning | lint | types | passed | failed | skipped | seconds | date | commit |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def _results() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def _record(result: dict[str, Any]) -> None:
    """Puts a result in the place of what the same versions had; what is no longer supported is left out."""
    versions = ("python", "torch", "lightning")
    others = [r for r in _results() if _is_supported(r) and [r[v] for v in versions] != [result[v] for v in versions]]
    results = sorted([*others, result], key=lambda r: [[int(n) for n in re.findall(r"\d+", r[v])] for v in versions])
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def _is_supported(result: dict[str, Any]) -> bool:
    return any(result["python"].startswith(f"{p}.") and result["torch"].startswith(t) for p, t, _ in COMBINATIONS)


def rendered(results: list[dict[str, Any]]) -> str:
    """Returns the document for these results."""
    text = HEAD.format(oldest=f"torch {OLDEST['torch']} and Lightning {OLDEST['lightning']}")
    for r in results:
        verdicts = ["ok" if r[what] else "failed" for what in ("lint", "types")]
        counts = [r[what] for what in ("passed", "failed", "skipped", "seconds", "date", "commit")]
        text += f"| {' | '.join(map(str, [r['python'], r['torch'], r['lightning'], *verdicts, *counts]))} |\n"
    for r in results:
        if r["failures"]:
            text += f"\nFailed with Python {r['python']}, torch {r['torch']}, Lightning {r['lightning']}:\n\n"
            text += "".join(f"- `{name}`\n" for name in r["failures"])
    return text


def _write_table() -> None:
    TABLE.write_text(rendered(_results()))
