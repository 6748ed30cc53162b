"""Every flow that an adapter makes in these tests can be sent to another process, as far as its clock goes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from flowsolve.adapters.finding import Finding


@pytest.fixture(autouse=True)
def clocks_are_values(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Finding.flow

    def flow(self: Finding, *args: Any, **options: Any) -> Any:
        found = made(self, *args, **options)
        given = getattr(found.clock, "__module__", None) or ""
        if not given.startswith(("tests", "test_")):  # time= of a test's own
            again = pickle.loads(pickle.dumps(found.clock))  # noqa: S301
            assert again(0.25) == found.clock(0.25)
        return found

    monkeypatch.setattr(Finding, "flow", flow)
