"""Exports that are sent to the hub: a real server on this machine, which keeps what arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from lorakit.sources import hub as hub_module
from tests.support.exports import RANKS, Trained, as_if_trained
from tests.support.hub import TOKEN, Hub, Repository, local_hub
from tests.support.processes import Done, in_this_process

Call = Callable[..., Done]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, sums: Path) -> Trained:
    folder = tmp_path_factory.mktemp("trained") / "runs/x"
    return as_if_trained(folder, tiny_llama, sums, "vanilla", RANKS["one at rank 0"], "causal-lm")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub asks, with the right token. What huggingface_hub read from the
    environment when it was imported is set anew."""
    with local_hub() as found:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        hub_module.unreachable.cache_clear()
        yield found
    hub_module.unreachable.cache_clear()


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], trained: Trained
) -> Call:
    run = in_this_process(monkeypatch, capfd)
    return lambda *more: run("export", trained.run, "--adapter", *more)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_the_whole_export_arrives_in_a_private_repository(
    tmp_path: Path, call: Call, hub: Hub
) -> None:
    out = tmp_path / "out"
    done = call("--format", "peft-portable", "--out", out, "--push-to-hub", "someone/mine")
    assert done.code == 0, done.err
    repository = hub.repositories["someone/mine"]
    assert repository.private
    assert repository.branches == {"main": content(out)}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= content(out).keys()
    assert list(hub.large.values()) == [(out / "adapter_model.safetensors").read_bytes()]
    assert repository.messages == ["Export of a lorakit run"]
    assert "private repository someone/mine made" in done.out
    assert f"sent to {hub.url}/someone/mine/commit/" in done.out
    assert "by a folder of this machine" in done.out


def test_a_branch_a_message_and_a_public_repository(tmp_path: Path, call: Call, hub: Hub) -> None:
    more = ("--public", "--revision", "try", "--commit-message", "Rank 4")
    done = call("--out", tmp_path / "a", "--push-to-hub", "someone/mine", *more)
    assert done.code == 0, done.err
    repository = hub.repositories["someone/mine"]
    assert not repository.private
    assert repository.branches == {"main": {}, "try": content(tmp_path / "a")}
    assert repository.messages == ["Rank 4"]
    done = call("--out", tmp_path / "b", "--push-to-hub", "someone/mine", "--public")
    assert done.code == 0, done.err
    assert "made" not in done.out, "it was there"
    assert repository.branches["main"] == content(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "fails", "words", "remedy"),
    [
        ("someone/public", None, "everyone can read it", "--public"),
        ("other/public", None, "everyone can read it", "--public"),
        ("other/private", None, "You can only read this repository (HTTP status 403)", "hf upload"),
        ("other/new", None, "can not make `other/new`", "hf upload"),
        ("someone/new", "commit", "the disk is full", "hf upload someone/new"),
    ],
)
def test_what_the_hub_refuses_is_said_and_the_export_is_kept(
    tmp_path: Path, call: Call, hub: Hub, name: str, fails: str | None, words: str, remedy: str
) -> None:
    hub.fails = fails
    hub.repositories |= {
        "someone/public": Repository(private=False),
        "other/public": Repository(private=False),
        "other/private": Repository(private=True),
    }
    done = call("--out", tmp_path / "a", "--push-to-hub", name)
    assert done.code == 1
    assert words in done.err
    assert remedy in done.err
    by_hand = f"hf upload {name} {tmp_path / 'a'} . --private"
    assert (by_hand in done.err) is ("everyone" not in words), "it would become public"
    assert str(tmp_path / "a") in done.err
    assert "Traceback" not in done.err
    assert (tmp_path / "a/adapter_model.safetensors").is_file()
    assert not any(any(one.branches["main"]) for one in hub.repositories.values())


def test_without_a_token_or_a_hub_nothing_is_asked(
    tmp_path: Path, call: Call, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = call("--out", tmp_path / "a", "--push-to-hub", "someone/mine")
    assert done.code == 1
    assert "the hub does not accept the token" in done.err
    monkeypatch.delenv("HF_TOKEN")
    done = call("--out", tmp_path / "b", "--push-to-hub", "someone/mine")
    assert done.code == 1
    assert "there is no token" in done.err
    assert "hf auth login" in done.err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_module.unreachable.cache_clear()
    done = call("--out", tmp_path / "c", "--push-to-hub", "someone/mine")
    assert done.code == 1
    assert "nothing was sent: HF_HUB_OFFLINE is set" in done.err
    assert all((tmp_path / name / "README.md").is_file() for name in "abc")
    assert not hub.repositories


def test_a_name_and_options_are_checked_before_anything_is_written(
    tmp_path: Path, call: Call, hub: Hub
) -> None:
    for name in ("mine", "a/b/c", "someone/-mine"):
        done = call("--out", tmp_path / "a", "--push-to-hub", name)
        assert done.code == 2
        assert "OWNER/NAME" in done.err
    done = call("--out", tmp_path / "a", "--revision", "try")
    assert done.code == 2
    assert "are of --push-to-hub" in done.err
    assert not (tmp_path / "a").exists()
    assert not hub.requests
