"""What a person sees of sparse factors and a pruned base: tables, JSON, pictures, and the density
so far."""

from __future__ import annotations

import html
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lorakit.errors import UsageError
from lorakit.report.grid_table import meanings
from lorakit.report.history import RankRecord, read_densities
from lorakit.report.layout import layout
from lorakit.report.plots import plot_ranks
from lorakit.report.rank_figure import STYLE
from lorakit.report.rank_figure import figure as rank_figure
from lorakit.report.rank_json import as_json
from lorakit.report.ranks import rank_table
from lorakit.report.sparsity import percent, run_tables, short, sparsity
from tests.support.records import MODELS, blocks, moving, rendered, write_run

RAMP = {step: max(0.3, 1 - 0.01 * step) for step in range(1, 101)}


def sparse(
    records: list[RankRecord],
    low: float = 0.2,
    high: float = 0.8,
    width: int = 2000,
    of_initial: bool = False,
) -> dict[str, Any]:
    """The keys of a result whose shares lie between `low` and `high`; `of_initial` as where
    components were pruned."""
    rng = random.Random(0)
    first, last = records[0].ranks, records[-1].ranks
    entries = {
        name: (first if of_initial else last)[name] * width * (1 + i % 3)
        for i, name in enumerate(last)
    }
    kept = {
        name: last[name] / first[name] if of_initial else rng.uniform(low, high) for name in last
    }
    nonzeros = {name: round(entries[name] * kept[name]) for name in last}
    modules = {
        name: round(nonzeros[name] / entries[name], 6) if entries[name] else 0.0 for name in last
    }
    total = round(sum(nonzeros.values()) / sum(entries.values()), 6)
    ranks = {name: round(rank * rng.uniform(0.5, 1), 3) for name, rank in last.items()}
    return {
        "density": {"total": total, "modules": modules},
        "nonzeros": nonzeros,
        "effective_ranks": ranks,
    }


def pruned(records: list[RankRecord], low: float = 0.4, high: float = 0.6) -> dict[str, Any]:
    rng = random.Random(1)
    modules = {name: round(rng.uniform(low, high), 6) for name in records[-1].ranks}
    return {"base_density": {"total": 0.5, "modules": modules}}


def fewer(records: list[RankRecord], seed: int = 0) -> list[RankRecord]:
    """A history in which components were only ever removed, of some modules all."""
    rng, first = random.Random(seed), records[0]
    ranks = {name: rng.randint(0, rank) for name, rank in first.ranks.items()}
    return [first, RankRecord(9, ranks, sum(ranks.values()), 0, sum(ranks.values()))]


def sections(text: str) -> list[list[str]]:
    """The printed tables, their lines each."""
    return [
        part.splitlines() for part in re.split(r"\n *\n(?=non-zeros|effective|base|density)", text)
    ]


def row(lines: list[str], label: str) -> list[str]:
    return next(line.split()[1:] for line in lines if line.split()[:1] == [label])


# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2", "distilbert", "t5"])
@pytest.mark.parametrize(
    ("low", "high", "width"),
    [(0.2, 0.8, 2000), (0.995, 1.0, 10**7), (0.0, 0.02, 300), (0.0, 1.0, 20)],
)
def test_tables_fit_80_columns_whole(model: str, low: float, high: float, width: int) -> None:
    records = moving(MODELS[model], 64, updates=0)
    result = sparse(records, low, high, width)
    text = rendered(run_tables(records, result, full=True))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    ranks, nonzeros, effective = sections(text)
    grid = layout(MODELS[model])
    for lines in (nonzeros, effective):
        labels = [
            label for label in grid.layers if any(line.startswith(f"{label} ") for line in lines)
        ]
        assert labels == grid.layers
    # No number is broken in two: every share and every effective rank is on the line of its layer.
    for layer in grid.layers:
        names = [name for kind in grid.kinds for name in grid.cells.get((layer, kind), [])]
        line = next(line for line in nonzeros if line.startswith(f"{layer} "))
        assert line.count("%") + line.count("all") == len(names) + 1
        line = next(line for line in effective if line.startswith(f"{layer} "))
        shown = [float(word) for word in line.removeprefix(layer).split()]
        assert shown[:-1] == pytest.approx(
            [result["effective_ranks"][name] for name in names], abs=0.0501
        )
        assert shown[-1] == pytest.approx(
            sum(result["effective_ranks"][name] for name in names) / len(names), abs=0.0501
        )
    legend = rendered(meanings("budget", "pool")).splitlines()
    assert [*rendered(rank_table(records)).splitlines(), *legend] == ranks


def test_table_shows_counts_shares_and_totals() -> None:
    records = [RankRecord(0, {"h.0.q": 2, "h.0.up": 2, "h.1.q": 2}, 6, 0, 6)]
    result = {
        "density": {"total": 0.6, "modules": {"h.0.q": 0.25, "h.0.up": 1.0, "h.1.q": 0.75}},
        "nonzeros": {"h.0.q": 500, "h.0.up": 1000, "h.1.q": 1500},
        "effective_ranks": {"h.0.q": 1.0, "h.0.up": 1.25, "h.1.q": 2.0},
    }
    text = rendered(run_tables(records, result))
    _, nonzeros, effective = sections(text)
    assert row(nonzeros, "0") == ["500", "25%", "1.0k", "all", "1.5k", "50%"]
    assert row(nonzeros, "1") == ["1.5k", "75%", "1.5k", "75%"]
    assert row(nonzeros, "total") == ["2.0k", "50%", "1.0k", "all", "3.0k", "60%"]
    assert row(effective, "0") == ["1.0", "1.2", "1.1"]
    assert row(effective, "mean") == ["1.5", "1.2", "1.4"]


def test_counts_and_shares_are_short_and_true() -> None:
    rng = random.Random(0)
    for count in [
        0,
        1,
        999,
        1000,
        9949,
        9950,
        99_950,
        999_499,
        999_500,
        *(int(10 ** rng.uniform(0, 12)) for _ in range(2000)),
    ]:
        text = short(count)
        assert len(text) <= 4
        scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1)
        assert float(text.rstrip("kMGT")) * scale == pytest.approx(count, rel=0.051)
    for share in [
        0,
        0.0001,
        0.00999,
        0.01,
        0.5,
        0.994,
        0.996,
        0.99999,
        *(rng.random() for _ in range(500)),
    ]:
        text = percent(share)
        assert len(text) <= 3
        assert text == "<1%" or float(text.rstrip("%")) == pytest.approx(100 * share, abs=1)
    assert (percent(1.0), percent(None)) == ("all", "")


@pytest.mark.parametrize(
    "extra",
    [{}, {"density": {"total": 0.9996, "modules": {}}, "nonzeros": {}, "effective_ranks": {}}],
)
def test_dense_and_old_runs_show_what_they_always_showed(extra: dict[str, Any]) -> None:
    records = moving(MODELS["bert"])
    gates = {name: [0.5] * rank for name, rank in records[-1].ranks.items()}
    explained = rendered(meanings("budget", "pool", "gate"))
    assert (
        rendered(run_tables(records, {"gates": gates, **extra}))
        == rendered(rank_table(records, gates)) + explained
    )
    assert rendered(run_tables(records)) == rendered(rank_table(records)) + rendered(
        meanings("budget", "pool")
    )


def test_pruned_components_are_a_share_of_what_was_there_at_the_start() -> None:
    records = fewer(moving(MODELS["bert"], updates=0))
    assert 0 in records[-1].ranks.values()
    found = sparsity(records, sparse(records, of_initial=True))
    assert found is not None
    assert found.of_initial
    first, last = records[0].ranks, records[-1].ranks
    for group in [*map(found.grid.of_kind, found.grid.kinds), *([name] for name in last)]:
        # One kind has one size, so its share is that of the ranks, those that fell to 0 among them.
        assert found.share(group) == pytest.approx(
            sum(last[n] for n in group) / sum(first[n] for n in group), abs=1e-4
        )
    assert "initial entries" in rendered(run_tables(records, sparse(records, of_initial=True)))


def test_modules_without_components_have_no_share_elsewhere() -> None:
    modules = blocks("h", ["q", "v"], 2)
    start = RankRecord(0, dict.fromkeys(modules, 4), 16, 0, 16)
    records = [start, RankRecord(5, dict(zip(modules, (0, 7, 5, 3), strict=True)), 15, 1, 16)]
    result = sparse(records)
    found = sparsity(records, result)
    assert found is not None
    assert not found.of_initial
    assert found.share(["h.0.q"]) is None
    assert found.share(["h.0.q", "h.1.q"]) == pytest.approx(
        result["density"]["modules"]["h.1.q"], abs=1e-5
    )
    assert row(sections(rendered(run_tables(records, result)))[1], "0")[0] == "0"


def test_a_share_that_can_not_be_known_is_left_out() -> None:
    """Where all components of a kind are gone, nothing tells how large it was; the whole is known
    all the same."""
    modules = blocks("h", ["q", "v"], 2)
    records = [
        RankRecord(0, dict.fromkeys(modules, 4), 16, 0, 16),
        RankRecord(5, dict(zip(modules, (0, 2, 0, 4), strict=True)), 6, 0, 6),
    ]
    result = sparse(records, of_initial=True)
    found = sparsity(records, result)
    assert found is not None
    assert found.share(["h.0.q", "h.0.v"]) is None
    assert found.share(modules) == result["density"]["total"]
    assert row(sections(rendered(run_tables(records, result)))[1], "total")[-1] == percent(
        result["density"]["total"]
    )


def test_numbered_parts_are_summed_and_their_effective_ranks_averaged() -> None:
    modules = [f"layers.0.experts.{i}.w1" for i in range(64)]
    records = moving(modules, updates=0)
    result = sparse(records)
    text = rendered(run_tables(records, result))
    _, nonzeros, effective = sections(text)
    assert row(nonzeros, "0")[0] == short(sum(result["nonzeros"].values()))
    assert float(row(effective, "0")[0]) == pytest.approx(
        sum(result["effective_ranks"].values()) / 64, abs=0.051
    )
    assert "means over the parts" in text


def test_a_line_tells_of_a_pruned_base_even_beside_dense_factors() -> None:
    records = moving(MODELS["bert"])
    base = pruned(records)
    modules, places = base["base_density"]["modules"], layout(MODELS["bert"]).places()
    low, high = min(modules, key=modules.__getitem__), max(modules, key=modules.__getitem__)
    text = rendered(run_tables(records, base), 120)
    line = (
        f"base density 0.5, from {modules[low]:.3g} ({places[low]}) to {modules[high]:.3g}"
        f" ({places[high]})"
    )
    assert text.splitlines()[-1] == line
    assert "non-zeros" not in text
    even = rendered(run_tables(records, pruned(records, 0.5, 0.5)))
    assert even.splitlines()[-1] == "base density 0.5 in each of 72 pruned modules"


# -- the density so far ----------------------------------------------------------------------------


def write_metrics(folder: Path, densities: dict[int, float]) -> Path:
    lines: list[dict[str, float]] = []
    for step, density in densities.items():
        lines.append({"step": step, "loss": 0.5, "density": density})
        if step % 10 == 0:
            lines.append({"step": step, "eval_loss": 0.4})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_densities_are_read_as_written_without_a_half_written_line(tmp_path: Path) -> None:
    assert read_densities(tmp_path) == {}
    path = write_metrics(tmp_path, RAMP)
    assert read_densities(tmp_path) == RAMP
    path.write_text(path.read_text() + '{"step": 101, "loss": 0.5, "dens')
    assert read_densities(tmp_path) == RAMP
    path.write_text('{"step": 1, "loss": 0.5}\n')
    assert read_densities(tmp_path) == {}


def test_densities_of_a_resumed_run_replace_those_after_its_checkpoint(tmp_path: Path) -> None:
    path = write_metrics(tmp_path, {1: 1.0, 2: 0.8, 3: 0.6})
    path.write_text(path.read_text() + '{"step": 2, "density": 0.7}\n')
    assert list(read_densities(tmp_path).items()) == [(1, 1.0), (2, 0.7)]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{oops}", "not JSON"),
        ("[1]", "not an object"),
        ('{"loss": 1}', "`step`"),
        *(
            (f'{{"step": 2, "density": {density}}}', "from 0 to 1")
            for density in ("2", '"0.5"', "true", "null", "NaN")
        ),
    ],
)
def test_broken_metrics_are_usage_errors_with_their_place(
    line: str, what: str, tmp_path: Path
) -> None:
    good = '{"step": 1, "density": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(f"{good}{line}\n{good}")
    with pytest.raises(UsageError, match=re.escape("metrics.jsonl:2")) as caught:
        read_densities(tmp_path)
    assert what in str(caught.value)


def test_json_has_what_the_result_has_and_the_density_so_far_before_there_is_one() -> None:
    records = moving(MODELS["bert"])
    result = {**sparse(records), **pruned(records), "method": "x"}
    keys = {"density", "nonzeros", "effective_ranks", "base_density"}
    assert {key: as_json(records, result, None, RAMP)[key] for key in keys} == {
        key: result[key] for key in keys
    }
    assert not keys & as_json(records, {"method": "l1ra"}).keys()
    assert not keys & as_json(records).keys()
    assert as_json(records, None, None, RAMP)["density"] == {"total": RAMP[100], "step": 100}


def test_inspect_ranks_of_a_finished_and_of_an_unfinished_run(
    tmp_path: Path, call: Callable[..., str]
) -> None:
    records = moving(MODELS["bert"], updates=0)
    run, picture = write_run(tmp_path / "run", records), tmp_path / "ranks.png"
    call("inspect-ranks", run, "--plot", picture)
    before = picture.read_bytes()
    assert "density" not in call("inspect-ranks", run)
    write_metrics(run, {1: 1.0, 2: 0.62})
    out = call("inspect-ranks", run, "--plot", picture)
    assert "0.62, after step 2" in out
    assert "non-zeros" not in out
    assert json.loads(call("inspect-ranks", run, "--json"))["density"]["total"] == 0.62
    assert picture.read_bytes() != before
    result = sparse(records)
    (run / "result.json").write_text(json.dumps(result))
    out = call("inspect-ranks", run)
    assert out.index("none moved") < out.index("non-zeros") < out.index("effective rank")
    assert "so far" not in out
    assert json.loads(call("inspect-ranks", run, "--json"))["nonzeros"] == result["nonzeros"]
    assert "non-zeros" not in call("inspect-ranks", run, "--history")


# -- plots -----------------------------------------------------------------------------------------

EMPTY: dict[int, float] = {}
TWO = blocks("h", ["q"], 2)
CASES: dict[str, tuple[list[RankRecord], bool, dict[int, float]]] = {
    **{
        f"{model}-{what}": (moving(MODELS[model], 16, n), True, RAMP)
        for model in MODELS
        for what, n in (("flat", 0), ("moved", 5))
    },
    "two-layers": (moving(TWO, updates=0), True, RAMP),
    "unfinished": (moving(MODELS["bert"], updates=0), False, {1: 1.0, 2: 1.0}),
    "first-step": (moving(MODELS["bert"], updates=0), False, {1: 1.0}),
    "nearly-empty": (
        moving(MODELS["bert"], updates=0),
        True,
        {step: max(0.01, 1 - 0.01 * step) for step in range(1, 201)},
    ),
    "no-metrics": (moving(MODELS["bert"], updates=0), True, EMPTY),
}


def drawn(records: list[RankRecord], finished: bool, densities: dict[int, float]) -> Figure:
    with rc_context(STYLE):
        figure = rank_figure(
            records,
            "a run",
            {**sparse(records), **pruned(records)} if finished else None,
            densities,
        )
        FigureCanvasAgg(figure).draw()
    return figure


def written(figure: Figure) -> Iterator[tuple[str, Any]]:
    """Every text in the picture, with its box in pixels."""
    texts = list(figure.texts)
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                # Ticks beyond the limits are there, but not drawn.
                texts += [tick.label1, tick.label2] if low <= tick.get_loc() <= high else []
    for text in texts:
        if text.get_text() and text.get_visible():
            yield text.get_text(), text.get_window_extent()


def axes_with(figure: Figure, title: str) -> Any:
    return next((axes for axes in figure.axes if title in axes.get_title(loc="left")), None)


@pytest.mark.parametrize("case", CASES)
def test_nothing_in_a_picture_overlaps_or_leaves_it(case: str) -> None:
    figure = drawn(*CASES[case])
    shown, page = list(written(figure)), figure.bbox
    assert len(shown) > 20
    for text, box in shown:
        assert page.containsx(box.x0), text
        assert page.containsx(box.x1), text
        assert page.containsy(box.y0), text
        assert page.containsy(box.y1), text
    for (one, a), (other, b) in itertools.combinations(shown, 2):
        assert not a.padded(-0.5).overlaps(b.padded(-0.5)), (one, other)


@pytest.mark.parametrize("case", CASES)
def test_the_density_is_drawn_from_0_to_1_over_the_steps_of_the_other_courses(case: str) -> None:
    records, finished, densities = CASES[case]
    figure = drawn(records, finished, densities)
    axes = axes_with(figure, "density of the factors")
    assert (axes is None) == (not densities)
    if axes is None:
        return
    low, high = axes.get_ylim()
    assert (low, round(high, 1)) == (0, 1.0)
    curve = axes.lines[0]
    assert dict(zip(curve.get_xdata(), curve.get_ydata(), strict=True)) == densities
    (label,) = [text.get_text() for text in axes.texts]
    assert float(label.split()[0]) == pytest.approx(list(densities.values())[-1], abs=1e-3)
    assert ("so far" in label) == (not finished)
    assert [other for other in figure.axes if other.get_xlabel() == "step"] == [axes]
    means = axes_with(figure, "mean rank of each kind")
    if len(records) > 1:
        assert axes.get_xlim() == means.get_xlim()
        assert axes.get_position().x0 == pytest.approx(means.get_position().x0)
        assert axes.get_position().width == pytest.approx(means.get_position().width)
        # The ranks hold to the end of the run.
        assert all(line.get_xdata()[-1] >= max(densities) for line in means.lines)


def test_ranks_that_never_moved_give_way_to_shares_and_effective_ranks() -> None:
    records = moving(MODELS["bert"], updates=0)
    result = sparse(records)
    with rc_context(STYLE):
        figure = rank_figure(records, "x", result, RAMP)
    assert axes_with(figure, "mean rank") is None
    shares, ranks = axes_with(figure, "share of non-zeros"), axes_with(figure, "effective rank")
    found = sparsity(records, result)
    assert found is not None
    kinds = [found.grid.of_kind(kind) for kind in found.grid.kinds]
    assert [bar.get_width() for bar in shares.patches] == [found.share(names) for names in kinds]
    assert [bar.get_width() for bar in ranks.patches] == [
        found.effective_rank(names) for names in kinds
    ]
    assert sorted(x for x, _ in ranks.collections[0].get_offsets()) == pytest.approx(
        sorted(result["effective_ranks"].values())
    )
    assert ranks.get_xlim() == (0, 8)


def test_dense_runs_have_the_picture_they_always_had(tmp_path: Path) -> None:
    for records in (moving(MODELS["bert"]), moving(MODELS["bert"], updates=0)):
        for suffix in ("png", "html"):
            old, new = tmp_path / f"old.{suffix}", tmp_path / f"new.{suffix}"
            plot_ranks(records, old, "x")
            plot_ranks(records, new, "x", {**sparse(records, 1.0, 1.0), "method": "l1ra"}, {})
            assert old.read_bytes() == new.read_bytes()


def test_html_has_the_tables_too(tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script>"
    modules = [f"h.{i}.{kind}" for i in range(2) for kind in (hostile, "SelfAttention.Q")]
    records = moving(modules, updates=0)
    result = {**sparse(records), **pruned(records)}
    path = tmp_path / "ranks.html"
    plot_ranks(records, path, "x", result, RAMP)
    page = path.read_text()
    assert page.count("<table>") == page.count("</table>") == 3
    for count in result["nonzeros"].values():
        assert f"<td>{count:,} <small>" in page
    for rank in result["effective_ranks"].values():
        assert f"<td>{rank:.2f}</td>" in page
    assert "<script" not in page
    assert html.escape(hostile) in page
    assert "base density 0.5, from" in page
    plot_ranks(records, path, "x")
    assert path.read_text().count("<table>") == 1
