"""Whether a pipeline call's settings are those its knowledge base was built with, and which plan serves it then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from redi.engine import ReDiEngine
from redi.errors import FingerprintMismatchError

_REFUSED: Final = ("timesteps", "sigmas", "denoising_end", "denoising_start", "eta")


@final
@dataclass(frozen=True)
class Decision:
    """How a call is served.

    Args:
        engine: the plan's, or None for the plain solver.
        arguments: the call's, with what it left open filled in from the knowledge base.
        notes: why the plain solver serves, if it does.
    """

    engine: ReDiEngine | None
    arguments: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def decide(
    engines: Sequence[ReDiEngine],
    arguments: Mapping[str, Any],
    given: frozenset[str],
    now: Mapping[str, Any],
    on_mismatch: Literal["error", "plain"],
) -> Decision:
    """Choose the engine for a call.

    Args:
        engines: of one knowledge base and solver; of two with equal steps the first serves.
        arguments: the call's, defaults filled in.
        given: the names its caller gave.
        now: the fields of the fingerprint that the pipeline's user may have changed, as they are.
        on_mismatch: whether other settings are an error or served by the plain solver.

    Raises:
        FingerprintMismatchError: the settings differ, and that is to be an error.
    """
    mark = engines[0].knowledge_base.fingerprint
    by_steps = {e.plan.steps: e for e in reversed(engines)}
    ours = {"guidance_scale": mark.guidance, "height": mark.height, "width": mark.width}
    absent = {name for name, value in arguments.items() if name not in given or value is None}
    filled: dict[str, Any] = {**arguments, **{name: value for name, value in ours.items() if name in absent}}
    if "num_inference_steps" not in given and len(by_steps) == 1:
        filled["num_inference_steps"] = next(iter(by_steps))

    differences: dict[str, tuple[object, object]] = {
        name: (getattr(mark, name), value) for name, value in now.items() if getattr(mark, name) != value
    }
    steps = filled.get("num_inference_steps")
    if steps not in by_steps:
        valid = ", ".join(f"{n} ({e.plan})" for n, e in sorted(by_steps.items()))
        differences["num_inference_steps"] = (valid, steps)
    for name, mine in {**ours, "guidance_rescale": mark.guidance_rescale}.items():
        if (theirs := filled.get(name)) is not None and theirs != mine:
            differences[name] = (mine, theirs)
    if _negative(filled.get("negative_prompt")) != {mark.negative_prompt}:
        differences["negative_prompt"] = (mark.negative_prompt, filled["negative_prompt"])
    latents = filled.get("latents")
    if latents is not None and tuple(latents.shape[1:]) != mark.sample_shape:
        differences["latents"] = (mark.sample_shape, tuple(latents.shape[1:]))
    differences |= {name: (None, filled[name]) for name in _REFUSED if filled.get(name)}

    if not differences:
        return Decision(by_steps[int(filled["num_inference_steps"])], filled)
    if on_mismatch == "error":
        raise FingerprintMismatchError(
            differences,
            "call the pipeline with the knowledge base's settings, or enable it with on_mismatch='plain' "
            "to run the plain solver where they differ",
        )
    return Decision(None, filled, (f"plain solver: {', '.join(sorted(differences))} differ from the knowledge base's",))


def _negative(given: str | list[str] | None) -> set[str]:
    if given is None:
        return {""}
    return {given} if isinstance(given, str) else set(given)
