"""Joint attention within discs as a processor of attentions that follow the protocol of diffusers."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgraft.errors import BadInput
from torchgraft.generate.clear_diffusers import DiscAttnProcessor, set_disc_processors

DOUBLE = torch.float64
WIDTH, HEADS, SIZE = 24, 3, 8


class _FullAttention:
    """All tokens to all, by the definition: the oracle, pair by pair of heads and in complex numbers."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        streams = [(hidden_states, "to_q", "to_k", "to_v", attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            streams.insert(0, (encoder_hidden_states, *names, attn.norm_added_q, attn.norm_added_k))
        parts: list[list[Tensor]] = [[], [], []]
        for x, *names, norm_q, norm_k in streams:
            for place, norm in enumerate((norm_q, norm_k, None)):
                heads = getattr(attn, names[place])(x).view(len(x), -1, HEADS, SIZE)
                parts[place].append(heads if norm is None else norm(heads))
        q, k, v = (torch.cat(part, dim=1).transpose(1, 2) for part in parts)  # (B, H, T, K)
        if image_rotary_emb is not None:
            turn = torch.complex(image_rotary_emb[0][:, ::2], image_rotary_emb[1][:, ::2])
            q, k = (
                torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2) for x in (q, k)
            )
        y = (q @ k.mT / math.sqrt(SIZE)).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2)
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        image = y[:, text:]
        for layer in attn.to_out or ():
            image = layer(image)
        if encoder_hidden_states is None:
            return image
        return image, y[:, :text] if attn.to_add_out is None else attn.to_add_out(y[:, :text])


class _Attention(nn.Module):
    """A stand-in for the attentions of diffusers: their names, and how they call their processor."""

    def __init__(
        self, *, joint: bool = False, normed: bool = False, pre_only: bool = False, last: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.is_cross_attention = HEADS, False
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(SIZE) if normed else None for _ in range(2))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(SIZE) if normed and joint else None for _ in range(2))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            nn.Linear(WIDTH, WIDTH) if joint else None for _ in range(3)
        )
        self.to_out = None if pre_only else nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)])
        self.to_add_out = nn.Linear(WIDTH, WIDTH) if joint and not last else None
        self.processor: Any = _FullAttention()

    def set_processor(self, processor: Any) -> None:
        if isinstance(self.processor, nn.Module) and not isinstance(processor, nn.Module):
            self._modules.pop("processor")
        elif isinstance(processor, nn.Module):
            self.__dict__.pop("processor", None)
        self.processor = processor

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        known = inspect.signature(self.processor.__call__).parameters
        options = {name: value for name, value in options.items() if name in known}
        return self.processor(
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **options,
        )


def _attention(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    attn = _Attention(**options).double().eval()
    for module in attn.modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return attn


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _turn(tokens: int) -> tuple[Tensor, Tensor]:
    angle = _draw(tokens, SIZE // 2, seed=9).repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin()


KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "flux, two streams": ({"joint": True, "normed": True}, True),
    "flux, one stream": ({"normed": True, "pre_only": True}, True),
    "sd3": ({"joint": True}, False),
    "sd3.5, normed": ({"joint": True, "normed": True}, False),
    "sd3, last block": ({"joint": True, "last": True}, False),
    "image only": ({}, False),
}


def _inputs(kind: str, grid: tuple[int, int], text: int) -> dict[str, Any]:
    options, rotary = KINDS[kind]
    tokens = grid[0] * grid[1]
    given: dict[str, Any] = {"image_rotary_emb": _turn(text + tokens)} if rotary else {}
    if options.get("joint"):
        return given | {
            "hidden_states": _draw(2, tokens, WIDTH),
            "encoder_hidden_states": _draw(2, text, WIDTH, seed=1),
        }
    return given | {"hidden_states": _draw(2, tokens + (text if rotary else 0), WIDTH)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_radius_beyond_the_image_is_the_full_joint_attention(kind: str) -> None:
    attn, x = _attention(**KINDS[kind][0]), _inputs(kind, (4, 6), 3)
    expected, names = attn(**x), attn.state_dict().keys()
    assert set_disc_processors(nn.ModuleDict({"attn": attn}), grid=(4, 6), radius=5.84) == ["attn"]  # sqrt(34) is 5.83
    assert attn.state_dict().keys() == names
    torch.testing.assert_close(attn(**x), expected, rtol=1e-10, atol=1e-12)
    attn.set_processor(DiscAttnProcessor(grid=(4, 6), radius=5.83))
    found = attn(**x)
    image, full = (found, expected) if isinstance(expected, Tensor) else (found[0], expected[0])
    assert (image - full).abs().max() > 1e-6, "the far corners are not seen"
    attn.set_processor(_FullAttention())
    assert torch.equal(
        torch.cat([each.flatten() for each in attn(**x)]), torch.cat([each.flatten() for each in expected])
    )
    single = attn.float()
    single.set_processor(DiscAttnProcessor(grid=(4, 6), radius=9.0))
    found = single(**{name: value.float() if isinstance(value, Tensor) else value for name, value in x.items()})
    for each, wanted in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
        assert each.dtype == torch.float32
        torch.testing.assert_close(each.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_outside_of_the_disc_the_derivative_is_zero(kind: str) -> None:
    grid, text, radius = (4, 5), 2, 2.0
    attn, x = _attention(**KINDS[kind][0]), _inputs(kind, grid, text)
    attn.set_processor(DiscAttnProcessor(grid=grid, radius=radius))
    rest = {name: value for name, value in x.items() if name not in ("hidden_states", "encoder_hidden_states")}
    joint = "encoder_hidden_states" in x
    words = text if joint or rest else 0
    first = x["hidden_states"][:1]
    sequence = torch.cat([x["encoder_hidden_states"][:1], first], dim=1) if joint else first

    def reach(sequence: Tensor) -> Tensor:
        if not joint:
            y: Tensor = attn(sequence, **rest)
        else:
            image, said = attn(sequence[:, words:], encoder_hidden_states=sequence[:, :words], **rest)
            y = torch.cat([said, image], dim=1)
        return y.sum((0, 2)) if y.shape[-1] != 1 else y

    moved = torch.autograd.functional.jacobian(reach, sequence)[:, 0].abs().amax(-1)
    place = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    near = (place[:, None] - place).square().sum(-1) < radius**2
    seen = torch.ones(words + 20, words + 20, dtype=torch.bool)
    seen[words:, words:] = near
    assert torch.equal(moved > 0, seen)


def test_coarse_keys_are_seen_by_images_and_not_by_text() -> None:
    grid, text = (4, 4), 2
    attn, x = _attention(joint=True, normed=True), _inputs("flux, two streams", grid, text)
    plain, coarse = DiscAttnProcessor(grid=grid, radius=1.5), DiscAttnProcessor(grid=grid, radius=1.5, down=2)
    nn.init.uniform_(coarse.spatial, 0.1, 0.4)
    attn.set_processor(plain)
    without = attn(**x)
    attn.set_processor(coarse.double())
    image, words = attn(**x)
    torch.testing.assert_close(words, without[1], rtol=1e-12, atol=1e-12)
    assert (image - without[0]).abs().max() > 1e-3
    assert "processor.spatial" in attn.state_dict()
    # one token by hand: its own disc, the text and four sums of turned keys
    cos, sin = x["image_rotary_emb"]
    q, k, v = ([], [], [])  # type: ignore[var-annotated]
    for given, names, norms in (
        (x["encoder_hidden_states"], ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")),
        (x["hidden_states"], ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
    ):
        parts = [getattr(attn, name)(given[0]).view(-1, HEADS, SIZE) for name in names]
        q.append(getattr(attn, norms[0])(parts[0]))
        k.append(getattr(attn, norms[1])(parts[1]))
        v.append(parts[2])

    def turned(x: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        cosine, sine = cos[:, None, ::2], sin[:, None, ::2]
        return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).flatten(-2)

    queries, keys, values = turned(torch.cat(q)), turned(torch.cat(k)), torch.cat(v)
    sums = []
    for each in (keys, values):
        patches = each[text:].view(2, 2, 2, 2, HEADS, SIZE).transpose(1, 2).reshape(4, 4, HEADS, SIZE)
        sums.append(torch.einsum("rphk,p->rhk", patches, coarse.spatial))
    token, disc = 5, [0, 1, 2, 4, 5, 6, 8, 9, 10]  # row 1, column 1 of 4 x 4; the corners are 1.41 away
    own = [*range(text), *(text + each for each in disc)]
    weights = (
        torch.einsum("hk,shk->hs", queries[text + token], torch.cat([keys[own], sums[0]])) / math.sqrt(SIZE)
    ).softmax(-1)
    mixed = torch.einsum("hs,shv->hv", weights, torch.cat([values[own], sums[1]])).flatten()
    torch.testing.assert_close(image[0, token], attn.to_out[0](mixed), rtol=1e-10, atol=1e-12)
    image.sum().backward()
    assert coarse.spatial.grad is not None
    assert bool((coarse.spatial.grad != 0).all())


def test_strips_and_larger_images_are_those_of_the_method() -> None:
    attn, x = _attention(joint=True), _inputs("sd3", (6, 4), 2)
    attn.set_processor(DiscAttnProcessor(grid=(6, 4), radius=2.5))
    whole = attn(**x)[0]
    attn.set_processor(DiscAttnProcessor(grid=(6, 4), radius=2.5, strips=3))
    torch.testing.assert_close(attn(**x)[0], whole, rtol=1e-10, atol=1e-12)
    attn.set_processor(DiscAttnProcessor(grid=(6, 4), radius=9.0, train_tokens=4))
    scaled = attn(**x)[0]
    with torch.no_grad():
        stretch = math.sqrt(math.log(24) / math.log(4))
        for layer in (attn.to_q, attn.add_q_proj):
            layer.weight.mul_(stretch)
            layer.bias.mul_(stretch)
    attn.set_processor(_FullAttention())
    torch.testing.assert_close(attn(**x)[0], scaled, rtol=1e-10, atol=1e-12)


def test_only_attentions_within_the_image_are_changed() -> None:
    foreign = _attention()
    foreign.is_cross_attention = True
    model = nn.Sequential(_attention(), nn.Linear(2, 2), foreign, _attention(joint=True))
    assert set_disc_processors(model, grid=3, radius=2, down=3) == ["0", "3"]
    assert isinstance(foreign.processor, _FullAttention)
    first, last = model[0].processor, model[3].processor
    assert isinstance(first, DiscAttnProcessor)
    assert first is not last, "each learns sums of its own"
    assert first.spatial is not None
    assert first.spatial.dtype == DOUBLE


def test_what_cannot_be_used_is_refused() -> None:
    attn, x = _attention(), _draw(1, 9, WIDTH)
    attn.set_processor(DiscAttnProcessor(grid=3, radius=2))
    with pytest.raises(BadInput, match="attention_mask must be None"):
        attn(x, attention_mask=torch.ones(9, 9))
    with pytest.raises(BadInput, match="set processors for the size that is drawn"):
        attn(x[:, :8])
    with pytest.raises(BadInput, match="set processors for the size that is drawn"):
        attn(torch.cat([x, x], dim=1), encoder_hidden_states=x)
    with pytest.raises(BadInput, match="_Attention lacks some"):
        attn(x, encoder_hidden_states=x)
    with pytest.raises(BadInput, match=r"must have shape \(B, T, D\)"):
        attn(x[..., None])
    with pytest.raises(BadInput, match="Linear holds none such"):
        set_disc_processors(nn.Linear(2, 2), grid=2)
    for options in ({"radius": 0.0}, {"down": 2}, {"train_tokens": 1}, {"strips": 4}):
        with pytest.raises(BadInput, match=next(iter(options))):
            DiscAttnProcessor(grid=3, **options)  # type: ignore[arg-type]


def test_diffusers_is_not_imported() -> None:
    code = "import sys, torchgraft.generate.clear_diffusers; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
