"""Every way to compute a change against a loop over rows and increments, and what each is chosen for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from slm.backbone import bindings
from slm.backbone.bindings import RowBinding
from slm.backbone.kernel import row_kernel
from slm.backbone.reparameterize import Mixture, Reparameterizer
from slm.increments.increment import Increment, LowRankPair

NUM_IN, NUM_OUT = 71, 37  # no multiple of anything a processor likes
WAYS = ("kernel", "stacked", "gathered", "bags")

needs_kernel = pytest.mark.skipif(row_kernel(torch.float32) is None, reason="there is no compiler")


def random_increment(seed: int, rank: int, size: float = 1.0) -> Increment:
    draw = torch.Generator().manual_seed(seed)
    pair = LowRankPair(
        torch.randn(rank, NUM_IN, generator=draw) * NUM_IN**-0.5,
        size * torch.randn(NUM_OUT, rank, generator=draw),
    )
    return Increment({"0": pair}, rank, 2.0 * rank)


def by_hand(y: torch.Tensor, x: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """y_b + Σ_k w_bk s_k B_k A_k x_b in float64."""
    bent = y.double()
    for b in range(len(x)):
        for slot, weight in zip(mixture.slots[b].tolist(), mixture.weights[b].tolist(), strict=True):
            if weight:
                one = mixture.increments[slot]
                pair = one.pairs["0"]
                bent[b] += weight * one.scale * (x[b].double() @ pair.A.double().T @ pair.B.double().T)
    return bent


@pytest.fixture
def only(monkeypatch):
    """Leave one way; the others fail."""

    def leave(way: str) -> None:
        has_kernel = way == "kernel"
        monkeypatch.setattr(bindings, "row_kernel", row_kernel if has_kernel else lambda *_: None)
        monkeypatch.setattr(bindings, "STACKED_EXCESS", 100 if way == "stacked" else 0)
        monkeypatch.setattr(bindings, "FOLDED_EXCESS", 0 if way == "fold" else 10**9)
        for other in ("_fold", "_add_stacked", "_add_gathered", "_add_bags"):
            if not other.endswith(f"_{way}"):
                monkeypatch.setattr(RowBinding, other, lambda *_, name=other: pytest.fail(f"went {name}"))

    return leave


def net_of(dtype: torch.dtype) -> tuple[nn.Sequential, Reparameterizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(NUM_IN, NUM_OUT)).to(dtype).requires_grad_(False)
    return net, Reparameterizer(net, ["0"])


def mixed(ranks: tuple[int, ...] = (8, 3, 5)) -> Mixture:
    increments = [random_increment(seed, rank) for seed, rank in enumerate(ranks)]
    slots = torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2], [2, 1]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0], [0.0, 0.0], [0.125, 0.875]])
    return Mixture(increments, slots, weights)


def alike() -> Mixture:
    whole = mixed()
    return Mixture(whole.increments, whole.slots[:1].expand(5, 2), whole.weights[:1].expand(5, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 5, 9])
@pytest.mark.parametrize("way", [pytest.param("kernel", marks=needs_kernel), *WAYS[1:]])
def test_every_way_adds_the_weighed_sum_and_leaves_abstaining_rows_alone(way, num_tokens, dtype, only):
    if (way == "bags" and num_tokens > 1) or (way == "kernel" and num_tokens > bindings.MAX_KERNEL_TOKENS):
        pytest.skip("this way is for few tokens")
    only(way if not (way == "gathered" and num_tokens == 1) else "bags")
    net, bound = net_of(dtype)
    x = torch.randn(5, num_tokens, NUM_IN, generator=torch.Generator().manual_seed(9)).to(dtype)
    frozen, mixture = net(x), mixed()
    expected = by_hand(frozen, x, mixture)
    bound.bind(mixture)
    bent = net(x)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(bent.double(), expected, atol=tolerance * float(expected.abs().max()), rtol=0)
    assert torch.equal(bent[3], frozen[3])
    assert not torch.equal(bent[0], frozen[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("way", [pytest.param("kernel", marks=needs_kernel), "stacked", "fold"])
def test_rows_that_are_alike_are_bent_alike_whatever_their_number(way, num_tokens, dtype, only, monkeypatch):
    if way == "fold" and dtype != torch.float32:
        pytest.skip("short weights are not folded into")
    only(way)
    monkeypatch.setattr(bindings, "MAX_KERNEL_ALIKE", 1000)
    net, bound = net_of(dtype)
    x = torch.randn(5, num_tokens, NUM_IN, generator=torch.Generator().manual_seed(9)).to(dtype)
    frozen, mixture = net(x), alike()
    expected = by_hand(frozen, x, mixture)
    bound.bind(mixture)
    tolerance = (1e-5 if dtype == torch.float32 else 0.03) * float(expected.abs().max())
    torch.testing.assert_close(net(x).double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(net(x[:2]).double(), expected[:2], atol=tolerance, rtol=0)
    torch.testing.assert_close(net(x[1]).double(), expected[1], atol=tolerance, rtol=0)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("way", [pytest.param("kernel", marks=needs_kernel), *WAYS[1:]])
def test_a_zero_increment_changes_no_bit_whichever_way_it_is_added(way, num_tokens, only):
    if way == "bags" and num_tokens > 1:
        pytest.skip("bags are for one token")
    only(way if not (way == "gathered" and num_tokens == 1) else "bags")
    net, bound = net_of(torch.bfloat16)
    x = torch.randn(5, num_tokens, NUM_IN).bfloat16()
    frozen, whole = net(x), mixed()
    zero = [random_increment(seed, 4, size=0.0) for seed in range(3)]
    bound.bind(Mixture(zero, whole.slots, whole.weights))
    assert torch.equal(net(x), frozen)


@needs_kernel
def test_the_kernel_is_taken_for_a_decoding_step_and_left_for_a_long_prompt(monkeypatch):
    net, bound = net_of(torch.float32)
    taken = []
    kernel = row_kernel(torch.float32)
    monkeypatch.setattr(bindings, "row_kernel", lambda *_: lambda *a: taken.append("kernel") or kernel(*a))
    for name in ("_fold", "_add_stacked", "_add_gathered", "_add_bags"):
        plain = getattr(RowBinding, name)
        monkeypatch.setattr(
            RowBinding, name, lambda *a, name=name, plain=plain: taken.append(name) or plain(*a)
        )
    many = Mixture(
        [random_increment(seed, 4) for seed in range(10)],
        torch.arange(10).view(5, 2),
        torch.full((5, 2), 0.5),
    )
    calls = ((many, 1), (many, 50), (mixed(), 50), (alike(), 1), (alike(), 14), (alike(), 15))
    for mixture, num_tokens in calls:
        bound.bind(mixture)
        net(torch.randn(5, num_tokens, NUM_IN))
    assert taken == ["kernel", "_add_gathered", "_add_stacked", "kernel", "kernel", "_fold"]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_turned", [True, False])
def test_a_fold_is_the_layer_with_its_weight_changed_whichever_way_round_it_is_kept(
    is_turned, has_bias, only
):
    only("fold")
    torch.manual_seed(0)
    layer = Conv1D(NUM_OUT, NUM_IN) if is_turned else nn.Linear(NUM_IN, NUM_OUT, bias=has_bias)
    if has_bias:
        nn.init.normal_(layer.bias)
    bound = Reparameterizer(net := nn.Sequential(layer).requires_grad_(False), ["0"])
    x = torch.randn(5, 9, NUM_IN)
    frozen, whole = net(x), alike()
    before = layer.weight.clone()
    bound.bind(whole)
    torch.testing.assert_close(net(x).double(), by_hand(frozen, x, whole), atol=1e-4, rtol=1e-5)
    bound.bind(
        Mixture([random_increment(seed, 4, size=0.0) for seed in range(3)], whole.slots, whole.weights)
    )
    assert torch.equal(net(x), frozen)
    assert torch.equal(layer.weight, before)


def test_nothing_is_folded_into_a_layer_of_a_kind_of_its_own_or_of_few_bits_or_for_gradients(monkeypatch):
    folded = []
    monkeypatch.setattr(RowBinding, "_fold", lambda *_: folded.append(True))
    monkeypatch.setattr(RowBinding, "_add", lambda _, y, *__: y)

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    x = torch.randn(5, 99, NUM_IN)
    plain = nn.Linear(NUM_IN, NUM_OUT)
    for layer, given, dtype, is_foldable in (
        (plain, x, torch.float32, True),
        (plain, x, torch.bfloat16, False),  # a wide layer of a short model
        (plain, x.clone().requires_grad_(), torch.float32, False),
        (Own(NUM_IN, NUM_OUT), x, torch.float32, False),
        (nn.Linear(NUM_IN, NUM_OUT).bfloat16(), x.bfloat16(), torch.bfloat16, False),
        (nn.Linear(NUM_IN, NUM_OUT).half(), x.half(), torch.float16, False),
    ):
        bound = Reparameterizer(nn.Sequential(layer).requires_grad_(False), ["0"], dtype)
        bound.bind(alike())
        bound.layers["0"].binding.bend(layer, given)
        assert folded == [True] * is_foldable
        folded.clear()


def test_gradients_pass_through_a_bent_layer_as_through_its_full_weight_change():
    net, bound = net_of(torch.float32)
    for mixture in (mixed(), alike()):
        for num_tokens in (1, 3):
            x = torch.randn(5, num_tokens, NUM_IN, requires_grad=True)
            bound.bind(mixture)
            net(x).square().sum().backward()
            found, x.grad = x.grad, None
            bound.release()
            by_hand(net(x), x, mixture).square().sum().backward()
            torch.testing.assert_close(found, x.grad, atol=1e-4, rtol=1e-4)


def test_a_compiled_net_is_not_compiled_again_for_another_mixture_of_the_same_shape():
    program = Path(__file__).with_name("compile_twice.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["2"] * 4, done.stderr


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "num_tokens"), [((8, 8, 8), 1), ((5, 3, 7), 1), ((16, 11, 2), 3)])
def test_the_kernel_gives_a_row_the_same_bits_beside_rows_that_share_its_increments(ranks, num_tokens, dtype):
    draw = torch.Generator().manual_seed(4)
    slots, weights = torch.randint(0, 3, (23, 2), generator=draw), torch.rand(23, 2, generator=draw)
    weights[::3, 1] = 0.0
    weights[::5] = 0.0
    _, bound = net_of(dtype)
    increments = [random_increment(seed, rank) for seed, rank in enumerate(ranks)]
    bound.bind(Mixture(increments, slots, weights))
    x = torch.randn(23, num_tokens, NUM_IN, generator=draw).to(dtype)
    y = torch.randn(23, num_tokens, NUM_OUT, generator=draw).to(dtype)
    together = bound.layers["0"].binding.bend(lambda _: y.clone(), x)
    for i in range(23):
        with bound.selected(torch.tensor([i])):
            alone = bound.layers["0"].binding.bend(lambda _, i=i: y[i : i + 1].clone(), x[i : i + 1])
        assert torch.equal(alone[0], together[i])
        assert torch.equal(alone[0], y[i]) == (i % 5 == 0)


@pytest.mark.skipif(row_kernel(torch.float32, torch.float16) is None, reason="the kernel reads no float16")
@pytest.mark.parametrize("num_tokens", [1, 3, 30])
@pytest.mark.parametrize("which", [mixed, alike])
def test_float16_pairs_give_the_bits_that_the_same_values_give_in_float32(which, num_tokens):
    given = which()
    short = [increment.in_float16() for increment in given.increments]
    net, bound = net_of(torch.float32)
    x = torch.randn(5, num_tokens, NUM_IN)
    found = []
    for increments, dtype in (
        (short, torch.float16),
        ([increment.to("cpu", torch.float32) for increment in short], torch.float32),
    ):
        bound.bind(Mixture(increments, given.slots, given.weights))
        assert bound.bank.shelves["0"].down.dtype == dtype
        found.append(net(x))
    assert torch.equal(*found)


@needs_kernel
@pytest.mark.parametrize(
    ("dtype", "is_float16"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 1), (31, 33), (32, 64), (1024, 1025), (1090, 2079)])
def test_the_kernel_reads_and_rounds_every_width_as_torch_does(num_in, num_out, dtype, is_float16):
    draw = torch.Generator().manual_seed(5)
    net = nn.Sequential(nn.Linear(num_in, num_out)).to(dtype).requires_grad_(False)
    bound = Reparameterizer(net, ["0"])
    # Whole numbers, small enough that every sum of products is exact: what comes out is rounded once.
    pair = LowRankPair(
        torch.randint(-2, 3, (3, num_in), generator=draw).float(),
        torch.randint(-2, 3, (num_out, 3), generator=draw).float(),
    )
    increment = Increment({"0": pair}, 3, 3.0)
    increment = increment.in_float16() if is_float16 else increment
    bound.bind(Mixture([increment], torch.zeros(2, 1).long(), torch.ones(2, 1)))
    x = torch.randint(-2, 3, (2, 1, num_in), generator=draw).to(dtype)
    y = torch.randint(-9, 10, (2, 1, num_out), generator=draw).to(dtype)
    y[0, 0, -1], y[1, 0, 0] = torch.nan, torch.inf
    exact = y.double() + full_change(pair, x)
    bent = bound.layers["0"].binding.bend(lambda _: y, x)
    assert torch.equal(bent.nan_to_num(7, 8), exact.to(dtype).nan_to_num(7, 8))


def full_change(pair: LowRankPair, x: torch.Tensor) -> torch.Tensor:
    """B A x in float64."""
    return x.double() @ pair.A.double().T @ pair.B.double().T


@needs_kernel
def test_every_way_gives_the_same_bits_whatever_was_asked_before():
    net, bound = net_of(torch.float32)
    fresh, same = net_of(torch.float32)
    small = mixed(ranks=(2, 3, 1))
    bound.bind(mixed(ranks=(16, 3, 5)))
    bound.bind(alike())
    for num_tokens in (1, 30):
        x = torch.randn(5, num_tokens, NUM_IN)
        bound.bind(small)
        same.bind(small)
        assert torch.equal(net(x), fresh(x))


@pytest.mark.parametrize("num_tokens", [1, 9, 40])
@pytest.mark.parametrize("way", [mixed, alike])
def test_under_autocast_a_bent_layer_gives_the_short_floats_that_a_frozen_one_gives(way, num_tokens):
    net, bound = net_of(torch.float32)
    x = torch.randn(5, num_tokens, NUM_IN, generator=torch.Generator().manual_seed(9))
    expected = by_hand(net(x), x, way())
    bound.bind(way())
    net(x)
    for is_learning in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            found = net(x.clone().requires_grad_(is_learning))
        assert found.dtype == torch.bfloat16
        tolerance = 0.03 * float(expected.abs().max())
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


def test_under_autocast_a_small_change_is_not_lost_in_the_weight():
    net, bound = net_of(torch.float32)
    layer = bound.layers["0"].base
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    x = torch.randn(5, 99, NUM_IN, generator=torch.Generator().manual_seed(9))
    x -= x.mean(-1, keepdim=True)  # what the frozen layer gives is near zero, though its weights are not
    whole, short = alike(), torch.autocast("cpu", torch.bfloat16)
    frozen = net(x)
    with short:
        frozen_short = net(x)
    increments = [random_increment(seed, 4, size=1e-3) for seed in range(3)]
    bound.bind(Mixture(increments, whole.slots, whole.weights))
    expected = net(x) - frozen
    assert bound.layers["0"].binding._way.is_folded
    with short:
        found = net(x) - frozen_short
    torch.testing.assert_close(found.float(), expected, atol=0.1 * float(expected.abs().max()), rtol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("way", [mixed, alike])
def test_a_traced_layer_is_bent_as_the_layer_is(way, num_tokens):
    net, bound = net_of(torch.float32)
    x, other = (torch.randn(5, num_tokens, NUM_IN) for _ in range(2))
    bound.bind(way())
    net(x)  # the kernel was taken for this shape
    traced = torch.jit.trace(net, (x,), check_trace=False)
    for given in (x, other):
        torch.testing.assert_close(traced(given), net(given), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch.func's own
@pytest.mark.parametrize("way", [mixed, alike])
def test_forward_derivatives_pass_through_a_bent_layer(way):
    net, bound = net_of(torch.float32)
    x, direction = (torch.randn(5, 3, NUM_IN) for _ in range(2))
    bound.bind(way())
    net(x)
    change, bias = net(direction), bound.layers["0"].base.bias  # the layer is affine
    _, found = torch.func.jvp(net, (x,), (direction,))
    torch.testing.assert_close(found, change - bias, atol=1e-4, rtol=1e-4)
