"""`packcache check`: is a cache right? The conformance kit, for our adapters and for yours."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from packcache.console import err, print_json, progress
from packcache.errors import InvalidSetting

__all__ = ["check"]

Name = Annotated[
    str | None, typer.Argument(help="an adapter, or yours as module:Subject", show_default=False)
]


def check(
    name: Name = None,
    every: Annotated[bool, typer.Option("--all", help="every adapter of the package")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Is a cache right? Eleven checks on a small random model; exit 1 if one fails."""
    from packcache.testing import conformance
    from packcache.testing.subjects import SUBJECTS, find_subject

    if (name is None) is not every:
        raise InvalidSetting(
            f"give one adapter or --all: known are {', '.join(SUBJECTS)}, or yours as "
            "module:Subject"
        )
    names = list(SUBJECTS) if name is None else [name]
    reports: list[Any] = []
    with progress("checking") as advance:
        for done, one in enumerate(names):
            if advance:
                advance(done, len(names))
            try:
                subject = find_subject(one)()
            except InvalidSetting as missing:  # its library is not installed
                if not every:
                    raise
                err.print(f"{one}: not asked: {missing}", markup=False, highlight=False)
                continue
            reports.append(conformance.check(subject))
    if as_json:
        print_json(conformance.to_json(reports))
    else:
        print("\n".join(line for report in reports for line in report.lines()))
    if not all(report.ok for report in reports):
        raise typer.Exit(1)
