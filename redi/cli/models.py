"""Models by name: the bundled one, a local diffusers folder, or one from the Hub."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from redi.errors import InvalidInputError

if TYPE_CHECKING:
    from redi.knowledge_base import KnowledgeBase

BUNDLED: Final = "emoji"
_HUB_ID: Final = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of every command that runs a model."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps …; by default cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; by default torch's own choice")


def name_of(text: str) -> str:
    """How a model is remembered: a folder by its whole path, so that it is found from everywhere."""
    return str(Path(text).expanduser().resolve()) if text != BUNDLED and Path(text).expanduser().is_dir() else text


def guidance_of(text: str) -> float:
    """The guidance scale a model is used with if nothing is said: what it was tuned with, or diffusers' default."""
    return 3.0 if text == BUNDLED else 7.5


def model_of(kb: KnowledgeBase) -> str:
    """The model that a knowledge base was built with.

    Raises:
        InvalidInputError: it was a folder, which is not there.
    """
    name = kb.fingerprint.model
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise InvalidInputError(
            f"{kb.path} was built with the model in {name}, which is not there; name it with --model"
        )
    return name


def load(text: str, given: argparse.Namespace, dtype: str | None = None) -> Any:
    """The pipeline of this name, on the device asked for.

    Args:
        text: `emoji`, a folder, or a Hub id.
        given: the parsed options of `configure`.
        dtype: of the weights; None is float16 on a GPU and float32 on a CPU.

    Raises:
        InvalidInputError: there is no such model, or it cannot be loaded.
    """
    hush()
    import torch

    if given.threads is not None:
        if given.threads < 1:
            raise InvalidInputError(f"--threads must be at least 1, given {given.threads}")
        torch.set_num_threads(given.threads)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    weights: torch.dtype = getattr(torch, dtype or ("float32" if device == "cpu" else "float16"))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InvalidInputError(f"--device {device} cannot be used: {str(e).splitlines()[0]}") from e
    if text == BUNDLED:
        from redi import zoo

        return zoo.load(text, weights).to(device)
    folder = Path(text).expanduser()
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise InvalidInputError(
            f"{text} holds no diffusers pipeline: expected model_index.json in it, as pipe.save_pretrained writes"
        )
    if not folder.is_dir() and not _HUB_ID.fullmatch(text):
        raise InvalidInputError(f"there is no folder {text}; expected a diffusers folder, a Hub id, or {BUNDLED}")
    # the argument that names the precision changed its own name between versions of diffusers; this way has none
    return _from_pretrained(text, folder).to(device, weights)


def _from_pretrained(text: str, folder: Path) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    local = folder.is_dir()
    try:
        return DiffusionPipeline.from_pretrained(str(folder) if local else text, local_files_only=local)
    except Exception as e:  # what a folder's files or a hub may answer is without end: all mean the same to the user
        said = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        if local:
            raise InvalidInputError(f"{text} cannot be loaded as a diffusers pipeline: {said}") from e
        raise InvalidInputError(
            f"{text} is no folder here, not the bundled {BUNDLED}, and could not be had from the Hub: {said}"
        ) from e


def hush() -> None:
    """Keep diffusers' and transformers' own chatter out of our output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # before diffusers is imported: importing it makes transformers talk
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
