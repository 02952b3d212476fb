"""Bounds of `redi.theory` next to measured errors on the bundled model, over an ablation of k, v, H and rows.

python -m benchmarks.theory --json bench/theory/theory.json
python -m benchmarks.theory --quick --json F                  # a look: figures of this size say little

Everything goes on where it was stopped: rows, latents and norms are kept in `--cache`.
"""
