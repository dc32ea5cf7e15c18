"""In-context learning beside gradient descent: the update that attention to demonstrations is, and one that is trained.

`Why Can GPT Learn In-Context? Language Models Implicitly Perform Gradient Descent as Meta-Optimizers
<https://arxiv.org/abs/2212.10559>`_ (Dai et al., 2023): without softmax, with demonstrations x'_i before a query q,

    W_V [X'; X] (W_K [X'; X])^T q = (W_ZSL + dW) q,  W_ZSL = W_V X (W_K X)^T,  dW = sum_i (W_V x'_i) (W_K x'_i)^T

as a linear layer after steps of gradient descent is W_0 x + sum_i e_i (x'_i . x), e_i the errors times -lr.

The identity holds for linear attention; with softmax it is an analogy, and later work disputes that trained models do
this (Shen et al., 2023, arXiv 2310.08540). What is measured is how alike the two are, beside controls.

Departures: random updates, the control, are of the weights, as large as the trained ones. In Kendall's rank correlation
the attention of finetuning to a training token is x'_i . x of the layer's inputs, by the equation above, and tokens of
answers are left out, which finetuning does not read. The paper's momentum attention is the mixer momentum-attention.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines import taps
from torchgraft.engines.recurrence.distance import rotary
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "Comparison",
    "Demonstrations",
    "attention_dual",
    "compare_icl_ft",
    "gradient_dual",
    "kendall",
    "rec2ftp",
    "sim_am",
    "sim_aou",
]

CARD = Card(
    key="icl-meta-optimizer",
    title="In-context learning as implicit gradient descent",
    seed_id=38,
    authors="Dai, Sun, Dong, Hao, Ma, Sui and Wei, 2023",
    reference="https://arxiv.org/abs/2212.10559",
    family="analyze/incontext",
    kind="analysis",
    engine=("attention", "taps"),
    equation="W_V [X'; X] (W_K [X'; X])^T q = (W_ZSL + dW) q,  dW = sum_i (W_V x'_i) (W_K x'_i)^T",
    entry="compare_icl_ft",
    capabilities=frozenset({"needs-data", "needs-labels"}),
    oracles=(
        "linear attention over demonstrations and context is W_ZSL + dW applied to the query, to 1e-10",
        "one step of gradient descent on squared errors is the sum of errors times inner products",
        "similarities of updates lie in [-1, 1], are 1 where finetuning's update is dW in a linear attention, and -1 "
        "for its opposite",
        "the share of corrected answers by hand; rank correlation equals scipy's",
        "finetuning moves the weights of keys and values of the named layers, in a copy, and nothing else",
    ),
    claim=Claim(
        text="A transformer of two layers trained on in-context linear classification, 8 features, 16 demonstrations: "
        "likeness of the update by context and by finetuning; bits a byte with momentum attention and without.",
        figure="mean SimAOU at least 0.1 above random updates; momentum attention at least 0.005 bits a byte better",
    ),
    choose_when="what a model takes from its demonstrations is to be compared with what finetuning on them would do",
    choose_instead="probes or circuits, where the mechanism itself is asked for: likeness proves no mechanism",
    bibtex="""@inproceedings{dai2023gpt,
  title={Why Can GPT Learn In-Context? Language Models Implicitly Perform Gradient Descent as Meta-Optimizers},
  author={Dai, Damai and Sun, Yutao and Dong, Li and Hao, Yaru and Ma, Shuming and Sui, Zhifang and Wei, Furu},
  booktitle={Findings of the Association for Computational Linguistics: ACL},
  year={2023}
}""",
)


def gradient_dual(errors: Tensor, inputs: Tensor) -> Tensor:
    """Return sum_i e_i x_i^T, what gradient descent adds to a linear layer: (N, O), (N, I) -> (O, I).

    Args:
        errors: -lr times the derivative of the loss by the layer's output, for each input.
        inputs: what the layer read.

    Raises:
        BadInput: the numbers of errors and inputs differ.
    """
    if errors.ndim != 2 or inputs.ndim != 2 or len(errors) != len(inputs):
        raise BadInput(f"errors (N, O) and inputs (N, I) must agree, got {tuple(errors.shape)}, {tuple(inputs.shape)}")
    return errors.mT @ inputs


def attention_dual(w_k: Tensor, w_v: Tensor, demos: Tensor) -> Tensor:
    """Return the update of weights that linear attention to ``demos`` is.

    Args:
        w_k: projection to keys.
        w_v: projection to values.
        demos: tokens of the demonstrations; given those of the query instead, W_ZSL is returned.

    Shapes:
        w_k: (K, D); w_v: (V, D); demos: (N, D) -> (V, K)

    Example:
        >>> attention_dual(torch.eye(2), torch.eye(2), torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([[1., 2.],
                [2., 5.]])

    Raises:
        BadInput: shapes disagree.
    """
    if w_k.ndim != 2 or w_v.ndim != 2 or demos.ndim != 2 or not w_k.shape[1] == w_v.shape[1] == demos.shape[1]:
        shapes = f"{tuple(w_k.shape)}, {tuple(w_v.shape)} and {tuple(demos.shape)}"
        raise BadInput(f"w_k must have shape (K, D), w_v (V, D) and demos (N, D), got {shapes}")
    return gradient_dual(demos @ w_v.mT, demos @ w_k.mT)


def rec2ftp(zero_shot: Tensor, in_context: Tensor, finetuned: Tensor) -> float:
    """Return which share of the answers that finetuning corrects the context corrects too; NaN where there is none.

    Args:
        zero_shot: True where the answer without demonstrations is right, (M,).
        in_context: the same with demonstrations as context.
        finetuned: the same after finetuning on them.
    """
    corrected = finetuned & ~zero_shot
    return float((in_context & corrected).sum() / corrected.sum())


def sim_aou(in_context: Tensor, zero_shot: Tensor, finetuned: Tensor) -> Tensor:
    """Return the cosine of two updates of a layer's output, by context and by finetuning: (..., D) thrice -> (...).

    Outputs are brought to unit length first, so that it is directions that count.
    """
    start = F.normalize(zero_shot, dim=-1)
    return F.cosine_similarity(
        F.normalize(in_context, dim=-1) - start, F.normalize(finetuned, dim=-1) - start, dim=-1, eps=1e-12
    )


def sim_am(left: Tensor, right: Tensor) -> Tensor:
    """Return the cosine of the scores before softmax that two passes give to the query's tokens: (..., S) -> (...)."""
    return F.cosine_similarity(left, right, dim=-1, eps=1e-12)


def kendall(left: Tensor, right: Tensor) -> Tensor:
    """Return Kendall's rank correlation (tau-b) along the last dimension, (..., N) twice -> (...).

    Example:
        >>> kendall(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])).item()
        0.3333333432674408
    """
    first, second = ((x[..., :, None] - x[..., None, :]).sign() for x in (left, right))
    lengths = (first.square().sum((-1, -2)) * second.square().sum((-1, -2))).sqrt()
    return (first * second).sum((-1, -2)) / lengths


@dataclass(frozen=True)
class Demonstrations:
    """Examples of a task, each a prompt, whose last token is where the answer is wanted, and the answer.

    Args:
        prompts: tokens, (N, P) integers or (N, P, F).
        answers: the tokens that follow each prompt in a context, (N, A) or (N, A, F).
        labels: what the model should answer, (N,).
    """

    prompts: Tensor
    answers: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        shapes = f"{tuple(self.prompts.shape)}, {tuple(self.answers.shape)} and {tuple(self.labels.shape)}"
        counts = {len(self.prompts), len(self.answers), len(self.labels)}
        if self.prompts.ndim < 2 or self.answers.ndim != self.prompts.ndim or self.labels.ndim != 1 or len(counts) > 1:
            raise BadInput(f"prompts (N, P, ...), answers (N, A, ...) and labels (N,) must agree, got {shapes}")

    def context(self) -> Tensor:
        """Return prompts and answers one after another, (1, N (P + A), ...)."""
        return torch.cat([self.prompts, self.answers], dim=1).flatten(0, 1)[None]


@dataclass(frozen=True)
class Comparison:
    """How alike a model's learning from context and by finetuning are.

    Args:
        accuracy: of answers ``"zero-shot"``, ``"in context"`` and ``"finetuned"``.
        rec2ftp: share of the answers that finetuning corrects which the context corrects too.
        sim_aou: likeness of the updates of the attention's output, by layer.
        sim_aou_random: the same of random updates of the weights, as large as the trained ones.
        sim_am: likeness of the scores of the query's tokens, in context and after finetuning, by layer.
        sim_am_before: the same in context and before finetuning.
        kendall: rank correlation of the attention to demonstrations in context and in finetuning, by layer.
        kendall_random: the same with random numbers for the latter.
    """

    accuracy: dict[str, float]
    rec2ftp: float
    sim_aou: dict[str, float]
    sim_aou_random: dict[str, float]
    sim_am: dict[str, float]
    sim_am_before: dict[str, float]
    kendall: dict[str, float]
    kendall_random: dict[str, float]


@dataclass(frozen=True)
class _Pass:
    """What a pass showed: logits of the last token, and by layer inputs, (M, T, D), and last outputs, (M, D)."""

    logits: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def _watched(model: nn.Module, names: list[str], tokens: Tensor) -> _Pass:
    with torch.no_grad(), taps.record(model, names, "input") as inputs, taps.record(model, names) as outputs:
        logits = model(tokens)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise BadInput("the model must return logits of every token, (B, T, C)")
    return _Pass(logits[:, -1], dict(inputs), {name: value[:, -1] for name, value in outputs.items()})


def _mixers(model: nn.Module, attention: str) -> dict[str, Any]:
    """Return the attentions by name.

    Raises:
        BadInput: one of them does not project queries, keys and values by one layer ``qkv``.
    """
    found: dict[str, Any] = taps.matching(model, attention)
    for name, mixer in found.items():
        if not isinstance(getattr(mixer, "qkv", None), nn.Linear) or not hasattr(mixer, "num_heads"):
            raise BadInput(
                f"attention must name mixers with a layer qkv and num_heads, such as softmax-attention; "
                f"{name!r} is {type(mixer).__name__}"
            )
    return found


def _query_rows(mixer: Any) -> int:
    """Return how many rows of ``qkv`` make queries; the others make keys and values."""
    groups = int(getattr(mixer, "num_kv_heads", mixer.num_heads))
    return int(mixer.qkv.out_features // (mixer.num_heads + 2 * groups) * mixer.num_heads)


def _scores(mixer: Any, x: Tensor) -> Tensor:
    """Return the scores before softmax that the last token gives to all, (M, T, D) -> (M, H, T)."""
    heads, groups = mixer.num_heads, int(getattr(mixer, "num_kv_heads", mixer.num_heads))
    size = _query_rows(mixer) // heads
    q, k, _ = torch.split(mixer.qkv(x), [heads * size, groups * size, groups * size], dim=-1)
    q, k = torch.unflatten(q, -1, (heads, size)), torch.unflatten(k, -1, (groups, size))
    if getattr(mixer, "rotary", False):
        place = torch.arange(x.shape[1], device=x.device)[None]
        q, k = rotary(q, place), rotary(k, place)
    k = k.repeat_interleave(heads // groups, dim=2)
    scores: Tensor = torch.einsum("mhk,mthk->mht", q[:, -1], k) * size**-0.5
    return scores


def _finetuned(
    model: nn.Module, demos: Demonstrations, names: list[str], lr: float
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a copy after one step a demonstration, and the inputs of the layers that it read, (N, P, D)."""
    twin = copy.deepcopy(model).requires_grad_(False)
    mixers: list[Any] = [twin.get_submodule(name) for name in names]
    weights = [mixer.qkv.weight.requires_grad_(True) for mixer in mixers]
    read: dict[str, list[Tensor]] = {name: [] for name in names}
    for prompt, label in zip(demos.prompts, demos.labels, strict=True):
        with torch.enable_grad(), taps.record(twin, names, "input") as inputs:
            loss = F.cross_entropy(twin(prompt[None])[:, -1], label[None])
        found = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for mixer, weight, slope in zip(mixers, weights, found, strict=True):
                weight[_query_rows(mixer) :] -= lr * slope[_query_rows(mixer) :]
        for name in names:
            read[name].append(inputs[name])
    twin.requires_grad_(False)
    return twin, {name: torch.cat(values) for name, values in read.items()}


def _randomised(model: nn.Module, trained: nn.Module, names: list[str], draw: torch.Generator) -> nn.Module:
    """Return a copy of ``model`` moved as far as ``trained`` was, layer by layer, in random directions."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            mixer, other = twin.get_submodule(name), trained.get_submodule(name)
            start, end = (each.get_submodule("qkv").get_parameter("weight") for each in (mixer, other))
            rows = _query_rows(mixer)
            away = torch.randn(start[rows:].shape, generator=draw).to(start)
            start[rows:] += away * ((end - start)[rows:].norm() / away.norm())
    return twin


def compare_icl_ft(
    model: nn.Module,
    demos: Demonstrations,
    queries: Tensor,
    targets: Tensor,
    *,
    lr: float,
    attention: str = "*mixer",
    seed: int = 0,
) -> Comparison:
    """Compare what demonstrations do to a model as context and by finetuning on them.

    Finetuning takes the demonstrations in order, one step of plain gradient descent each, on the weights of keys and
    values alone. It happens in a copy.

    Args:
        model: tokens (B, T) or (B, T, F) -> logits (B, T, C), with softmax attention.
        demos: the demonstrations.
        queries: prompts to be answered.
        targets: the right answers.
        lr: of the finetuning; to be chosen such that it helps.
        attention: name or glob of the attentions: modules with one layer ``qkv``, as the catalogue's have.
        seed: of the controls.

    Shapes:
        queries: (M, P) or (M, P, F); targets: (M,)

    Example:
        >>> from torchgraft.parts.blocks.sequence_model import SequenceModel
        >>> from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention
        >>> model = SequenceModel(8, 1, SoftmaxAttention, vocab_size=10)
        >>> demos = Demonstrations(torch.randint(8, (4, 3)), torch.full((4, 1), 9), torch.full((4,), 9))
        >>> found = compare_icl_ft(model, demos, torch.randint(8, (5, 3)), torch.full((5,), 9), lr=0.1)
        >>> list(found.sim_aou), abs(found.sim_aou["blocks.0.mixer"]) <= 1
        (['blocks.0.mixer'], True)

    Raises:
        BadInput: ``lr`` is not positive, shapes disagree, or the model is none that can be compared.
    """
    if not lr > 0:
        raise BadInput(f"lr must be positive, got {lr}")
    if queries.shape[1:] != demos.prompts.shape[1:] or targets.shape != (len(queries),) or not len(demos.labels):
        shapes = f"queries {tuple(queries.shape)} and targets {tuple(targets.shape)}"
        raise BadInput(f"queries must be prompts as those of demos, {tuple(demos.prompts.shape[1:])}, got {shapes}")
    names = list(_mixers(model, attention))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        draw = torch.Generator().manual_seed(seed)
        tuned, read = _finetuned(model, demos, names, lr)
        context = demos.context().expand(len(queries), *(-1 for _ in queries.shape[1:]))
        zero = _watched(model, names, queries)
        icl = _watched(model, names, torch.cat([context, queries], dim=1))
        ft = _watched(tuned, names, queries)
        chance = _watched(_randomised(model, tuned, names, draw), names, queries)
    finally:
        for module, mode in modes.items():
            module.training = mode
    right = {
        name: seen.logits.argmax(-1) == targets
        for name, seen in (("zero-shot", zero), ("in context", icl), ("finetuned", ft))
    }
    found: dict[str, dict[str, float]] = {}

    def note(what: str, name: str, value: Tensor) -> None:
        found.setdefault(what, {})[name] = float(value.mean())

    size = demos.prompts.shape[1] + demos.answers.shape[1]
    asked = torch.arange(len(demos.labels) * size, device=queries.device) % size < demos.prompts.shape[1]
    with torch.no_grad():
        for name in names:
            before, after = model.get_submodule(name), tuned.get_submodule(name)
            note("sim_aou", name, sim_aou(icl.outputs[name], zero.outputs[name], ft.outputs[name]))
            note("sim_aou_random", name, sim_aou(icl.outputs[name], zero.outputs[name], chance.outputs[name]))
            scores = _scores(before, icl.inputs[name])
            own = scores[..., -queries.shape[1] :]
            note("sim_am", name, sim_am(own, _scores(after, ft.inputs[name])))
            note("sim_am_before", name, sim_am(own, _scores(before, zero.inputs[name])))
            shown = scores[..., : len(asked)][..., asked]  # (M, H, N P)
            taught = ft.inputs[name][:, -1] @ read[name].flatten(0, 1).mT  # (M, N P)
            note("kendall", name, kendall(shown, taught[:, None]))
            note("kendall_random", name, kendall(shown, torch.randn(shown.shape, generator=draw).to(shown)))
    return Comparison(
        accuracy={name: float(value.float().mean()) for name, value in right.items()},
        rec2ftp=rec2ftp(*right.values()),
        **found,
    )
