"""Retrievers compared on latents: what they find, what that costs, and what it does to the picture.

    python -m benchmarks.retrievers --json bench/retrievers.json

Nothing a retriever says of itself is believed: every distance is computed anew in float64, and every setting runs in a
process of its own.
"""
