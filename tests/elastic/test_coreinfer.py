"""CoreInfer: sparse decoding against the dense layer with neurons at zero, counts by hand, the model back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.meters import macs
from torchgraft.bench.models import ByteTransformer
from torchgraft.elastic.coreinfer import Clusters, cluster_cores, core_counts, core_overlap, core_sets, coreinfer
from torchgraft.engines.taps import intervene
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention


def plain() -> nn.Module:
    torch.manual_seed(0)
    return ByteTransformer(16, 12, d_model=8, depth=3, num_heads=2, spread=1.0).double().eval()


def gated() -> nn.Module:
    torch.manual_seed(0)
    return SequenceModel(8, 3, SoftmaxAttention, vocab_size=16, hidden=32).double().eval()


def tokens(rows: int = 1, length: int = 8) -> Tensor:
    return torch.randint(16, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", [plain(), gated()])
def test_all_neurons_are_the_dense_model(model: nn.Module) -> None:
    x = tokens(3)
    dense = model(x)
    with coreinfer(model, x, keep=1.0):
        assert torch.allclose(model(x), dense, atol=1e-12)
    assert torch.equal(model(x), dense)


@pytest.mark.parametrize("rows", [1, 3])
def test_sparse_is_dense_with_the_other_activations_at_zero(rows: int) -> None:
    model, x = plain(), tokens(rows)
    with coreinfer(model, x, keep=0.25) as cores:
        sets, sparse = cores.sets, model(x)
    assert all(len(chosen) == rows and all(len(one) == 8 for one in chosen) for chosen in sets.values())

    def masked(name: str) -> object:
        keep = torch.zeros(rows, 1, 32, dtype=torch.float64)
        for row, one in enumerate(sets[name]):
            keep[row, 0, one] = 1.0
        return lambda hidden: hidden * keep

    with intervene(model, {f"{name}.fc2": masked(name) for name in sets}, "input"):  # type: ignore[misc]
        assert torch.allclose(sparse, model(x), atol=1e-12)
    assert not torch.allclose(sparse, model(x))


def test_gated_layers_keep_the_neurons_of_the_gate() -> None:
    model, x = gated(), tokens()
    with coreinfer(model, x, keep=0.5) as cores:
        sparse, sets = model(x), cores.sets

    def masked(name: str) -> object:
        keep = torch.zeros(32, dtype=torch.float64)
        keep[sets[name][0]] = 1.0
        return lambda hidden: hidden * keep

    with intervene(model, {f"{name}.down": masked(name) for name in sets}, "input"):  # type: ignore[misc]
        assert torch.allclose(sparse, model(x), atol=1e-12)


def test_tokens_that_stay_inside_the_core_decode_as_dense() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 12, bias=False), nn.ReLU(), nn.Linear(12, 4))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.mlp(x)
            return out

    torch.manual_seed(0)
    model = Net().double()
    with torch.no_grad():  # neurons 0 to 5 read the first half of the input, the others the second
        model.mlp[0].weight.abs_()
        model.mlp[0].weight[:6, 2:] = 0
        model.mlp[0].weight[6:, :2] = 0
    first = torch.rand(1, 7, 4, dtype=torch.float64) * torch.tensor([1.0, 1.0, 0.0, 0.0])
    dense = model(first)
    with coreinfer(model, first[:, :4], token_keep=1.0, keep=0.5) as cores:
        assert cores.sets["mlp"][0].tolist() == [0, 1, 2, 3, 4, 5]
        assert torch.allclose(model(first), dense, atol=1e-12)
        assert not torch.allclose(model(first.flip(-1)), first.flip(-1))


def test_counts_by_hand_and_in_sum() -> None:
    activations = torch.randn(9, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).relu()
    counts = core_counts(activations, 0.4)
    each = int(0.4 * float((activations > 0).sum(1).double().mean()))
    assert int(counts.sum()) == 9 * each
    wanted = [sum(int(j in row.topk(each).indices) for row in activations) for j in range(20)]
    assert counts.tolist() == wanted
    core = core_sets(activations, keep=0.35)
    assert len(core) == 7
    assert int(counts[core].min()) >= max(counts[j] for j in range(20) if j not in core.tolist())


def test_work_falls_by_what_is_left_out() -> None:
    model, x = plain(), tokens()
    dense = macs(model, x)
    with coreinfer(model, x, keep=0.25):
        assert dense - macs(model, x) == 3 * 8 * 24 * 2 * 8


def test_layers_can_be_left_dense_and_the_model_is_back_after_an_error() -> None:
    model, x = plain(), tokens()
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="stop"), coreinfer(model, x, layers=slice(1, -1)) as cores:  # noqa: PT012
        assert list(cores.sets) == ["blocks.1.mlp"]
        raise RuntimeError("stop")
    assert dict(model.named_modules()) == before


def test_overlap_is_one_with_itself_and_symmetric() -> None:
    model = plain()
    overlap = core_overlap(model, [tokens(), tokens(1, 5), torch.full((1, 8), 3)])
    assert torch.equal(overlap.diagonal(), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(overlap, overlap.T)
    assert float(overlap.min()) < 1


def test_clusters_give_the_neurons_of_the_kind_of_text() -> None:
    model = plain()
    texts = [torch.full((1, 6), kind) for kind in (1, 9) for _ in range(3)]
    clusters = cluster_cores(model, texts, k=2, keep=0.25)
    assert isinstance(clusters, Clusters)
    assert all(len(one) == 8 for one in clusters.sets["blocks.2.mlp"])
    with coreinfer(model, torch.full((1, 2), 9), keep=0.25) as own:
        wanted = own.sets
    with coreinfer(model, torch.full((1, 2), 9), mode="similarity", clusters=clusters) as cores:
        common = torch.isin(cores.sets["blocks.0.mlp"][0], wanted["blocks.0.mlp"][0])
        assert float(common.double().mean()) > 0.5  # 0.25 by chance
        chosen = cores.sets["blocks.0.mlp"][0].tolist()
    with coreinfer(model, torch.full((1, 2), 1), mode="similarity", clusters=clusters) as cores:
        assert cores.sets["blocks.0.mlp"][0].tolist() != chosen
    assert len(cluster_cores(model, texts, keep=0.25).centres) == 2, "there are no more kinds than that"
    varied = [torch.full((1, 6), kind) for kind in range(10)]
    assert 4 <= len(cluster_cores(model, varied, keep=0.25).centres) <= 8


@pytest.mark.parametrize(
    "bad", [{"keep": 0.0}, {"token_keep": 1.5}, {"mode": "similarity"}, {"mode": "other"}, {"layers": slice(5, 6)}]
)
def test_bad_input_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(BadInput), coreinfer(plain(), tokens(), **bad):  # type: ignore[arg-type]
        pass


def test_another_batch_than_the_prompts_is_refused() -> None:
    model = plain()
    with coreinfer(model, tokens(2)), pytest.raises(BadInput, match="2 sequences"):
        model(tokens(3))


def test_a_prompt_that_is_read_again_runs_whole() -> None:
    model, x = plain(), tokens(2)
    dense = model(x)
    with coreinfer(model, x[:, :5], keep=0.25, reread=True):
        assert torch.allclose(model(x)[:, :5], dense[:, :5], atol=1e-12)
        assert not torch.allclose(model(x)[:, 5:], dense[:, 5:])
