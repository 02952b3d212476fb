"""Whether a pipeline call's settings are those its knowledge base was built with, and which plan serves it then."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, Literal, final

from redi.engine import ReDiEngine
from redi.errors import FingerprintMismatchError
from redi.interception import starts_from_picture
from redi.negatives import negative_prompts
from redi.pipelines import changeable, settings_of

REFUSED: Final = ("timesteps", "sigmas", "denoising_end", "denoising_start", "eta")
"""Arguments that make another schedule, or noise on the way."""


@final
@dataclass(frozen=True)
class Decision:
    """How a call is served.

    Args:
        engine: the plan's, or None for the pipeline as it is without redi.
        arguments: the call's; for an engine, with what it left open filled in from the knowledge base.
        notes: why no engine serves, if none does.
    """

    engine: ReDiEngine | None
    arguments: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def decide(
    engines: Sequence[ReDiEngine],
    pipe: Any,
    arguments: Mapping[str, Any],
    given: frozenset[str],
    on_mismatch: Literal["error", "plain"],
) -> Decision:
    """Choose the engine for a call.

    Args:
        engines: of one knowledge base and solver; of two with equal steps the first serves.
        pipe: the pipeline that is called.
        arguments: the call's, defaults filled in.
        given: the names its caller gave.
        on_mismatch: whether other settings are an error or served as without redi.

    Raises:
        FingerprintMismatchError: the settings differ, and that is to be an error.
    """
    mark = engines[0].knowledge_base.fingerprint
    begin = engines[0].route.fine.timetable.begin
    by_steps = {e.plan.steps: e for e in reversed(engines)}
    ours = {
        "guidance_scale": mark.guidance,
        "guidance_rescale": mark.guidance_rescale,
        "height": mark.height,
        "width": mark.width,
    }
    absent = {name for name, value in arguments.items() if name not in given or value is None}
    filled: dict[str, Any] = {
        **arguments,
        **{name: value for name, value in {**ours, **mark.settings}.items() if name in absent},
    }
    if "num_inference_steps" not in given and not begin and (own := _unasked(engines)) is not None:
        filled["num_inference_steps"] = own.plan.steps
        by_steps[own.plan.steps] = own

    differences: dict[str, tuple[object, object]] = {
        name: (getattr(mark, name), value) for name, value in changeable(pipe).items() if getattr(mark, name) != value
    }
    steps = walked(pipe, filled)
    if steps not in by_steps:
        named = {n: f"{e.plan}, {e.route.nfe} calls" if e.plan.halved else e.plan for n, e in sorted(by_steps.items())}
        valid = ", ".join(f"{n} ({plan})" for n, plan in named.items())
        differences["num_inference_steps"] = (valid, steps)
    for name, mine in ours.items():
        if mine is not None and (theirs := filled.get(name)) is not None and theirs != mine:
            differences[name] = (mine, theirs)
    asked = settings_of(pipe, filled)
    for name in {**mark.settings, **asked}:
        mine, theirs = (said.get(name, "the pipeline's default") for said in (mark.settings, asked))
        if mine != theirs:
            differences[name] = (mine, theirs)
    if (negative := negative_prompts(pipe, filled, mark.negative_prompt)) != {mark.negative_prompt}:
        differences["negative_prompt"] = (mark.negative_prompt, ", ".join(sorted(negative)))
    latents = filled.get("latents")
    if latents is not None and begin:
        differences["latents"] = ("noise on a picture", "latents")
    elif latents is not None and tuple(latents.shape[1:]) != mark.sample_shape:
        differences["latents"] = (mark.sample_shape, tuple(latents.shape[1:]))
    differences |= {name: (None, filled[name]) for name in REFUSED if filled.get(name)}

    if not differences:
        return Decision(by_steps[steps], filled)
    if on_mismatch == "error":
        raise FingerprintMismatchError(
            differences,
            "call the pipeline with the knowledge base's settings, or enable it with on_mismatch='plain' "
            "to run it as without redi where they differ",
        )
    return Decision(
        None, arguments, (f"plain solver: {', '.join(sorted(differences))} differ from the knowledge base's",)
    )


def _unasked(engines: Sequence[ReDiEngine]) -> ReDiEngine | None:
    """What serves a call that asks for no number of steps: the cheapest whose error is allowed, or the only one.

    Where no error is allowed, it is the one whose error is the least: its gate sees to the samples.
    """
    judged = [(e.gate.trust.average, e) for e in engines if e.gate.trust and e.gate.max_error < math.inf]
    allowed = [e for error, e in judged if error <= e.gate.max_error]
    if allowed:
        return min(allowed, key=lambda e: e.route.nfe)
    if judged:
        return min(judged, key=lambda found: found[0])[1]
    return engines[0] if len({e.plan.steps for e in engines}) == 1 else None


def walked(pipe: Any, arguments: Mapping[str, Any]) -> Any:
    """How many steps a call walks: those it asks for, or of them what its `strength` leaves, as its pipeline counts."""
    steps, strength = arguments.get("num_inference_steps"), arguments.get("strength")
    if not starts_from_picture(pipe) or not isinstance(steps, int) or strength is None:
        return steps
    scheduler = SimpleNamespace(timesteps=range(steps), order=1)
    kept, _ = type(pipe).get_timesteps(SimpleNamespace(scheduler=scheduler), steps, strength, None)
    return len(kept)
