"""lorakit env"""

from __future__ import annotations

import logging

import typer

from lorakit.cli import common

log = logging.getLogger("lorakit")


def env(
    as_json: bool = typer.Option(False, "--json", help="One JSON object instead of a table."),
) -> None:
    """Show installed and tested versions, devices, the cache, and the builtins in it."""
    from lorakit.runs.environment import environment

    found = environment()
    if as_json:
        common.say_json(found)
        return
    from rich.table import Table

    out, _ = common.consoles()
    for warning in found.pop("warnings"):
        log.warning("%s", warning)
    table = Table(show_header=False, box=None)
    for section, value in found.items():
        rows = value if isinstance(value, dict) else {"": value}
        for name, content in rows.items():
            missing = "not installed" if section == "versions" else "not downloaded yet"
            shown = missing if content is None else str(content) or "-"
            table.add_row(section if name == next(iter(rows)) else "", name, shown)
    out.print(table)
