"""The contract of procedures, checked on tiny models to which the procedure applies.

The rows of the design for ``shrink`` and ``elastic``: strength 0 is the identity, physically removed equals masked, a
reload gives the same outputs, nothing outside the declared sites moves, cost never rises with strength.
"""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.files import pack_tensors, size_of_tensors, unpack_tensors
from torchgraft.bench.meters import macs, params
from torchgraft.bench.task import Inputs, Split, Task
from torchgraft.catalogue import Card
from torchgraft.contracts.check import Check, CheckFailure, Subject, require
from torchgraft.contracts.sameness import equal, fittings, same_output, same_state, surroundings
from torchgraft.contracts.subjects import Bare, Case, Guarded, Guess, cases_of, output, settings
from torchgraft.engines.procedure import Procedure, ignored
from torchgraft.engines.surgery.edits import apply_edits, edit_from_record, edit_to_record, history
from torchgraft.engines.surgery.slicing import Slice, structure
from torchgraft.errors import BadInput, Untraceable

__all__ = ["CHECKS"]

_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def _procedure(subject: Subject) -> Procedure:
    made = subject.entry(**settings(subject.card))
    require(isinstance(made, Procedure), f"{subject.card.entry} makes a {type(made).__name__}, which is no Procedure")
    found: Procedure = made
    return found


def _cases(subject: Subject) -> list[Case]:
    return cases_of(subject, _procedure(subject).applies_to)


def _apply(subject: Subject, tiny: Case, strength: float, *, task: Task | None = None) -> nn.Module:
    return _procedure(subject).apply(tiny.model, task or tiny.task, strength)


def _changed(subject: Subject, tiny: Case, strength: float = 0.5) -> nn.Module:
    """Return the model after the procedure, a private copy of one that is made once."""
    key = f"{tiny.name}:{strength}"
    if key not in subject.kept:
        # One model for all strengths: a procedure may remember what it found out about a model.
        model = subject.kept.setdefault(tiny.name, tiny.model)
        subject.kept[key] = _procedure(subject).apply(model, tiny.task, strength)
    private: nn.Module = copy.deepcopy(subject.kept[key])
    return private


def _ended(subject: Subject, tiny: Case, changed: nn.Module) -> nn.Module:
    """Return ``changed`` as it is once it is trained; ``changed`` itself where nothing is left to do."""
    edits = _procedure(subject).ending(changed, tiny.task)
    return apply_edits(changed, edits) if edits else changed


def check_procedure_is_what_the_card_says(subject: Subject) -> None:
    """The entry is a Procedure that works without arguments, carries this card, and finds sound sites."""
    bare = subject.entry()
    require(isinstance(bare, Procedure), f"{subject.card.entry}() is a {type(bare).__name__}, no Procedure")
    require(bare.card == subject.card, f"{subject.card.entry}.card is the card of {bare.card.key!r}")
    for tiny in _cases(subject):
        sites = _procedure(subject).applies_to(tiny.model, tiny.task)
        names = [site.name for site in sites]
        require(len(set(names)) == len(names), f"{tiny.name}: sites share a name: {sorted(names)}")
        empty = [site.name for site in sites if site.size < 1 or site.parameters < 0]
        require(not empty, f"{tiny.name}: sites without units: {empty}")


def check_strength_zero_is_the_identity(subject: Subject) -> None:
    """At strength 0 weights and outputs are bit for bit those of the original."""
    for tiny in _cases(subject):
        changed = _apply(subject, tiny, 0.0)
        same_state(tiny.model, changed, f"{tiny.name} at strength 0")
        same_output(output(tiny.model, tiny.inputs), output(changed, tiny.inputs), f"{tiny.name} at strength 0")
        require(history(changed) == (), f"{tiny.name}: strength 0 leaves the edits {history(changed)}")


def check_strength_changes_the_model(subject: Subject) -> None:
    """At strength 1 something is done, and it is noted in the history."""
    for tiny in _cases(subject):
        changed = _changed(subject, tiny, 1.0)
        require(len(history(changed)) > 0, f"{tiny.name}: no edit at strength 1")
        described = {name for edit in history(changed) for name in edit.describe()}
        require(bool(described), f"{tiny.name}: the edits describe nothing")


def check_original_is_untouched(subject: Subject) -> None:
    """The model that is given, and everything around it (random state, threads, modes), is left as it was."""
    for tiny in _cases(subject):
        model = tiny.model
        model.train()
        for parameter in list(model.parameters())[:1]:
            parameter.requires_grad_(False)
        weights = copy.deepcopy(model)
        parts, around = fittings(model), surroundings()
        _procedure(subject).apply(model, tiny.task, 0.5)
        for name, value in surroundings().items():
            require(value == around[name], f"{tiny.name}: {name} changed")
        for name, value in fittings(model).items():
            require(value == parts[name], f"{tiny.name}: the {name} of the original changed")
        same_state(weights, model, f"{tiny.name}: the original after apply")


def check_same_seed_gives_the_same_model(subject: Subject) -> None:
    """Applied twice with one seed, whatever was drawn before, the models are bit for bit equal."""
    for tiny in _cases(subject):
        first = _changed(subject, tiny)
        with torch.random.fork_rng():
            torch.manual_seed(12345)
            second = _apply(subject, tiny, 0.5)
        require(history(first) == history(second), f"{tiny.name}: the edits differ from one run to the next")
        same_state(first, second, f"{tiny.name}: two runs with seed 0")
        same_output(output(first, tiny.inputs), output(second, tiny.inputs), f"{tiny.name}: two runs with seed 0")


def check_cost_never_rises_with_strength(subject: Subject) -> None:
    """Cost (bytes for weights and precision, else parameters and MACs) never rises with strength and falls in all.

    An execution leaves all of them as they are.
    """
    for tiny in _cases(subject):
        series: dict[str, list[int]] = {}
        for strength in _STRENGTHS:
            changed = _ended(subject, tiny, _changed(subject, tiny, strength))
            if subject.card.stage in ("weights", "precision"):
                series.setdefault("bytes", []).append(size_of_tensors(changed.state_dict()))
            else:
                series.setdefault("parameters", []).append(params(changed))
                series.setdefault("MACs", []).append(macs(changed, tiny.inputs))
        for name, values in series.items():
            rises = [pair for pair in itertools.pairwise(values) if pair[1] > pair[0]]
            require(not rises, f"{tiny.name}: {name} over strengths {_STRENGTHS} are {values}")
        if subject.card.stage == "execution":  # it shortens the time alone, which a benchmark measures
            require(all(len(set(values)) == 1 for values in series.values()), f"{tiny.name}: counts change: {series}")
            continue
        require(any(values[-1] < values[0] for values in series.values()), f"{tiny.name}: nothing falls: {series}")


def check_ignored_modules_stay(subject: Subject) -> None:
    """What an ignore glob names keeps its modules and weights bit for bit, and ignoring all leaves no site."""
    procedure = _procedure(subject)
    for tiny in _cases(subject):
        model = tiny.model
        sites = procedure.applies_to(model, tiny.task)
        for site in (sites[0], sites[-1]):
            glob = site.name.split(":")[0]
            left = procedure.applies_to(model, tiny.task, ignore=[glob])
            require(site.name not in [other.name for other in left], f"{tiny.name}: {glob!r} is ignored, yet a site")
            if not left:
                continue
            changed = procedure.apply(model, tiny.task, 1.0, ignore=[glob])
            before, after = model.state_dict(), changed.state_dict()
            held = [name for name in before if ignored(name, [glob])]
            moved = [name for name in held if name not in after or not equal(before[name], after[name])]
            require(not moved, f"{tiny.name}: ignoring {glob!r}, yet {moved} changed")
        require(not procedure.applies_to(model, tiny.task, ignore=["*"]), f"{tiny.name}: sites though all ignored")


def check_reload_gives_the_same_outputs(subject: Subject) -> None:
    """Edits through JSON on a fresh architecture, then the saved weights, give the same outputs bit for bit."""
    for tiny in _cases(subject):
        changed = _changed(subject, tiny)
        ended = _ended(subject, tiny, changed)
        for model in (changed, ended) if ended is not changed else (changed,):
            _reload(tiny, model)


def _reload(tiny: Case, changed: nn.Module) -> None:
    records = json.loads(json.dumps([edit_to_record(edit) for edit in history(changed)]))
    edits = [edit_from_record(record) for record in records]
    require(tuple(edits) == history(changed), f"{tiny.name}: edits change on the way through JSON")
    fresh = apply_edits(tiny.build(7), edits)
    weights, _ = unpack_tensors(pack_tensors(changed.state_dict()))
    missing = sorted(fresh.state_dict().keys() ^ weights.keys())
    require(not missing, f"{tiny.name}: the rebuilt model and the saved weights differ in {missing[:4]}")
    fresh.load_state_dict(weights)
    same_state(changed, fresh, f"{tiny.name}: after reload")
    same_output(output(changed, tiny.inputs), output(fresh.eval(), tiny.inputs), f"{tiny.name}: after reload")


def check_ending_keeps_the_outputs(subject: Subject) -> None:
    """What is left to be done to a trained model changes its outputs by less than 1e-5, and is done once."""
    for tiny in _cases(subject):
        for strength in (0.5, 1.0):
            changed = _changed(subject, tiny, strength)
            ended = _ended(subject, tiny, changed)
            expected, found = output(changed, tiny.inputs), output(ended, tiny.inputs)
            gap = (expected - found).abs().max().item() / max(1.0, expected.abs().max().item())
            require(gap <= 1e-5, f"{tiny.name}: the ending moves the outputs by {gap:.3g} at strength {strength}")
            training = [name for name, module in ended.named_modules() if module.training]
            require(not training, f"{tiny.name}: ended in eval mode, yet {training[:3]} train")
            again = _procedure(subject).ending(ended, tiny.task)
            require(ended is changed or not again, f"{tiny.name}: an ended model has another ending: {again}")


def check_deepcopy_keeps_outputs_and_history(subject: Subject) -> None:
    """A deep copy says the same and remembers the same edits, and changing it leaves the first alone."""
    for tiny in _cases(subject):
        changed = _changed(subject, tiny)
        expected = output(changed, tiny.inputs)
        twin = copy.deepcopy(changed)
        require(history(twin) == history(changed), f"{tiny.name}: the copy has the edits {history(twin)}")
        same_output(expected, output(twin, tiny.inputs), f"{tiny.name}: deep copy")
        with torch.no_grad():
            for value in (*twin.parameters(), *twin.buffers()):
                value.zero_()
        same_output(expected, output(changed, tiny.inputs), f"{tiny.name}: after its copy was zeroed")


def check_eval_is_deterministic(subject: Subject) -> None:
    """In eval mode the same inputs give the same outputs, call after call, and the result stands in eval mode."""
    for tiny in _cases(subject):
        changed = _changed(subject, tiny)
        training = [name for name, module in changed.named_modules() if module.training]
        require(not training, f"{tiny.name}: made from a model in eval mode, yet {training[:3]} train")
        first = output(changed, tiny.inputs)
        for _ in range(3):
            same_output(first, output(changed, tiny.inputs), f"{tiny.name}: called again")


def check_bad_strength_is_refused(subject: Subject) -> None:
    """A strength outside [0, 1] is refused with the value that was received."""
    tiny = _cases(subject)[0]
    for strength in (-0.1, 1.5, float("nan")):
        try:
            _apply(subject, tiny, strength)
        except BadInput as error:
            require(str(strength) in str(error), f"the refusal of {strength} does not say it: {error}")
        else:
            require(False, f"strength {strength} is accepted")


def check_model_without_sites_is_refused(subject: Subject) -> None:
    """A model in which there is nothing to do has no sites, and applying is refused by a one-line BadInput."""
    tiny = _cases(subject)[0]
    procedure = _procedure(subject)
    try:
        sites = procedure.applies_to(Bare(), tiny.task)
        require(not sites, f"a model of one bias vector has the sites {sites}")
        procedure.apply(Bare(), tiny.task, 0.5)
    except BadInput as error:
        require("\n" not in str(error) and subject.card.key in str(error), f"the refusal is unclear: {error}")
    else:
        require(False, "a model of one bias vector is accepted")


def check_only_declared_sites_move(subject: Subject) -> None:
    """Weights that no edit names are bit for bit those of the original."""
    for tiny in _cases(subject):
        changed = _changed(subject, tiny)
        touched: set[str] = set()
        for edit in history(changed):
            touched.update(edit.tensors if isinstance(edit, Slice) else edit.describe())
        before, after = tiny.model.state_dict(), changed.state_dict()
        kept = [name for name in before if not any(name == t or name.startswith(f"{t}.") for t in touched)]
        moved = [name for name in kept if name not in after or not equal(before[name], after[name])]
        require(not moved, f"{tiny.name}: {moved[:3]} changed, outside {sorted(touched)}")


def check_removed_equals_masked(subject: Subject) -> None:
    """Where the cut of a group is exact, slicing gives what zeroing the same entries gives, within 1e-5."""
    for tiny in _cases(subject):
        plan = structure(tiny.model, tiny.inputs)
        sizes = {group.name: group.size for group in plan.groups if group.exact}
        # Only what a LayerNorm averages over, or what scales the attention's scores, may be cut inexactly.
        loose = [group.name for group in plan.groups if not group.exact and group.kind not in ("width", "features")]
        require(not loose, f"{tiny.name}: cutting {', '.join(loose)} is not what masking gives")
        for edit in history(_changed(subject, tiny)):
            if not isinstance(edit, Slice):
                continue
            strange = sorted(edit.units.keys() - {group.name for group in plan.groups})
            require(not strange, f"{tiny.name}: {', '.join(strange)} cannot be cut without changing more than masking")
            counts = {name: left for name, (left, _) in edit.units.items() if name in sizes}
            if not counts:
                continue
            keep = {name: [place * sizes[name] // left for place in range(left)] for name, left in counts.items()}
            cut = plan.slice(keep)
            expected = output(_masked(tiny.model, cut), tiny.inputs)
            found = output(apply_edits(tiny.model, [cut]), tiny.inputs)
            gap = (expected - found).abs().max().item() / max(1.0, expected.abs().max().item())
            require(gap <= 1e-5, f"{tiny.name}: sliced and masked differ by {gap:.3g} when {counts} of {sizes} stay")


def _masked(model: nn.Module, cut: Slice) -> nn.Module:
    """Zero in place, in the model of full size, every parameter entry that ``cut`` removes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim, runs in cut.tensors.get(name, {}).items():
                gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
                for start, stop in runs:
                    gone[start:stop] = False
                parameter.index_fill_(dim, gone.nonzero().flatten(), 0.0)
    return model


def check_selection_data_is_never_seen(subject: Subject) -> None:
    """Only the training split is looked at; validation and test samples are not."""
    for tiny in _cases(subject):
        guarded = Guarded(tiny.task, ("val", "test"))
        _apply(subject, tiny, 0.5, task=guarded)
        require(not guarded.seen, f"{tiny.name}: looked at {guarded.seen}")


def check_undeclared_data_is_not_used(subject: Subject) -> None:
    """A procedure that does not declare needs-data gives the same model whatever the samples hold."""
    for tiny in _cases(subject):
        train = tiny.task.train
        other = Guarded(tiny.task, ())
        other.train = Split(3.0 - 2.0 * _tensor(train.inputs), (train.target + 1) % 4)
        first, second = _changed(subject, tiny), _apply(subject, tiny, 0.5, task=other)
        same_state(first, second, f"{tiny.name}: with other samples, though the card lacks needs-data")


def check_undeclared_labels_are_not_used(subject: Subject) -> None:
    """A procedure that does not declare needs-labels gives the same model whatever the labels say."""
    for tiny in _cases(subject):
        other = Guarded(tiny.task, ())
        other.train = Split(tiny.task.train.inputs, (tiny.task.train.target + 1) % 4)
        first, second = _changed(subject, tiny), _apply(subject, tiny, 0.5, task=other)
        same_state(first, second, f"{tiny.name}: with other labels, though the card lacks needs-labels")


def check_outputs_are_finite_at_any_batch_size(subject: Subject) -> None:
    """At full strength outputs keep their shape and stay finite for batches of 1, 5 and 8."""
    for tiny in _cases(subject):
        changed = _changed(subject, tiny, 1.0)
        for size in (1, 5, 8):
            inputs = _tensor(tiny.inputs)[:size]
            out, expected = output(changed, inputs), output(tiny.model, inputs)
            require(out.shape == expected.shape, f"{tiny.name}: {tuple(out.shape)}, not {tuple(expected.shape)}")
            require(bool(torch.isfinite(out).all()), f"{tiny.name}: not finite at batch size {size}")


def check_result_can_be_trained(subject: Subject) -> None:
    """Every trainable parameter of the result gets a finite gradient, so that accuracy can be recovered."""
    for tiny in _cases(subject):
        changed = _changed(subject, tiny).train()
        task = tiny.task
        trainable = {name: value for name, value in changed.named_parameters() if value.requires_grad}
        require(bool(trainable), f"{tiny.name}: no parameter is trainable")
        loss = task.loss(changed(task.train.inputs), task.train.target)
        found = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        grads = dict(zip(trainable, found, strict=True))
        without = [name for name, grad in grads.items() if grad is None or not bool(torch.isfinite(grad).all())]
        require(not without, f"{tiny.name}: no finite gradient for {without[:4]}")


def check_untraceable_model_is_handled(subject: Subject) -> None:
    """A model that branches on its data works, or, where the card declares needs-trace, is refused with the line."""
    tiny = _cases(subject)[0]
    model = Guess(tiny.model)
    try:
        changed = _procedure(subject).apply(model, tiny.task, 0.5)
    except Untraceable as error:
        require("needs-trace" in subject.card.capabilities, f"the card lacks needs-trace, yet a trace failed: {error}")
        require(error.line is not None, f"the offending line is not named: {error}")
    else:
        require(output(changed, tiny.inputs).shape == (8, 4), "the branching model lost its output")


def _tensor(inputs: Inputs) -> Tensor:
    if not isinstance(inputs, Tensor):
        raise CheckFailure("check models take one tensor")
    return inputs


def _is_procedure(card: Card) -> bool:
    return card.kind == "procedure" and card.stage is not None


def _without(capability: str) -> Any:
    return lambda card: _is_procedure(card) and capability not in card.capabilities


CHECKS = (
    *(
        Check(function, _is_procedure)
        for function in (
            check_procedure_is_what_the_card_says,
            check_strength_zero_is_the_identity,
            check_strength_changes_the_model,
            check_original_is_untouched,
            check_same_seed_gives_the_same_model,
            check_cost_never_rises_with_strength,
            check_ignored_modules_stay,
            check_reload_gives_the_same_outputs,
            check_ending_keeps_the_outputs,
            check_deepcopy_keeps_outputs_and_history,
            check_eval_is_deterministic,
            check_bad_strength_is_refused,
            check_model_without_sites_is_refused,
            check_selection_data_is_never_seen,
            check_outputs_are_finite_at_any_batch_size,
            check_untraceable_model_is_handled,
        )
    ),
    Check(check_only_declared_sites_move, _without("needs-training")),
    Check(check_undeclared_data_is_not_used, _without("needs-data")),
    Check(check_undeclared_labels_are_not_used, _without("needs-labels")),
    Check(check_removed_equals_masked, lambda card: _is_procedure(card) and card.stage == "width"),
    Check(check_result_can_be_trained, lambda card: _is_procedure(card) and card.stage != "precision"),
)
