"""What every pipeline is expected to do with every feature: the table of docs/pipelines.md, and what tests hold it to.

`python -m tests.pipelines.matrix` writes the table; `test_matrix` runs each of its cells and compares the page with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.pipelines.beds import CASES, parameters_of, prepares
from tests.pipelines.features import FEATURES

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"
YES, REFUSED, ABSENT = "yes", "refused", "–"

WORDS = {
    "half_calls": "half",
    **dict.fromkeys(("jump_value", "jump_residual", "jump_defect"), "cannot jump"),
    "eta": "eta",
    "custom_schedule": "sigmas|timesteps",
    "denoising_window": "denoising_end",
    "other_guidance": "guidance_scale",
    "other_steps": "num_inference_steps",
    "stochastic_scheduler": "draws noise in every step",
}
"""What the error says of each thing that is refused."""
_DOUBLING = ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "PixArtSigma", "Sana")
"""Guide by one batch of twice the size, from noise and text alone."""
_ARGUMENT = {
    "negative_prompts": "negative_prompt",
    "guidance_rescale": "guidance_rescale",
    "callbacks": "callback_on_step_end",
    "eta_zero": "eta",
    "eta": "eta",
    "custom_schedule": "sigmas",
    "denoising_window": "denoising_end",
}


def expected(name: str, feature: str) -> str:
    """What a pipeline of the matrix does with a feature."""
    if (name, feature) == ("AnimateDiff", "pictures_per_prompt"):
        return ABSENT  # its call takes `num_videos_per_prompt`, and makes one video all the same
    if (name, feature) == ("PixArtSigma", "adapters"):
        return ABSENT  # diffusers loads none into its transformer
    if feature in _ARGUMENT and _ARGUMENT[feature] not in parameters_of(name):
        return ABSENT
    if feature == "half_calls":
        return YES if name in _DOUBLING else REFUSED
    if feature.startswith("jump"):
        return REFUSED if "timestep" in prepares(name) else YES
    return REFUSED if feature in WORDS else YES


def table(names: Sequence[str]) -> str:
    """Features down, pipelines across."""
    rows = [["", *names], ["---"] * (len(names) + 1)]
    rows += [[feature.replace("_", " "), *(expected(name, feature) for name in names)] for feature in FEATURES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def render() -> str:
    """The generated part of the page."""
    plain = [name for name, case in CASES.items() if not case.recorded]
    given = [name for name, case in CASES.items() if case.recorded]
    lines = [f"- **{feature.replace('_', ' ')}**: {(f.__doc__ or '').strip()}" for feature, f in FEATURES.items()]
    return "\n\n".join(
        (
            BEGIN,
            "### From text",
            table(plain),
            "### From text and pictures, recorded with `redi.record`",
            table(given),
            "### What the rows mean",
            "\n".join(lines),
            END,
        )
    )


def updated(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(BEGIN)
    return before + render() + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
