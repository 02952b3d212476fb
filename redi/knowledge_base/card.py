"""The dataset card: `README.md` beside the manifest, for people. Nothing reads it back."""

from __future__ import annotations

import json

from redi.knowledge_base.config import Config
from redi.knowledge_base.manifest import Manifest


def card(config: Config, manifest: Manifest) -> str:
    """Markdown that says what a knowledge base holds and how to use it."""
    f, record = config.fingerprint, config.record
    size = f"{f.height} × {f.width}" if f.height and f.width else "–"
    versions = ", ".join(f"{name} {v}" for name, v in sorted(config.created_with.items()))
    stored = sum(s.bytes + s.prompts_bytes for s in manifest.shards)
    facts = {
        "Model": f.model,
        "Weights": f.weights[:16] or "–",
        "Adapters": ", ".join(f.adapters) or "none",
        "Pipeline": f.pipeline,
        "Solver": f"{f.scheduler}, {f.steps} steps",
        "Guidance": f"{f.guidance:g}" + (f", rescaled {f.guidance_rescale:g}" if f.guidance_rescale else ""),
        "Negative prompt": f.negative_prompt or "none",
        "Picture": size,
        "Sample": " × ".join(map(str, f.sample_shape)),
        "Plans": ", ".join(config.plans) or "–",
        "Samples recorded at": _entries(record.samples),
        "Denoised predictions recorded at": _entries(record.denoised),
        "Solver history recorded at": _entries(record.history),
        "Unconditional outputs recorded at": _entries(record.unconditional),
        "Noise bank": json.dumps(config.noise, ensure_ascii=False, sort_keys=True),
        "Stored as": f"{config.storage}, {stored:,} bytes",
        "Created with": versions,
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    return f"""---
tags:
- diffusion
- redi
---

# A knowledge base of diffusion trajectories

{manifest.rows:,} trajectories, solved finely once, so that later generations can leap along their neighbours.

| | |
|---|---|
{table}

```python
import redi

kb = redi.KnowledgeBase.open("path/to/this/folder")
```

`redi info` describes this folder and `redi verify` checks every byte of it. The trajectories are in `shards/`;
everything under `derived/` is computed from them and may be deleted.
"""


def _entries(entries: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(entries))) or "–"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
