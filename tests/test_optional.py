"""Optional packages: present, absent, or broken."""

from __future__ import annotations

import math

import pytest

from flowsolve._optional import require


def test_present() -> None:
    assert require("math", "cli", "arithmetic") is math


def test_absent_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r"arithmetic needs nowhere, .*: pip install .*\[cli\]'"):
        require("nowhere.at_all", "cli", "arithmetic")


def test_a_package_broken_inside_is_reported_as_it_is(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("import module_that_is_not_there\n")  # type: ignore[operator]
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="module_that_is_not_there"):
        require("broken_package", "cli", "arithmetic")
