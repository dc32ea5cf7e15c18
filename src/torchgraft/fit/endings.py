"""How the float model of a trial ends: in which precision and how it runs, chosen by what each ending would hold."""

from __future__ import annotations

import contextlib
import math

from torch import nn

from torchgraft.errors import BadInput
from torchgraft.fit.contribution import LEFT, gains, promise
from torchgraft.fit.plan import check_combination
from torchgraft.fit.workshop import LAST, NOISY, Made, Workshop

__all__ = ["FEWER", "LITTLE", "MORE", "USUAL", "chosen_ending", "chosen_execution"]

#: The strength at which every precision procedure is tried, and those at which the best of them is tried then: fewer
#: bits, and more of them where fewer did not do.
USUAL, FEWER, MORE = 0.8, 1.0, 0.5
#: The share of the exact way's time, quickly measured, below which another way is faster.
FASTER = 0.95
#: Halvings that count for a cost that does not fall, so that gains in the others still tell.
LITTLE = 0.05


def chosen_ending(workshop: Workshop, made: Made, seed: int) -> tuple[nn.Module, float]:
    """Return ``made`` with the precision procedure that holds most, not yet as it will run, and its validation score.

    How deep a model may be cut must not depend on one precision that does not suit it. The float model has had its few
    steps, and an ending costs no training. What counts is the score, of which recovery at length mends what the float
    model has lost and not what rounding takes, times the halvings of exact costs. No times decide: procedures that
    measure some wait for the end of the run.

    Args:
        workshop: what the trials share.
        made: a model after its recovery; its strengths are set to those chosen.
        seed: the trial's seed.
    """
    members = workshop.plan.stages.get("precision", {})
    untimed = [key for key in members if not members[key].timed]
    if not untimed or not made.strengths.keys() & members.keys():
        model = workshop.finish(made.model, made.strengths, seed, stages=LAST[:-1])
        return model, float(workshop.score(model).mean())
    base, exact = float(workshop.validation.mean()), [cost for cost in workshop.costs if cost not in NOISY]
    rest = {key: strength for key, strength in made.strengths.items() if key not in members}
    plain = float(workshop.score(workshop.finish(made.model, rest, seed, stages=())).mean())
    mended = (1.0 - LEFT) * max(base - plain, 0.0)
    best: tuple[float, float, dict[str, float], nn.Module] | None = None

    def worth(key: str, strength: float) -> float:
        nonlocal best
        strengths: dict[str, float] = {}
        for other, value in made.strengths.items():
            strengths |= {key: strength} if other in members else {other: value}
        try:
            check_combination(list(strengths))
            model = workshop.finish(made.model, strengths, seed, stages=LAST[:1])
            score = float(workshop.score(model).mean())
        except BadInput:
            return 0.0  # refused beside what stands there, or useless
        ratios = workshop.quick_ratios(model, exact)
        share, *halvings = gains(score + mended, [ratios[cost] for cost in exact], base, span=workshop.span)
        held = share * math.prod(max(value, LITTLE) for value in halvings)
        if best is None or (held, score) > best[:2]:
            best = held, score, strengths, model
        return held

    usual = {key: worth(key, USUAL) for key in untimed}
    suited = max(usual, key=usual.__getitem__)
    if worth(suited, FEWER) <= usual[suited]:
        worth(suited, MORE)
    if best is None:
        raise BadInput("no precision procedure can end this model")
    _, score, made.strengths, model = best
    return model, score


def chosen_execution(
    workshop: Workshop, made: Made, plain: nn.Module, score: float, seed: int
) -> tuple[nn.Module, float]:
    """Return ``made`` finished, run as holds most when measured, and its validation score then.

    What is exact is among its strengths already. A pass that rounds is faster on some cuts and not on others, and may
    cost score: what counts is the score that recovery at length may bring, times the halvings of all costs. Where it
    was once no faster, narrower cuts are not asked again.

    Args:
        workshop: what the trials share.
        made: a model at the end of its trial; its strengths and ratios are set to those of the execution chosen.
        plain: what :func:`chosen_ending` made of it.
        score: the validation score of that.
        seed: the trial's seed.
    """
    members, base = workshop.plan.stages.get(LAST[-1], {}), float(workshop.validation.mean())
    size = sum(value.numel() for value in made.model.parameters())
    kept = {key: strength for key, strength in made.strengths.items() if key not in members}
    ways = [{key: s for key, s in made.strengths.items() if key in members}]
    ways += [
        {key: 1.0}
        for key, procedure in members.items()
        if not procedure.exact and size > workshop.unhurried.get(key, 0) and not _refused(*kept, key)
    ]
    models = [workshop.finish(plain, way, seed, stages=LAST[-1:]) for way in ways]
    measured = workshop.quick_ratios_of(models)

    def held(number: int, score: float) -> float:
        share, *halvings = promise(score, list(measured[number].values()), base, span=workshop.span)
        return share * math.prod(max(value, LITTLE) for value in halvings)

    best, most = (0, score), held(0, score)
    for number in range(1, len(ways)):
        if measured[number]["latency"] >= FASTER * measured[0]["latency"]:
            workshop.unhurried.update(dict.fromkeys(ways[number], size))
            continue
        with contextlib.suppress(BadInput):  # NaN
            rounded = float(workshop.score(models[number]).mean())
            if held(number, rounded) > most:
                best, most = (number, rounded), held(number, rounded)
    number, score = best
    made.strengths, made.ratios = {**kept, **ways[number]}, measured[number]
    return models[number], score


def _refused(*keys: str) -> bool:
    try:
        check_combination(keys)
    except BadInput:
        return True
    return False
