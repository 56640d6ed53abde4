"""Optimisations are undone where they fail, and errors that nobody expects are raised in CI."""

from __future__ import annotations

import pytest

from lorakit.kernels.optimisation import Optimisation, Unsupported, attempt


class Watched(Optimisation):
    trouble = "it broke"

    def __init__(self, fails: str = "", error: Exception | None = None) -> None:
        self.fails, self.error, self.calls = fails, error, list[str]()

    def _do(self, what: str) -> None:
        self.calls.append(what)
        if what == self.fails and self.error is not None:
            raise self.error

    def install(self) -> None:
        self._do("install")

    def verify(self) -> None:
        self._do("verify")

    def undo(self) -> None:
        self._do("undo")


@pytest.fixture(params=["strict", "lenient"])
def strict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv("LORAKIT_STRICT", str(int(request.param == "strict")))
    return bool(request.param == "strict")


def test_one_that_works_stays(strict: bool) -> None:
    tried = Watched()
    assert attempt(tried) is None
    assert tried.calls == ["install", "verify"]


@pytest.mark.parametrize("fails", ["install", "verify"])
def test_one_that_can_not_be_used_is_undone_and_says_why(fails: str, strict: bool) -> None:
    tried = Watched(fails, Unsupported("it has three heads"))
    assert attempt(tried) == "it has three heads"
    assert tried.calls[-2:] == [fails, "undo"]


@pytest.mark.parametrize("fails", ["install", "verify"])
def test_an_error_is_a_reason_but_in_ci(fails: str, strict: bool) -> None:
    tried = Watched(fails, KeyError("x"))
    if strict:
        with pytest.raises(KeyError):
            attempt(tried)
    else:
        assert attempt(tried) == "it broke (KeyError: 'x')"
    assert tried.calls[-2:] == [fails, "undo"]
