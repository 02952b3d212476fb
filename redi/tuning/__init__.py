"""Finds the best way to serve the plans of a knowledge base, and what error to expect of it, from its own rows."""

from redi.tuning.curves import fit
from redi.tuning.left_out import Candidate, LeftOut, Sums, candidates
from redi.tuning.tune import Progress, tune
from redi.tuning.validation import Held, held_out

__all__ = ["Candidate", "Held", "LeftOut", "Progress", "Sums", "candidates", "fit", "held_out", "tune"]
