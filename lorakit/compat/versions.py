"""Versions of the packages that lorakit needs, and the error for a name that a package lacks.

The tested versions are read from the requirements in lorakit's installed metadata.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from lorakit.errors import RunError

LORAKIT = "lorakit"
# Extras that are not needed to use lorakit.
DEVELOPERS = ("test", "dev")


@dataclass(frozen=True)
class Tested:
    """A package that lorakit needs: its installed version (None where it is not installed) and the
    versions that lorakit was tested with, as pip writes them."""

    package: str
    installed: str | None
    range: str
    fits: bool

    def __str__(self) -> str:
        outside = "outside of the versions that lorakit was tested with"
        return f"{self.package} {self.installed} is {outside} ({self.range})"


def tested() -> dict[str, Tested]:
    """{package: its versions} for lorakit's requirements, including extras for users.

    {} if lorakit is not installed.
    """
    from packaging.requirements import Requirement  # `lorakit --help` does not need it

    try:
        lines = requires(LORAKIT) or []
    except PackageNotFoundError:
        return {}
    found: dict[str, Tested] = {}
    for requirement in map(Requirement, lines):
        marker = str(requirement.marker)
        if any(f'extra == "{extra}"' in marker for extra in DEVELOPERS):
            continue
        there = installed(requirement.name)
        fits = there is None or requirement.specifier.contains(there, prereleases=True)
        name = _canonical(requirement.name)
        found[name] = Tested(name, there, _by_version(str(requirement.specifier)), fits)
    return found


def _canonical(package: str) -> str:
    from packaging.utils import canonicalize_name

    return str(canonicalize_name(package))


def _by_version(specifier: str) -> str:
    """Sort a specifier by version: `<6,>=5` becomes `>=5,<6`."""
    return ",".join(sorted(specifier.split(","), reverse=True))


def installed(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def untested() -> list[str]:
    """A sentence for each installed package whose version is outside the tested range."""
    return [str(package) for package in tested().values() if not package.fits]


def tested_range(package: str) -> str:
    """The tested versions of a package, in words."""
    known = tested().get(_canonical(package))
    if known is None:
        return f"the versions of {package} in its pyproject.toml"
    return f"{package} {known.range}"


def oldest_tested(package: str) -> str | None:
    """The oldest version of a package that lorakit was tested with; None if that is not known."""
    known = tested().get(_canonical(package))
    found = re.search(r">=([\w.]+)", known.range) if known else None
    return found[1] if found else None


def gone(package: str, what: str) -> RunError:
    """Make the error for something that another package lacks."""
    return RunError(
        f"{package} {installed(package) or '(unknown version)'} has no {what}, which lorakit needs",
        f"lorakit was tested with {tested_range(package)}: install one of these.",
    )


def moved(error: ImportError) -> RunError | None:
    """Make the error for a failed import from a package that lorakit needs.

    None if lorakit does not need the package, or if it is not installed.
    """
    package = (error.name or "").partition(".")[0]
    if _canonical(package) not in tested() or installed(package) is None:
        return None
    name = re.search(r"cannot import name '(\w+)'", str(error))
    return gone(package, f"`{error.name}.{name[1]}`" if name else f"`{error.name}`")
