"""All policies on the shipped traces, and yours: what they keep of the attention, in a minute.

    python benchmarks/leaderboard.py                       # writes results/leaderboard.json there
    python benchmarks/leaderboard.py --policies-from DIR   # and those of the files in a folder
    python benchmarks/leaderboard.py --record              # makes the traces anew

No model is run. Policies with a budget are asked at 0.5, 1 and 2 latent frames in tokens, so that
the rows of a group hold equally many; the others, and files dropped into a folder, as they are.
`policies/` beside the Makefile is such a folder, and git does not see it. With rows of such files
nothing is written but to `--out`: the stored result is that of the library.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from packcache.environment import environment
from packcache.evaluate.memory import DEFAULT_POLICIES
from packcache.files import write_json
from packcache.inspect.score import TOLD, Scores, merged, policies_of_folder, score
from packcache.inspect.trace import Trace
from packcache.policies import POLICIES, Policy, parse_policy
from packcache.timeline import FrameLayout

SCHEMA = "packcache.leaderboard/1"
HERE = Path(__file__).parent

#: Where files with policies of one's own are looked for, and where the library's rows are written.
OWN = HERE.parent / "policies"
STORED = HERE / "results" / "leaderboard.json"

#: Latent frames of history that a budget is asked at.
BUDGETS = (0.5, 1, 2)

#: Asked beside the library's own names: what holds as much as the largest budget, the other way to
#: fill, and the scored order that a trace knows.
MORE = {
    "window 2": "window:frames=2",
    "deepforcing 2": "deepforcing:frames=2,recent=0",
    "fill window": "packcache:fill=window",
    "observed": "packcache:order=observed",
}

#: Asked as they are spelled too: a preset whose budget counts visible tokens.
SPELLED = ("paper visible",)

#: The shipped traces: clips of each, pixel frames, and whether their first frame is given.
CLIPS, FRAMES = 2, 49
TRACES = {"text.trace": False, "image.trace": True}


def library() -> dict[str, Policy]:
    """What the memory horizon compares, and every named policy, if a trace can serve it."""
    spellings = {**DEFAULT_POLICIES, **{name: name for name in POLICIES}, **MORE}
    found: dict[str, Policy] = {}
    for label, spelling in spellings.items():
        policy = parse_policy(spelling)
        if policy.asks in TOLD and policy not in found.values():
            found[label] = policy
    return found


def entrants(layout: FrameLayout) -> dict[str, Policy]:
    """The library's policies by label; each once, at every budget if it has one."""
    found: dict[str, Policy] = {}
    known = library()
    for label, policy in known.items():
        if "budget" not in {field.name for field in fields(policy)}:
            found[label] = policy
            continue
        for frames in BUDGETS:
            tokens = f"{round(frames * layout.tokens)}tok"
            asked: Any = replace(policy, budget=tokens)  # type: ignore[call-arg]
            if asked not in found.values():
                found[f"{label}, budget {frames:g}"] = asked
    return {**found, **{label: known[label] for label in SPELLED}}


def record_traces(folder: Path) -> None:
    """Make the shipped traces: the first scenes of the truth table, seed 0."""
    import packcache as pc
    from packcache.inspect.record import record, scenes

    pipeline = pc.load("digits")
    folder.mkdir(parents=True, exist_ok=True)
    for name, with_image in TRACES.items():
        prompts, images = scenes(CLIPS, with_image=with_image, seed=0)
        trace = record(pipeline, prompts, images=images, frames=FRAMES)
        trace.save(folder / name)
        print(f"{name}: {(folder / name).stat().st_size / 1e6:.2f} MB")


def result(scores: Scores, paths: list[Path], seconds: float) -> dict[str, Any]:
    """The leaderboard's file: where it was scored, on which traces, and the rows."""
    told = scores.to_json()
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "workload": {
            **told["workload"],
            "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths},
            "recorded_on": told["environment"],
            "budgets": list(BUDGETS),
            "seconds": seconds,
        },
        "results": told["results"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=HERE / "traces")
    parser.add_argument(
        "--policies-from", type=Path, help="folder of Python files with policies [policies/]"
    )
    parser.add_argument("--record", action="store_true", help="make the traces anew first")
    parser.add_argument(
        "--out", type=Path, help="JSON to write [the stored result, without policies of files]"
    )
    arguments = parser.parse_args()
    if arguments.record:
        record_traces(arguments.traces)
    start = time.perf_counter()
    paths = sorted(arguments.traces.glob("*.trace"))
    if not paths:
        parser.error(f"no *.trace in {arguments.traces}: record them with --record")
    traces = [Trace.load(path) for path in paths]
    policies = entrants(traces[0].layout)
    folder = arguments.policies_from or (OWN if any(OWN.glob("*.py")) else None)
    if folder is not None:
        policies = merged(policies, policies_of_folder(folder))
    scores = score(traces, policies)
    spent = time.perf_counter() - start
    print("\n".join(scores.lines()))
    print(f"{len(policies)} policies on {len(paths)} traces in {spent:.1f} s")
    out = arguments.out or (STORED if folder is None else None)
    if out is None:
        print(f"nothing was written, with rows of {folder}: name a file with --out")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(result(scores, paths, spent), out)


if __name__ == "__main__":
    main()
