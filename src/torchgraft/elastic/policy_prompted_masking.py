"""Let a policy choose the layer from which a query token prompts a mask decoder, and prompt with its similarity map.

`UGround: Towards Unified Visual Grounding with Unrolled Transformers <https://arxiv.org/abs/2510.03853>`_ (Qian et al.,
2025).

Equation: ``u_l = w_l . h^l_s, a ~ softmax(u), S_p = h^a_s . h^a_p``; policy loss ``-(r - b) log pi(a)``.

It is a part of a model that grounds words in images, and no lever of ``fit``: there is nothing to prompt elsewhere.

Departures: w starts at 1 / D in place of 1, so that the first logits are means of hidden states and not sums, while w
learns as fast as in the paper (a division of the logits by D would slow it D times). Rewards are each query's own,
where the paper's code shares one in a batch. The two-layer projection of the chosen state is the decoder's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.policy_gradient import EmaBaseline, categorical_log_prob
from torchgraft.engines.policy_gradient import reinforce_loss as policy_loss
from torchgraft.errors import BadInput

__all__ = ["CARD", "LayerPolicy", "blurred", "mask_loss", "reinforce_loss", "similarity_prompt"]

CARD = Card(
    key="policy-prompted-masking",
    title="Policy-prompted masking",
    seed_id=213,
    authors="Qian, Yin, Deng, Peng, Xiong, Zhai and Dou, 2025",
    reference="https://arxiv.org/abs/2510.03853",
    family="elastic",
    kind="part",
    engine=("taps",),
    equation="u_l = w_l . h^l_s; a ~ softmax(u); S_p = h^a_s . h^a_p; L = -(r - b) log pi(a)",
    entry="LayerPolicy",
    example={"d_model": 8, "num_layers": 4},
    shapes=((5, 3, 4, 8),),
    declared={"parameters": "num_layers * d_model"},
    oracles=(
        "with a fixed reward of each layer the expected gradient of the policy loss, over all layers, is that of minus "
        "the expected reward to 1e-10, and a constant baseline leaves it what it is",
        "the similarity map does not change when similarities are scaled by a positive factor or shifted, and sampled "
        "layers come as often as softmax(u) says (chi-square, p > 0.01 over 20,000 draws)",
        "no gradient of the policy loss reaches the hidden states",
    ),
    claim=Claim(
        text="Scenes of coloured shapes and a word, read by one 4-layer transformer that is trained to name what the "
        "word asks for; a small convolutional head draws the mask. Beside the policy with its map as a prompt: "
        "the last layer's token alone. Mean intersection over union.",
        figure="policy and mask prompt >= 3 points of mIoU above the last layer, and less than half of the learned "
        "distribution on the last layer (mean of 3 seeds)",
    ),
    choose_when="hidden states of a middle layer may locate better than the last ones, and which layer is not known",
    choose_instead="a learned weighted sum of layers where the decoder can take a mixture and its gradient",
    confidence="medium",
    bibtex="@article{qian2025uground, title={{UGround}: Towards Unified Visual Grounding with Unrolled Transformers}, "
    "author={Qian, Rui and Yin, Xin and Deng, Chuanhang and Peng, Zhiyuan and Xiong, Jian and Zhai, Wei and Dou, "
    "Dejing}, journal={arXiv preprint arXiv:2510.03853}, year={2025}}",
)


class LayerPolicy(nn.Module):
    """A categorical policy over the layers of a transformer, for each query token by its states.

    Args:
        d_model: width D of the states.
        num_layers: number L of states of a token, the embedding among them.
        baseline: ``"ema"``, an average of earlier rewards, or ``"critic"``, a network that guesses the reward from the
            policy itself.
        decay: of the average.

    Shapes:
        (B, Q, L, D), of Q queries a sample -> (B, Q, L): logits of the layers

    Example:
        >>> policy = LayerPolicy(8, num_layers=3)
        >>> layer = policy.sample(torch.randn(2, 1, 3, 8))
        >>> layer.shape, policy.loss(torch.randn(2, 1, 3, 8), layer, torch.zeros(2, 1)).ndim
        (torch.Size([2, 1]), 0)

    Raises:
        BadInput: a size is below 1, or the baseline is unknown.
    """

    def __init__(
        self,
        d_model: int = 64,
        *,
        num_layers: int = 33,
        baseline: Literal["ema", "critic"] = "ema",
        decay: float = 0.9,
    ) -> None:
        super().__init__()
        if d_model < 1 or num_layers < 1:
            raise BadInput(f"d_model and num_layers must be at least 1, got {d_model} and {num_layers}")
        if baseline not in ("ema", "critic"):
            raise BadInput(f"baseline must be 'ema' or 'critic', got {baseline!r}")
        self.d_model, self.num_layers = d_model, num_layers
        self.weight = nn.Parameter(torch.full((num_layers, d_model), 1.0 / d_model))
        self._ema = EmaBaseline(decay=decay)
        self.critic: nn.Module | None = None
        if baseline == "critic":
            self.critic = nn.Sequential(nn.Linear(num_layers, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits u of each query's layers."""
        fits = states.ndim == 4 and states.shape[2:] == (self.num_layers, self.d_model)
        if not fits or not states.is_floating_point():
            raise BadInput(
                f"states must be floating point of shape (B, Q, {self.num_layers}, {self.d_model}), got {states.dtype} "
                f"{tuple(states.shape)}"
            )
        logits: Tensor = (states * self.weight).sum(-1)
        return logits

    def sample(self, states: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return a layer drawn for each query, (B, Q)."""
        chances = self(states.detach()).detach().softmax(-1)
        return torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view(chances.shape[:2])

    def best(self, states: Tensor) -> Tensor:
        """Return the likeliest layer of each query, (B, Q)."""
        logits: Tensor = self(states.detach())
        return logits.argmax(-1)

    def loss(self, states: Tensor, layer: Tensor, reward: Tensor) -> Tensor:
        """Return the policy loss of layers that were drawn, and that of the critic where there is one.

        Args:
            states: of the queries, (B, Q, L, D); no gradient reaches them.
            layer: what :meth:`sample` gave, (B, Q).
            reward: of each query, (B, Q).
        """
        logits, layer, reward = self(states.detach()).flatten(0, 1), layer.flatten(), reward.detach().flatten()
        if self.critic is None:
            return reinforce_loss(logits, layer, self._ema.advantages(reward))
        guess = self.critic(logits.detach().softmax(-1))[:, 0]
        return reinforce_loss(logits, layer, reward - guess.detach()) + F.mse_loss(guess, reward)


def reinforce_loss(logits: Tensor, layer: Tensor, advantage: Tensor) -> Tensor:
    """Return -mean (r - b) log pi(a).

    Shapes:
        logits (B, L), layer (B,), advantage (B,) -> ()
    """
    return policy_loss(categorical_log_prob(logits[:, None], layer[:, None]), advantage)


def similarity_prompt(query: Tensor, patches: Tensor, size: tuple[int, int], *, grid: tuple[int, int]) -> Tensor:
    """Return the similarity of each patch to the query, between 0 and 1, as an image; a flat map gives zeros.

    Args:
        query: state of the query token.
        patches: states of the image's patches, row by row.
        size: height and width of the image.
        grid: rows and columns of patches.

    Shapes:
        (B, D), (B, P, D) -> (B, 1, *size)

    Example:
        >>> similarity_prompt(torch.ones(1, 1), torch.tensor([[[0.0], [2.0]]]), (1, 2), grid=(1, 2)).tolist()
        [[[[0.0, 1.0]]]]

    Raises:
        BadInput: the patches do not fill the grid.
    """
    if patches.ndim != 3 or patches.shape[1] != grid[0] * grid[1] or query.shape != (len(patches), patches.shape[2]):
        raise BadInput(
            f"a grid of {grid} needs queries (B, D) and patches (B, {grid[0] * grid[1]}, D), got {tuple(query.shape)} "
            f"and {tuple(patches.shape)}"
        )
    flat = (patches @ query[:, :, None])[..., 0]  # (B, P)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    spread = high - low
    scaled = torch.where(spread > 0, (flat - low) / torch.where(spread > 0, spread, 1.0), 0.0)
    image = torch.unflatten(scaled, 1, grid)[:, None]
    return F.interpolate(image, size, mode="bilinear", align_corners=False)


def blurred(mask: Tensor, *, kernel: int = 31, sigma: float = 7.0) -> Tensor:
    """Return masks blurred by a Gaussian, their peak at 1; (B, 1, h, w) -> (B, 1, h, w)."""
    if kernel < 1 or kernel % 2 == 0 or not sigma > 0:
        raise BadInput(f"kernel must be odd and sigma positive, got {kernel} and {sigma}")
    place = torch.arange(kernel, dtype=mask.dtype, device=mask.device) - kernel // 2
    bell = (-0.5 * (place / sigma).square()).exp()
    bell = bell / bell.sum()
    wide = F.conv2d(mask, bell.view(1, 1, 1, -1), padding=(0, kernel // 2))
    soft = F.conv2d(wide, bell.view(1, 1, -1, 1), padding=(kernel // 2, 0))
    return soft / soft.amax((2, 3), keepdim=True).clamp_min(1e-6)


def mask_loss(chance: Tensor, target: Tensor) -> Tensor:
    """Return binary cross-entropy plus the Dice loss of each mask, given as probabilities; (B, 1, h, w) -> (B,)."""
    cross = F.binary_cross_entropy(chance.clamp(1e-6, 1 - 1e-6), target, reduction="none").mean((1, 2, 3))
    both = (chance * target).sum((1, 2, 3))
    dice = 1 - (2 * both + 1) / (chance.sum((1, 2, 3)) + target.sum((1, 2, 3)) + 1)
    return cross + dice
