"""The tables and figures of Zhang et al. (ICML 2023, arXiv 2302.02285) on the bundled model; one script each.

`python -m benchmarks.paper` runs them all, loading the model once.
"""
