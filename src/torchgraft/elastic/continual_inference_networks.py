"""Turn a trained clip network into one that takes frame by frame, with the same outputs and a fraction of the work.

`Efficient Online Processing with Deep Neural Networks <https://arxiv.org/abs/2306.13474>`_ (Hedegaard, 2023): continual
convolutions, pools, residuals and encoder layers, and structured pruning adapters.

    o_t = b + sum_k W_k x_{t - (K - 1 - k) D};  delay D (K - 1) - p;  W_hat = (W + W_up W_down) * (m_out m_in^T)

It is no lever of ``fit``: what it makes takes a frame and a state where the model took a clip, so that one pass of the
two is not the same work.

Departures:
- The ring of a convolution holds the last D(K - 1) frames, not the partial sums of outputs to come: the same K products
  a frame, summed in the clip's order, so that outputs agree to rounding.
- What a trace finds is converted, not modules by name; streams that meet wait for each other, which is the delay of a
  residual branch, and what was converted is compared with the clip network, place by place.
- Zero padding in time is refused where a whole clip is read later, unless ``edges="stream"``; elsewhere the stream
  begins and (with ``last=True``) ends with the same zeros as the clip.
- Retroactive sums are float64 with a shift for each row, and are formed anew now and then. Tokens that were read off a
  retroactive layer are recomputed at every step: only its attention is O(n).
- A convolution's adapter is a K x K convolution to ``rank`` channels and a 1 x 1 one from them; biases stay frozen.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card, Claim
from torchgraft.engines.streaming import (
    ContinualNetwork,
    RecyclingPositionalEncoding,
    RetroactiveAttention,
    SingleOutputAttention,
)
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "SPLoRA",
    "ContinualNetwork",
    "RecyclingPositionalEncoding",
    "RetroactiveAttention",
    "SingleOutputAttention",
    "to_continual",
]

CARD = Card(
    key="continual-inference-networks",
    title="Continual inference networks",
    seed_id=20,
    authors="Hedegaard, 2023",
    reference="https://arxiv.org/abs/2306.13474",
    family="elastic",
    kind="tool",
    engine=("recurrence", "surgery"),
    equation="o_t = b + sum_k W_k x_{t - (K - 1 - k) D}; delay D (K - 1) - p; W_hat = (W + W_up W_down) m_out m_in^T",
    entry="to_continual",
    oracles=(
        "in float64 every output of a stream equals the clip network's to 1e-9: dilated, strided, grouped and padded "
        "convolutions, pools, a residual, an ST-GCN block, single-output and retroactive attention, in any chunks",
        "the delay formula gives the step of the first output, and the stride the steps between outputs",
        "SPLoRA starts as the layer itself bit for bit; fused, and fused and cut, it equals the masked adapter",
        "work per frame of padded stride-1 convolutions is the clip's divided by T exactly",
        "retroactive attention over 2,000 steps stays within 1e-5 of attention recomputed in float32",
        "what reads a clip in another way (flatten, group norm, softmax over time, padding before a pool) is refused",
    ),
    claim=Claim(
        text="blobs of 12 x 12 pixels moving in 5 ways, clips of 16; a 3D convolutional net trained on clips and"
        " converted: predictions, MACs and time a frame against the sliding window. A digits MLP (256, 256) adapted to"
        " digits turned by 45 degrees while 50, 65 and 80 % of its units are pruned: SPLoRA of rank 8 or fine-tuning",
        figure="the same class at every valid step with >= 8x fewer MACs a frame; SPLoRA's accuracy, mean over the"
        " ratios, >= fine-tuning's with <= 1/3 of its learned weights at every ratio; mean of 3 seeds",
    ),
    choose_when="a network trained on clips must answer at every frame of a stream: video, skeletons, sensors, sound",
    choose_instead="a recurrent mixer (parts/mixers) where the model is yet to be trained; the clip network itself "
    "where one answer a clip is enough",
    bibtex="""@phdthesis{hedegaard2023efficient,
  title={Efficient Online Processing with Deep Neural Networks},
  author={Hedegaard, Lukas},
  school={Aarhus University},
  year={2023}
}""",
)


def to_continual(
    model: nn.Module, example: Tensor, *, time: int = 2, edges: Literal["clip", "stream"] = "clip"
) -> ContinualNetwork:
    """Return ``model`` as a stream that shares its weights.

    Args:
        model: a trained clip network in eval mode that ``torch.fx`` can trace, from one clip to one tensor.
        example: a clip (B, C, T, ...) or (B, T, D); its length is the window of what reads the whole clip.
        time: the time axis of the clip.
        edges: what stands for zero padding in time where a whole clip is read later: ``"clip"`` refuses such models,
            ``"stream"`` uses the frames that are there, so that outputs differ from the clip network's.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
        >>> stream = to_continual(net, torch.zeros(1, 3, 8))
        >>> clip = torch.randn(1, 3, 8)
        >>> frames = [stream.forward_step(clip[:, :, t]) for t in range(8)]
        >>> stream.delay, frames[6] is None, torch.allclose(frames[7], net(clip), atol=1e-6)
        (7, True, True)

    Raises:
        BadInput: something in the model cannot be run as a stream; the place is named.
    """
    return ContinualNetwork(model, example, time=time, edges=edges)


class SPLoRA(nn.Module):
    """A structured pruning adapter: a frozen layer, a low-rank change that is learned, and masks of channels.

    Args:
        layer: an ``nn.Linear``, or a convolution with one group; frozen and shared.
        rank: of the change.

    Shapes:
        those of the layer.

    Example:
        >>> adapter = SPLoRA(nn.Linear(6, 4), rank=2)
        >>> adapter.prune(out=torch.tensor([True, False, True, True]))
        >>> adapter.fuse(cut=True).weight.shape, adapter.learned
        (torch.Size([3, 6]), 18)
    """

    out_mask: Tensor
    in_mask: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, rank: int = 8) -> None:
        super().__init__()
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or getattr(layer, "groups", 1) != 1:
            raise BadInput(f"layer must be an nn.Linear or a convolution with one group, got {type(layer).__name__}")
        if rank < 1:
            raise BadInput(f"rank must be at least 1, got {rank}")
        self.layer = layer.requires_grad_(False)
        weight = layer.weight  # (n, m, ...)
        self.up = nn.Parameter(weight.detach().new_zeros(weight.shape[0], rank))
        self.down = nn.Parameter(weight.detach().new_empty((rank, *weight.shape[1:])))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.register_buffer("out_mask", torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device))
        self.register_buffer("in_mask", torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device))

    @property
    def learned(self) -> int:
        """Learned weights of the channels that are left."""
        rank, kernel = self.up.shape[1], self.down[0, 0].numel()
        return rank * (int(self.out_mask.sum()) + int(self.in_mask.sum()) * kernel)

    def weight(self) -> Tensor:
        """Return W_hat."""
        weight = self.layer.weight + (self.up @ self.down.flatten(1)).view_as(self.layer.weight)
        rest = (1,) * (weight.ndim - 2)
        mask = self.out_mask[:, None] & self.in_mask[None]
        return weight * mask.view(*mask.shape, *rest)

    def _bias(self) -> Tensor | None:
        return None if self.layer.bias is None else self.layer.bias * self.out_mask

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer with W_hat."""
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, self.weight(), self._bias())
        out: Tensor = self.layer._conv_forward(x, self.weight(), self._bias())
        return out

    def prune(self, out: Tensor | None = None, inputs: Tensor | None = None) -> None:
        """Set which channels are left.

        Args:
            out: booleans (n,), or ``None`` to leave them as they are.
            inputs: booleans (m,), or ``None``.

        Raises:
            BadInput: a mask has another length or type, or leaves nothing.
        """
        for name, mask, held in (("out", out, self.out_mask), ("inputs", inputs, self.in_mask)):
            if mask is None:
                continue
            if mask.dtype != torch.bool or mask.shape != held.shape or not bool(mask.any()):
                raise BadInput(f"{name} must be booleans of shape {tuple(held.shape)} with one true at least")
            held.copy_(mask)

    def fuse(self, *, cut: bool = False) -> nn.Module:
        """Return a plain layer that computes the same.

        Args:
            cut: leave out masked channels; the layer then takes and gives only those that are left.
        """
        with torch.no_grad():
            weight, bias = self.weight(), self._bias()
            if cut:
                weight = weight[self.out_mask][:, self.in_mask]
                bias = None if bias is None else bias[self.out_mask]
            old = self.layer
            like: dict[str, Any] = {"bias": bias is not None, "dtype": weight.dtype, "device": weight.device}
            made: nn.Module
            if isinstance(old, nn.Linear):
                made = nn.Linear(weight.shape[1], weight.shape[0], **like)
            else:
                shape: dict[str, Any] = {
                    name: getattr(old, name) for name in ("stride", "padding", "dilation", "padding_mode")
                }
                build: Any = type(old)
                made = build(weight.shape[1], weight.shape[0], old.kernel_size, **shape, **like)
            made.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        return made.train(self.training)
