"""Every error a user can meet. Each message says what was given, what was expected, and what to do.

All derive from `ReDiError`, so `except redi.ReDiError` catches exactly what this library refuses.
"""

from __future__ import annotations

from collections.abc import Mapping


class ReDiError(Exception):
    """Base of every error this library raises on purpose."""


class InvalidInputError(ReDiError, ValueError):
    """A value that can never work: wrong shape, wrong type, not finite, out of range."""


class PlanError(ReDiError, ValueError):
    """A plan that cannot be laid on this solver's schedule."""


class UnsupportedSolverError(ReDiError, ValueError):
    """A scheduler that does not replay deterministically, or cannot serve this plan."""


class KnowledgeBaseError(ReDiError):
    """A knowledge base that is missing, damaged, or not what it claims to be."""


class FingerprintMismatchError(KnowledgeBaseError):
    """The knowledge base was built with other settings than those it is asked to serve.

    Args:
        differences: field name to (value in the knowledge base, value given).
        what_to_do: how to resolve it.
    """

    def __init__(self, differences: Mapping[str, tuple[object, object]], what_to_do: str) -> None:
        self.differences = dict(differences)
        lines = [
            f"  {name}: knowledge base has {ours!r}, given {theirs!r}" for name, (ours, theirs) in differences.items()
        ]
        super().__init__("the knowledge base was built with other settings:\n" + "\n".join(lines) + f"\n{what_to_do}")


class NoiseError(ReDiError, ValueError):
    """Starting noise that the bank cannot supply."""


class MissError(ReDiError, LookupError):
    """Samples found no remembered row near enough, where that is to be an error.

    Args:
        distances: number of the sample in its batch to the distance of its nearest row; inf where it has none.
        allowed: the largest distance that may leap.
    """

    def __init__(self, distances: Mapping[int, float], allowed: float) -> None:
        self.distances = dict(distances)
        which = ", ".join(f"picture {i} ({d:.4g})" for i, d in distances.items())
        super().__init__(
            f"no row within {allowed:.4g} of {which}; remember rows like these, widen the gate, or enable with "
            "on_miss='plain' or 'full'"
        )


class MissingExtraError(ReDiError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'redi[{extra}]'")


class RankError(ReDiError):
    """Another process of the same run stopped, or was lost, so that this one could not finish.

    Args:
        rank: which one; None where nobody knows.
        why: what it said, or how it was noticed.
    """

    def __init__(self, rank: int | None, why: str) -> None:
        self.rank = rank
        who = "another rank was lost" if rank is None else f"rank {rank} stopped"
        super().__init__(f"{who} ({why}); finished rows are safe, the same build goes on")
