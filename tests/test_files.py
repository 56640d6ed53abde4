"""Files that are whole or not there, wherever a signal hits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lorakit.files import new_folder, write_bytes


def fill(folder: Path) -> None:
    with new_folder(folder / "new") as staging:
        (staging / "file").write_text("new")


@pytest.fixture(params=["a folder", "a folder anew", "a file"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "a file":
        return lambda: write_bytes(tmp_path / "new", b"new")
    if request.param == "a folder anew":
        fill(tmp_path)
    return lambda: fill(tmp_path)


@pytest.mark.parametrize(
    "where", [(Path, "mkdir"), (Path, "open"), (os, "replace"), (os, "fsync")], ids=lambda at: at[1]
)
def test_a_signal_right_after_a_system_call_leaves_nothing_beside_it(
    where: tuple[Any, str], write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in tmp_path.rglob("*"))
    real = getattr(*where)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        if not kwargs.get("exist_ok"):  # the parent's
            raise KeyboardInterrupt
        return made

    with monkeypatch.context() as patch:
        patch.setattr(*where, interrupted)
        try:
            write()
        except KeyboardInterrupt:
            assert sorted(path.name for path in tmp_path.rglob("*")) in (
                before,
                ["new"],
                ["file", "new"],
            )
    write()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_modes_are_those_of_the_umask(tmp_path: Path) -> None:
    for umask, file_mode, folder_mode in (
        (0o022, 0o644, 0o755),
        (0o002, 0o664, 0o775),
        (0o077, 0o600, 0o700),
    ):
        before = os.umask(umask)
        try:
            fill(tmp_path)
            write_bytes(tmp_path / "text", b"text")
        finally:
            os.umask(before)
        modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("text", "new/file", "new")]
        assert modes == [file_mode, file_mode, folder_mode]
