"""Model calls against quality on the bundled model: plain solvers, each tuned, and redi, both against the fine solve.

python -m benchmarks.quality --json bench/quality/quality.json            # the frontier
python -m benchmarks.quality choices rows noises guidance --json …        # what decides it, each a study of its own
python -m benchmarks.quality --quick --json F                             # everything of the frontier once, in a minute

Everything goes on where it was stopped: rows and latents are kept in `--cache`.
"""
