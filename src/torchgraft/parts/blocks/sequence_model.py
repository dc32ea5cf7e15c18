"""A small sequence model that any mixer fits into: the same embedding, blocks and head, whatever mixes the tokens.

Pre-norm blocks, ``x + mixer(norm(x))`` and then ``x + swiglu(norm(x))``, between an embedding and a head. What is
compared in such a model differs in the mixer and in nothing else. Positions are the mixer's own business.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.files import read_tensors, write_atomic, write_tensors
from torchgraft.bench.task import Task
from torchgraft.catalogue import registry
from torchgraft.engines.recurrence.mixer import Mixer, State, StatefulMixer
from torchgraft.errors import BadInput, UnsafeFile, nearest

__all__ = ["Build", "Option", "Pool", "SequenceConfig", "SequenceModel", "SwiGLU", "build_mixer"]

#: A function from the width to a mixer.
Build: TypeAlias = "Callable[[int], Mixer]"
#: The value of a mixer's keyword argument.
Option: TypeAlias = "bool | int | float | str | None"
#: How one answer is made of all positions.
Pool: TypeAlias = Literal["last", "mean"]


class SequenceConfig(BaseModel):
    """Everything that rebuilds a :class:`SequenceModel` but its weights, as kept in ``config.json``.

    Args:
        format: the layout of the folder.
        torchgraft: the version that wrote it.
        torch: the version of torch at that time.
        mixer: key of the mixer.
        mixer_options: its keyword arguments.
        d_model, layers, vocab_size, outputs, pool, in_features, hidden, tied: as for the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["torchgraft.sequence-model/1"] = "torchgraft.sequence-model/1"
    torchgraft: str = ""
    torch: str = ""
    mixer: str
    mixer_options: dict[str, Option] = {}
    d_model: int = Field(ge=1)
    layers: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    outputs: int = Field(ge=1)
    pool: Pool | None = None
    in_features: int | None = Field(default=None, ge=1)
    hidden: int = Field(ge=0)
    tied: bool = False


def build_mixer(mixer: str | Build, d_model: int, options: Mapping[str, Option] | None = None) -> Mixer:
    """Return a new mixer of width ``d_model``.

    Args:
        mixer: key of a mixer in the catalogue, or a function from the width to a mixer.
        d_model: the width.
        options: keyword arguments of a mixer named by key.

    Raises:
        BadInput: there is no such mixer, the key is of something else, or an option is unknown.

    Example:
        >>> from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention
        >>> build_mixer(SoftmaxAttention, 8).d_model
        8
    """
    options = dict(options or {})
    if not isinstance(mixer, str):
        if options:
            raise BadInput(f"mixer_options belong to a mixer named by key; write them into the function, got {options}")
        built = mixer(d_model)
    else:
        card = registry.lookup(mixer)
        made = registry.entry(card)
        if card.kind != "part" or not (isinstance(made, type) and issubclass(made, Mixer)):
            raise BadInput(f"mixer must be the key of a sequence mixer, got {mixer!r}, a {card.kind} of {card.family}")
        known = [name for name in inspect.signature(made).parameters if name != "d_model"]
        for name in options:
            if name not in known:
                raise BadInput(f"{mixer} has no option {name!r}{nearest(name, known)}")
        built = made(d_model, **options)
    if not isinstance(built, Mixer) or built.d_model != d_model:
        raise BadInput(f"mixer must give a Mixer of width {d_model}, got {built!r:.80}")
    return built


class SwiGLU(nn.Module):
    """Two gated linear layers and one back: (..., D) -> (..., D).

    Args:
        d_model: D.
        hidden: width between them.
    """

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, hidden, bias=False)
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token by itself."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class _Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + swiglu(norm(x))`` unless ``hidden`` is 0; (B, T, D) -> (B, T, D)."""

    def __init__(self, mixer: Mixer, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(mixer.d_model, eps=1e-5)
        self.mixer = mixer
        self.channel_norm = nn.RMSNorm(mixer.d_model, eps=1e-5) if hidden else nn.Identity()
        self.channels: nn.Module | None = SwiGLU(mixer.d_model, hidden) if hidden else None

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Return what follows the mixer."""
        x = x + mixed
        return x if self.channels is None else x + self.channels(self.channel_norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x, self.mixer(self.norm(x)))


class SequenceModel(nn.Module):
    """Embedding, blocks of a mixer and a SwiGLU, norm, head.

    Args:
        d_model: width D of the residual stream.
        layers: number of blocks.
        mixer: key of a mixer in the catalogue, or a function from the width to a mixer.
        vocab_size: number of input symbols; 256 are bytes.
        outputs: number of output symbols or classes; default ``vocab_size``.
        pool: ``None`` for an answer at every position, ``"last"`` or ``"mean"`` for one answer a sequence.
        in_features: where given, inputs are (B, T, in_features) floating point instead of symbols.
        hidden: width of the SwiGLU; default 8/3 ``d_model``, rounded up to a multiple of 8; 0 leaves it out.
        tied: whether the head is the embedding.
        mixer_options: keyword arguments of a mixer named by key.

    Shapes:
        (B, T) integers, or (B, T, in_features) -> (B, T, outputs), or (B, outputs) where pooled

    Example:
        >>> from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention
        >>> model = SequenceModel(16, 1, SoftmaxAttention)
        >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 256])
        >>> model.generate(torch.zeros(1, 2, dtype=torch.long), max_new_tokens=3, temperature=0).shape
        torch.Size([1, 5])

    Raises:
        BadInput: a size is below 1, the mixer cannot be built, or the head cannot be tied.
    """

    def __init__(
        self,
        d_model: int,
        layers: int,
        mixer: str | Build,
        *,
        vocab_size: int = 256,
        outputs: int | None = None,
        pool: Pool | None = None,
        in_features: int | None = None,
        hidden: int | None = None,
        tied: bool = False,
        mixer_options: Mapping[str, Option] | None = None,
    ) -> None:
        super().__init__()
        outputs = vocab_size if outputs is None else outputs
        sizes = {"d_model": d_model, "layers": layers, "vocab_size": vocab_size, "outputs": outputs}
        for name, value in {**sizes, "in_features": 1 if in_features is None else in_features}.items():
            if value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        hidden = math.ceil(d_model / 3) * 8 if hidden is None else hidden
        if hidden < 0:
            raise BadInput(f"hidden must be at least 0 (none), got {hidden}")
        if pool not in (None, "last", "mean"):
            raise BadInput(f"pool must be None, 'last' or 'mean', got {pool!r}")
        if tied and (in_features is not None or outputs != vocab_size):
            raise BadInput("tied needs symbols as inputs and as many outputs as symbols")
        self.d_model, self.layers, self.vocab_size, self.outputs = d_model, layers, vocab_size, outputs
        self.pool, self.in_features, self.hidden, self.tied = pool, in_features, hidden, tied
        self.mixer_key = mixer if isinstance(mixer, str) else None
        self.mixer_options = dict(mixer_options or {})
        self.embed: nn.Module
        if in_features is None:
            self.embed = nn.Embedding(vocab_size, d_model)
            if tied:  # as a head, embeddings of unit scale would give logits of scale sqrt(D)
                nn.init.normal_(self.embed.weight, std=d_model**-0.5)
        else:
            self.embed = nn.Linear(in_features, d_model)
        self.blocks = nn.ModuleList(
            _Block(build_mixer(mixer, d_model, self.mixer_options), hidden) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.head = nn.Linear(d_model, outputs, bias=False)
        if tied and isinstance(self.embed, nn.Embedding):
            self.head.weight = self.embed.weight

    @classmethod
    def for_task(
        cls,
        task: Task,
        d_model: int,
        layers: int,
        mixer: str | Build,
        *,
        pool: Pool = "last",
        hidden: int | None = None,
        mixer_options: Mapping[str, Option] | None = None,
    ) -> SequenceModel:
        """Return a new model whose inputs and outputs are those of ``task``'s own model.

        Args:
            task: a task on sequences, such as the built-in ``recall``.
            d_model: as for the class.
            layers: as for the class.
            mixer: as for the class.
            pool: how one answer is made of all positions, for a task that wants one answer a sequence.
            hidden: as for the class.
            mixer_options: as for the class.

        Raises:
            BadInput: the task's inputs are no sequences.
        """
        inputs = task.val.inputs
        if not isinstance(inputs, Tensor) or inputs.ndim != (3 if inputs.is_floating_point() else 2):
            raise BadInput(
                f"task {task.name!r} is not on sequences: inputs must be (N, T) integers or (N, T, F) floating point; "
                "take recall, parity, copying or stdlib-bytes"
            )
        own = task.architecture()
        with torch.no_grad():
            shape = own(inputs[:1]).shape
        tables = [m.num_embeddings for m in own.modules() if isinstance(m, nn.Embedding)]
        symbols = inputs.is_floating_point() or 1 + max(int(s.inputs.max()) for s in (task.train, task.val, task.test))  # type: ignore[union-attr]  # all splits are alike
        return cls(
            d_model,
            layers,
            mixer,
            vocab_size=max([int(symbols), *tables]),
            outputs=int(shape[-1]),
            pool=pool if len(shape) == 2 else None,
            in_features=int(inputs.shape[-1]) if inputs.is_floating_point() else None,
            hidden=hidden,
            mixer_options=mixer_options,
        )

    def mixers(self) -> list[Mixer]:
        """Return the mixer of every block."""
        return [block.mixer for block in self.blocks if isinstance(block.mixer, Mixer)]

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits at every position, or one answer a sequence."""
        x = self.embed(self._checked(tokens))
        for block in self.blocks:
            x = block(x)
        if self.pool is not None:
            x = x[:, -1] if self.pool == "last" else self.norm(x).mean(dim=1)
        logits: Tensor = self.head(x if self.pool == "mean" else self.norm(x))
        return logits

    def init_state(self, batch_size: int) -> list[State]:
        """Return the state of every block before the first token.

        Raises:
            BadInput: the mixers keep no state, or the model answers once a sequence.
        """
        return [block.mixer.init_state(batch_size) for block in self._stateful()]

    def state_bytes(self, tokens: int) -> int | None:
        """Return the bytes that the mixers remember of one sequence of ``tokens``; ``None`` if one keeps no state.

        Args:
            tokens: how many tokens were read, at least 1.
        """
        total = 0
        for mixer in self.mixers():
            if not isinstance(mixer, StatefulMixer):
                return None
            anchor = self.head.weight
            with torch.no_grad():
                _, state = mixer.prefill(anchor.new_zeros(1, tokens, self.d_model))
            total += sum(value.numel() * value.element_size() for value in state.values())
        return total

    def prefill(self, tokens: Tensor, state: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """Read ``tokens`` after ``state``; return the logits at every position and the state after the last one.

        Raises:
            BadInput: the mixers keep no state, or the model answers once a sequence.
        """
        blocks = self._stateful()
        x, after = self.embed(self._checked(tokens)), []
        for index, block in enumerate(blocks):
            mixed, new = block.mixer.prefill(block.norm(x), None if state is None else state[index])
            x = block.after(x, mixed)
            after.append(new)
        return self.head(self.norm(x)), after

    def step(self, token: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        """Read one token a sequence, (B,) or (B, in_features); return its logits, (B, outputs), and the next state.

        Raises:
            BadInput: the mixers keep no state, or the model answers once a sequence.
        """
        blocks = self._stateful()
        x, after = self.embed(self._checked(token[:, None]))[:, 0], []
        for block, before in zip(blocks, state, strict=True):
            mixed, new = block.mixer.step(block.norm(x), before)
            x = block.after(x, mixed)
            after.append(new)
        return self.head(self.norm(x)), after

    def stream(
        self,
        tokens: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield new tokens, (B,) at a time; arguments and errors are those of :meth:`generate`."""
        self._checked(tokens)
        if self.in_features is not None or self.pool is not None or self.outputs != self.vocab_size:
            raise BadInput("generation needs a model whose outputs are its input symbols, one at every position")
        if not all(mixer.causal for mixer in self.mixers()):
            raise BadInput("generation needs causal mixers")
        if tokens.shape[1] < 1:
            raise BadInput("generation needs at least one token to begin with, got none")
        if max_new_tokens < 0:
            raise BadInput(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if not temperature >= 0 or math.isinf(temperature):
            raise BadInput(f"temperature must be at least 0 and finite, got {temperature}")
        if top_k is not None and top_k < 1:
            raise BadInput(f"top_k must be at least 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise BadInput(f"top_p must be above 0 and at most 1, got {top_p}")
        draw = torch.Generator(tokens.device)
        if seed is None:
            draw.seed()
        else:
            draw.manual_seed(seed)
        return self._stream(tokens, max_new_tokens, temperature, top_k, top_p, draw)

    def _stream(
        self,
        tokens: Tensor,
        count: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        draw: torch.Generator,
    ) -> Iterator[Tensor]:
        stateful = all(isinstance(mixer, StatefulMixer) for mixer in self.mixers())
        state: list[State] = []
        for index in range(count):
            training = self.training
            self.eval()
            try:
                with torch.no_grad():  # entered anew for every token: between two, the caller's own mode holds
                    if not stateful:
                        logits = self(tokens)[:, -1]
                    elif index:
                        logits, state = self.step(tokens[:, -1], state)
                    else:
                        every, state = self.prefill(tokens)
                        logits = every[:, -1]
                    token = _pick(logits, temperature, top_k, top_p, draw)
            finally:
                self.train(training)
            # A stateful model has read what came before and needs the newest token only.
            tokens = token[:, None] if stateful else torch.cat([tokens, token[:, None]], dim=1)
            yield token

    def generate(
        self,
        tokens: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        on_token: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Continue ``tokens``; a stateful mixer reads each token once, any other reads all of them for each new one.

        Args:
            tokens: what to continue.
            max_new_tokens: how many tokens to add.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: draw from the likeliest ``top_k`` tokens only.
            top_p: draw from the fewest likeliest tokens whose probabilities reach ``top_p``.
            seed: makes the draws repeatable.
            on_token: called with every new token, (B,).

        Shapes:
            (B, T) -> (B, T + max_new_tokens)

        Raises:
            BadInput: an argument is out of range, the model cannot generate, or its logits are NaN.
        """
        found = [tokens]
        for token in self.stream(
            tokens, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        ):
            found.append(token[:, None])
            if on_token is not None:
                on_token(token)
        return torch.cat(found, dim=1)

    def config(self) -> SequenceConfig:
        """Return what rebuilds this model without its weights.

        Raises:
            BadInput: the mixer was given as a function, which no file can hold.
        """
        if self.mixer_key is None:
            raise BadInput("only a model whose mixer is named by key can be saved; its mixer was given as a function")
        from torchgraft import __version__

        return SequenceConfig(
            torchgraft=__version__,
            torch=torch.__version__,
            mixer=self.mixer_key,
            mixer_options=self.mixer_options,
            d_model=self.d_model,
            layers=self.layers,
            vocab_size=self.vocab_size,
            outputs=self.outputs,
            pool=self.pool,
            in_features=self.in_features,
            hidden=self.hidden,
            tied=self.tied,
        )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``.

        Raises:
            BadInput: the mixer was given as a function, or the folder cannot be written.
        """
        config = self.config()
        write_tensors(Path(folder) / "model.safetensors", self.state_dict())
        write_atomic(Path(folder) / "config.json", config.model_dump_json(indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> SequenceModel:
        """Return the model that :meth:`save_pretrained` wrote, in eval mode and in the data type that it was saved in.

        Raises:
            BadInput: ``folder`` holds no such model, or its settings are not understood.
            UnsafeFile: the weights are damaged, of another model, or a pickle.
        """
        path = Path(folder) / "config.json"
        try:
            config = SequenceConfig.model_validate_json(path.read_bytes())
        except OSError as error:
            raise BadInput(f"{folder} holds no sequence model: cannot read {path}: {error.strerror or error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise BadInput(f"{path} is not understood: {place}: {first['msg']}") from None
        fields = config.model_dump(exclude={"format", "torchgraft", "torch"})
        with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away
            model = cls(fields.pop("d_model"), fields.pop("layers"), fields.pop("mixer"), **fields)
        tensors, _ = read_tensors(Path(folder) / "model.safetensors")
        wanted = {name: value.shape for name, value in model.state_dict().items()}
        if wanted != {name: value.shape for name, value in tensors.items()}:
            raise UnsafeFile(f"{folder}/model.safetensors does not hold the tensors that {path} describes")
        kinds = {value.dtype for value in tensors.values() if value.is_floating_point()}
        if len(kinds) == 1:
            model.to(kinds.pop())
        model.load_state_dict(tensors)
        return model.eval()

    def _stateful(self) -> list[Any]:
        if self.pool is not None:
            raise BadInput(f"a model with pool={self.pool!r} answers once a sequence and cannot take tokens one by one")
        for block in self.blocks:
            if not isinstance(block.mixer, StatefulMixer):
                raise BadInput(f"{type(block.mixer).__name__} keeps no state; use the forward pass")
        return list(self.blocks)

    def _checked(self, tokens: Tensor) -> Tensor:
        if self.in_features is None:
            if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
                raise BadInput(f"tokens must be integers of shape (B, T), got {tokens.dtype} {tuple(tokens.shape)}")
        elif tokens.ndim != 3 or tokens.shape[-1] != self.in_features or not tokens.is_floating_point():
            wanted = f"(B, T, {self.in_features})"
            raise BadInput(f"inputs must be floating point of shape {wanted}, got {tokens.dtype} {tuple(tokens.shape)}")
        return tokens


def _pick(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, draw: torch.Generator) -> Tensor:
    """Return one token a row, (B, V) -> (B,)."""
    if bool(logits.isnan().any()):
        raise BadInput("the model's logits are NaN; its weights are broken or its training diverged")
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    ordered, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if top_p is not None:  # a token stays while those before it do not yet reach top_p
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
    place = torch.multinomial(ordered, 1, generator=draw)
    return order.gather(-1, place)[:, 0]
