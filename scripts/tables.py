"""Tables of bench_training.py: medians and paired ratios of its arms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from arms import PEERS, Task


def summary(
    arm: str, runs: list[dict[str, Any]], limits: list[dict[str, float]], quality: str
) -> dict[str, Any]:
    """Compute medians over the arm's runs, and the paired ratios to each of the peers and to
    vanilla."""
    mine = {run["round"]: run for run in runs if run["arm"] == arm}
    row: dict[str, Any] = {"arm": arm}
    row["precision"] = ", ".join(sorted({run["precision"] for run in mine.values()}))
    for key in ("tokens_per_second", "train_seconds", "wall_seconds", "clock", "peak_mb"):
        values = [run[key] for run in mine.values() if run[key] is not None]
        row[key] = spread(values) if values else None
    # tokens a second
    bounds = [found["flop_per_second"] / found["flop_per_token"] for found in limits]
    row["share"] = spread([run["tokens_per_second"] / bounds[i] for i, run in mine.items()])
    for other in ("peer", "peer-best", "peer-same-order", "vanilla"):
        theirs = {run["round"]: run for run in runs if run["arm"] == other}
        if not theirs or other == arm:
            continue
        for key in ("tokens_per_second", "peak_mb", *(["loss"] if quality == "loss" else [])):
            row[f"{key} / {other}"] = spread([mine[i][key] / theirs[i][key] for i in mine])
        if quality == "accuracy":
            row[f"accuracy - {other}"] = mean(
                [mine[i]["accuracy"] - theirs[i]["accuracy"] for i in mine]
            )
    row[quality] = mean([run[quality] for run in mine.values()])
    return row


def spread(values: list[float]) -> tuple[float, float, float]:
    """(median, minimum, maximum)."""
    return statistics.median(values), min(values), max(values)


def mean(values: list[float]) -> tuple[float, float | None]:
    """(mean, its standard error)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def one(value: Any, form: str) -> str:
    """The text of a `spread`; "" of None."""
    return "" if value is None else f"{value[0]:{form}} ({value[1]:{form}} to {value[2]:{form}})"


def show(rows: list[dict[str, Any]], limits: list[dict[str, float]], task: Task) -> None:
    def error(value: Any, form: str) -> str:
        return (
            ""
            if value is None
            else f"{value[0]:{form}}" + ("" if value[1] is None else f" ± {value[1]:.4f}")
        )

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "arm": lambda row: row["arm"],
        "precision": lambda row: row["precision"],
        "tokens/s": lambda row: one(row["tokens_per_second"], ",.0f"),
        "share": lambda row: one(row["share"], ".1%"),
        "train s": lambda row: one(row["train_seconds"], ".1f"),
        "wall s": lambda row: one(row["wall_seconds"], ".1f"),
        "clock": lambda row: one(row["clock"], ".3f"),
        "peak MB": lambda row: one(row["peak_mb"], ",.0f"),
        task.quality: lambda row: error(row[task.quality], ".4f"),
    }
    others = [row["arm"] for row in rows if row["arm"] in PEERS or row["arm"] == "vanilla"]
    for other in others:
        if other != "peer-same-order":
            columns[f"tokens/s / {other}"] = lambda row, key=f"tokens_per_second / {other}": one(
                row.get(key), ".2f"
            )
            columns[f"peak / {other}"] = lambda row, key=f"peak_mb / {other}": one(
                row.get(key), ".2f"
            )
        if task.quality == "loss":
            columns[f"loss / {other}"] = lambda row, key=f"loss / {other}": one(row.get(key), ".3f")
        else:
            columns[f"accuracy - {other}"] = lambda row, key=f"accuracy - {other}": error(
                row.get(key), "+.4f"
            )
    # One line per column, so that values to compare are below each other for any number of peers.
    cells = [[name, *(cell(row) for row in rows)] for name, cell in columns.items()]
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    for line in filter(lambda line: any(line[1:]), cells):
        print("".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip())
    own, square = (
        spread([found[key] / 1e9 for found in limits])
        for key in ("flop_per_second", "square_flop_per_second")
    )
    print(
        f"limit: {limits[0]['flop_per_token'] / 1e6:,.1f} MFLOP a token; GFLOP/s {one(own, ',.0f')}"
        " on the model's own shapes,"
    )
    print(f"       {one(square, ',.0f')} on a product of 4096 x 4096 matrices")


def check(runs: list[dict[str, Any]]) -> None:
    """Report if all arms saw the same tokens, and what they trained. The peer's number of tokens
    is known up to rounding."""
    first = next((run for run in runs if run["arm"] not in PEERS), runs[0])
    others = {
        f"{run['arm']} {run['tokens']:,.0f}"
        for run in runs
        if abs(run["tokens"] - first["tokens"]) > run.get("tokens_error", 0)
    }
    print(
        f"tokens: {first['tokens']:,.0f} in every run"
        + (f" BUT {', '.join(sorted(others))}" if others else "")
    )
    trained = {run["arm"]: run["trainable"] for run in runs if run["trainable"] is not None}
    print("trained parameters: " + ", ".join(f"{arm} {count:,}" for arm, count in trained.items()))
