"""Discrete key-value bottleneck: only fetched values move, and what that implies, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.errors import BadInput
from torchgraft.parts.memories.discrete_key_value_bottleneck import BottleneckClassifier, DiscreteKeyValueBottleneck


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(*, seed: int = 0, **options: object) -> DiscreteKeyValueBottleneck:
    torch.manual_seed(seed)
    sizes = {"codebooks": 3, "pairs": 6, "dim_key": 2, "dim_value": 4, **options}
    return DiscreteKeyValueBottleneck(5, **sizes).double()  # type: ignore[arg-type]


def ready(**options: object) -> DiscreteKeyValueBottleneck:
    """Return a bottleneck with keys from data and values that are not zero."""
    head = build(**options)
    head.init_keys([draw(64, 5, seed=9)], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.values.copy_(draw(*head.values.shape, seed=8))
    return head


def labels(count: int, classes: int = 4) -> Tensor:
    return torch.arange(count) % classes


def fetched(head: DiscreteKeyValueBottleneck, z: Tensor) -> Tensor:
    """Return which values a batch fetches, (C, N)."""
    return torch.stack([torch.bincount(row, minlength=head.values.shape[1]) for row in head.fetch(z)]) > 0


def test_forward_by_hand() -> None:
    head, z = ready(), draw(7, 5)
    for i in range(7):
        total = torch.zeros(4).double()
        for c in range(3):
            distances = (head.projection[c] @ z[i] - head.keys.codes[c]).square().sum(-1)
            total += head.values[c, distances.argmin()]
        torch.testing.assert_close(head(z)[i], total / 3)
    bare = ready(decoder="none")
    torch.testing.assert_close(bare(z).mean(1), head(z))
    assert bare(z).shape == (7, 3, 4)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_step_leaves_what_it_did_not_fetch_bit_for_bit(seed: int) -> None:
    head, batch, others = ready(pairs=20), draw(4, 5, seed=seed), draw(60, 5, seed=seed + 1)
    head.values.data[0, 0] = -0.0
    before, said, mask = head.values.detach().clone(), head(others).detach(), fetched(head, batch)
    head.fit_values([(batch, labels(4))], lr=3.0)
    same = (head.values == before) & (head.values.signbit() == before.signbit())
    assert bool(same[~mask].all())
    assert not bool(same.all(-1)[mask].any())
    shares = mask.gather(1, head.fetch(others)).any(0)  # (60,)
    assert torch.equal(head(others)[~shares], said[~shares])
    assert not bool((head(others)[shares] == said[shares]).all(-1).any())


def test_step_is_the_gradient_by_hand() -> None:
    head, z, target = ready(), draw(6, 5), labels(6)
    indices = head.fetch(z)
    error = (head(z).softmax(-1) - F.one_hot(target, 4)) / 6
    expected = head.values.detach().clone()
    for c in range(3):
        for b in range(6):
            expected[c, indices[c, b]] -= 0.7 * error[b].detach() / 3
    head.fit_values([(z, target)], lr=0.7)
    torch.testing.assert_close(head.values.detach(), expected, rtol=0, atol=1e-12)


def test_step_equals_plain_descent_of_torch() -> None:
    head, other = ready(), ready()
    stream = [(draw(6, 5, seed=seed), labels(6)) for seed in range(4)]
    assert head.fit_values(stream, lr=0.7) == 4
    optimizer = torch.optim.SGD(other.parameters(), lr=0.7)
    for z, target in stream:
        optimizer.zero_grad()
        F.cross_entropy(other(z), target).backward()
        optimizer.step()
    torch.testing.assert_close(head.values, other.values, rtol=0, atol=1e-12)


def test_momentum_and_decay_would_touch_the_others() -> None:
    for options in ({"momentum": 0.9}, {"weight_decay": 0.1}):
        head = ready(pairs=20)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.7, **options)  # type: ignore[arg-type]
        first, second = draw(3, 5), draw(3, 5, seed=1)
        for z in (first, second):
            before, mask = head.values.detach().clone(), fetched(head, z)
            optimizer.zero_grad()
            F.cross_entropy(head(z), labels(3)).backward()
            optimizer.step()
        assert not torch.equal(head.values[~mask], before[~mask])


def test_disjoint_tasks_train_to_the_same_values_in_any_order() -> None:
    loss = lambda out, target: F.cross_entropy(out, target, reduction="sum")  # noqa: E731
    head = ready(codebooks=1, pairs=20)
    z = draw(200, 5, seed=3)
    left = z[head.fetch(z)[0] < 10][:20]
    right = z[head.fetch(z)[0] >= 10][:20]
    assert not bool((fetched(head, left) & fetched(head, right)).any())
    tasks = [(left, labels(20)), (right, labels(20))]
    joint = [(torch.cat([left, right]), torch.cat([labels(20)] * 2))]
    found = []
    for stream in (tasks * 3, joint * 3, [tasks[0]] * 3 + [tasks[1]] * 3, tasks[::-1] * 3):
        twin = ready(codebooks=1, pairs=20)
        twin.fit_values(stream, lr=0.2, loss=loss)
        found.append(twin.values.detach())
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[3])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    # A linear head has no such freedom: the order decides what it ends as.
    weights = []
    for stream in ([tasks[0]] * 3 + [tasks[1]] * 3, [tasks[1]] * 3 + [tasks[0]] * 3):
        linear = nn.Linear(5, 4).double()
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        for z, target in stream:
            grads = torch.autograd.grad(loss(linear(z), target), list(linear.parameters()))
            with torch.no_grad():
                for value, grad in zip(linear.parameters(), grads, strict=True):
                    value -= 0.2 * grad
        weights.append(linear.weight.detach())
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)


def test_a_key_on_every_point_is_the_nearest_neighbour() -> None:
    points, target, queries = draw(30, 5), labels(30), draw(40, 5, seed=1)
    head = build(codebooks=1, pairs=30, dim_key=5)
    head.projection.copy_(torch.eye(5))
    head.init_keys([points], generator=torch.Generator().manual_seed(0))
    head.fit_values([(points, target)], lr=1.0)
    torch.testing.assert_close(head.keys.codes[0][head.fetch(points)[0]], points, rtol=0, atol=1e-12)
    expected = target[torch.cdist(queries, points).argmin(-1)]
    assert torch.equal(head(queries).argmax(-1), expected)
    assert torch.equal(head(points).argmax(-1), target)


def test_keys_are_the_running_means_and_labels_are_not_looked_at() -> None:
    batches = [draw(40, 5, seed=seed) for seed in range(3)]
    head, other = build(), build()
    head.init_keys(batches, generator=torch.Generator().manual_seed(0), dead_after=100)
    other.init_keys([(z, "no label") for z in batches], generator=torch.Generator().manual_seed(0), dead_after=100)  # type: ignore[misc]
    assert torch.equal(head.keys.codes, other.keys.codes)
    # The same by hand, for the first codebook: n <- g n + (1 - g) #, m <- g m + (1 - g) sum.
    twin = build()
    twin.init_keys(batches[:1], generator=torch.Generator().manual_seed(0))
    counts, sums = twin.keys.counts[0].clone(), twin.keys.sums[0].clone()
    codes = twin.keys.codes[0].clone()
    for z in batches[1:]:
        y = z @ twin.projection[0].T
        nearest = torch.cdist(y, codes).argmin(-1)
        for i in range(6):
            counts[i] = 0.95 * counts[i] + 0.05 * (nearest == i).sum().item()
            sums[i] = 0.95 * sums[i] + 0.05 * y[nearest == i].sum(0)
        codes = sums / counts[:, None]
    torch.testing.assert_close(head.keys.codes[0], codes, rtol=0, atol=1e-12)


def test_keys_without_memory_are_the_means_of_the_batch() -> None:
    head = build(decay=0.0)
    z, last = draw(40, 5), draw(40, 5, seed=1)
    head.init_keys([z], generator=torch.Generator().manual_seed(0))
    chosen = head.fetch(last)
    head.init_keys([z, last], generator=torch.Generator().manual_seed(0))
    projected = head.project(last)
    for c in range(3):
        for i in range(6):
            mine = projected[c][chosen[c] == i]
            if len(mine):
                torch.testing.assert_close(head.keys.codes[c, i], mine.mean(0), rtol=0, atol=1e-12)


def test_dead_keys_move_to_where_the_data_are() -> None:
    far, near = 100 + draw(12, 5), draw(40, 5, seed=1)
    stuck, moved = build(), build()
    stuck.init_keys([far] + [near] * 6, dead_after=99, generator=torch.Generator().manual_seed(0))
    moved.init_keys([far] + [near] * 6, dead_after=2, generator=torch.Generator().manual_seed(0))
    assert fetched(stuck, near).float().mean() < 0.5
    assert fetched(moved, near).float().mean() > 0.8


def test_keys_stay_while_values_learn() -> None:
    head = ready()
    before = {name: value.clone() for name, value in head.state_dict().items() if name != "values"}
    head.fit_values([(draw(8, 5), labels(8))] * 3)
    assert all(torch.equal(head.state_dict()[name], value) for name, value in before.items())
    assert [name for name, _ in head.named_parameters()] == ["values"]


def test_new_keys_forget_the_values() -> None:
    head = ready()
    head.init_keys([draw(20, 5)])
    assert not bool(head.values.any())


def test_rounding_of_the_input_dtype_chooses_no_key() -> None:
    head, z = ready().float(), draw(500, 5).float()
    expected = head.double().fetch(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.float().fetch(z), expected)
    lowered = torch.cdist((z.bfloat16() @ head.projection.mT.bfloat16()).float(), head.keys.codes).argmin(-1)
    assert not torch.equal(lowered, expected)


def test_classifier_freezes_its_encoder() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    model = BottleneckClassifier(encoder, DiscreteKeyValueBottleneck(5, codebooks=8, pairs=16, dim_value=3)).train()
    assert model.training
    assert not encoder.training
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    x = draw(60, 6).float()
    target = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    model.init_keys([x])
    for _ in range(30):
        model.fit_values([(x, target)])
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in before.items())
    assert (model(x).argmax(-1) == target).float().mean() > 0.8
    model(x).sum().backward()
    assert all(value.grad is None for value in encoder.parameters())


@pytest.mark.parametrize(
    "call",
    [
        lambda: build(codebooks=0),
        lambda: build(pairs=0),
        lambda: build(dim_key=0),
        lambda: build(dim_value=-1),
        lambda: build(decay=1.0),
        lambda: build(decoder="mean"),
        lambda: build().init_keys([]),
        lambda: build().fit_values([], lr=0.0),
        lambda: build()(torch.zeros(2, 4)),
        lambda: build()(torch.zeros(2, 3, 5)),
    ],
)
def test_bad_input_is_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(BadInput):
        call()
