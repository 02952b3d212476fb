"""redi inside a diffusers pipeline: enable, disable, report. The loop is the pipeline's, the leap is the engine's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, get_args

import torch

from redi.backends import Retriever
from redi.combiners import Combiner
from redi.engine import ReDiEngine
from redi.errors import FingerprintMismatchError, InvalidInputError
from redi.gate import Gate
from redi.interception import Interception, active, loop_code
from redi.knowledge_base import KnowledgeBase
from redi.pipelines import fingerprint, parts_of
from redi.plan import Plan
from redi.run import OnMiss
from redi.serving import Server, in_context
from redi.solvers import DiffusersSolver
from redi.table import Key
from redi.transports import Transport
from redi.tuned import mark_of
from redi.types import LeapReport

_PER_CALL: Final = ("steps", "guidance", "guidance_rescale", "negative_prompt", "height", "width", "settings")
_OF_THE_SOLVER: Final = ("scheduler", "scheduler_config", "sample_shape", "model")
# what a scheduler's config says of how the model was trained, whatever the solver
_TRAINING: Final = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "num_train_timesteps",
    "prediction_type",
)


def enable(
    pipe: Any,
    kb: KnowledgeBase,
    *,
    plan: Plan | str | None = None,
    solver: DiffusersSolver | None = None,
    transport: Transport | None = None,
    combiner: Combiner | None = None,
    retriever: Retriever | None = None,
    key: Key | None = None,
    neighbors: int | None = None,
    gate: Gate | None = None,
    max_error: float | None = None,
    retrieve_at: Sequence[int] | None = None,
    history: Literal["carry", "fresh"] | None = None,
    eight_bits: bool | None = None,
    on_mismatch: Literal["error", "plain"] = "error",
    on_miss: OnMiss | None = None,
    seed: int = 0,
) -> None:
    """Serve a knowledge base inside a pipeline: from now on `pipe(prompt)` leaps.

    The knowledge base's solver stands in for the pipeline's scheduler, and its noise bank supplies the starting noise,
    until `disable`. What is left open is served as `redi.tune` found it best, else by the defaults of `ReDiEngine`.

    Args:
        pipe: a diffusers text-to-image pipeline, the one the knowledge base was built with.
        kb: the knowledge base.
        plan: the one to serve; None picks, at every call, the knowledge base's first plan of the steps asked for.
            With `max_error`, a call that asks for no steps gets the plan of the fewest calls whose error is allowed.
        solver: whose steps are taken; None is the solver of the rows, and for a coarse plan its `for_coarse_steps`.
        transport: of every leap; None is `Defect()`, or `Value()` for a jump of a solver that Defect does not suit.
        combiner: how neighbours are weighed.
        retriever: how they are found; None is what suits the number of rows.
        key: what they are found by.
        neighbors: how many.
        gate: when they are near enough.
        max_error: error that may be expected of a sample that leaps, as a fraction of the plain solver's at the same
            number of calls; needs a tuned knowledge base.
        retrieve_at: leaps at which they are looked up; in between the last ones serve.
        history: of the solver after a jump.
        eight_bits: whether the defects of coarse plans are kept in int8, half the bytes of float16.
        on_mismatch: what a call with other settings than the knowledge base's gets: an error, or (`plain`) what the
            pipeline gives without redi.
        on_miss: what a sample gets that the gate shuts out: `plain`, the solver without memory at the same number of
            calls (a coarse plan's default); `full`, every fine step (a jump's default); `nearest`, the nearest row all
            the same; or `error`.
        seed: of the starting noise for calls without a generator.

    Raises:
        FingerprintMismatchError: the pipeline is not the one the rows came from.
        PlanError: the plan does not suit the solver, the transport or the key.
        KnowledgeBaseError: the rows do not hold what the plan needs.
        InvalidInputError: redi is active already, the pipeline does not start from noise, or no error can be foretold
            that `max_error` could be compared with.
    """
    if not isinstance(kb, KnowledgeBase):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidInputError(
            f"expected a knowledge base, given {kb!r}; open its folder: redi.KnowledgeBase.open(folder)"
        )
    if on_mismatch not in ("error", "plain"):
        raise InvalidInputError(f"on_mismatch must be 'error' or 'plain', given {on_mismatch!r}")
    if on_miss not in (None, *get_args(OnMiss)):
        raise InvalidInputError(f"on_miss must be one of {', '.join(get_args(OnMiss))}, given {on_miss!r}")
    if len(kb) == 0:
        raise InvalidInputError(f"{kb.path} holds no finished rows; run redi build first")
    mark = kb.fingerprint
    rows = DiffusersSolver.from_config(mark.scheduler, mark.scheduler_config)
    given = fingerprint(pipe, rows, steps=mark.steps, guidance=mark.guidance, sample_shape=mark.sample_shape)
    differences = mark.differences(given, ignoring=(*_PER_CALL, *_OF_THE_SOLVER))
    differences |= _trained_otherwise(mark.scheduler_config, pipe.scheduler.config)
    if differences:
        raise FingerprintMismatchError(
            differences, "use the pipeline it was built with, or build one for this pipeline"
        )
    engines = ReDiEngine.serving(
        kb,
        plan,
        solver=solver,
        transport=transport,
        combiner=combiner,
        retriever=retriever,
        key=key,
        neighbors=neighbors,
        gate=gate,
        max_error=max_error,
        retrieve_at=retrieve_at,
        history=history,
        eight_bits=eight_bits,
    )
    made = {mark_of(s): s.scheduler() for s in (e.solver for e in engines) if isinstance(s, DiffusersSolver)}
    schedulers, own = [made[mark_of(e.solver)] for e in engines], _copied(pipe) if on_mismatch == "plain" else None
    server = Server(engines, schedulers, own, loop_code(pipe), on_mismatch, on_miss, seed, parts=parts_of(pipe))
    first, *others = made.values()
    Interception(pipe, first, server, others if own is None else (*others, own)).install()


def _copied(pipe: Any) -> Any:
    try:
        return copy.deepcopy(pipe.scheduler)
    except Exception as e:  # whatever it holds may refuse in its own way
        raise InvalidInputError(
            f"on_mismatch='plain' needs a copy of the {type(pipe.scheduler).__name__}, which cannot be made ({e}); "
            "use on_mismatch='error', or give the pipeline a scheduler made from its config"
        ) from e


def disable(pipe: Any) -> None:
    """Leave the pipeline exactly as `enable` found it. A pipeline that is not enabled is left alone."""
    if (found := active(pipe)) is not None:
        found.remove()


def report(pipe: Any) -> LeapReport:
    """What the last call of an enabled pipeline did.

    Raises:
        InvalidInputError: redi is not active in this pipeline, or it has not been called yet.
    """
    found = active(pipe)
    if found is None or not isinstance(found.listener, Server):
        raise InvalidInputError("redi is not active in this pipeline; call redi.enable(pipe, kb) first")
    if found.listener.last is None:
        raise InvalidInputError("no call has ended well since redi.enable; call the pipeline, then ask for a report")
    return in_context(found.listener.last, pipe, found.listener.engines[0].knowledge_base)


def switch_prompt(
    pipe: Any, prompt: str | list[str], *, negative_prompt: str | None = None
) -> Callable[..., dict[str, Any]]:
    """Zero-shot domain adaptation (paper, section 4.3): another prompt once the first leap is made or missed.

    Pass the result as `callback_on_step_end` with `callback_on_step_end_tensor_inputs=["prompt_embeds"]`, and the
    content alone as the prompt: neighbours are found by content, what follows the leap is content and style. On a
    coarse plan, where every step is a leap, and where the plain solver serves, the switch comes after the first step.

    Args:
        pipe: an enabled pipeline whose callbacks may replace `prompt_embeds`.
        prompt: content and style; one, or one per prompt of the call.
        negative_prompt: as in the call.
    """
    found = active(pipe)
    if found is None or not isinstance(found.listener, Server):
        raise InvalidInputError("redi is not active in this pipeline; call redi.enable(pipe, kb) first")
    server = found.listener

    def swap(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        run = server.run
        if run is None or not run.switching:
            return {}
        run.switching = False
        before = tensors["prompt_embeds"]
        guided = bool(pipe.do_classifier_free_guidance)
        count = len(prompt) if isinstance(prompt, list) else 1
        pictures = len(before) // (2 if guided else 1)
        if pictures % count:
            raise InvalidInputError(f"given {count} prompts to switch to for {pictures} pictures; give one, or as many")
        server.deaf = True
        try:
            encoded = pipe.encode_prompt(
                prompt=prompt,
                device=before.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
                negative_prompt=negative_prompt,
            )
        finally:
            server.deaf = False

        def spread(embeds: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
            parts = [negative, embeds] if guided else [embeds]
            return torch.cat([part.repeat_interleave(pictures // count, 0) for part in parts]).to(before.dtype)

        # Stable Diffusion XL has pooled embeddings besides
        names = ("prompt_embeds", "add_text_embeds")[: len(encoded) // 2]
        return {name: spread(*encoded[2 * i : 2 * i + 2]) for i, name in enumerate(names)}

    return swap


def _trained_otherwise(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[object, object]]:
    both = [name for name in _TRAINING if name in ours and name in theirs]
    return {f"scheduler_config.{name}": (ours[name], theirs[name]) for name in both if ours[name] != theirs[name]}
