"""Tables of a run's estimate: memory by kind, time by part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lorakit.report.grid_table import MUTED, SHARE_COLOURS

BAR_WIDTH = 24
KINDS = {
    "base": "frozen weights",
    "heads": "trained in full",
    "adapters": "factors",
    "gradients": "of what is trained",
    "optimizer": "Adam's moments",
    "activations": "kept for the backward pass, at most",
    "logits": "with their gradients",
    "libraries": "Python and its packages",
    "other": "data, kernels' workspaces, gaps",
}


def estimate_tables(found: Mapping[str, Any]) -> RenderableType:
    """Tables of the result of `lorakit.runs.estimate.estimate`."""
    return Group(_facts(found), Text(), _memory_table(found), Text(), _time_table(found))


def _facts(found: Mapping[str, Any]) -> RenderableType:
    parameters, calibration = found["parameters"], found["calibration"]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style=MUTED, no_wrap=True)
    table.add_column(overflow="fold")
    made_of = f"adapters {parameters['adapters']:,}, heads {parameters['heads']:,}"
    table.add_row(
        "parameters",
        f"{parameters['trained']:,} trained ({made_of}) of {parameters['total']:,}",
    )
    stored = found["quantization"]
    in_bits = f"; base in {stored['bits']} bits by {stored['backend']}" if stored else ""
    table.add_row("precision", f"{found['precision']} on {found['device']}{in_bits}")
    table.add_row("steps", f"{found['steps']:,} with {found['tokens']:,} tokens")
    error = calibration["relative_error"]
    known = f"; standard error {error:.1%}" if error is not None else ""
    timed = (
        f"from {calibration['timed_steps']} steps after {calibration['warm_up_steps']} of"
        f" warm-up{known}"
    )
    table.add_row("speed", f"{found['tokens_per_second']:,.0f} tokens/s ({timed})")
    return table


def _memory_table(found: Mapping[str, Any]) -> Table:
    gpu = found["peak_gpu_memory_mb"]
    peak = found["peak_memory_mb"] if gpu is None else gpu
    rows = [(kind, size, KINDS[kind]) for kind, size in found["memory_mb"].items()]
    total = (
        "highest resident set, measured"
        if gpu is None
        else f"measured; of the host {found['peak_memory_mb']:,.0f} MB"
    )
    return _shares("memory", "MB", rows, ("peak", peak, total), ",.1f")


def _time_table(found: Mapping[str, Any]) -> Table:
    evaluations, calibration = found["evaluations"], found["calibration"]
    unit = {"tokens": "token", "positions": "position, padding included"}[calibration["measure"]]
    step = (
        f"{calibration['seconds_per_step']:.3g} s a step and"
        f" {calibration['seconds_each'] * 1e3:.3g} ms a {unit}"
    )
    notes = {
        "loading": "model and data",
        "preparing": "the method, before the first step",
        "training": step,
        "evaluating": (
            f"{evaluations['count']} × {evaluations['seconds_each']:.1f} s for"
            f" {evaluations['rows']:,} rows"
        ),
    }
    rows = [(part, spent, notes[part]) for part, spent in found["seconds"].items()]
    return _shares(
        "time",
        "s",
        rows,
        ("wall clock", found["wall_seconds"], "without saving"),
        ",.1f",
    )


def _shares(
    what: str,
    unit: str,
    rows: Iterable[tuple[str, float, str]],
    total: tuple[str, float, str],
    form: str,
) -> Table:
    """A row each with its share of the total, as a bar and a number; the total below."""
    name, whole, note = total
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(what, no_wrap=True)
    table.add_column(unit, justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    table.add_column("", style=MUTED, overflow="fold")
    for label, value, meaning in rows:
        share = min(1.0, value / whole) if whole else 0.0
        bar = Text("━" * round(share * BAR_WIDTH), SHARE_COLOURS[1])
        table.add_row(label, f"{value:{form}}", f"{share:.0%}", bar, meaning)
    table.add_section()
    table.add_row(Text(name, "bold"), Text(f"{whole:{form}}", "bold"), "", "", note)
    return table
