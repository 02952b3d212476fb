"""All tables and figures, one after the other, with the model loaded once; arguments as for each.

python -m benchmarks.paper --out bench/paper
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import bundled
from benchmarks.paper import figure4, figure6, table1, table2, table3
from benchmarks.paper.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    settings = Settings.parse(argv, "benchmarks.paper", __doc__)
    pipe = bundled.load(compiled=not settings.quick)
    for script in (table2, table1, table3, figure4, figure6):
        script.main(argv, pipe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
