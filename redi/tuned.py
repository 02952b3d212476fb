"""What `redi.tune` found for each plan of a knowledge base: kept beside the derived tables, read when it is served.

Bound to the manifest: what was found on other rows is not used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from redi.combiners import NNLS, Affine, Combiner, Kriging, LeastSquares, Nearest
from redi.errors import InvalidInputError, KnowledgeBaseError
from redi.gate import Gate, Trust
from redi.knowledge_base import KnowledgeBase, files
from redi.knowledge_base.derived import FOLDER
from redi.knowledge_base.fields import HASH, NUMBER, OBJECT, POSITIVE, TEXT, take
from redi.solvers import SolverAdapter
from redi.table import Key
from redi.transports import Defect, Transport

FILE: Final = "tuned.json"
_SCHEMA: Final = 1
# what a file may name; a part of the user's own cannot be read back
_COMBINERS: Final[Mapping[str, type[Combiner]]] = {
    c.__name__: c for c in (Nearest, LeastSquares, NNLS, Affine, Kriging)
}
_TRANSPORTS: Final[Mapping[str, type[Transport]]] = {Defect.__name__: Defect}  # of coarse plans, which alone are tuned
_KEYS: Final[Sequence[Key]] = ("denoised", "prompt")  # the sample that a coarse plan begins with is the noise
_RETRIEVED_ONCE: Final = (0,)


@final
@dataclass(frozen=True)
class Tuned:
    """The best way found to serve one plan.

    Args:
        transport: of every leap.
        solver: whose coarse steps were corrected, see `mark_of`.
        key: what neighbours are found by.
        neighbors: H, how many.
        combiner: how they are weighed.
        trust: how far they are believed.
        rows: that were left out one by one.
        candidates: all that were compared → expected error, as a fraction of the plain solver's.
        validation: what held-out prompts gave, where there were any.
    """

    transport: Transport
    solver: str
    key: Key
    neighbors: int
    combiner: Combiner
    trust: Trust
    rows: int
    candidates: Mapping[str, float]
    validation: Mapping[str, float] | None = None

    @property
    def choices(self) -> dict[str, Any]:
        """The fields of an engine that were chosen."""
        return {
            "transport": self.transport,
            "key": self.key,
            "neighbors": self.neighbors,
            "combiner": self.combiner,
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON object.

        Raises:
            InvalidInputError: a combiner or transport that only its author knows.
        """
        return {
            "transport": _named(self.transport, _TRANSPORTS),
            "solver": self.solver,
            "key": self.key,
            "neighbors": self.neighbors,
            "combiner": _named(self.combiner, _COMBINERS),
            "trust": dataclasses.asdict(self.trust),
            "rows": self.rows,
            "candidates": dict(self.candidates),
            "validation": None if self.validation is None else dict(self.validation),
        }

    @classmethod
    def from_json(cls, data: Any) -> Tuned:
        """What `to_json` said.

        Raises:
            KnowledgeBaseError: it is something else.
        """
        given = take(
            data,
            {
                "transport": OBJECT,
                "solver": TEXT,
                "key": TEXT,
                "neighbors": POSITIVE,
                "combiner": OBJECT,
                "trust": OBJECT,
                "rows": POSITIVE,
                "candidates": NUMBER.mapping(),
                "validation": NUMBER.mapping().or_none(),
            },
            "plan",
        )
        if given["key"] not in _KEYS:
            raise KnowledgeBaseError(f"key must be one of {', '.join(_KEYS)}, given {given['key']!r}")
        curve = NUMBER.list()
        kinds = {"unit": NUMBER, "distances": curve, "scale": curve, "error": curve, "bound": curve, "average": NUMBER}
        trust = take(given["trust"], kinds, "trust")
        return cls(
            **given
            | {
                "transport": _made(given["transport"], _TRANSPORTS),
                "combiner": _made(given["combiner"], _COMBINERS),
                "trust": _checked(Trust, **{n: tuple(v) if isinstance(v, list) else v for n, v in trust.items()}),
            }
        )


@final
@dataclass(frozen=True)
class Tunings:
    """What was found for the plans of one knowledge base.

    Args:
        plans: plan, as text → what was found.
        note: why nothing is used of a file that is there.
    """

    plans: Mapping[str, Tuned] = field(default_factory=dict[str, Tuned])
    note: str = ""

    @classmethod
    def read(cls, kb: KnowledgeBase) -> Tunings:
        """What is kept in a knowledge base's folder, if it is of these rows and can be read."""
        path = kb.path / FOLDER / FILE
        if not path.exists():
            return cls()
        try:
            said = take(files.read_json(path), {"schema": POSITIVE, "manifest": HASH, "plans": OBJECT.mapping()}, FILE)
            if said["schema"] != _SCHEMA:
                raise KnowledgeBaseError(f"{FILE}: this version of redi reads schema {_SCHEMA}")
            if said["manifest"] != kb.manifest_hash:
                return cls(note="tuned on other rows than these, so not used: run redi tune again")
            return cls({plan: Tuned.from_json(found) for plan, found in said["plans"].items()})
        except KnowledgeBaseError as e:
            return cls(note=f"what was tuned cannot be read and is not used ({e}): run redi tune again")

    def write(self, kb: KnowledgeBase) -> None:
        """Keep these, with what is kept of other plans of the same rows.

        Raises:
            InvalidInputError: a combiner or transport that only its author knows.
            KnowledgeBaseError: the folder cannot be written.
        """
        plans = {**Tunings.read(kb).plans, **self.plans}
        data = files.dump(
            {
                "schema": _SCHEMA,
                "manifest": kb.manifest_hash,
                "plans": {plan: files.encode(t.to_json(), plan) for plan, t in plans.items()},
            }
        )
        path = kb.path / FOLDER / FILE
        try:
            path.parent.mkdir(exist_ok=True)
            files.write(path, data)
        except OSError as e:
            raise KnowledgeBaseError(f"{path} cannot be written ({e.strerror}); see to the disk") from e

    def fields(
        self, plan: str, given: Mapping[str, Any], max_error: float | None, solver: SolverAdapter
    ) -> dict[str, Any]:
        """Fields of an engine for a plan: the caller's first, then those that were found.

        What was fitted holds for what was found alone: a caller who chooses otherwise gets a gate that is open.

        Args:
            plan: as text.
            given: what the caller chose.
            max_error: of the gate, or None.
            solver: that serves.

        Raises:
            InvalidInputError: an error is to be kept, and none can be foretold.
        """
        tuned = self.plans.get(plan)
        found = {} if tuned is None else tuned.choices
        other = [n for n, v in {**found, "retrieve_at": _RETRIEVED_ONCE}.items() if _differs(given.get(n, v), v)]
        other += ["solver"] if tuned is not None and tuned.solver != mark_of(solver) else []
        fields: dict[str, Any] = {"notes": (self.note,) if self.note else ()} | found | dict(given)
        if max_error is not None and (tuned is None or other or "gate" in given):
            why = (
                f"plan {plan} is not tuned{f' ({self.note})' if self.note else ''}; run redi tune on it"
                if tuned is None
                else f"plan {plan} was tuned with other choices ({', '.join(other)}); leave them to what was tuned"
                if other
                else "the gate given decides already; give one of the two"
            )
            raise InvalidInputError(f"max_error={max_error:g} cannot be kept: {why}")
        if tuned is not None and not other and "gate" not in given:
            fields["gate"] = Gate(max_error=math.inf if max_error is None else max_error, trust=tuned.trust)
        return fields


def mark_of(solver: SolverAdapter) -> str:
    """A solver in a few letters; others have others."""
    identity = files.dump({"solver": files.encode(dict(solver.identity()), "solver")})
    return f"{solver} {files.digest(identity)[:12]}"


def _differs(given: Any, found: Any) -> bool:
    return list(given) != list(found) if isinstance(found, tuple) else given != found


def _named(part: Any, known: Mapping[str, type]) -> dict[str, Any]:
    name = type(part).__name__
    if known.get(name) is not type(part):
        raise InvalidInputError(f"only {', '.join(known)} can be kept, given {part!r}")
    return {"name": name, **dataclasses.asdict(part)}


def _made(said: Mapping[str, Any], known: Mapping[str, type[Any]]) -> Any:
    settings = dict(said)
    kind = known.get(str(settings.pop("name", None)))
    if kind is None:
        raise KnowledgeBaseError(f"expected one of {', '.join(known)}, given {said}")
    return _checked(kind, **settings)


def _checked(kind: type[Any], **fields: Any) -> Any:
    try:
        return kind(**fields)
    except (TypeError, OverflowError, InvalidInputError) as e:
        raise KnowledgeBaseError(f"{kind.__name__}: {e}") from e
