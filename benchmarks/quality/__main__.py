"""The command line; see `benchmarks.quality`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import benchmarks.quality
from benchmarks import bundled
from benchmarks.paper import report
from benchmarks.quality import frontier, studies
from benchmarks.quality.lab import arguments
from redi.cli.console import write_json


def main(argv: Sequence[str] | None = None, pipe: Any = None) -> int:
    given, settings = arguments(argv, benchmarks.quality.__doc__, tuple(studies.STUDIES))
    pipe = pipe or bundled.load(compiled=not settings.quick)
    much = {"families": given.solvers, "budgets": given.budgets, "tuning": given.tuning, "turns": given.turns}
    whole = studies.Study(functools.partial(frontier.study, **much), frontier.tables, frontier.plot)
    for name in given.studies or ["frontier"]:
        study = studies.STUDIES.get(name, whole)
        found = study.measure(settings, pipe)
        file = given.json if study is whole else given.json.with_name(f"{given.json.stem}-{name}.json")
        said = report.document(settings, f"benchmarks.quality {name}", **found)
        if study is whole and not given.quick:
            listed = ",".join(map(str, given.budgets))
            said["command"] += (
                f" --solvers {','.join(given.solvers)} --budgets {listed} --tuning {given.tuning} --turns {given.turns}"
            )
        write_json(file, said)
        title = f"# {name.capitalize()}\n\n`{said['command']}`"
        text = "\n\n".join([title, report.LEGEND, *study.tables(found)]) + "\n"
        file.with_suffix(".md").write_text(text, encoding="utf-8")
        study.plot(found, file.with_suffix(".png"))
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
