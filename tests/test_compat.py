"""What lorakit needs of other packages: found under its old and its new names, and missed aloud."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from lorakit import compat
from lorakit.cli import main
from lorakit.errors import RunError
from lorakit.runs.environment import environment
from lorakit.sources import hub
from tests.support.tiny import write_jsonl

ROOT = Path(__file__).parent.parent


# -- versions --------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    """Those of pyproject.toml that users and the tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [line for extra in ("peft", "eval", "quant", "test") for line in extras[extra]]
    found = map(Requirement, [*project["dependencies"], *needed])
    return [requirement for requirement in found if requirement.name != "lorakit"]


def bound(requirement: Requirement, operator: str) -> str:
    (found,) = (one.version for one in requirement.specifier if one.operator == operator)
    return found


def test_the_oldest_packages_of_ci_are_the_lower_bounds() -> None:
    lines = (ROOT / ".ci/oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    torch_version = Version(pinned.pop("torch"))
    lowest = {requirement.name: bound(requirement, ">=") for requirement in requirements()}
    assert torch_version in next(r.specifier for r in requirements() if r.name == "torch")
    assert pinned == {name: version for name, version in lowest.items() if name != "torch"}


def test_every_range_has_two_ends_and_holds_what_is_installed() -> None:
    for requirement in requirements():
        assert Version(bound(requirement, ">=")) < Version(bound(requirement, "<")), requirement
        assert requirement.specifier.contains(importlib.metadata.version(requirement.name)), (
            requirement
        )


@pytest.fixture
def other_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.6,<99",
        "transformers>=3,<4",
        'peft>=9; extra == "peft"',
        'pytest>=99; extra == "test"',
        "no-such-thing>=1",
    ]
    monkeypatch.setattr("lorakit.compat.versions.requires", lambda _: lines)


def test_versions_outside_of_the_tested_range_are_told(other_ranges: None) -> None:
    installed = {
        package: importlib.metadata.version(package)
        for package in ("torch", "transformers", "peft")
    }
    found = compat.tested()
    assert {name: known.installed for name, known in found.items()} == installed | {
        "no-such-thing": None
    }
    assert {name: known.fits for name, known in found.items()} == {
        "torch": True,
        "transformers": False,
        "peft": False,
        "no-such-thing": True,
    }
    expected = (
        f"transformers {installed['transformers']} is outside of the versions that lorakit was"
        " tested with (>=3,<4)"
    )
    assert compat.untested()[0] == expected
    assert environment()["warnings"] == compat.untested()
    assert environment()["tested"]["torch"] == ">=2.6,<99"


def test_env_warns_on_stderr(
    other_ranges: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorakit", "env"])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    assert "warning: transformers" in captured.err
    assert "outside of the versions" not in captured.out


def test_without_metadata_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr("lorakit.compat.versions.requires", missing)
    assert compat.tested() == {}
    assert "pyproject.toml" in str(compat.gone("torch", "`x`"))


# -- what is gone is an error ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "torch._no_such_name",
        "transformers.no_such_module.thing",
        "transformers.Cache.no_such_method",
    ],
)
def test_a_name_that_is_gone_is_told_with_package_version_and_tested_versions(
    other_ranges: None, place: str
) -> None:
    package = place.partition(".")[0]
    with pytest.raises(RunError) as caught:
        compat.part(place)
    for told in (
        package,
        importlib.metadata.version(package),
        f"`{place}`",
        compat.tested()[package].range,
    ):
        assert told in str(caught.value)


def test_an_argument_that_is_gone_is_told() -> None:
    with pytest.raises(RunError, match="argument `no_such_argument`"):
        compat.part("transformers.DynamicCache", ("no_such_argument",))


def test_everything_that_is_needed_is_there() -> None:
    """All functions without arguments look something up; those with arguments are run by the tests
    of what uses them."""
    for look in (
        compat.check_cache_methods,
        compat.check_apply,
        compat.sdpa_attention,
        compat.fused_adamw,
        compat.dispatch_mode,
    ):
        look()
    assert issubclass(compat.http_error(), Exception)
    compat.command_line_error()
    assert compat.foreach.norm([torch.tensor([3.0, 4.0])])[0] == 5
    with pytest.raises(RunError, match="_foreach_no_such"):
        compat.foreach.no_such  # noqa: B018


def test_an_import_that_fails_is_told_as_such(other_ranges: None) -> None:
    with pytest.raises(ImportError) as caught:
        from transformers import NoSuchName  # noqa: F401
    known = compat.moved(caught.value)
    assert known is not None
    assert "NoSuchName" in str(known)
    assert ">=3,<4" in str(known)
    assert compat.moved(ImportError("x", name="somebody.elses")) is None


def test_settings_of_compilation_that_are_gone_are_not_set_anew() -> None:
    with pytest.raises(RunError, match="no_such_setting"):
        compat.attribute(compat.part("torch._dynamo.config"), "no_such_setting", "torch")


# -- key-value caches ------------------------------------------------------------------------------


class OldName(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None, **more: Any) -> Any: ...


class NewName(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None, **more: Any) -> Any: ...


class OtherName(nn.Module):
    def forward(self, input_ids: Any, memory: Any = None, **more: Any) -> Any: ...


def test_the_cache_has_the_name_that_the_model_takes() -> None:
    cache = DynamicCache()
    assert compat.cache_argument(OldName(), cache) == {"past_key_values": cache}
    assert compat.cache_argument(NewName(), cache) == {"cache": cache}
    with pytest.raises(
        RunError, match=r"OtherName takes no key-value cache as `cache` or `past_key_values`"
    ):
        compat.cache_argument(OtherName(), cache)


def test_a_cache_is_found_among_arguments_by_either_name_and_never_overlooked() -> None:
    cache = DynamicCache()
    assert compat.cache_in({"cache": cache}) is cache
    assert compat.cache_in({"past_key_values": cache, "cache": None}) is cache
    assert compat.cache_in({"input_ids": torch.zeros(1), "cache": None}) is None
    with pytest.raises(RunError, match="two key-value caches"):
        compat.cache_in({"past_key_values": cache, "cache": DynamicCache()})
    with pytest.raises(RunError, match="as `memory`"):
        compat.cache_in({"memory": cache})


def test_a_cache_is_found_in_an_output_by_either_name_and_never_overlooked(
    recwarn: pytest.WarningsRecorder,
) -> None:
    cache = DynamicCache()
    assert compat.cache_of(SimpleNamespace(past_key_values=cache)) is cache
    assert compat.cache_of(SimpleNamespace(cache=cache)) is cache
    assert compat.cache_of(SimpleNamespace(logits=1)) is None
    with pytest.raises(RunError, match="key-value cache"):
        compat.cache_of((torch.zeros(1), cache))
    assert not recwarn.list


def test_a_models_cache_goes_out_and_in_and_is_counted(
    tiny_llama: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.arange(5, 17)[None]

    def run(part: Tensor, cache: Any) -> Any:
        return model(input_ids=part, use_cache=True, **compat.cache_argument(model, cache))

    with torch.no_grad():
        first = run(ids[:, :8], compat.new_cache(model.config))
        rest = run(ids[:, 8:], compat.cache_of(first))
        torch.testing.assert_close(rest.logits, model(ids, use_cache=False).logits[:, 8:])
    # Layers, keys and values, key-value heads, tokens, their width, bytes.
    assert compat.cache_bytes(compat.cache_of(rest)) == 2 * 2 * 2 * 12 * 8 * 4
    assert not [warning for warning in recwarn.list if issubclass(warning.category, FutureWarning)]


def test_a_mask_is_asked_for_by_a_number_or_by_positions() -> None:
    assert compat.new_tokens(3) == compat.new_tokens(torch.tensor([7, 8, 9])) == 3


# -- the hub ---------------------------------------------------------------------------------------


def test_the_commit_of_a_model_is_read_off_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """transformers 5.24 says it in the configuration no longer."""
    place = tmp_path / "models--owner--name"
    for commit in ("abc", "def"):
        (place / "snapshots" / commit).mkdir(parents=True)
        (place / "snapshots" / commit / "config.json").write_text("{}")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("def")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub.cached_commit("owner/name", None) == "def"
    assert hub.cached_commit("owner/name", "abc") == "abc"
    with pytest.raises(RunError, match="commit of `owner/other`"):
        hub.cached_commit("owner/other", None)


# -- what users see --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_train_and_generate_give_no_warning_of_what_will_change(
    request: pytest.FixtureRequest, model: str, tmp_path: Path, sums: Path
) -> None:
    """Of packages that lorakit calls; a FutureWarning is an error here."""
    write_jsonl(tmp_path / "prompts.jsonl", [])
    name, data = (
        request.getfixturevalue(model),
        f"{{name_or_path: {sums}, prompt: '{{question}}', completion: ' {{answer}}'}}",
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {name}, task: causal-lm}}\ndata: {data}\nmethod: {{name:"
        " chunkwise, r: 4, ladder: [1, 2, 4], rank_target: 2, min_len: 2, max_len: 8, fade:"
        " 1}\ntrain: {max_steps: 2, per_device_train_batch_size: 4}\noutput_dir:"
        f" {tmp_path}/run\n"
    )
    commands = [
        ["train", str(recipe)],
        ["generate", f"{tmp_path}/run", "--prompt", "how many", "--max-new-tokens", "4"],
        ["export", f"{tmp_path}/run", "--merge"],
        ["eval", f"{tmp_path}/run"],
    ]
    # One process for all of them: most of the time of each is imports.
    code = f"""
import sys
from lorakit.cli import main
for arguments in {commands!r}:
    sys.argv = ["lorakit", *arguments]
    try:
        main()
    except SystemExit as end:
        print(arguments[0], "ended with", end.code or 0)
        if end.code:
            raise
"""
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(\w+) ended with 0", done.stdout) == [one[0] for one in commands]
    assert not re.search("deprecated|FutureWarning", done.stderr), done.stderr
