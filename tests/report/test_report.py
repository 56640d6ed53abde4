"""Reports: the layout of modules, tables, JSON and plots of a run's ranks."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.errors import UsageError
from lorakit.report.grid_table import MEANINGS, SHARE_COLOURS, meanings
from lorakit.report.history import RankRecord, newest_run, read_history, run_folder
from lorakit.report.layout import column_heads, layout, split_name
from lorakit.report.plots import plot_ranks
from lorakit.report.rank_json import as_json
from lorakit.report.ranks import fixed_ranks, history_table, rank_table
from lorakit.report.summary import summary_panel
from tests.support.records import (
    BERT_KINDS,
    LLAMA_KINDS,
    MODELS,
    blocks,
    moving,
    rendered,
    write_run,
)

# -- layout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_every_module_has_one_cell_and_every_column_its_own_head(model: str) -> None:
    grid = layout(MODELS[model])
    assert not grid.summed
    assert sorted(name for names in grid.cells.values() for name in names) == sorted(MODELS[model])
    assert all(len(names) == 1 for names in grid.cells.values())
    assert len(set(grid.heads.values())) == len(grid.kinds)
    for kind, head in grid.heads.items():
        assert f".{kind}".endswith(f".{head}")
        # Whoever reads the head finds one kind: no other one ends in it, unless the head is a whole
        # name.
        assert head == kind or not any(
            f".{other}".endswith(f".{head}") for other in grid.kinds if other != kind
        )


def test_heads_are_the_names_that_people_use() -> None:
    assert list(layout(MODELS["llama"]).heads.values()) == [
        kind.split(".")[-1] for kind in LLAMA_KINDS
    ]
    assert list(layout(MODELS["bert"]).heads.values()) == ["query", "key", "value", *BERT_KINDS[3:]]
    assert list(layout(MODELS["gpt2"]).heads.values()) == [
        "c_attn",
        "attn.c_proj",
        "c_fc",
        "mlp.c_proj",
        "lm_head",
    ]
    assert list(layout(MODELS["distilbert"]).heads.values())[:2] == ["q_lin", "k_lin"]
    assert list(layout(MODELS["t5"]).heads.values())[3:7] == [
        "SelfAttention.o",
        "wi",
        "wo",
        "EncDecAttention.q",
    ]
    assert column_heads(["experts.0.w1", "experts.1.w1", "gate"]) == {
        "experts.0.w1": "experts.0.w1",
        "experts.1.w1": "experts.1.w1",
        "gate": "gate",
    }


def test_layers_come_in_the_order_of_their_numbers_and_stacks() -> None:
    assert layout(reversed(MODELS["bert"])).layers == [str(i) for i in range(12)]
    both = [f"{stack} {i}" for stack in ("encoder", "decoder") for i in range(6)]
    assert layout(MODELS["t5"]).layers == both
    assert layout(MODELS["gpt2"]).layers[-1] == "-"
    towers = ["model.layers.0.q", "model.vision.layers.0.q", "model.vision.layers.0.k"]
    assert layout(towers).layers == ["0", "vision 0"]
    assert split_name("model.layers.7.experts.3.w1") == ("model.layers", 7, "experts.3.w1")


def test_many_experts_are_summed_rather_than_spread_over_hundreds_of_columns() -> None:
    few, many = ([f"layers.0.experts.{i}.w1" for i in range(count)] for count in (4, 64))
    assert len(layout(few).kinds) == 4
    grid = layout(many)
    assert grid.summed
    assert grid.rank(moving(many, updates=0)[0], "0", "experts.w1") == 64 * 8
    assert "summed" in rendered(rank_table(moving(many)))


# -- reading a run ---------------------------------------------------------------------------------


def test_history_is_read_as_written(tmp_path: Path) -> None:
    records = moving(MODELS["bert"])
    assert read_history(write_run(tmp_path / "run", records)) == records


def test_half_written_last_line_is_ignored(tmp_path: Path) -> None:
    records = moving(MODELS["bert"])
    path = write_run(tmp_path, records) / "ranks.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40])
    assert read_history(tmp_path) == records[:-1]
    path.write_text(whole.rstrip("\n"))
    assert read_history(tmp_path) == records


def test_what_a_resumed_run_writes_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    records = moving(MODELS["bert"])
    again = RankRecord(records[3].step, records[0].ranks, records[0].cost, 0, records[0].budget)
    assert read_history(write_run(tmp_path, [*records, again])) == [*records[:3], again]


GOOD = '{"step": 0, "ranks": {"a": 1}, "cost": 1, "pool": 0, "budget": 1}\n'


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "holds no record"),
        ("\n\n", "holds no record"),
        ('{"step": 0, "ra', "holds no record"),
        (GOOD + "{oops}\n" + GOOD, "ranks.jsonl:2: not JSON"),
        (GOOD + "[1]\n", "ranks.jsonl:2: not an object"),
        (GOOD.replace('{"a": 1}', "{}"), "ranks.jsonl:1: `ranks`"),
        (GOOD.replace('"a": 1', '"a": "1"'), "the rank of `a`"),
        (GOOD.replace('"a": 1', '"a": -1'), "the rank of `a`"),
        (GOOD.replace('"pool": 0', '"pool": null'), "`pool`"),
        (
            GOOD + GOOD.replace('"a"', '"b"').replace("0", "1"),
            "ranks.jsonl:2: it lists other modules",
        ),
    ],
)
def test_broken_file_is_one_clear_error(tmp_path: Path, text: str, place: str) -> None:
    write_run(tmp_path, []).joinpath("ranks.jsonl").write_text(text)
    with pytest.raises(UsageError) as caught:
        read_history(tmp_path)
    assert place in str(caught.value)
    assert caught.value.exit_code == 2


def test_newest_run_is_found_at_any_depth(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with pytest.raises(UsageError, match="lorakit train"):
        newest_run(root)
    old, new = (
        write_run(root / name, moving(MODELS["bert"], updates=0))
        for name in ("old", "sweep/lr/new")
    )
    for age, run in ((100, new), (200, old)):
        for file in run.iterdir():
            os.utime(file, (10_000 - age, 10_000 - age))
    assert newest_run(root) == run_folder(None, root) == new
    os.utime(old / "ranks.jsonl")
    assert newest_run(root) == old


def test_wrong_run_folder_suggests_the_nearest(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = write_run(root / "l1ra_glue", moving(MODELS["bert"], updates=0))
    assert run_folder(run, root) == run
    for name in (Path("l1ra_glu"), root / "l1ra_gleu", root):
        with pytest.raises(UsageError) as caught:
            run_folder(name, root)
        assert str(run) in str(caught.value)
    (run / "ranks.jsonl").unlink()
    with pytest.raises(UsageError, match=r"has no ranks\.jsonl"):
        read_history(run)
    with pytest.raises(UsageError, match="is not there"):
        read_history(tmp_path / "nowhere")


# -- tables and JSON -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "rank"), [("bert", 8), ("bert", 64), ("llama", 8), ("llama", 64), ("t5", 8)]
)
def test_tables_fit_80_columns(model: str, rank: int) -> None:
    records = moving(MODELS[model], rank)
    layers = layout(MODELS[model]).layers
    gates = {name: [0.5] * count for name, count in records[-1].ranks.items()}
    text = rendered(rank_table(records, gates))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    shown = [
        line[: max(map(len, layers))].rstrip() for line in text.splitlines() if "moved" not in line
    ]
    assert [label for label in shown if label in layers] == layers
    assert "…" not in rendered(history_table(records))


def test_table_shows_ranks_moves_and_totals() -> None:
    first = RankRecord(0, {"h.0.q": 8, "h.0.k": 8, "h.1.q": 8}, 24, 0, 24)
    last = RankRecord(30, {"h.0.q": 6, "h.0.k": 11, "h.1.q": 7}, 24, 0, 24)
    lines = rendered(rank_table([first, last], {"h.0.q": [1.0, 0.5], "h.1.q": [0.0]})).splitlines()
    words = [line.split() for line in lines]
    assert ["0", "6", "-2", "11", "+3", "17", "+1"] in words
    assert ["1", "7", "-1", "7", "-1"] in words
    assert ["total", "13", "11", "24"] in words
    assert ["-3", "+3"] in words
    assert ["gate", "0.50", "-", "0.50"] in words
    assert "3 of 3 modules moved" in "\n".join(lines)


def test_ranks_that_never_moved_are_a_few_lines() -> None:
    records = moving(MODELS["bert"], updates=0)
    count = len(records[0].ranks)
    (line,) = rendered(fixed_ranks(records)).splitlines()  # type: ignore[arg-type]
    assert re.fullmatch(
        rf"{count} modules in \d+ layers, rank 8 each, {8 * count:,} in all; none moved",
        line.strip(),
    )
    same = [
        records[0],
        RankRecord(3, dict(records[0].ranks), *(records[0].cost, 0, records[0].budget)),
    ]
    assert rendered(fixed_ranks(same)) == rendered(fixed_ranks(records))  # type: ignore[arg-type]
    ranks = {"h.0.q": 4, "h.0.up": 2, "h.1.q": 8, "h.1.up": 2}
    lines = rendered(
        fixed_ranks([RankRecord(0, ranks, 16, 0, 16)], {"h.0.q": [0.5, 1.0]})
    ).splitlines()  # type: ignore[arg-type]
    assert [line.rstrip() for line in lines] == [
        "4 modules in 2 layers, ranks 2 to 8, 16 in all; none moved",
        "mean gate 0.75 (1 is open, 0 closed)",
        "  q   ranks 4 to 8",
        "  up  rank 2",
    ]


def test_ranks_that_moved_and_came_back_are_a_table() -> None:
    start = RankRecord(0, {"h.0.q": 4, "h.1.q": 4}, 8, 0, 8)
    away = RankRecord(1, {"h.0.q": 3, "h.1.q": 5}, 8, 0, 8)
    assert fixed_ranks([start, away, RankRecord(2, start.ranks, 8, 0, 8)]) is None


def test_every_word_of_a_table_has_a_line_that_fits() -> None:
    text = rendered(meanings(*MEANINGS))
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) == len(MEANINGS) == 4


def test_history_names_the_largest_changes_and_counts_the_others() -> None:
    records = moving(MODELS["bert"])
    text = rendered(history_table(records))
    assert "start: 72 modules, rank 8" in text
    assert "more" in text
    assert len(
        [line for line in text.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    ) == len(records)
    assert "nothing moved" in rendered(
        history_table([*records, RankRecord(99, records[-1].ranks, 1, 0, 1)])
    )


def test_json_moves_are_against_the_first_record_and_sums_match() -> None:
    records = moving(MODELS["t5"])
    first, last = records[0], records[-1]
    out = json.loads(json.dumps(as_json(records, {"method": "l1ra"}, Path("runs/x"))))
    assert (out["run"], out["method"], out["step"]) == ("runs/x", "l1ra", last.step)
    assert {name: last.ranks[name] - rank for name, rank in first.ranks.items()} == dict.fromkeys(
        last.ranks, 0
    ) | out["moved"]
    assert 0 not in out["moved"].values()
    for groups in (out["by_kind"], out["by_layer"]):
        assert (
            sum(group["now"] for group in groups.values())
            == out["total"]
            == sum(last.ranks.values())
        )
        assert sum(group["start"] for group in groups.values()) == sum(first.ranks.values())
    replayed = dict(first.ranks)
    for entry in out["history"]:
        for name, delta in entry["changed"].items():
            replayed[name] += delta
    assert replayed == out["ranks"]


def test_colours_can_be_read_on_black_and_on_white() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for colour in SHARE_COLOURS:
        assert (luminance(colour) + 0.05) / 0.05 >= 4
        assert 1.05 / (luminance(colour) + 0.05) >= 4


def test_markup_in_names_is_shown_not_obeyed() -> None:
    records = [RankRecord(0, {"h.0.[red]q": 3, "[/]": 2}, 5, 0, 5)]
    text = rendered(rank_table(records)) + rendered(history_table(records))
    assert "[red]q" in text
    assert "[/]" in text


def test_summary_shouts_about_stand_ins_only() -> None:
    result = {
        "method": "l1ra",
        "task": "sequence-classification",
        "metrics": {"accuracy": 0.9},
        "adapter_bytes": 1_234_567,
    }
    result |= {
        "train_seconds": 12.34,
        "tokens_per_second": 1234.5,
        "peak_memory_mb": 900,
        "trainable_parameters": 5000,
    }
    plain = rendered(summary_panel(result | {"data": {"name": "nyu-mll/glue", "stand_in": False}}))
    for part in ("l1ra", "accuracy 0.9", "12.3 s", "1,234 tokens/s", "900 MB", "5,000", "1.23 MB"):
        assert part in plain
    assert "STAND-IN" not in plain
    for data in (
        {"name": "nyu-mll/glue", "stand_in": "builtin/movie-snippets"},
        {"name": "builtin/movie-snippets", "stand_in": True},
    ):
        text = rendered(summary_panel(result | {"data": data}))
        assert "STAND-IN DATA" in text
        assert "builtin/movie-snippets" in text
    assert "STAND-IN MODEL" in rendered(summary_panel({"model": {"name": "m", "stand_in": True}}))


# -- plots -----------------------------------------------------------------------------------------

RECORDS = {
    "bert": moving(MODELS["bert"]),
    "one-record": moving(MODELS["bert"], updates=0),
    "two-layers": moving(blocks("h", ["q"], 2)),
    "80-layers": moving(blocks("model.layers", ["q_proj", "v_proj"], 80), 4, 2),
    "all-zero": [RankRecord(0, {"h.0.q": 0}, 0, 0, 0), RankRecord(5, {"h.0.q": 0}, 0, 0, 0)],
}


@pytest.mark.parametrize("case", RECORDS)
def test_png_is_a_picture(case: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "ranks.png"
    plot_ranks(RECORDS[case], path, "a title with $ and _")
    image = path.read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(image) > 10_000
    assert list(path.parent.iterdir()) == [path]


def test_html_is_one_file_and_escapes_names(tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script>"
    path = tmp_path / "ranks.html"
    plot_ranks([RankRecord(0, {f"h.0.{hostile}": 4}, 4, 0, 4)], path, f"{hostile} & {{braces}}")
    page = path.read_text()
    assert "<script" not in page
    assert html.escape(hostile) in page
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert "{braces}" in page


def test_other_suffixes_and_unwritable_places_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.html"):
        plot_ranks(RECORDS["bert"], tmp_path / "ranks.pdf", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can not be written"):
        plot_ranks(RECORDS["two-layers"], tmp_path / "file" / "ranks.png", "x")


def test_tables_need_neither_torch_nor_matplotlib() -> None:
    code = (
        "import lorakit.report.ranks, sys; print([m for m in ('torch', 'transformers',"
        " 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = (
        "import lorakit.report.plots, sys; print([m for m in ('torch', 'transformers',"
        " 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
