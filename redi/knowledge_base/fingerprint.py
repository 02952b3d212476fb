"""What a knowledge base was built with, so that it serves only where its trajectories belong.

How a pipeline's fingerprint is taken is not known here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, final

import torch
from torch import Tensor

from redi.errors import FingerprintMismatchError, InvalidInputError
from redi.knowledge_base import files
from redi.knowledge_base.fields import NATURAL, NUMBER, OBJECT, POSITIVE, TEXT, take

_SAMPLED: Final = 4096
_ABSENT: Final = "(absent)"


@final
@dataclass(frozen=True)
class Fingerprint:
    """The settings that rows depend on.

    Args:
        model: name, Hub id or folder of the model.
        weights: `weight_hash` of everything that was run.
        adapters: names of the active LoRA adapters.
        pipeline: class of the pipeline.
        scheduler: class of the scheduler.
        scheduler_config: its configuration, JSON.
        steps: fine solver steps.
        guidance: classifier-free guidance scale.
        guidance_rescale: as the pipeline's argument.
        negative_prompt: "" for none.
        height: pixels; None where pictures have no size.
        width: pixels; None where pictures have no size.
        dtype: the model's dtype, e.g. `float32`.
        sample_shape: shape of one sample, without the batch.
        settings: further arguments of the pipeline's call that are not its defaults, JSON.

    Raises:
        InvalidInputError: a value that cannot be written as JSON, or a number that is not finite.
    """

    model: str
    weights: str
    adapters: tuple[str, ...]
    pipeline: str
    scheduler: str
    scheduler_config: Mapping[str, Any]
    steps: int
    guidance: float
    guidance_rescale: float
    negative_prompt: str
    height: int | None
    width: int | None
    dtype: str
    sample_shape: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        # through JSON and back, so that what is compared is what is stored
        for name in ("scheduler_config", "settings"):
            object.__setattr__(self, name, files.decode(files.encode(getattr(self, name), name)))
        for name in ("guidance", "guidance_rescale"):
            if not math.isfinite(getattr(self, name)):
                raise InvalidInputError(f"{name} must be finite, given {getattr(self, name)}")
        if self.steps < 1 or any(n < 1 for n in self.sample_shape):
            raise InvalidInputError(
                f"steps and sample_shape must be positive, given steps={self.steps}, sample_shape={self.sample_shape}"
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON object; without settings it is what the first version of redi wrote."""
        said = {f.name: files.encode(getattr(self, f.name), f.name) for f in fields(self)}
        return said if self.settings else {name: value for name, value in said.items() if name != "settings"}

    @classmethod
    def from_json(cls, data: Any) -> Fingerprint:
        """The inverse of `to_json`.

        Raises:
            KnowledgeBaseError: fields are missing, unknown or of the wrong type; all are named.
        """
        if isinstance(data, Mapping):
            data = {"settings": {}, **data}
        given = take(
            data,
            {
                "model": TEXT,
                "weights": TEXT,
                "adapters": TEXT.list(),
                "pipeline": TEXT,
                "scheduler": TEXT,
                "scheduler_config": OBJECT,
                "steps": POSITIVE,
                "guidance": NUMBER,
                "guidance_rescale": NUMBER,
                "negative_prompt": TEXT,
                "height": NATURAL.or_none(),
                "width": NATURAL.or_none(),
                "dtype": TEXT,
                "sample_shape": POSITIVE.list(),
                "settings": OBJECT,
            },
            "fingerprint",
        )
        given["adapters"] = tuple(given["adapters"])
        given["sample_shape"] = tuple(given["sample_shape"])
        for name in ("scheduler_config", "settings"):
            given[name] = files.decode(given[name])
        given["guidance"] = float(given["guidance"])
        given["guidance_rescale"] = float(given["guidance_rescale"])
        return cls(**given)

    def differences(self, other: Fingerprint, ignoring: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
        """Field name → (value here, value there), for every field that differs.

        Args:
            other: the fingerprint to compare with.
            ignoring: names to leave out, e.g. `steps` or `scheduler_config.timestep_spacing`; a name stands for
                everything below it.

        Values of the scheduler's configuration have dotted names. Those that begin with an underscore are the
        scheduler's own bookkeeping (which values were defaults, which version wrote them) and are not compared.
        """
        return differing(self.to_json(), other.to_json(), ignoring)

    def require(self, given: Fingerprint, ignoring: Sequence[str] = (), what_to_do: str = "") -> None:
        """Refuse settings that differ from these.

        Args:
            given: the settings asked for.
            ignoring: as in `differences`.
            what_to_do: ends the message.

        Raises:
            FingerprintMismatchError: they differ; the fields are listed.
        """
        if found := self.differences(given, ignoring):
            raise FingerprintMismatchError(
                found, what_to_do or "use the settings of the knowledge base, or build another in a new folder"
            )


def differing(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], ignoring: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Dotted name → (ours, theirs) for every value of two JSON objects that differs."""
    left, right = dict(_flat(ours)), dict(_flat(theirs))
    return {
        name: (left.get(name, _ABSENT), right.get(name, _ABSENT))
        for name in [*left, *(n for n in right if n not in left)]
        if left.get(name, _ABSENT) != right.get(name, _ABSENT)
        and not any(name == skip or name.startswith(skip + ".") for skip in ignoring)
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if name.startswith("_"):
            continue
        plain = files.decode(value)
        if isinstance(plain, dict) and plain:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, plain


def weight_hash(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A quick hash of weights that tells one model from another, whatever the order of its tensors.

    Hashed are every tensor's name and shape and at most 4,096 of its elements, evenly spread, floating ones rounded
    to half precision: so weights and their float16 copy agree, on every device. It does not see changes between the
    elements it looks at or smaller than half precision's rounding, so it is no protection against tampering; a
    bfloat16 copy, rounded more coarsely, differs.

    Args:
        named_tensors: names and tensors, e.g. `module.state_dict().items()`.

    Returns:
        64 hexadecimal digits.

    Raises:
        InvalidInputError: a name occurs twice.
    """
    entries: dict[str, bytes] = {}
    for name, tensor in named_tensors:
        if name in entries:
            raise InvalidInputError(f"expected a name for every tensor, given {name!r} twice")
        flat = tensor.detach().reshape(-1)
        # the stride is taken where the tensor lives: only the sample crosses to the host
        sample = flat[:: max(1, -(-flat.numel() // _SAMPLED))].cpu()
        kind = "float" if sample.is_floating_point() else str(sample.dtype)
        sample = sample.to(torch.float16) if sample.is_floating_point() else sample
        content = hashlib.sha256(sample.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        entries[name] = repr((name, tuple(tensor.shape), kind, content)).encode()
    return hashlib.sha256(b"\n".join(entries[name] for name in sorted(entries))).hexdigest()
