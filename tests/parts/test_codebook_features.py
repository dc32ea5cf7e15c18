"""Codebook features: the choice by a loop, gradients by hand, interventions, and grafts on models of four libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.bench.models import ByteTransformer
from torchgraft.errors import BadInput
from torchgraft.parts.memories.code_sites import CodeSite, code_sites
from torchgraft.parts.memories.codebook_features import CodebookBottleneck
from torchgraft.parts.memories.codebooks import Codebooks, add_codebooks

TOKENS = torch.randint(0, 16, (2, 6), generator=torch.Generator().manual_seed(0))


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def book(seed: int = 0, **options: object) -> CodebookBottleneck:
    torch.manual_seed(seed)
    return CodebookBottleneck(6, **options).double()  # type: ignore[arg-type]


def bytes_model(seed: int = 0) -> ByteTransformer:
    torch.manual_seed(seed)
    return ByteTransformer(16, 8, d_model=8, depth=2, num_heads=2, spread=1.0).double().eval()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([1, 2, 3]),
    st.sampled_from(["cosine", "euclid"]),
    st.sampled_from(["sum", "mean"]),
    st.integers(0, 99),
)
def test_output_is_the_sum_of_the_k_most_similar_codes(k: int, heads: int, kind: str, reduce: str, seed: int) -> None:
    part = book(seed, num_codes=7, k=k, num_heads=heads, similarity=kind, reduce=reduce)
    x, size = draw(2, 3, 6, seed=seed), 6 // heads
    found = part(x)
    for b in range(2):
        for t in range(3):
            for h in range(heads):
                a = x[b, t, h * size : (h + 1) * size]
                near = [
                    float(a @ c / (a.norm() * c.norm()) if kind == "cosine" else -(a - c).norm())
                    for c in part.codes.detach()[h]
                ]
                best = sorted(range(7), key=lambda i: -near[i])[:k]
                total = sum(part.codes[h, i] for i in best) / (k if reduce == "mean" else 1)
                torch.testing.assert_close(found[b, t, h * size : (h + 1) * size], total, rtol=0, atol=1e-12)


def test_a_scaled_code_returns_the_code() -> None:
    part = book(num_codes=9, k=1)
    scales = torch.rand(9, 1, dtype=torch.float64) * 5 + 0.01
    assert torch.equal(part((scales * part.codes[0])[None]), part.codes)
    nearest = book(num_codes=9, k=1, similarity="euclid")
    assert not torch.equal(nearest((0.01 * nearest.codes[0])[None]), nearest.codes)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_gradient_passes_straight_through_and_reaches_the_codes(reduce: str) -> None:
    part = book(num_codes=5, k=2, reduce=reduce)
    x, upstream = draw(1, 4, 6).requires_grad_(), draw(1, 4, 6, seed=2)
    part(x).backward(upstream)
    assert x.grad is not None
    assert part.codes.grad is not None
    assert torch.equal(x.grad, upstream)
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for token, codes in enumerate(part.choose(x)[0].tolist()):
        for code in codes:
            expected[code] += upstream[0, token] / (2 if reduce == "mean" else 1)
    torch.testing.assert_close(part.codes.grad[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("recon", "commitment"), [(2.0, 0.0), (0.0, 0.25), (1.0, 0.25)])
def test_the_codebooks_own_losses(recon: float, commitment: float) -> None:
    """recon draws codes only, commitment activations only; each is the mean over tokens of |ahat - a|^2."""
    model = nn.Sequential(nn.Linear(6, 6)).double()
    books = add_codebooks(model, ["0"], num_codes=5, k=2, recon_weight=recon, commitment=commitment)
    x = draw(2, 3, 6)
    with books.watch() as seen, books.bypass():
        a = model(x)
    assert float(seen.loss.detach()) == 0.0
    with books.watch() as seen:
        gap = model(x) - a
    expected = gap.detach().square().sum(-1).mean()
    torch.testing.assert_close(seen.loss.detach(), (recon + commitment) * expected)
    weight, codes = torch.autograd.grad(seen.loss, [model[0].weight, books.sites["0"].codes], allow_unused=True)
    assert (weight is not None and bool(weight.any())) == (commitment > 0)
    assert (codes is not None and bool(codes.any())) == (recon > 0)
    if recon and not commitment:
        by_hand = torch.zeros(5, 6, dtype=torch.float64)
        for row, chosen in zip(gap.detach().flatten(0, 1), books.sites["0"].choose(a).flatten(0, 1), strict=True):
            by_hand[chosen] += recon * 2 * row / 6
        torch.testing.assert_close(codes[0], by_hand)


def test_activating_what_is_active_changes_nothing() -> None:
    model = bytes_model()
    books = add_codebooks(model, num_codes=12, k=3)
    with books.watch() as seen:
        expected = model(TOKENS[:1, :1])
    active = {name: dict(enumerate(codes[0][:, 0].tolist())) for name, codes in seen.codes.items()}
    assert [len(heads) for heads in active.values()] == [2, 1, 2, 1]
    with books.activate(active):
        assert torch.equal(model(TOKENS[:1, :1]), expected)
    with books.activate(active, keep_others=True):
        assert torch.equal(model(TOKENS[:1, :1]), expected)
    first = next(iter(active))
    spare = min(set(range(12)) - set(active[first][0]))
    with books.activate({first: {0: [spare, *active[first][0][1:]]}}):
        assert not torch.equal(model(TOKENS[:1, :1]), expected)
    assert torch.equal(model(TOKENS[:1, :1]), expected)


def test_interventions_at_one_site() -> None:
    part = book(num_codes=8, k=3)
    model = nn.Sequential(nn.Identity())
    model[0].add_module("output_codebook", part)
    x = draw(1, 3, 6)
    cosine = nn.functional.normalize(x[0], dim=-1) @ nn.functional.normalize(part.codes[0], dim=-1).T
    order = cosine.argsort(-1, descending=True).tolist()
    books = Codebooks(model)
    plain = part.choose(x)[0].tolist()
    assert plain == [sorted(row[:3]) for row in order]
    last = order[1][-1]
    with books.activate({"0": last}, keep_others=True, positions=1):
        found = part.choose(x)[0].tolist()
        assert found == [plain[0], sorted([*order[1][:2], last]), plain[2]]  # the third most similar left
        assert part.choose(torch.cat([x, x, x])).tolist() == [found] * 3
    with books.activate({"0": [5]}, positions=[0, -1, 17]):
        assert part.choose(x)[0].tolist() == [[-1, -1, 5], plain[1], [-1, -1, 5]]
        assert torch.equal(part(x)[0, 0], part.codes[0, 5])
        torch.testing.assert_close(part(x)[0, 1], part.codes[0, plain[1]].sum(0), rtol=0, atol=1e-12)
    with books.activate({"0": [0, 1, 2, 3, 4]}):
        torch.testing.assert_close(part(x)[0, 2], part.codes[0, :5].sum(0), rtol=0, atol=1e-12)
    gone = order[0][1]
    with books.ablate({"0": gone}):
        assert part.choose(x)[0, 0].tolist() == sorted([order[0][0], order[0][2], order[0][3]])
    with books.ablate({"0": gone}, replace=False):
        assert part.choose(x)[0, 0].tolist() == [-1, *sorted([order[0][0], order[0][2]])]
        total = part.codes[0, order[0][0]] + part.codes[0, order[0][2]]
        torch.testing.assert_close(part(x)[0, 0], total, rtol=0, atol=1e-12)
    assert part.choose(x)[0].tolist() == plain
    assert part.changes == []


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=16, n_positions=32, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=16, **sizes), add_pooling_layer=False)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 99)
        return hidden


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int], bool]] = {
    "bytes": (bytes_model, {"blocks.1.attn.out": 2, "blocks.1.mlp": 1}, True),
    "gpt2": (gpt2, {"transformer.h.1.attn.c_proj": 2, "transformer.h.1.mlp": 1}, True),
    "llama": (llama, {"model.layers.1.self_attn.o_proj": 4, "model.layers.1.mlp": 1}, True),
    "bert": (bert, {"encoder.layer.1.attention.output.dense": 2, "encoder.layer.1.output.dense": 1}, True),
    "torch": (Encoder, {"encoder.layers.1.self_attn": 1, "encoder.layers.1.linear2": 1}, False),
}


def said(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(tokens)
    if isinstance(out, Tensor):
        return out
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_codebooks_that_hold_the_activations_change_nothing(name: str) -> None:
    make, expected, per_head = MODELS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    before, names = said(model, TOKENS), list(model.state_dict())
    books = add_codebooks(model, num_codes=TOKENS.numel(), k=1, similarity="euclid", per_head=per_head)
    sites = {site: book.num_heads for site, book in books.sites.items()}
    assert len(sites) == 4
    assert expected.items() <= sites.items()
    assert [each for each in model.state_dict() if "_codebook" not in each] == names
    random = said(model, TOKENS)
    assert float((random - before).abs().max()) > 1e-2
    with books.bypass(), books.watch(activations=True) as seen:
        torch.testing.assert_close(said(model, TOKENS), before, rtol=0, atol=1e-12)
    for site, each in books.sites.items():
        with torch.no_grad():
            each.codes.copy_(seen.activations[site][0])
    torch.testing.assert_close(said(model, TOKENS), before, rtol=0, atol=1e-12)
    twin = copy.deepcopy(model)
    for each in Codebooks(twin).sites.values():
        each.codes.data.zero_()
    assert float((said(twin, TOKENS) - before).abs().max()) > 1e-3
    torch.testing.assert_close(said(model, TOKENS), before, rtol=0, atol=1e-12)
    other = make().double().eval()
    add_codebooks(other, num_codes=TOKENS.numel(), k=1, similarity="euclid", per_head=per_head)
    other.load_state_dict(model.state_dict())
    assert torch.equal(said(other, TOKENS), said(model, TOKENS))
    assert torch.equal(said(books.remove(), TOKENS), before)
    assert list(model.state_dict()) == names
    add_codebooks(model, ["mlp"], num_codes=2, k=1)  # and there is room again


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [gpt2, llama])
def test_codes_steer_generation_with_and_without_cache(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    model = make().double().eval()
    books = add_codebooks(model, num_codes=6, k=2)
    for each in books.sites.values():
        each.codes.data.mul_(3)  # so that codes decide what is said

    def written(use_cache: bool = True) -> list[int]:
        out = model.generate(
            TOKENS[:1, :3], max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0, eos_token_id=None
        )
        return [int(token) for token in out[0]]

    plain = written()
    site = list(books.sites)[-1]
    steered = set()
    for code in range(6):
        with books.activate({site: [code]}):
            assert written(True) == written(False)
            steered.add(tuple(written()))
    assert len(steered) > 1
    assert written() == plain
    with books.ablate({site: 0}), books.watch() as seen:
        written()
    assert not any(bool((codes == 0).any()) for codes in seen.codes[site])


def test_precision_and_recall_by_hand() -> None:
    """Codes that are the embeddings of an identity model fire for their own token and no other."""
    model = nn.Sequential(nn.Embedding(4, 6), nn.Identity()).double()
    books = add_codebooks(model, [CodeSite("1", d_model=6)], num_codes=4, k=1)
    books.sites["1"].codes.data[0] = model[0].weight.data * 2
    batches = [torch.tensor([[0, 1, 1, 2]]), torch.tensor([[3, 1, 2, 0]])]
    found = books.code_search(lambda tokens: tokens % 2 == 1, batches)
    assert [(hit.code, hit.precision, hit.recall, hit.active) for hit in found] == [
        (1, 1.0, 0.75, 3),
        (3, 1.0, 0.25, 1),
        (0, 0.0, 0.0, 2),
        (2, 0.0, 0.0, 2),
    ]
    found = books.code_search(lambda tokens: tokens < 2, batches, min_recall=0.5, sites=["1"], top=1)
    assert [(hit.code, hit.precision, hit.recall) for hit in found] == [(1, 1.0, 0.6)]
    used = books.usage(batches)["1"]
    assert used.counts.tolist() == [[2.0, 3.0, 2.0, 1.0]]
    with pytest.raises(BadInput, match="one bool for each of 4 tokens"):
        books.code_search(lambda tokens: tokens[:, 1:] > 0, batches)
    with books.activate({"1": []}):  # nothing is active, and nothing is counted
        assert books.code_search(lambda tokens: tokens < 2, batches) == []


def test_start_finds_the_clusters_and_divides_by_k_where_codes_are_summed() -> None:
    centres = torch.eye(6, dtype=torch.float64)[:3] * 10
    tokens = torch.arange(30)[None] % 3
    for k, scale in ((1, 1.0), (2, 0.5)):
        model = nn.Sequential(nn.Embedding(3, 6), nn.Identity()).double()
        model[0].weight.data.copy_(centres)
        books = add_codebooks(model, [CodeSite("1", d_model=6)], num_codes=3, k=k)
        books.start_([tokens, tokens], generator=torch.Generator().manual_seed(0))
        found = books.sites["1"].codes[0].detach()
        found = found[found.argmax(-1).argsort()]
        torch.testing.assert_close(found, centres * scale)


def test_dead_codes_are_replaced_by_activations() -> None:
    part = book(num_codes=5, k=1, replace_after=3, replace_noise=0.0)
    x = part.codes.detach()[:, :2] * 2  # only codes 0 and 1 are ever nearest
    kept = part.codes.detach().clone()
    part.train()
    for step in range(3):
        part(x)
        assert part.idle.tolist() == [[0, 0, step + 1, step + 1, step + 1]]
    assert torch.equal(part.codes, kept)
    part.eval()(x)
    assert torch.equal(part.codes, kept)
    part.train()(x)
    assert torch.equal(part.codes[0, :2], kept[0, :2])
    for code in part.codes.detach()[0, 2:]:
        assert bool((code == x[0]).all(-1).any())


def test_whole_chains_and_tuples_are_sites() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.GRU(6, 4, batch_first=True)).double()
    books = add_codebooks(model, [CodeSite("0", d_model=6), CodeSite("1", d_model=4)], num_codes=5, k=1)
    assert list(books.sites) == ["0.1", "1"]
    out, state = model(draw(2, 3, 6))
    assert len(model[0]) == 2
    assert torch.equal(out.flatten(0, 1), books.sites["1"].codes[0, books.sites["1"].choose(out)[..., 0].flatten()])
    assert state.shape == (1, 2, 4)


def test_heads_of_one_codebook_can_be_put_together() -> None:
    sites = code_sites(bytes_model(), ["attention"], per_head=False)
    assert [(site.name, site.what, site.heads) for site in sites] == [
        ("blocks.0.attn.out", "input", 1),
        ("blocks.1.attn.out", "input", 1),
    ]


def test_bad_input() -> None:
    with pytest.raises(BadInput, match=r"heads of 'encoder\.layers\.0.self_attn'"):
        add_codebooks(Encoder())
    with pytest.raises(BadInput, match="no mlp known here"):
        add_codebooks(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(BadInput, match=r"no module 'blocks\.9\.mlp'"):
        add_codebooks(bytes_model(), ["blocks.9.mlp"])
    with pytest.raises(BadInput, match="width of the output of '0' is unknown"):
        add_codebooks(nn.Sequential(nn.Identity()), ["0"])
    with pytest.raises(BadInput, match="k not exceed num_codes"):
        add_codebooks(bytes_model(), num_codes=4, k=5)
    with pytest.raises(BadInput, match="similarity must be known, got 'dot'; choose from euclid, cosine"):
        CodebookBottleneck(6, similarity="dot")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="has no codebooks"):
        Codebooks(bytes_model())
    model = bytes_model()
    with pytest.raises(BadInput, match="has a codebook already"):
        add_codebooks(model, ["mlp", "blocks.0.mlp"], num_codes=8, k=2)
    with pytest.raises(BadInput, match="has no codebooks"):  # the refusal above left nothing behind
        Codebooks(model)
    books = add_codebooks(model, num_codes=8, k=2)
    for codes, words in (
        ({"blocks.0.mpl": [1]}, "did you mean 'blocks.0.mlp'"),
        ({"blocks.0.mlp": [8]}, "below 8"),
        ({"blocks.0.attn.out": [1]}, "codes as head -> codes"),
        ({"blocks.0.attn.out": {2: [1]}}, "heads below 2"),
    ):
        with pytest.raises(BadInput, match=words), books.activate(codes):
            pass
    with (
        pytest.raises(BadInput, match="at most 2 codes"),
        books.activate({"blocks.0.mlp": [1, 2, 3]}, keep_others=True),
    ):
        pass
    with pytest.raises(BadInput, match="at most 6 codes"), books.ablate({"blocks.0.mlp": range(7)}):
        pass
