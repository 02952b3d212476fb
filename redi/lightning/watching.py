"""Lightning's loggers and profilers by name, as `redi build` takes them; what they are told is told in `writer`."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any, Final

from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler

from redi.errors import InvalidInputError

LOGGERS: Final[dict[str, type[Logger]]] = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
PROFILERS: Final[dict[str, type[SimpleProfiler | AdvancedProfiler]]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
}
_WINDOW: Final = 10  # batches over which a ThroughputMonitor takes its rates


def watching(folder: str | Path, *, logger: str | None = None, profile: str | None = None) -> dict[str, Any]:
    """Arguments of a Trainer that log and profile a build.

    Args:
        folder: where files go.
        logger: `csv`, `tensorboard`, or the dotted name of a Logger's class, made with `save_dir` where it takes one;
            told rows, rows a second, and what Lightning's ThroughputMonitor finds.
        profile: `simple` or `advanced`; each rank leaves a report.

    Raises:
        InvalidInputError: there is no such logger, or it lacks a package.
    """
    given: dict[str, Any] = {}
    if profile is not None:
        given["profiler"] = PROFILERS[profile](dirpath=folder, filename="profile")
    if logger is not None:
        cls = LOGGERS.get(logger) or _imported(logger)
        where = {"save_dir": str(folder)} if "save_dir" in inspect.signature(cls).parameters else {}
        try:
            given["logger"] = cls(**where)
        except (ImportError, TypeError) as e:
            raise InvalidInputError(f"logger {logger} cannot be made: {e}") from e
        # a predict loop takes no training steps, so by Lightning's count every batch is the first
        given |= {"callbacks": [ThroughputMonitor(batch_size_fn=len, window_size=_WINDOW)], "log_every_n_steps": 1}
    return given


def _imported(name: str) -> type[Logger]:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError) as e:
        raise InvalidInputError(f"there is no logger {name}: {e}") from e
    if not (isinstance(found, type) and issubclass(found, Logger)):
        raise InvalidInputError(
            f"there is no logger {name!r}; there is: {', '.join(LOGGERS)}, or the dotted name of a Lightning logger's "
            "class, as lightning.pytorch.loggers.WandbLogger"
        )
    return found
