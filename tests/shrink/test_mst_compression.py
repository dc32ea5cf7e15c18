"""Reuse along a minimum spanning tree: exact integers, the least tree of all, and counts that are true."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.engines.binary import BinaryConv2d, Polynomial, Straight, sign
from torchgraft.errors import BadInput
from torchgraft.shrink.quantize.mst_compression import MSTBinaryConv2d, Tree, bitops, compress, mst_loss, mst_order


def signs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def cayley(count: int) -> list[list[tuple[int, int]]]:
    """Return the edges of every tree on ``count`` vertices, by their Prüfer codes."""
    if count == 1:
        return [[]]
    trees = []
    for code in itertools.product(range(count), repeat=count - 2):
        degrees = [1 + code.count(vertex) for vertex in range(count)]
        edges = []
        for vertex in code:
            leaf = min(other for other in range(count) if degrees[other] == 1)
            edges.append((leaf, vertex))
            degrees[leaf] -= 1
            degrees[vertex] -= 1
        last = [other for other in range(count) if degrees[other] == 1]
        trees.append([*edges, (last[0], last[1])])
    return trees


def depth_from(edges: list[tuple[int, int]], count: int, root: int) -> int:
    reached, depth = {root}, 0
    while len(reached) < count:
        reached |= {b for a, b in (*edges, *((b, a) for a, b in edges)) if a in reached}
        depth += 1
    return depth


def edges_of(tree: Tree) -> list[tuple[int, int]]:
    return [(parent, channel) for channel, parent in enumerate(tree.parents) if channel != parent]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 9))
def test_no_tree_is_lighter_and_no_root_shallower(seed: int, count: int, n: int) -> None:
    rows = signs(count, n, seed=seed)
    tree = mst_order(rows)
    apart = (rows[:, None] != rows[None]).sum(-1)
    assert tree.weight == min(sum(int(apart[a, b]) for a, b in edges) for edges in cayley(count))
    assert all(tree.distances[c] == int(apart[c, p]) for c, p in enumerate(tree.parents))
    edges = edges_of(tree)
    assert len(edges) == count - 1
    assert tree.depth == depth_from(edges, count, tree.root) == min(depth_from(edges, count, r) for r in range(count))
    seen = {tree.root}
    for channel in tree.order:
        assert tree.parents[channel] in seen
        seen.add(channel)
    assert seen == set(range(count))


def test_there_are_as_many_trees_as_cayley_says() -> None:
    for count in (2, 3, 4, 5):
        assert len({tuple(sorted(map(tuple, map(sorted, edges)))) for edges in cayley(count)}) == count ** (count - 2)


def test_ties_make_a_star_and_not_a_chain() -> None:
    rows = torch.ones(7, 6)
    for channel in range(1, 7):
        rows[channel, channel - 1] = -1  # all differ from the first at one place, and from each other at two
    assert mst_order(rows).root == 0
    assert mst_order(rows).depth == 1
    assert mst_order(torch.ones(9, 4)).depth == 1  # equal channels
    assert mst_order(torch.ones(9, 4)).weight == 0


def test_trees_are_grown_from_many_roots_for_ties_may_end_deeper_from_one() -> None:
    bits = ["0100", "0110", "1110", "0011", "1100", "1000", "1011"]
    rows = torch.tensor([[2.0 * int(bit) - 1 for bit in row] for row in bits])
    # Grown from the first channel alone the least tree is 3 deep, hung at its centre; another of equal weight is 2.
    assert mst_order(rows).weight == 5 + 2  # steps of one place, and one of two from the last pair to the others
    assert mst_order(rows).depth == 2


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2)
)
def test_integers_in_tree_order_are_those_of_the_convolution(
    seed: int, channels: int, outputs: int, size: int, stride: int, padding: int
) -> None:
    torch.manual_seed(seed)
    conv = BinaryConv2d(
        channels,
        out_channels=outputs,
        kernel_size=size,
        stride=stride,
        padding=padding,
        activation=Straight(),
        scale="one",
        bias=False,
    ).eval()
    x = torch.randn(2, channels, 5, 4)
    assert torch.equal(MSTBinaryConv2d.from_conv(conv)(x), conv(x))


def test_a_network_in_tree_order_says_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        BinaryConv2d(4, out_channels=8, activation=Polynomial(), stride=2),
        nn.BatchNorm2d(8),
        BinaryConv2d(8, activation=Polynomial()),
        BinaryConv2d(8),
    ).eval()
    x = torch.randn(3, 1, 8, 8)
    made = compress(model)
    assert [type(layer) for layer in made][1::2] == [MSTBinaryConv2d] * 2
    assert isinstance(made[4], BinaryConv2d)  # its inputs are numbers
    assert torch.equal(made(x), model(x))
    assert made(x[:0]).shape == (0, 8, 3, 3)


def test_the_formula_counts_what_a_pass_does(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(BinaryConv2d(3, out_channels=10, activation=Polynomial(), stride=2, padding=0)).eval()
    x = torch.randn(1, 3, 9, 7)
    counted = 0
    plain = MSTBinaryConv2d.agreements

    def counting(self: MSTBinaryConv2d, rows: Tensor, signs: Tensor) -> Tensor:
        nonlocal counted
        counted += rows.numel()
        return plain(self, rows, signs)

    monkeypatch.setattr(MSTBinaryConv2d, "agreements", counting)
    compress(model)(x)
    found = bitops(model, x)["0"]
    assert found.tree == counted
    assert found.direct == 10 * 27 * 4 * 3
    assert found.saved == pytest.approx(1 - counted / found.direct)
    one = bitops(model)["0"]
    assert (one.tree * 12, one.direct * 12) == (found.tree, found.direct)
    assert one.direct_bits == 270
    assert one.tree_bits == 27 + (one.tree - 27) * 5 + 9 * 4
    assert not model[0]._forward_hooks


def test_the_loss_by_hand_and_its_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(BinaryConv2d(2, out_channels=5, activation=Polynomial()))
    weight = model[0].weight
    draw = torch.Generator().manual_seed(3)
    centres = torch.randint(0, 2, (2, 18), generator=draw).float() * 2 - 1
    rows = sign(weight.detach()).flatten(1)
    apart = (rows[:, None] != centres[None]).sum(-1)
    loss = mst_loss(model, 2, 0.25, seed=3)
    assert loss.item() == 0.25 * float(apart.min(1).values.sum())
    loss.backward()
    assert weight.grad is not None
    single = apart[:, 0] != apart[:, 1]
    assert bool(single.any())
    assert torch.equal(weight.grad.flatten(1)[single], -0.125 * centres[apart.argmin(1)][single])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        mst_loss(model, 1, 0.25).backward()
        optimizer.step()
    assert mst_loss(model, 1, 1.0).item() == 0.0
    assert mst_order(model[0].signs().detach()).weight == 0


def test_more_centres_are_never_farther() -> None:
    model = nn.Sequential(BinaryConv2d(3, out_channels=12, activation=Polynomial()))
    losses = [float(mst_loss(model, centers, 1.0).detach()) for centers in (1, 2, 4, 8)]
    assert losses == sorted(losses, reverse=True)


def test_what_has_no_tree_is_refused() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 1, 1))
    for wrong in (
        lambda: mst_order(torch.zeros(2, 3)),
        lambda: mst_order(torch.ones(3)),
        lambda: mst_order(torch.ones(0, 3)),
        lambda: MSTBinaryConv2d.from_conv(plain[0]),
        lambda: MSTBinaryConv2d.from_conv(BinaryConv2d(2)),
        lambda: compress(plain),
        lambda: bitops(plain),
        lambda: mst_loss(plain),
        lambda: mst_loss(nn.Sequential(BinaryConv2d(2, activation=Straight())), 0),
    ):
        with pytest.raises(BadInput):
            wrong()
