"""Small reference models, written plainly so that they can be traced, sliced and read.

Shapes are read from attributes (``num_heads``, ``head_dim``) at every call and never baked into the forward pass, so
a model whose heads or channels were cut runs on unchanged code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Attention",
    "ByteTransformer",
    "RecurrentNet",
    "ResidualNet",
    "TransformerBlock",
    "TwoTower",
    "VisionTransformer",
    "mlp",
]


class Attention(nn.Module):
    """Multi-head self-attention with separate projections for queries, keys and values.

    Args:
        d_model: width of the residual stream.
        num_heads: number of heads; must divide ``d_model``.
        causal: whether a token sees only itself and those before it.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> Attention(8, 2)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, d_model: int, num_heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads
        self.causal = causal
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix tokens; ``mask`` (B, 1, 1, T) is True where a key may be seen."""
        B, T, _ = x.shape
        q = self.query(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, K)
        k = self.key(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.value(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(B, T, self.num_heads * self.head_dim))
        return mixed


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them: (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, hidden)
        self.fc2 = nn.Linear(hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token by itself."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class TransformerBlock(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x)); (B, T, D) -> (B, T, D).

    Args:
        d_model: width of the residual stream.
        num_heads: number of heads.
        ratio: hidden width of the feed-forward part in units of ``d_model``.
        causal: whether attention is causal.
    """

    def __init__(self, d_model: int, num_heads: int, *, ratio: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attn = Attention(d_model, num_heads, causal=causal)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = FeedForward(d_model, ratio * d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Add what attention and the feed-forward part say to the residual stream."""
        x = x + self.attn(self.norm1(x), mask)
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionTransformer(nn.Module):
    """A small vision transformer with a class token.

    Args:
        image_size: height and width of the image.
        patch_size: height and width of a patch.
        channels: colour channels.
        classes: number of classes.
        d_model: width of the residual stream.
        depth: number of blocks.
        num_heads: heads a block.

    Shapes:
        (B, channels, image_size, image_size) -> (B, classes)

    Example:
        >>> VisionTransformer(d_model=8, depth=1, num_heads=2)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        channels: int = 1,
        classes: int = 10,
        *,
        d_model: int = 96,
        depth: int = 6,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        tokens = (image_size // patch_size) ** 2
        self.patch = nn.Conv2d(channels, d_model, patch_size, stride=patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, d_model))
        # Positions as large as the patches themselves: small ones cost a small data set many epochs to find.
        self.position = nn.Parameter(torch.randn(1, tokens + 1, d_model) * 0.3)
        self.blocks = nn.ModuleList([TransformerBlock(d_model, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return class logits."""
        x = self.patch(image).flatten(2).transpose(1, 2)  # (B, T, D)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut: (B, C, h, w) -> (B, C', h / stride, w / stride)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + convolutions(x))."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNet(nn.Module):
    """A small residual convolutional network with batch norm; every stage after the first halves the image.

    Args:
        channels: colour channels.
        classes: number of classes.
        widths: channels of each stage.
        depth: blocks a stage.

    Shapes:
        (B, channels, h, w) -> (B, classes)

    Example:
        >>> ResidualNet(widths=(4, 8), depth=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, channels: int = 1, classes: int = 10, *, widths: tuple[int, ...] = (32, 64, 128), depth: int = 2
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        blocks: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for index in range(depth):
                blocks.append(ResidualBlock(before, width, stride=2 if stage and not index else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return class logits."""
        x = self.blocks(F.relu(self.bn(self.stem(image))))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def mlp(inputs: int, outputs: int, *, widths: tuple[int, ...], dropout: float = 0.0) -> nn.Sequential:
    """Return linear layers with ReLU between them, after flattening the input: (B, ...) -> (B, outputs).

    Example:
        >>> mlp(4, 2, widths=(8,))(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    layers: list[nn.Module] = [nn.Flatten()]
    before = inputs
    for width in widths:
        layers += [nn.Linear(before, width), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        before = width
    return nn.Sequential(*layers, nn.Linear(before, outputs))


class ByteTransformer(nn.Module):
    """A causal language model over a small vocabulary such as bytes.

    Args:
        vocabulary: number of symbols.
        context: the longest sequence.
        d_model: width of the residual stream.
        depth: number of blocks.
        num_heads: heads a block.
        spread: standard deviation of the initial embeddings. Large ones make it easy to tell tokens and places apart
            from the first step on, which recall needs; small ones suit text.

    Shapes:
        (B, T) integers -> (B, T, vocabulary)

    Example:
        >>> ByteTransformer(16, 8, d_model=8, depth=1, num_heads=2)(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 128,
        *,
        d_model: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        spread: float = 0.02,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d_model)
        self.position = nn.Parameter(torch.randn(1, context, d_model) * spread)
        self.blocks = nn.ModuleList([TransformerBlock(d_model, num_heads, causal=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocabulary)
        nn.init.normal_(self.embed.weight, std=spread)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the symbol after each one."""
        x = self.embed(tokens) + self.position[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class RecurrentNet(nn.Module):
    """An LSTM over symbols or numbers, with a linear head.

    Args:
        vocabulary: number of input symbols, or ``None`` where inputs are numbers.
        outputs: number of answers to choose from.
        d_model: width of embedding and LSTM.
        depth: layers of the LSTM.
        features: numbers a step, where inputs are numbers.
        pooled: whether one answer is given, after the last step, or one at every step.

    Shapes:
        (B, T) integers, or (B, T, features) -> (B, T, outputs), or (B, outputs) where pooled

    Example:
        >>> RecurrentNet(3, 2, d_model=8)(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 2])
    """

    def __init__(
        self,
        vocabulary: int | None,
        outputs: int,
        *,
        d_model: int = 64,
        depth: int = 1,
        features: int = 1,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        self.pooled = pooled
        self.embed = nn.Linear(features, d_model) if vocabulary is None else nn.Embedding(vocabulary, d_model)
        self.lstm = nn.LSTM(d_model, d_model, depth, batch_first=True)
        self.head = nn.Linear(d_model, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits at every step, or after the last one."""
        y, _ = self.lstm(self.embed(x))
        logits: Tensor = self.head(y[:, -1] if self.pooled else y)
        return logits


class TextEncoder(nn.Module):
    """Token identities to one vector a text: a bidirectional transformer, then a mean over the real tokens.

    Shapes:
        (B, T) integers, 0 where there is padding -> (B, D)
    """

    def __init__(self, embed: nn.Embedding, context: int, *, depth: int, num_heads: int) -> None:
        super().__init__()
        d_model = embed.embedding_dim
        self.embed = embed
        self.position = nn.Parameter(torch.randn(1, context, d_model) * 0.02)
        self.blocks = nn.ModuleList([TransformerBlock(d_model, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return one vector a text, not normalised."""
        real = tokens != 0  # (B, T)
        x = self.embed(tokens) + self.position[:, : tokens.shape[1]]
        mask = real[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        weight = real.unsqueeze(-1).to(x.dtype)  # (B, T, 1)
        mean: Tensor = (self.norm(x) * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
        return mean


class TwoTower(nn.Module):
    """Two encoders whose vectors meet in a similarity: every query of a batch against every candidate of the batch.

    Both read the same table of embeddings, so that words in common make texts similar before anything is learned.

    Args:
        vocabulary: number of token identities; 0 is padding.
        query_context: longest query.
        code_context: longest candidate.
        d_model: width of both encoders.
        depth: blocks an encoder.
        num_heads: heads a block.

    Shapes:
        query (B, T), code (B, S) -> (B, B): row i holds the scaled cosine of query i with every candidate

    Example:
        >>> model = TwoTower(32, 4, 6, d_model=8, depth=1, num_heads=2)
        >>> model(torch.ones(3, 4, dtype=torch.long), torch.ones(3, 6, dtype=torch.long)).shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        vocabulary: int,
        query_context: int,
        code_context: int,
        *,
        d_model: int = 128,
        depth: int = 2,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        embed = nn.Embedding(vocabulary, d_model)
        self.query_encoder = TextEncoder(embed, query_context, depth=depth, num_heads=num_heads)
        self.code_encoder = TextEncoder(embed, code_context, depth=depth, num_heads=num_heads)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, query: Tensor, code: Tensor) -> Tensor:
        """Return the similarities within the batch."""
        q = F.normalize(self.query_encoder(query), dim=-1)
        c = F.normalize(self.code_encoder(code), dim=-1)
        similarity: Tensor = q @ c.transpose(0, 1) * self.log_scale.exp()
        return similarity
