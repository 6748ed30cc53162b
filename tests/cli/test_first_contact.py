"""The first minutes: help without torch, `python -m flowsolve`, completion, and hints that install."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import flowsolve as fs
from flowsolve import _optional
from flowsolve._optional import EXTRAS, install
from flowsolve._version import __version__

pytest.importorskip("typer")

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("demo", "doctor", "inspect", "nll", "reflow", "sample", "train", "tune")
HELP = """
import runpy, sys
for arguments in [["--version"], ["--help"], [], *[[c, "--help"] for c in sys.argv[1:]], ["--show-completion", "bash"]]:
    sys.argv = ["flowsolve", *arguments]
    print("=" * 8, *arguments)
    try:
        runpy.run_module("flowsolve", run_name="__main__")
    except SystemExit as stop:
        assert stop.code in (0, 2 if not arguments else 0, None), stop.code
"""


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing torch, or anything that is large, is an error."""
    for name in ("torch", "diffusers", "numba", "scipy", "sklearn", "matplotlib", "pyarrow", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported ' + __name__)\n")
    paths = os.pathsep.join((str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    return {**os.environ, "PYTHONPATH": paths, "COLUMNS": "80", "NO_COLOR": "1", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}


def test_help_and_version_without_torch(without_torch: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS], env=without_torch, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    _, *told = done.stdout.split("=" * 8)
    assert told[0].split() == ["--version", __version__]
    for text in told[1:3]:
        assert all(c in text for c in COMMANDS)
        assert "--install-completion" in text
        assert "Usage: flowsolve" in text  # not python -m flowsolve, nor __main__.py
    for command, text in zip(COMMANDS, told[3:], strict=False):
        assert f"Usage: flowsolve {command}" in text
    assert "_FLOWSOLVE_COMPLETE=complete_bash" in told[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [("flowsolve ins", "inspect"), ("flowsolve sample --solv", "--solver"), ("flowsolve n", "nll")],
)
def test_completion_without_torch(words: str, expected: str, without_torch: dict[str, str]) -> None:
    asked = {"_FLOWSOLVE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-m", "flowsolve"], env=without_torch | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [expected], done.stderr


def test_public_names_are_those_that_are_declared() -> None:
    """What type checkers are told, where it is found, and what is public are one list."""
    tree = ast.parse(Path(fs.__file__).read_text(encoding="utf-8"))
    typed: Any = next(n for n in tree.body if isinstance(n, ast.If))
    named = {a.name for n in typed.body for a in n.names}
    assert named | {"__version__"} == set(fs.__all__)
    homes = {name: module for module, names in fs._HOME.items() for name in names}
    for statement in typed.body:
        for name in statement.names:
            found = getattr(fs, name.name)
            assert found is getattr(sys.modules[statement.module], name.name)
            assert name.name in homes or found.__name__ == f"flowsolve.{name.name}"
    assert dir(fs) == sorted(fs.__all__)
    assert fs.noise.Noise  # any module is an attribute, as when all were imported at once
    with pytest.raises(AttributeError, match=r"module 'flowsolve' has no attribute 'sampel'"):
        _ = fs.sampel


def test_a_hint_from_a_copy_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "it's mine"
    (root / "flowsolve").mkdir(parents=True)
    monkeypatch.setattr(_optional, "__file__", str(root / "flowsolve/_optional.py"))
    assert install("cli") == "pip install 'flowsolve[cli]'"  # installed as a wheel: pip asks no index for it
    (root / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert install("cli") == "pip install 'flowsolve[cli]'"
    (root / "pyproject.toml").write_text('[project]\nname = "flowsolve"\n')
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {install('cli')}"], capture_output=True, text=True, check=True
    ).stdout.split("\n")[:-1]
    assert words == ["pip", "install", "-e", f"{root}[cli]"]


def test_a_missing_package_names_every_extra() -> None:
    with pytest.raises(ImportError) as caught:
        _optional.require("nowhere", "runs", "a picture")
    assert str(caught.value) == (
        f"a picture needs nowhere, which is not installed: {install('runs')} "
        "(the extras are cli, diffusers, runs, train, bridges, ot, bench)"
    )


def test_the_extras_are_listed_where_they_are_looked_for() -> None:
    project = ROOT / "pyproject.toml"
    if not project.is_file():
        pytest.skip("no pyproject.toml beside the tests")
    declared = set(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"])
    assert declared - {"dev", "docs"} == set(EXTRAS)
    page = ROOT / "docs/getting-started.md"
    if page.is_file():
        text = page.read_text(encoding="utf-8")
        assert all(f"| `{extra}` |" in text for extra in EXTRAS)


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("--help", 0), (None, 1)])
def test_without_typer_the_first_questions_are_answered(tmp_path: Path, argument: str | None, code: int) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('no typer', name='typer')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "flowsolve", *filter(None, [argument])]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert __version__ in done.stdout
    if argument != "--version":
        assert "typer" in done.stderr
        assert "[cli]" in done.stderr
        assert all(command in done.stdout for command in COMMANDS)


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is well here; what is broken is named, and is the exit status."""
    from typer.testing import CliRunner

    from flowsolve.cli import build

    run = CliRunner().invoke(build(), ["doctor", "--json"])
    told = json.loads(run.stdout)
    assert run.exit_code == 0, run.stdout
    assert told["flowsolve"] == __version__
    assert told["packages"]["torch"] == version("torch")
    assert [ok for _, ok, _ in told["tests"]] == [True] * 4
    module = sys.modules["flowsolve.cli.doctor"]
    monkeypatch.setitem(module.TESTS, "noise", lambda: 1 / 0)
    run = CliRunner().invoke(build(), ["doctor"])
    assert run.exit_code == 1
    assert "FAILED     noise: ZeroDivisionError" in run.stdout
    assert "ok         likelihood" in run.stdout


def test_what_doctor_lists_is_what_the_extras_bring() -> None:
    from flowsolve.cli.doctor import PACKAGES

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, names in PACKAGES.items():
        if extra:
            assert all(any(line.split(">")[0].strip() == name for line in extras[extra]) for name in names), extra
