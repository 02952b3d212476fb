"""The data that passes between the parts. Shape alphabet: `b` batch, `k` neighbours, `n` rows, `d` flattened
dimension, `*s` sample shape, `m` grid points, `p` = m + 1 with the end, `l` leaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from jaxtyping import Float32, Int64
from numpy import ndarray
from torch import Tensor


@final
@dataclass(frozen=True, slots=True)
class Neighbors:
    """What a search found, per query nearest first, ties by id.

    Args:
        ids: unique row ids within each query.
        distances: squared L2.
    """

    ids: Int64[ndarray, "b k"]
    distances: Float32[ndarray, "b k"]


@final
@dataclass(frozen=True, slots=True)
class Record:
    """Which parts of a trajectory are kept: entries of samples x[i], denoised predictions, solver history, and the
    model's unconditional output.
    """

    samples: frozenset[int] = frozenset()
    denoised: frozenset[int] = frozenset()
    history: frozenset[int] = frozenset()
    unconditional: frozenset[int] = frozenset()

    def __or__(self, other: Record) -> Record:
        return Record(*(a | b for a, b in zip(self.entries, other.entries, strict=True)))

    def __le__(self, other: Record) -> bool:
        """Whether everything recorded here is recorded in `other` too."""
        return all(a <= b for a, b in zip(self.entries, other.entries, strict=True))

    @property
    def entries(self) -> tuple[frozenset[int], ...]:
        """Of each part, in order."""
        return self.samples, self.denoised, self.history, self.unconditional

    @property
    def last(self) -> int:
        """The last entry that a run must reach: the run may stop once x at this entry (or its call) is there."""
        return max([0, *self.samples, *(i + 1 for i in self.denoised | self.unconditional), *self.history])


@final
@dataclass(frozen=True)
class Rows:
    """Stored trajectories, every tensor with first dimension n.

    Args:
        samples: entry → x[entry].
        denoised: entry → x̂0 predicted at that entry.
        history: entry → leaf name → the solver's history before the call at that entry.
        noise_ids: which bank noise each row began from.
        embeddings: mean over tokens of the prompt's embedding, shape (n, e).
        prompts: n strings.
        unconditional: entry → the model's output there without the prompt, from which guidance leads away.
    """

    samples: Mapping[int, Tensor]
    denoised: Mapping[int, Tensor]
    history: Mapping[int, Mapping[str, Tensor]]
    noise_ids: Int64[Tensor, " n"]
    embeddings: Tensor
    prompts: Sequence[str]
    unconditional: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])

    def __len__(self) -> int:
        return len(self.prompts)


@final
@dataclass(frozen=True)
class LeapReport:
    """What one generation did: calls made and saved, neighbours and distances, gate decisions, seconds per stage.

    Args:
        plan: the plan served, as text.
        nfe: model calls made per picture; one without its unconditional half counts as half a call.
        nfe_full: model calls of the fine run.
        leapt: per picture, whether retrieved rows were used.
        noise_ids: per picture, the bank noise it began from; −1 for a stranger.
        neighbors: per picture, row ids used (empty where it did not leap).
        distances: per picture, L2 distances of those rows' keys.
        sources: per picture, those rows' prompts.
        solver: whose steps were taken.
        seconds: stage → wall seconds.
        notes: anything worth saying in words.
        expected: per picture, the error expected of it as a fraction of the plain solver's at the same number of calls;
            None where it did not leap, nothing where the knowledge base is not tuned.
        break_even: pictures after which the knowledge base has paid for itself in model calls; None if never.
        building: model calls that building the knowledge base took; None where nobody says.
        context: what it was done with, name → words: versions, pipeline, rows, how they were served.
    """

    plan: str
    nfe: int | float
    nfe_full: int
    leapt: tuple[bool, ...] = ()
    noise_ids: tuple[int, ...] = ()
    neighbors: tuple[tuple[int, ...], ...] = ()
    distances: tuple[tuple[float, ...], ...] = ()
    sources: tuple[tuple[str, ...], ...] = ()
    solver: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    notes: tuple[str, ...] = ()
    expected: tuple[float | None, ...] = ()
    break_even: int | None = None
    building: int | None = None
    context: Mapping[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        pictures = len(self.leapt)
        lines = [
            *(f"{name:<11} {words}" for name, words in self.context.items()),
            f"plan        {self.plan}" + (f" with {self.solver}" if self.solver else ""),
            f"model calls {self.nfe:g} per picture"
            + (
                f" instead of {self.nfe_full} ({saved:g} saved)"
                if (saved := self.nfe_full - self.nfe)
                else ", none saved"
            ),
        ]
        if pictures:
            used = sum(map(len, self.neighbors))
            nearest = [d[0] for d in self.distances if d]
            missed = [str(i) for i, leapt in enumerate(self.leapt) if not leapt]
            which = f" (not {', '.join(missed)})" if 0 < len(missed) < pictures else ""
            lines += [
                f"leapt       {sum(self.leapt)} of {pictures} pictures{which}, {used / pictures:.1f} neighbours each",
                f"noise ids   {', '.join(map(str, self.noise_ids))}",
            ]
            for i, found in enumerate(self.sources[:4]):
                more = f" and {len(found) - 3} more" if len(found) > 3 else ""
                lines += [f"picture {i:<3} from {', '.join(map(repr, found[:3]))}{more}"] if found else []
            if nearest:
                lines.append(f"distance    {min(nearest):.4g} … {max(nearest):.4g} (L2 of the nearest key)")
            if expected := [e for e in self.expected if e is not None]:
                lines.append(f"expected    {min(expected):.2f} … {max(expected):.2f} of the plain solver's error")
        if self.building is not None:
            back = "never paid for" if self.break_even is None else f"paid for after {self.break_even:,} pictures"
            lines.append(f"cost        {self.building:,} model calls to build the knowledge base, {back}")
        if self.seconds:
            stages = ", ".join(f"{stage} {1e3 * s:.1f} ms" for stage, s in self.seconds.items())
            lines.append(f"time        {stages}")
        lines += [f"note        {note}" for note in self.notes]
        return "\n".join(lines)
