"""Is a cache right? Eleven checks of an adapter, on a small random model, in seconds.

    report = check(subject)              # a Subject: the host model, and a way to run it cached
    report.ok, report.lines(), report.to_json()

What a cache holds is read from the values of its first layer, which depend on a token's input
alone: so each token held is known by name, whatever an adapter says of itself. Outputs are judged
by one forward without a cache, in which every token sees what was held; what was held by the
policy's own plan. So a defect of one is not blamed on the other, and each check tells its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from packcache.environment import environment
from packcache.policies import FullCache, PackCache, Policy, SinkWindow, SlidingWindow
from packcache.testing.footprint import footprint
from packcache.testing.oracle import held_tokens
from packcache.testing.subject import Run, Subject
from packcache.timeline import Ints, Role, Span, Timeline

__all__ = ["CHECKS", "Finding", "Report", "check", "to_json"]

SCHEMA = "packcache.conformance/1"

State = Literal["holds", "fails", "not asked"]

#: Windows after which positions are looked at, and growth begins to be.
WINDOWS = 10

#: Bytes by which integers may differ between two moments; a list that grows by one a commit passes
#: this many times over.
_SLACK = 1024


@dataclass(frozen=True)
class Check:
    """What is asked, and a public bug that this question would have found."""

    name: str
    says: str
    bug: str
    ask: Callable[[Trial], str]


class Wrong(Exception):
    """A check fails; its text says what was seen."""


class NotAsked(Exception):
    """A check does not apply; its text says why."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found, in words."""

    check: str
    says: str
    state: State
    told: str
    bug: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings of one subject; `ok` if nothing failed."""

    subject: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [f.check for f in self.findings if f.state == "fails"]

    def lines(self) -> list[str]:
        held = sum(f.state == "holds" for f in self.findings)
        lines = [f"{self.subject}: {held} checks hold, {len(self.failed)} fail"]
        for found in self.findings:
            mark = {"holds": "ok", "fails": "FAIL", "not asked": "-"}[found.state]
            lines.append(f"  {mark:5}{found.check:11}{found.says}: {found.told}")
            if found.state == "fails":
                lines.append(f"{'':18}a public bug of this kind: {found.bug}")
        return lines

    def to_json(self) -> dict[str, Any]:
        return to_json([self])


def to_json(reports: Sequence[Report]) -> dict[str, Any]:
    """Plain data of several reports: a row a subject and check."""
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "workload": {"subjects": [report.subject for report in reports]},
        "results": [
            {"subject": report.subject, **asdict(found)}
            for report in reports
            for found in report.findings
        ],
    }


def check(subject: Subject, only: Sequence[str] = ()) -> Report:
    """Ask all checks, or those named; one that crashes has failed."""
    asked = [c for c in CHECKS if not only or c.name in only]
    return Report(subject=subject.name, findings=tuple(_ask(Trial(subject), c) for c in asked))


def _ask(trial: Trial, asked: Check) -> Finding:
    try:
        with torch.inference_mode():
            state, told = "holds", asked.ask(trial)
    except NotAsked as reason:
        state, told = "not asked", str(reason)
    except Wrong as found:
        state, told = "fails", str(found)
    except Exception as error:  # an adapter may fail in any way
        state, told = "fails", f"{type(error).__name__}: {error}"
    return Finding(check=asked.name, says=asked.says, bug=asked.bug, state=state, told=told)


# --- a clip under way ----------------------------------------------------------------------------


class Trial:
    """Clips of a subject: what goes in, what comes out, what is held."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.frames = subject, subject.frames
        self.has_text = max(subject.text) > 0

    def tokens(self, piece: int, branch: int = 0) -> int:
        frames = self.frames(piece)
        return len(frames) * self.subject.layout.tokens if frames else self.subject.text[branch]

    def clean(self, piece: int, seed: int = 0) -> Any:
        return self.subject.inputs(piece, seed)

    def play(
        self, policy: Policy, pieces: int, after: Callable[[int, Run, Tensor], None] | None = None
    ) -> Run:
        """A clip, every branch; `after(piece, run, outputs of branch 0)` each commit."""
        run = self.subject.begin(policy)
        for piece in range(pieces):
            out = self.step(run, piece)
            if after:
                after(piece, run, out)
        return run

    def step(self, run: Run, piece: int, seeds: Sequence[int] = ()) -> Tensor:
        """One piece, forwarded in every branch and committed; outputs of branch 0."""
        branches = range(len(self.subject.text))
        out = [run.forward(self.clean(piece, seeds[b] if seeds else 0), b) for b in branches]
        run.commit()
        return out[0]

    @functools.cached_property
    def newest(self) -> Policy:
        """A policy under which the piece that was just committed lies at the end, whole."""
        chunk = self.subject.chunk
        return SlidingWindow(frames=chunk) if self.subject.bounded else FullCache()

    def names(self, pieces: int) -> Tensor:
        """Values of the first layer of every token by logical index, `[N, H * D]`."""
        rows: list[Tensor] = []

        def remember(piece: int, run: Run, out: Tensor) -> None:
            rows.append(_first_values(run)[-self.tokens(piece) :].clone())

        self.play(self.newest, pieces, remember)
        return torch.cat(rows)

    def plan(self, policy: Policy, pieces: int) -> list[Ints]:
        """Logical indices that the policy holds after each piece."""
        timeline, held = Timeline(), []
        layout = self.subject.layout
        budget = policy.budget_for(layout.tokens)
        for piece in range(pieces):
            spans = [Span.of_frame(Role.HISTORY, f, layout) for f in self.frames(piece)]
            before = [e.span for e in timeline.entries if e.span.layout is not None][-1:]
            for span in spans or [Span.text(self.subject.text[0])]:
                timeline.append(span, policy.rank(span, before[0] if before else None))
                before = [span] if span.layout is not None else []
            timeline.keep(policy.plan(timeline, budget))
            held.append(held_tokens(timeline))
        return held

    def compare(self, policy: Policy, pieces: int, last: int = 0) -> str:
        """Outputs against one forward in which each piece sees what was held; `last`: those only.

        What is held is looked at, not believed; a token held twice counts twice.
        """
        names = self.names(pieces)
        held = [torch.zeros(0, dtype=torch.long)]
        outputs: list[Tensor] = []

        def look(piece: int, run: Run, out: Tensor) -> None:
            outputs.append(out)
            held.append(identify(_first_values(run), names))

        self.play(policy, pieces, look)
        inputs = [self.clean(piece) for piece in range(pieces)]
        nothing = [torch.zeros(0, dtype=torch.long)] * pieces
        lengths = [self.tokens(piece) for piece in range(pieces)]
        reference, blind = (
            self.subject.whole(inputs, self.bias(known), 0).split(lengths)[-last:]
            for known in (held[:-1], nothing)
        )
        ours = outputs[-last:]
        if any(own.shape != its.shape for own, its in zip(ours, reference, strict=True)):
            raise Wrong(f"outputs have shape {[tuple(own.shape) for own in ours]}")
        told = self.near(list(zip(ours, reference, strict=True)))
        self.has_power(blind, reference)
        return told

    def has_power(self, blind: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
        """Would it be noticed if no history were seen at all?"""
        try:
            told = self.near(list(zip(blind, reference, strict=True)))
        except Wrong:
            return
        raise Wrong(f"this host cannot tell: without any history its outputs are {told}")

    def near(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> str:
        """The largest difference in standard deviations of the second ones; Wrong if too large."""
        scale = float(torch.cat([theirs for _, theirs in pairs]).double().std())
        worst, where = 0.0, 0
        for piece, (ours, theirs) in enumerate(pairs):
            apart = float((ours.double() - theirs.double()).abs().max()) / scale
            if not apart <= worst:  # NaN is worse than all
                worst, where = apart, piece
        limit = self.subject.tolerance
        told = f"apart by {worst:.1e} of the outputs' deviation, at most {limit:.0e}"
        if not worst <= limit:
            raise Wrong(f"{told}; worst in piece {where} of {len(pairs)} compared")
        return told

    def bias(self, held: Sequence[Tensor]) -> Tensor:
        """What is added to the scores, `[N, N]`: the logarithm of how often a token is seen."""
        lengths = [self.tokens(piece) for piece in range(len(held))]
        seen = torch.zeros(sum(lengths), sum(lengths))
        start = 0
        for piece, (length, known) in enumerate(zip(lengths, held, strict=True)):
            rows = slice(start, start + length)
            seen[rows, : known.max() + 1 if len(known) else 0] = (
                torch.bincount(known) if len(known) else torch.zeros(0)
            ).float()
            seen[rows, rows] = self.subject.inside(length, not self.frames(piece)).float()
            start += length
        return seen.log()


def _first_values(run: Run) -> Tensor:
    """Values of the first layer, a row a token held, `[S, H * D]`."""
    values = run.kv()[0][1]
    return values.movedim(-2, 0).reshape(values.shape[-2], -1)


def identify(rows: Tensor, names: Tensor) -> Tensor:
    """Which token each row is, by logical index `[S]`. Raises Wrong for one that is none."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.long)
    apart, which = torch.cdist(rows.double(), names.double()).min(dim=1)
    strange = (apart > 1e-3 * names.double().norm(dim=1).mean()).nonzero()
    if len(strange):
        slots = strange.squeeze(1).tolist()
        raise Wrong(f"slot {slots[0]} holds no token that was ever committed ({len(slots)} such)")
    return which


# --- the questions -------------------------------------------------------------------------------


def _off(trial: Trial) -> str:
    pair = trial.subject.off()
    if pair is None:
        raise NotAsked("a cache alone, there is nothing to turn off")
    stock, ours = pair
    if not torch.equal(stock, ours):
        raise Wrong(f"outputs differ by up to {float((stock - ours).abs().max()):.1e}")
    return "equal"


def _unlimited(trial: Trial) -> str:
    return trial.compare(FullCache(), trial.has_text + 8)


def _bounded(trial: Trial) -> str:
    _evicts(trial)
    chunk = trial.subject.chunk
    policy = PackCache(budget=chunk, window=3 * chunk, half_life=chunk)
    return trial.compare(policy, trial.has_text + 6)


def _positions(trial: Trial) -> str:
    _evicts(trial)
    policy = SlidingWindow(frames=trial.subject.chunk)
    return trial.compare(policy, trial.has_text + WINDOWS + 2, last=2)


def _draft(trial: Trial) -> str:
    """Drafts of another input between commits: bytes stay, and nothing that follows changes."""
    branches = range(len(trial.subject.text))
    pieces = trial.has_text + 4
    policy = trial.newest
    plain, drafted = trial.subject.begin(policy), trial.subject.begin(policy)
    for piece in range(pieces):
        before = [_copies(drafted, branch) for branch in branches]
        for seed in (1, 2):
            for branch in branches:
                drafted.forward(trial.clean(piece, seed), branch)
        for branch in branches:
            if not _equal(before[branch], drafted.kv(branch)):
                raise Wrong(f"a draft of piece {piece} changed what is held")
        ours, theirs = (trial.step(run, piece) for run in (drafted, plain))
        if not torch.equal(ours, theirs):
            raise Wrong(f"piece {piece} came out otherwise after two drafts of it")
    for branch in branches:
        if not _equal(plain.kv(branch), drafted.kv(branch)):
            raise Wrong("what is held in the end is another than without drafts")
    return f"two drafts in front of each of {pieces} commits"


def _order(trial: Trial) -> str:
    pieces = trial.has_text + 3
    straight, turned = (trial.play(FullCache(), pieces) for _ in range(2))
    order = torch.randperm(turned.kv()[0][0].shape[-2], generator=torch.Generator().manual_seed(0))
    turned.reorder(order)
    told = trial.near(
        [(turned.forward(trial.clean(pieces)), straight.forward(trial.clean(pieces)))]
    )
    return f"{len(order)} tokens in another order: {told}"


def _sinks(trial: Trial) -> str:
    """Anchors and sinks after five windows: all there, and to the bit as they were committed."""
    _evicts(trial)
    chunk, first = trial.subject.chunk, trial.has_text + 1
    policy = SinkWindow(sinks=chunk, frames=chunk)
    pieces = first + 5
    names = trial.names(pieces)
    fixed = sum(trial.tokens(piece) for piece in range(first))
    committed: list[tuple[Tensor, Tensor]] = []

    def look(piece: int, run: Run, out: Tensor) -> None:
        if piece == first - 1:
            committed.extend(_copies(run))
        if piece >= first:
            held = identify(_first_values(run), names)
            gone = sorted(set(range(fixed)) - set(held.tolist()))
            if gone:
                raise Wrong(f"token {gone[0]} of {fixed} is gone after piece {piece}")
            places = [int((held == token).nonzero()[0]) for token in range(fixed)]
            now = [(k[..., places, :], v[..., places, :]) for k, v in run.kv()]
            if not _equal(committed, now):
                raise Wrong(f"other bytes than at their commit after piece {piece}")

    trial.play(policy, pieces, look)
    return f"{fixed} tokens after {pieces - first} more commits"


def _branches(trial: Trial) -> str:
    """Branch 1 is given other inputs: of branch 0 nothing may change, of itself it must."""
    if len(trial.subject.text) < 2:
        raise NotAsked("one branch")
    runs = [trial.subject.begin(trial.newest) for _ in range(2)]
    pieces = trial.has_text + 3
    for piece in range(pieces):
        one, other = (
            trial.step(run, piece, seeds=(0, seed)) for run, seed in zip(runs, (0, 1), strict=True)
        )
        if not torch.equal(one, other):
            raise Wrong(f"piece {piece} changed with the other branch's inputs")
    if not _equal(runs[0].kv(), runs[1].kv()):
        raise Wrong("what is held changed with the other branch's inputs")
    if _equal(runs[0].kv(1), runs[1].kv(1)):
        raise Wrong("the other branch holds the same whatever it is given")
    return f"{pieces} commits"


def _steady(trial: Trial) -> str:
    """History held after each commit is what the policy's own plan says, each token once."""
    _evicts(trial)
    chunk = trial.subject.chunk
    packed = PackCache(budget=chunk, window=3 * chunk, half_life=chunk)
    for policy in (SlidingWindow(frames=2 * chunk), packed):
        pieces = trial.has_text + 10
        names, plan = trial.names(pieces), trial.plan(policy, pieces)

        def look(
            piece: int, run: Run, out: Tensor, names: Tensor = names, plan: list[Ints] = plan
        ) -> None:
            held = identify(_first_values(run), names).tolist()
            _same_tokens(trial, piece, held, plan[piece].tolist())

        trial.play(policy, pieces, look)
    return "as planned after each of 10 commits"


def _same_tokens(trial: Trial, piece: int, held: list[int], planned: list[int]) -> None:
    text, size = trial.subject.text[0], trial.subject.layout.tokens
    kinds = {
        "held twice": [token for token in held if held.count(token) > 1],
        "held, but should have left": [token for token in held if token not in planned],
        "not held, but should be": [token for token in planned if token not in held],
    }
    for wrong, tokens in kinds.items():
        if tokens:
            where = f"latent frame {(tokens[0] - text) // size}" if tokens[0] >= text else "text"
            raise Wrong(f"a token of {where} is {wrong} after piece {piece} ({len(tokens)} such)")


def _lengths(trial: Trial) -> str:
    policy = trial.newest
    pieces = trial.has_text + 6
    committed = 0

    def look(piece: int, run: Run, out: Tensor) -> None:
        nonlocal committed
        committed += trial.tokens(piece)
        told = run.logical_length, run.physical_length
        expected = committed, run.kv()[0][0].shape[-2]
        if told != expected:
            raise Wrong(
                f"logical and physical length are told as {told} after piece {piece}, "
                f"expected {expected}"
            )

    trial.play(policy, pieces, look)
    return f"{committed} committed"


def _growth(trial: Trial) -> str:
    """Bytes of everything that hangs on a run: the same after ten windows and after fifty."""
    _evicts(trial)
    policy = SlidingWindow(frames=trial.subject.chunk)
    sizes: dict[int, int] = {}
    first, last = trial.has_text + WINDOWS, trial.has_text + 5 * WINDOWS

    def look(piece: int, run: Run, out: Tensor) -> None:
        if piece in (first, last):
            sizes[piece] = footprint(run.state())

    trial.play(policy, last + 1, look)
    grown = sizes[last] - sizes[first]
    if grown > _SLACK:
        raise Wrong(f"{grown} bytes more after {last - first} more commits, at most {_SLACK}")
    return f"{sizes[last]} bytes, {grown:+d} over {last - first} commits"


def _evicts(trial: Trial) -> None:
    if not trial.subject.bounded:
        raise NotAsked("it evicts nothing")


def _copies(run: Run, branch: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(k.clone(), v.clone()) for k, v in run.kv(branch)]


def _equal(ours: Sequence[tuple[Tensor, Tensor]], theirs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """To the bit; layers that hold nothing may as well not be there yet."""
    ours, theirs = ([p for p in pairs if p[0].shape[-2]] for pairs in (ours, theirs))
    return len(ours) == len(theirs) and all(
        torch.equal(a, b)
        for pair, other in zip(ours, theirs, strict=True)
        for a, b in zip(pair, other, strict=True)
    )


CHECKS = (
    Check("off", "installed but off it is the host, bit for bit",
          "asked for in NVlabs/LongLive#50: identical output when off", _off),
    Check("unlimited", "with nothing evicted it is one full forward",
          "hao-ai-lab/FastVideo#1307: keys and values were refreshed without the text", _unlimited),
    Check("bounded", "packed it is one full forward under the matching mask",
          "mikeallen39/FlowCache#3: compression failed with the paper's own settings", _bounded),
    Check("draft", "a draft leaves no trace",
          "NVIDIA/flashdreams#520: a copy not yet overwritten counted as committed", _draft),
    Check("order", "the order of the tokens held does not matter",
          "hao-ai-lab/FastVideo#1454: positions were cut out by place in the cache", _order),
    Check("sinks", "sinks and anchors survive to the bit",
          "NVlabs/LongLive#12: after a switch of prompts all sink tokens were zero", _sinks),
    Check("branches", "one branch does not leak into the other",
          "vllm-project/vllm-omni#3646: the unconditional pass saw the condition image", _branches),
    Check("steady", "it holds what the policy keeps, nothing twice and nothing stale",
          "NVIDIA/flashdreams#520: a chunk was held twice once the ring was full; "
          "chenfengxu714/StreamDiffusionV2#22: a sink that was to be updated never was", _steady),
    Check("positions", "positions are right after ten windows",
          "thu-ml/Causal-Forcing#2: the rotary table ended at 1024 frames", _positions),
    Check("lengths", "logical length counts what was committed, physical what is held",
          "NVIDIA/flashdreams#520: a count that stops at the buffer's size", _lengths),
    Check("growth", "nothing grows once the window is full",
          "vllm-project/vllm-omni#7498: metadata grew with a rollout", _growth),
)  # fmt: skip
