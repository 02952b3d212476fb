"""A jump inside a pipeline's own loop: leaps are decided as it runs, for each sample of the batch apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from redi.plan import Segment
from redi.recall import Recall
from redi.run import LeapingRun, Proceed, with_sample
from redi.solvers import SolverState, restore, snapshot
from redi.steering import SteeredTimesteps


@final
@dataclass(frozen=True)
class _Landed:
    """Samples that leapt while others of their batch did not: they wait at the leap's end for the rest.

    Args:
        rows: which samples.
        sample: x at the leap's end.
        state: the solver's there.
    """

    rows: Tensor
    sample: Tensor
    state: SolverState


@final
@dataclass
class JumpRun(LeapingRun):
    """A jump: the solver walks the fine schedule, and its history is the rows' after the leap.

    The loop is the whole batch's. If every sample hit, it leaps. If some did, it takes every step, and those that hit
    meet it at the leap's end: each sample is what it would be alone, and the calls are those of the fine run.

    Args:
        loop_code: the code object of the pipeline's loop.
    """

    loop_code: Any = field(kw_only=True)
    waiting: list[_Landed] = field(default_factory=list[_Landed])

    @property
    def leapt(self) -> Tensor:
        """Those that hit."""
        assert self.first is not None
        return self.first.hit if self.apart or self.first.hit.all() else torch.zeros_like(self.first.hit)

    @property
    def apart(self) -> bool:
        """Whether samples of a batch may leap and others not: not where the history begins anew for all of it."""
        return self.engine.history == "carry"

    def set_timesteps(self, proceed: Proceed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The fine schedule, through which only the pipeline's own loop is steered."""
        super().set_timesteps(proceed, args, kwargs)
        self.scheduler.timesteps = SteeredTimesteps.of(self.scheduler.timesteps, self.loop_code, self.follow)

    def follow(self) -> Iterator[int]:
        """Entries of the run, decided as it goes."""
        while (entry := self.position) < self.engine.route.fine.fine:
            yield entry
            self.position = max(self.position, entry + 1)  # an interrupted pipeline goes on without stepping
        if self.bar is not None and self.bar.total is not None:
            self.bar.update(self.bar.total - self.bar.n)  # pipelines count the last step by its number

    def step(self, proceed: Proceed, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """One entry, and the leap that begins with its call or after it."""
        self.halves += 2
        found = self.leap_at(self.position, called=True)
        if found is not None and (x := self.leap(found, model_output, sample)) is not None:
            return (x,) if kwargs.get("return_dict") is False else _output(x)
        out = self.advance(proceed, model_output, timestep, sample, **kwargs)
        out = with_sample(out, self.join(out[0]))
        found = self.leap_at(self.position, called=False)
        if found is not None and (x := self.leap(found, None, out[0])) is not None:
            return with_sample(out, x)
        return out

    def leap_at(self, entry: int, *, called: bool) -> int | None:
        """The leap that begins at an entry, if any."""
        return next((i for i, s in enumerate(self.engine.route.leaps) if s.called == called and s.start == entry), None)

    def leap(self, index: int, model_output: Tensor | None, sample: Tensor) -> Tensor | None:
        """Look neighbours up and leap with those that hit; None where the loop does not go on at the leap's end."""
        recall, leap = self.look_up(index, model_output, sample), self.engine.route.leaps[index]
        if recall.hit.all():
            x, state = self.cross(
                index, recall, model_output, sample, snapshot(self.scheduler, self.engine.route.fine, leap.start)
            )
            restore(self.scheduler, state)
            self.position = leap.stop
            self.skip(leap, self.engine.route.plan.leaps[index])
            return x
        missed = int((~recall.hit).sum())
        self.notes.append(
            f"{missed} of {len(recall.hit)} samples found no row near enough: the batch took every step"
            + ("" if missed == len(recall.hit) or not self.apart else ", and the others met it after the leap")
        )
        rows = recall.hit.nonzero().flatten()
        if self.apart and len(rows):
            state = snapshot(self.scheduler, self.engine.route.fine, leap.start)
            state = state.with_leaves({name: leaf[rows.to(leaf.device)] for name, leaf in state.leaves().items()})
            at = rows.to(sample.device)
            m = None if model_output is None else model_output[at]
            self.waiting.append(_Landed(at, *self.cross(index, recall[rows], m, sample[at], state)))
        return None

    def cross(
        self, index: int, recall: Recall, model_output: Tensor | None, sample: Tensor, state: SolverState
    ) -> tuple[Tensor, SolverState]:
        """Sample and solver state at the leap's end."""
        engine = self.engine
        propagated, _ = engine.transport.propagate(
            sample, model_output, state, engine.route.leaps[index], engine.solver
        )
        x = engine.leap(propagated, recall, index, self.watch)
        return x, engine.arrive(recall, index, sample, self.watch)

    def join(self, sample: Tensor) -> Tensor:
        """Put those that wait at this entry among the others, with their history."""
        here = [landed for landed in self.waiting if landed.state.position == self.position]
        for landed in here:
            self.waiting.remove(landed)
            sample = sample.clone()
            sample[landed.rows] = landed.sample
            live = snapshot(self.scheduler, self.engine.route.fine, self.position)
            leaves, theirs = live.leaves(), landed.state.leaves()
            for name, leaf in leaves.items():
                leaves[name] = leaf.clone()
                leaves[name][landed.rows.to(leaf.device)] = theirs[name].to(leaf)
            restore(self.scheduler, live.with_leaves(leaves))
        return sample

    def skip(self, entries: Segment, steps: Segment) -> None:
        """Let the bar and the pipeline know of the calls that will not be made."""
        if self.bar is not None and self.bar.total is not None:
            self.bar.total -= steps.stop - steps.start - entries.called
            self.bar.refresh()
        if hasattr(self.pipe, "_num_timesteps"):
            self.pipe._num_timesteps -= entries.stop - entries.start - entries.called


def _output(sample: Tensor) -> Any:
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    return SchedulerOutput(prev_sample=sample)
