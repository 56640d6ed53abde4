"""Masks: exact counts in every structure and scope, ties by index, what is spared and gone, and the
bounds on their error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakit.numerics.sparsity import keep_count, masks, pack_bits, strongest, unpack_bits
from lorakit.numerics.structure import UNSTRUCTURED, Structure

STRUCTURES = ["unstructured", "2:4", "1:4", "3:8", "group"]
DENSITIES = [0.01, 0.1, 0.29, 0.5, 0.77, 0.9, 1.0]
SHAPES = [(3, 8), (5, 16), (16, 24), (1, 8)]


def parse(text: str) -> Structure:
    return Structure.parse(text, group_size=4)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).abs()


def several(seed: int = 0) -> list[Tensor]:
    return [normal(*shape, seed=seed + i) for i, shape in enumerate(SHAPES)]


def live(found: list[Tensor]) -> int:
    return sum(int(mask.sum()) for mask in found)


def stable(scores: Tensor, keep: int) -> Tensor:
    """The oracle: a stable sort of the last dimension, highest first."""
    rows = scores.reshape(-1, scores.shape[-1]).tolist()
    kept = [sorted(range(len(row)), key=lambda i: -row[i])[:keep] for row in rows]
    mask = torch.zeros(len(rows), scores.shape[-1], dtype=torch.bool)
    for i, indices in enumerate(kept):
        mask[i, indices] = True
    return mask.reshape(scores.shape)


# -- the strongest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_strongest_is_a_stable_sort_also_where_most_scores_are_equal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for shape in ((1,), (7,), (40,), (5, 12), (3, 2, 9)):
        scores = torch.from_numpy(rng.integers(0, 4, shape).astype(np.float32))
        for keep in range(shape[-1] + 2):
            mask = strongest(scores, keep)
            assert mask.dtype == torch.bool
            assert torch.equal(mask, stable(scores, keep)), (scores, keep)


def test_of_equal_scores_those_with_the_lowest_index_stay() -> None:
    assert strongest(torch.ones(5), 2).tolist() == [True, True, False, False, False]
    assert strongest(torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]), 2).tolist() == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert strongest(torch.tensor([1.0, math.inf, -1.0, math.inf, math.inf]), 2).tolist() == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert strongest(torch.tensor([-0.0, 0.0, 0.0]), 1).tolist() == [True, False, False]


def test_strongest_of_nothing_and_of_too_many() -> None:
    assert strongest(torch.zeros(0), 3).shape == (0,)
    assert strongest(torch.zeros(2, 0), 0).shape == (2, 0)
    assert strongest(torch.ones(3), 9).all()
    assert not strongest(torch.ones(3), -1).any()


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_strongest_refuses_nan(keep: int) -> None:
    with pytest.raises(ValueError, match="not a number"):
        strongest(torch.tensor([1.0, math.nan, 2.0]), keep)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_masks_refuse_nan(structure: str, scope: str) -> None:
    scores = several()
    scores[1][2, 3] = math.nan
    with pytest.raises(ValueError, match="not a number"):
        masks(scores, 0.5, parse(structure), scope)


# -- counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "total", "count"),
    [
        (0.29, 100, 29),  # 0.29 · 100 is 28.999…96
        (0.5, 7, 3),
        (0.001, 7, 1),  # never none
        (1.0, 7, 7),
        (0.999, 7, 6),  # never more than its share
        (0.5, 0, 0),
        (1 / 3, 9, 3),
        (0.2, 35, 7),
    ],
)
def test_a_density_keeps_at_most_its_share_and_at_least_one(
    density: float, total: int, count: int
) -> None:
    assert keep_count(density, total) == count


def expected_count(structure: Structure, density: float, entries: int) -> int:
    if structure.kind == "group":
        return max(1, math.floor(density * (entries // structure.m) + 1e-9)) * structure.m
    least = entries * structure.n // structure.m if structure.kind == "n:m" else 0
    return max(least, 1, math.floor(density * entries + 1e-9))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_matrix_keeps_exactly_its_count(structure: str, density: float) -> None:
    form = parse(structure)
    for scores, mask in zip(several(), masks(several(), density, form), strict=True):
        assert mask.shape == scores.shape
        assert int(mask.sum()) == expected_count(form, density, scores.numel())


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_matrices_together_keep_exactly_their_count(structure: str, density: float) -> None:
    form, scores = parse(structure), several()
    entries = sum(score.numel() for score in scores)
    found = masks(scores, density, form, "global")
    assert live(found) == expected_count(form, density, entries)
    counts = [float(mask.float().mean()) for mask in found]
    if 0.1 < density < 0.9 and structure == "unstructured":
        assert len(set(counts)) > 1, "a global scope should give densities of their own"


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_what_stays_scores_higher_than_what_goes(scope: str) -> None:
    scores = several()
    relative = [s / s.square().mean().sqrt() for s in scores] if scope == "global" else scores
    found = masks(scores, 0.4, UNSTRUCTURED, scope)
    pairs = [(torch.cat([s.flatten() for s in relative]), torch.cat([m.flatten() for m in found]))]
    for score, mask in pairs if scope == "global" else zip(relative, found, strict=True):
        assert score[mask].min() > score[~mask].max()


@pytest.mark.parametrize("structure", ["2:4", "1:4", "3:8"])
def test_n_of_every_m_consecutive_entries_of_a_row_stay(structure: str) -> None:
    form = parse(structure)
    for scores, mask in zip(several(), masks(several(), form.n / form.m, form), strict=True):
        pieces = mask.reshape(len(mask), -1, form.m)
        assert (pieces.sum(-1) == form.n).all()
        assert torch.equal(pieces, stable(scores.reshape(pieces.shape), form.n))


@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("structure", ["2:4", "1:4", "3:8"])
def test_above_its_own_density_an_n_m_mask_is_a_part_of_the_mask(
    structure: str, scope: str
) -> None:
    form, scores = parse(structure), several()
    final = masks(scores, form.n / form.m, form, scope)
    for density in (0.55, 0.8, 0.95):
        wider = masks(scores, density, form, scope)
        assert live(wider) > live(final)
        for wide, least, score in zip(wider, final, scores, strict=True):
            assert wide[least].all()
            # and the rest goes by score
            if scope == "matrix" and (wide & ~least).any() and not wide.all():
                assert score[wide & ~least].min() > score[~wide].max()
    # Below it, n of every m is all that there is.
    assert live(masks(scores, form.n / form.m / 2, form, scope)) == live(final)


def test_a_group_goes_whole_and_by_its_sum() -> None:
    scores = torch.tensor(
        [[9.0, 0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 8.5]]
    )
    [mask] = masks([scores], 0.5, Structure("group", m=4))
    assert mask.tolist() == [[True] * 8, [False] * 8]
    [mask] = masks([scores], 0.3, Structure("group", m=4))
    assert mask.tolist() == [[False] * 4 + [True] * 4, [False] * 8]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_equal_scores_leave_the_first_of_each_matrix(structure: str) -> None:
    form = parse(structure)
    [mask] = masks([torch.ones(4, 8)], 0.5, form)
    if form.kind == "n:m":
        assert torch.equal(
            mask.reshape(-1, form.m)[:, : form.n],
            torch.ones(32 // form.m, form.n, dtype=torch.bool),
        )
    else:
        assert mask.flatten().tolist() == [True] * 16 + [False] * 16


def test_a_global_scope_divides_by_the_root_mean_square() -> None:
    scores = several()
    same = masks(scores, 0.4, UNSTRUCTURED, "global")
    scaled = masks([scores[0] * 1000, scores[1] / 1000, *scores[2:]], 0.4, UNSTRUCTURED, "global")
    for mine, theirs in zip(same, scaled, strict=True):
        assert torch.equal(mine, theirs)
    # Rows of one matrix are not set against each other like that.
    one = torch.cat([scores[1] * 1000, scores[1]])
    assert not masks([one], 0.4, UNSTRUCTURED, "global")[0][5:].any()


def test_a_matrix_of_zeros_or_of_nothing_is_no_matter_to_the_others() -> None:
    scores = [torch.zeros(2, 8), normal(4, 8, seed=1), torch.zeros(0, 8)]
    found = masks(scores, 0.5, UNSTRUCTURED, "global")
    assert [int(mask.sum()) for mask in found] == [0, 24, 0]
    assert torch.equal(found[1], masks([scores[1]], 0.75)[0])
    assert [int(mask.sum()) for mask in masks(scores, 0.5)] == [8, 16, 0]
    assert masks([torch.zeros(0, 8)], 0.5, UNSTRUCTURED, "global")[0].shape == (0, 8)


# -- spared and gone -------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("structure", ["unstructured", "2:4", "group"])
def test_density_falls_by_subsets_and_nothing_comes_back(structure: str, scope: str) -> None:
    """With scores that change all the time, as in training."""
    form = parse(structure)
    gone = [torch.zeros(shape, dtype=torch.bool) for shape in SHAPES]
    for i, density in enumerate((0.9, 0.75, 0.7, 0.55, 0.5)):
        found = masks(several(seed=50 * i), density, form, scope, gone=gone)
        for mask, out in zip(found, gone, strict=True):
            assert not (mask & out).any()
        # What is gone is always fewer than may go, so that the count is met whatever the scores do.
        each = [expected_count(form, density, mask.numel()) for mask in found]
        assert live(found) == (
            sum(each)
            if scope == "matrix"
            else expected_count(form, density, sum(m.numel() for m in found))
        )
        gone = [~mask for mask in found]
    if form.kind == "n:m":
        assert all((~out.reshape(-1, form.m)).sum(-1).eq(form.n).all() for out in gone)


def test_what_is_gone_stays_away_even_where_the_count_has_room() -> None:
    gone = torch.tensor([[True, True, True, False, False, False, False, False]])
    [mask] = masks([torch.arange(8.0).flip(0)[None]], 0.75, gone=[gone])
    assert mask.tolist() == (~gone).tolist()
    # At a score of zero it still goes before what is gone.
    [mask] = masks([torch.zeros(1, 8)], 0.5, gone=[gone])
    assert mask.tolist() == [[False] * 3 + [True] * 4 + [False]]


@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_what_is_spared_stays_and_does_not_count(density: float, scope: str) -> None:
    scores = several()
    spared = [normal(*shape, seed=90 + i) > 1.5 for i, shape in enumerate(SHAPES)]
    assert all(free.any() for free in spared)
    # spared, however small
    least = [score.masked_fill(free, 0.0) for score, free in zip(scores, spared, strict=True)]
    found = masks(least, density, UNSTRUCTURED, scope, spared)
    for mask, free in zip(found, spared, strict=True):
        assert mask[free].all()
    counted = [int((~free).sum()) for free in spared]
    others = [int((mask & ~free).sum()) for mask, free in zip(found, spared, strict=True)]
    if scope == "matrix":
        assert others == [keep_count(density, count) for count in counted]
    else:
        assert sum(others) == keep_count(density, sum(counted))


def test_where_all_is_spared_all_stays() -> None:
    everything = [torch.ones(shape, dtype=torch.bool) for shape in SHAPES]
    for scope in ("matrix", "global"):
        assert all(mask.all() for mask in masks(several(), 0.1, UNSTRUCTURED, scope, everything))


def test_a_group_with_one_spared_entry_is_spared() -> None:
    spared = torch.zeros(2, 8, dtype=torch.bool)
    spared[1, 6] = True
    scores = torch.ones(2, 8)
    scores[1] = 0.0
    [mask] = masks([scores], 0.4, Structure("group", m=4), spared=[spared])
    assert mask.tolist() == [[True] * 4 + [False] * 4, [False] * 4 + [True] * 4]


def test_a_spared_entry_is_one_of_the_n_of_its_group() -> None:
    spared = torch.tensor([[False, False, False, True, False, False, False, False]])
    [mask] = masks([torch.arange(8.0, 0, -1)[None]], 0.5, parse("2:4"), spared=[spared])
    assert mask.tolist() == [[True, False, False, True, True, True, False, False]]


def test_inputs_are_left_as_they_are() -> None:
    scores, before = several(), several()
    gone = [score < 0.2 for score in scores]
    kept = [out.clone() for out in gone]
    for structure in STRUCTURES:
        masks(scores, 0.5, parse(structure), "global", gone=gone)
    for mine, theirs in zip([*scores, *gone], [*before, *kept], strict=True):
        assert torch.equal(mine, theirs)


# -- structures ------------------------------------------------------------------------------------


def test_structures_are_told_by_their_word() -> None:
    assert Structure.parse("unstructured") == UNSTRUCTURED
    assert Structure.parse("2:4") == Structure("n:m", 2, 4)
    assert Structure.parse("group", 8) == Structure("group", m=8)
    assert Structure.parse("rank").kind == "rank"
    assert [str(Structure.parse(text, 8)) for text in ("2:4", "unstructured", "group", "rank")] == [
        "2:4",
        "unstructured",
        "group",
        "rank",
    ]
    assert [Structure.parse(text).share for text in ("2:4", "1:4", "unstructured", "rank")] == [
        0.5,
        0.25,
        None,
        None,
    ]


@pytest.mark.parametrize("text", ["3:2", "4:4", "0:4", "0:0"])
def test_a_pattern_that_keeps_nothing_or_drops_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"{text} keeps nothing or drops nothing"):
        Structure.parse(text)


@pytest.mark.parametrize(
    "text", ["", "Unstructured", "2:4 ", "2-4", "2:4:8", "-2:4", "ranks", "2:"]
)
def test_an_unknown_structure_is_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(ValueError, match=r"choose unstructured, group, rank or n:m"):
        Structure.parse(text)


@pytest.mark.parametrize("structure", ["2:4", "group"])
def test_rows_that_the_structure_does_not_divide_are_refused(structure: str) -> None:
    with pytest.raises(ValueError, match="rows of 6 entries can not be cut into pieces of 4"):
        masks([torch.ones(4, 8), torch.ones(4, 6)], 0.5, parse(structure))


def test_components_are_no_matter_of_a_mask() -> None:
    with pytest.raises(ValueError, match="components"):
        masks([torch.ones(4, 8)], 0.5, parse("rank"))


# -- bitmaps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1000])
def test_a_bitmap_holds_every_bit(count: int) -> None:
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    bitmap = pack_bits(mask)
    assert bitmap.dtype == torch.uint8
    assert len(bitmap) == math.ceil(count / 8)
    assert torch.equal(unpack_bits(bitmap, count), mask)


def test_the_first_entry_is_the_lowest_bit_row_by_row_also_of_a_view() -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[0, 2] = mask[1, 4] = True
    assert pack_bits(mask).tolist() == [0b101, 0b10]
    assert pack_bits(mask.T).tolist() == [0b10001, 0b10]
    assert torch.equal(unpack_bits(pack_bits(mask.T), 10).view(5, 2), mask.T)


@pytest.mark.parametrize(
    ("bitmap", "count", "words"),
    [
        (torch.zeros(2, dtype=torch.uint8), 17, "has 3 bytes"),
        (torch.zeros(3, dtype=torch.uint8), 16, "has 2 bytes"),
        (torch.zeros(2, dtype=torch.int32), 16, "int32"),
        (torch.zeros(1, 2, dtype=torch.uint8), 16, "2 bytes"),
        (torch.tensor([0, 0b100], dtype=torch.uint8), 10, "beyond its last entry"),
    ],
)
def test_a_bitmap_of_another_size_or_with_bits_beyond_is_refused(
    bitmap: Tensor, count: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        unpack_bits(bitmap, count)


# -- which matrix to mask --------------------------------------------------------------------------


def gaussian_share(dropped: float) -> float:
    """E[z²; |z| < q] of a standard normal z, with P(|z| < q) = dropped."""
    normal_ = torch.distributions.Normal(0.0, 1.0)
    q = float(normal_.icdf(torch.tensor((1 + dropped) / 2)))
    return dropped - 2 * q * math.exp(-q * q / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("dropped", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_masking_the_base_alone_by_its_own_size_has_the_least_error(
    dropped: float, ratio: float
) -> None:
    """arXiv 2601.16991, section 3, as mean squared errors of what a model W = W0 + BA loses an
    entry, over 20 seeds.

    W0 is Gaussian, BA of rank 8 and of `ratio` times its size. The ways to drop a share p of the
    entries:
    base:     W0 ⊙ M(W0) + BA, BA stays whole, as a separate adapter allows;
    dynamic:  W0 ⊙ M(W) + BA, the mask follows the merged matrix;
    merged:   W ⊙ M(W);
    foreign:  W ⊙ M(W0), the merged matrix by the base's mask;
    both:     W0 ⊙ M(W0) + BA ⊙ M(BA), each by its own mask.
    Per matrix, base ≤ dynamic: M(W0) drops the smallest entries of W0 by definition. In expectation
    base ≤ merged, since W is larger than W0 by ratio², and foreign and both cost what they drop of
    BA on top of base's own error.
    """
    errors: dict[str, list[float]] = {}
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        base = torch.randn(48, 64, generator=rng)
        update = torch.randn(48, 8, generator=rng) @ torch.randn(8, 64, generator=rng)
        update *= ratio / update.square().mean().sqrt()
        merged = base + update
        m_base, m_merged, m_update = (
            masks([w.abs()], 1 - dropped)[0] for w in (base, merged, update)
        )
        lost = {
            "base": base * ~m_base,
            "dynamic": base * ~m_merged,
            "merged": merged * ~m_merged,
            "foreign": merged * ~m_base,
            "both": base * ~m_base + update * ~m_update,
        }
        for way, what in lost.items():
            errors.setdefault(way, []).append(float(what.square().mean()))
        assert errors["base"][-1] <= errors["dynamic"][-1]
    mean = {way: sum(found) / len(found) for way, found in errors.items()}
    # Its error is that of the smallest entries of a Gaussian, whatever BA is.
    assert mean["base"] == pytest.approx(gaussian_share(dropped), rel=0.05)
    assert mean["foreign"] == pytest.approx(mean["base"] + dropped * ratio**2, rel=0.05)
    assert mean["merged"] > mean["base"] * (1 + 0.7 * ratio**2)
    for way in ("dynamic", "merged", "foreign", "both"):
        assert mean[way] > 1.02 * mean["base"], way


@pytest.mark.parametrize("density", [0.0, 0.3, 0.8, 1.0])
def test_matrices_of_one_shape_at_once_get_the_masks_that_they_get_alone(density: float) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = [(3, 8), (8, 3), (3, 8), (0, 8), (1, 1), (8, 3), (0, 8)]
    scores = [torch.randint(4, shape, generator=rng).float() for shape in shapes]  # many ties
    gone = [torch.rand(shape, generator=rng) < 0.4 for shape in shapes]
    together = masks(scores, density, gone=gone)
    nothing = [torch.zeros_like(out) for out in gone]
    alone = masks(scores, density, spared=nothing, gone=gone)
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert len({mask.untyped_storage().data_ptr() for mask in together if mask.numel()}) == 5
