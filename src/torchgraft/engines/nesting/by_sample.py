"""What a model needs whose path depends on the sample: logits of each sample by itself, and samples to set it on."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Task
from torchgraft.engines.width import calibration
from torchgraft.errors import BadInput

__all__ = ["apart", "without_margin"]

#: The fewest training samples that are kept from what is trained, to find thresholds on.
_LEAST_HELD = 64


def without_margin(model: nn.Module, task: Task) -> str:
    """Return why it cannot be told sample by sample how sure a classifier is; an empty string if it can.

    Args:
        model: the model; left as it was.
        task: its task, a few of whose training samples are looked at.
    """
    if task.distill != "classes":
        return "its outputs are values, which have no margin, and how far they move shows on a stream alone"
    if not isinstance(task.train.inputs, Tensor):
        return "it takes more than one tensor, or takes it by name"
    few = task.train.inputs[:4]
    half = (len(few) + 1) // 2
    with resting(model), torch.no_grad():
        out, part = model(few), model(few[:half])
    if not isinstance(out, Tensor):
        return f"it returns {type(out).__name__}, not one tensor of logits"
    if out.ndim != 2 or len(out) != len(few) or out.shape[1] < 2:
        return f"it gives outputs of shape {tuple(out.shape)} for {len(few)} samples, not two classes or more for each"
    logits = task.output_logits(out)
    if logits.shape != out.shape or not torch.equal(logits, out):
        return "the task takes its logits from a part of the output"
    scale = float(out.abs().max())
    if part.shape != out[:half].shape or not torch.allclose(part, out[:half], rtol=1e-3, atol=1e-3 * max(scale, 1e-6)):
        return "what it says of a sample depends on the others of its batch"
    return ""


def apart(task: Task, samples: int, seed: int) -> tuple[Task, Tensor]:
    """Return the task with the samples that a network learns from, and inputs to find its thresholds on.

    A network is surer of what it has learned from, so thresholds found there send too much work on later. Where a
    fifth of the training samples is too few to find a threshold on, all serve for both.

    Args:
        task: the task; left as it was.
        samples: the most inputs to find thresholds on.
        seed: which they are.

    Raises:
        BadInput: the inputs are not one tensor.
    """
    count = min(samples, len(task.train) // 5)
    if count < _LEAST_HELD:
        learn, held = task, calibration(task, samples, seed)
    else:
        order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))
        learn, held = copy.copy(task), task.train[order[:count].sort().values]
        learn.train = task.train[order[count:].sort().values]
    if not isinstance(held.inputs, Tensor):
        raise BadInput(f"thresholds need inputs of one tensor, got {type(held.inputs).__name__}")
    return learn, held.inputs
