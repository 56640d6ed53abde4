"""The loss without logits against torch's cross-entropy over all of them, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lorakit.kernels.cross_entropy import TARGETS, WORDS, linear_cross_entropy, tile_size
from lorakit.kernels.levels import Level
from tests.support.kernels import CallInC, watch_calls, why_not

WIDTH = 12
pytestmark = pytest.mark.usefixtures("form")


def inputs(
    count: int,
    words: int,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    width: int = WIDTH,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [count, width], weight [words, width], bias [words], targets [count]; logits are about
    `spread` apart."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=rng) * spread
    weight = torch.randn(words, width, generator=rng) * width**-0.5
    bias = torch.randn(words, generator=rng)
    targets = torch.randint(words, (count,), generator=rng)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), bias.to(dtype), targets


def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    return cross_entropy(logits, targets, reduction="none")


def upstream_of(losses: Tensor) -> Tensor:
    """One weight a target, and 0 among them, as for rows that are left out."""
    return torch.arange(len(losses)).remainder(5).sub(2).to(losses.dtype) / 3


def compare(given: tuple[Tensor, Tensor, Tensor | None, Tensor], allowed: float) -> None:
    """Losses within `allowed` of each, or of 1; gradients as a share of the largest of each
    target's."""
    ours, theirs = linear_cross_entropy(*given), exact(*given)
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.double(), theirs, rtol=allowed, atol=allowed)
    mine, right = (
        torch.autograd.grad(losses, given[0], upstream_of(losses))[0] for losses in (ours, theirs)
    )
    assert mine.dtype == given[0].dtype
    error = (mine.double() - right.double()).abs()
    assert bool(
        (error <= allowed * right.double().abs().amax(-1, keepdim=True).clamp(min=0.01)).all()
    ), float(error.max())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("words", [1, 5, WORDS - 1, WORDS, WORDS + 1, 2 * WORDS + 1234])
def test_losses_and_gradients_for_every_vocabulary(words: int, with_bias: bool) -> None:
    hidden, weight, bias, targets = inputs(7, words)
    compare((hidden, weight, bias if with_bias else None, targets), 1e-5)


@pytest.mark.parametrize("count", [1, 2, TARGETS - 1, TARGETS, TARGETS + 1, 2 * TARGETS + 77])
def test_losses_and_gradients_for_any_number_of_targets(count: int) -> None:
    hidden, weight, _, targets = inputs(count, 50)
    compare((hidden, weight, None, targets), 1e-5)
    compare((*inputs(count, 50, seed=1),), 1e-5)


def test_the_first_and_the_last_word_of_each_tile_can_be_the_target() -> None:
    hidden, weight, bias, _ = inputs(6, 2 * WORDS + 3)
    targets = torch.tensor([0, WORDS - 1, WORDS, 2 * WORDS - 1, 2 * WORDS, 2 * WORDS + 2])
    compare((hidden, weight, bias, targets), 1e-5)


def test_no_targets_make_no_losses_and_an_empty_gradient() -> None:
    hidden, weight, bias, targets = inputs(0, 50)
    losses = linear_cross_entropy(hidden, weight, bias, targets)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, WIDTH)


@pytest.mark.parametrize("spread", [30.0, 1e4])
def test_logits_far_apart_neither_overflow_nor_vanish(spread: float) -> None:
    """Words that win by thousands, in the first tile or in a later one; targets among them and far
    below."""
    hidden, weight, bias, targets = inputs(40, WORDS + 500, spread)
    best = linear(hidden, weight, bias).argmax(-1)
    targets[::2] = best[::2]
    assert (best >= WORDS).any()
    assert (best < WORDS).any()
    # float32 keeps a logit to 2⁻²⁴ of itself
    compare((hidden, weight, bias, targets), 1e-5 + 2**-19 * spread)


def test_words_that_are_ruled_out_count_for_nothing() -> None:
    """A bias of -inf, as for padding of a vocabulary: over all of the first tile, and over the end
    of the last."""
    hidden, weight, bias, _ = inputs(9, 2 * WORDS + 100)
    bias[:WORDS], bias[-50:] = -torch.inf, -torch.inf
    targets = torch.arange(WORDS, WORDS + 9)
    losses = linear_cross_entropy(hidden, weight, bias, targets)
    allowed = slice(WORDS, 2 * WORDS + 50)
    fewer = hidden, weight[allowed], bias[allowed], targets - WORDS
    torch.testing.assert_close(losses.double(), exact(*fewer), rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(losses.sum(), hidden)[0]
    right = torch.autograd.grad(exact(*fewer).sum(), hidden)[0]
    torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


def by_torch(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """As models do it: logits of the hidden states' type, the loss in float32."""
    return cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="none")


def error_of(losses: Tensor, right: Tensor, hidden: Tensor) -> tuple[float, float]:
    """(the largest of the losses', the gradient's as a share of its norm)."""
    mine, exactly = (
        torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0].double() for x in (losses, right)
    )
    return float((losses - right).detach().abs().max()), float(
        (mine - exactly).norm() / exactly.norm()
    )


@pytest.mark.parametrize("spread", [1.0, 4.0, 16.0])
def test_bfloat16_is_as_close_to_float64_as_logits_in_bfloat16_are(spread: float) -> None:
    given = inputs(200, WORDS + 700, spread, torch.bfloat16)
    losses, right = linear_cross_entropy(*given), exact(*given)
    ours, theirs = error_of(losses, right, given[0]), error_of(by_torch(*given), right, given[0])
    assert losses.dtype == torch.float32
    assert ours[0] <= 1.5 * theirs[0]
    assert ours[1] <= 2 * theirs[1]  # a bias is added to logits that were rounded before


def test_a_loss_in_bfloat16_is_never_negative() -> None:
    """Of targets that the model is sure of: a logit and the maximum that it is set against are
    rounded alike."""
    hidden, weight, bias, _ = inputs(200, WORDS + 700, 16.0, torch.bfloat16)
    targets = linear(hidden.double(), weight.double(), bias.double()).argmax(-1)
    assert float(by_torch(hidden, weight, bias, targets).detach().min()) > -1e-3
    assert float(linear_cross_entropy(hidden, weight, bias, targets).detach().min()) > -1e-3


def test_without_gradients_the_losses_are_the_same() -> None:
    given = inputs(30, WORDS + 5)
    with torch.no_grad():
        losses = linear_cross_entropy(*given)
    assert not losses.requires_grad
    assert torch.equal(losses, linear_cross_entropy(*given))
    frozen = linear_cross_entropy(given[0].detach(), *given[1:])
    assert not frozen.requires_grad
    assert torch.equal(losses, frozen)


def test_the_backward_pass_can_be_taken_twice() -> None:
    given = inputs(30, 50)
    losses = linear_cross_entropy(*given)
    first = torch.autograd.grad(losses, given[0], upstream_of(losses), retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(losses, given[0], upstream_of(losses))[0])


def test_nothing_that_is_given_is_written_to() -> None:
    given = inputs(30, WORDS + 5)
    before = [x.detach().clone() for x in given]
    linear_cross_entropy(*given).square().sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_a_target_does_not_know_of_the_others() -> None:
    """Its loss and gradient, bit for bit, whatever the other targets of its tile are."""
    hidden, weight, bias, targets = inputs(20, WORDS + 5)
    found = []
    for shift in (0.0, 3.0):
        changed = hidden.detach().clone()
        changed[1:] += shift
        changed.requires_grad_()
        losses = linear_cross_entropy(changed, weight, bias, targets)
        found.append((losses[0], torch.autograd.grad(losses.sum(), changed)[0][0]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def test_the_number_of_threads_changes_nothing_but_roundings(threads: None) -> None:
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        given = inputs(TARGETS + 9, WORDS + 5)
        losses = linear_cross_entropy(*given)
        found.append((losses, torch.autograd.grad(losses, given[0], upstream_of(losses))[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# -- by the tiles of AMX (csrc/cross_entropy.c), which take bfloat16 of a width that is a multiple
# of 32

only_native = pytest.mark.parametrize("form", ["native"], indirect=True)


@pytest.fixture
def calls(form: str, monkeypatch: pytest.MonkeyPatch) -> list[CallInC]:
    """The calls of the kernel."""
    if reason := why_not("cross_entropy", Level.amx):
        pytest.skip(reason)
    return watch_calls(monkeypatch, "cross_entropy")


def in_bfloat16(
    count: int, words: int, width: int, spread: float = 4.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return inputs(count, words, spread, torch.bfloat16, seed=words, width=width)


@only_native
@pytest.mark.parametrize("spread", [1.0, 4.0, 16.0, 64.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("count", "words", "width"),
    [
        (1, 40, 32),
        (31, 33, 64),
        (32, 1000, 96),
        (33, 31, 576),
        (65, 3001, 576),
        (100, 300, 2080),
        (17500, 48, 32),
    ],
)
def test_tiles_are_as_near_to_float64_as_plain_products(
    count: int,
    words: int,
    width: int,
    with_bias: bool,
    spread: float,
    calls: list[CallInC],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Widths and words of one chunk of the head and of several; targets of one pass over it and of
    two."""
    hidden, weight, bias, targets = in_bfloat16(count, words, width, spread)
    given = hidden, weight, bias if with_bias else None, targets
    right = exact(*given)
    ours = error_of(linear_cross_entropy(*given), right, hidden)
    assert [call.arguments[0].targets for call in calls] == [count]
    with monkeypatch.context() as patch:
        patch.setenv("LORAKIT_KERNELS", "torch")
        theirs = error_of(linear_cross_entropy(*given), right, hidden)
    assert [call.arguments[0].targets for call in calls] == [count]
    assert ours[0] <= 1.1 * theirs[0] + 1e-5
    assert ours[0] <= 1e-5 + 2e-6 * spread
    assert ours[1] < 0.004
    assert ours[1] <= 1.1 * theirs[1] or count == 1  # whose one large weight either rounds or not


@only_native
def test_a_target_that_tiles_are_sure_of_has_no_loss_and_no_gradient(calls: list[CallInC]) -> None:
    hidden, weight, _, _ = in_bfloat16(64, 500, 64, 8.0)
    targets = linear(hidden.double(), weight.double()).argmax(-1)
    # one word beats all others by far
    hidden = (hidden * 0 + 60 * weight[targets]).detach().requires_grad_()
    losses = linear_cross_entropy(hidden, weight, None, targets)
    right = exact(hidden, weight, None, targets)
    torch.testing.assert_close(losses.double(), right, rtol=1e-5, atol=1e-5)
    assert float(losses.detach().min()) >= -1e-5
    mine, exactly = (torch.autograd.grad(x.sum(), hidden)[0].double() for x in (losses, right))
    assert float((mine - exactly).detach().abs().max()) < 1e-5
    assert len(calls) == 1


@only_native
def test_tiles_raise_an_exponent_wherever_larger_logits_come(calls: list[CallInC]) -> None:
    """Logits that grow from word to word, by little and by much: over panels of 32 words and over
    chunks."""
    hidden, weight, _, targets = in_bfloat16(40, 3000, 576, 1.0)
    hidden = hidden.detach().clone()
    weight[:, 0], hidden[:, 0] = torch.linspace(0, 1, 3000), torch.linspace(-2000, 2000, 40)
    hidden.requires_grad_()
    given = hidden, weight, None, targets
    ours = error_of(linear_cross_entropy(*given), exact(*given), hidden)
    assert ours[0] < 1e-3
    assert ours[1] < 0.004
    assert [call.arguments[0].targets for call in calls] == [40]


@only_native
def test_tiles_rule_out_words_with_a_bias_of_minus_infinity(calls: list[CallInC]) -> None:
    hidden, weight, bias, _ = in_bfloat16(9, 2100, 576)
    bias[:700], bias[-50:] = -torch.inf, -torch.inf
    targets = torch.arange(1000, 1009)
    losses = linear_cross_entropy(hidden, weight, bias, targets)
    right = exact(hidden, weight[700:-50], bias[700:-50], targets - 700)
    torch.testing.assert_close(losses.double(), right, rtol=1e-5, atol=1e-5)
    mine, exactly = (torch.autograd.grad(x.sum(), hidden)[0] for x in (losses, right))
    torch.testing.assert_close(mine, exactly, rtol=0.02, atol=0.002)
    impossible = linear_cross_entropy(hidden.detach(), weight, bias, torch.zeros_like(targets))
    assert bool((impossible == torch.inf).all())
    assert len(calls) == 2


@only_native
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tiles_hide_no_number_that_is_not_finite(value: float, calls: list[CallInC]) -> None:
    hidden, weight, bias, targets = in_bfloat16(40, 1000, 64)
    bias[777] = value
    losses = linear_cross_entropy(hidden, weight, bias, targets)
    assert bool(losses.isnan().all())
    assert bool(torch.autograd.grad(losses.sum(), hidden)[0].isnan().all())
    hidden = hidden.detach().clone()
    hidden[3, 5] = value
    losses = linear_cross_entropy(hidden, weight, None, targets)
    assert losses.isfinite().logical_not().nonzero().tolist() == [[3]]
    assert len(calls) == 2


@only_native
def test_of_tiles_the_number_of_threads_changes_no_bit(calls: list[CallInC], threads: None) -> None:
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        given = in_bfloat16(150, 1500, 576)
        losses = linear_cross_entropy(*given)
        found.append((losses, torch.autograd.grad(losses, given[0], upstream_of(losses))[0]))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    assert len(calls) == 3


@only_native
def test_of_tiles_a_target_does_not_know_of_the_others(calls: list[CallInC]) -> None:
    """Its loss and gradient, bit for bit, whatever the others of its block are, with and without a
    gradient."""
    hidden, weight, bias, targets = in_bfloat16(50, 1500, 576)
    found = []
    for scale in (1.0, 20.0):
        changed = hidden.detach().clone()
        changed[1:] *= scale
        changed.requires_grad_()
        losses = linear_cross_entropy(changed, weight, bias, targets)
        assert torch.equal(losses, linear_cross_entropy(changed.detach(), weight, bias, targets))
        found.append((losses[0], torch.autograd.grad(losses.sum(), changed)[0][0]))
    alone = hidden.detach()[:1].requires_grad_()
    losses = linear_cross_entropy(alone, weight, bias, targets[:1])
    found.append((losses[0], torch.autograd.grad(losses.sum(), alone)[0][0]))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    assert len(calls) == 5


@only_native
def test_tiles_take_rows_that_are_columns_of_another_tensor(calls: list[CallInC]) -> None:
    hidden, weight, bias, targets = in_bfloat16(40, 300, 192)
    parts = [hidden.detach()[:, 32:96], weight[:, 64:128], bias, targets]
    copies = [part.contiguous() for part in parts]
    found = []
    for given in (
        parts,
        copies,
        [parts[0].T.contiguous().T, *parts[1:3], torch.stack([targets, targets], 1)[:, 0]],
    ):
        given[0].requires_grad_()
        losses = linear_cross_entropy(*given)
        found.append((losses, torch.autograd.grad(losses.sum(), given[0])[0]))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    assert len(calls) == 3


@only_native
@pytest.mark.parametrize("target", [-100, -1, 300])
def test_tiles_refuse_a_target_that_is_no_word(target: int, calls: list[CallInC]) -> None:
    hidden, weight, _, targets = in_bfloat16(40, 300, 64)
    targets[39] = target
    with pytest.raises(IndexError, match="300 words"):
        linear_cross_entropy(hidden, weight, None, targets)
    assert len(calls) == 1


@only_native
@pytest.mark.parametrize("what", ["float32", "width", "transposed", "no targets"])
def test_what_tiles_do_not_take_goes_the_other_way(what: str, calls: list[CallInC]) -> None:
    count, width = 0 if what == "no targets" else 7, 40 if what == "width" else 64
    hidden, weight, _, targets = inputs(
        count, 100, width=width, dtype=torch.float32 if what == "float32" else torch.bfloat16
    )
    weight = weight.T.contiguous().T if what == "transposed" else weight
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, None, targets).double(),
        exact(hidden, weight, None, targets),
        rtol=0.05,
        atol=0.05,
    )
    assert not calls


@pytest.mark.parametrize("tile", [(7, 1000), (1, 1000), (1000, 1000), (16, 300)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_tile_gives_the_loss_of_all_logits(
    tile: tuple[int, int], dtype: torch.dtype, form: str
) -> None:
    given = inputs(40, 1000, dtype=dtype)
    ours, theirs = linear_cross_entropy(*given, tile=tile), exact(*given)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    mine, right = (torch.autograd.grad(x.sum(), given[0])[0].double() for x in (ours, theirs))
    torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


def test_tiles_elsewhere_hold_all_words_and_no_value_is_read() -> None:
    """On a device without values, reading one would fail."""
    device = torch.device("meta")
    assert tile_size(device, 151_936) == (441, 151_936)
    assert tile_size(device, 1 << 30) == (1, 1 << 30)
    hidden = torch.empty(1000, 64, device=device, requires_grad=True)
    weight, targets = torch.empty(151_936, 64, device=device), torch.empty(1000, device=device)
    losses = linear_cross_entropy(hidden, weight, None, targets.long())
    losses.sum().backward()
    assert hidden.grad is not None
