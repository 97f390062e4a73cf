"""The conformance kit: right caches pass, and each broken one fails its own check and no other.

A broken cache is a right one with at most five lines changed; a test counts them.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from packcache.policies import Policy
from packcache.testing.bare import BareRun, BareSubject, FrameCacheRun
from packcache.testing.conformance import CHECKS, Report, check
from packcache.testing.footprint import footprint
from packcache.testing.host import attend_all
from packcache.timeline import Role, Span, Timeline


class ListRun(BareRun):
    """A right cache, written without ours: lists of tensors, cut by the policy's plan."""

    def __init__(self, subject: BareSubject, policy: Policy) -> None:
        super().__init__(subject, policy)
        self.branches, self.layers = len(subject.text), len(subject.host.blocks)
        empty = torch.empty(subject.host.heads, 0, subject.host.head_dim)
        every = itertools.product(range(self.branches), range(self.layers))
        self.held = dict.fromkeys(every, (empty, empty))
        self.draft: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.timeline = Timeline()

    def update(self, layer: int, k: Tensor, v: Tensor, branch: int) -> tuple[Tensor, Tensor]:
        self.draft[branch, layer] = k, v
        keys, values = self.held[branch, layer]
        return torch.cat((keys, k), dim=1), torch.cat((values, v), dim=1)

    def commit(self) -> None:
        for (branch, layer), (k, v) in self.draft.items():
            keys, values = self.held[branch, layer]
            self.held[branch, layer] = torch.cat((keys, k), 1), torch.cat((values, v), 1)
        self.draft = {}
        slots = torch.tensor(self.plan())
        for branch, text in enumerate(self.subject.text):
            own = slots[slots >= self.subject.text[0] - text] - (self.subject.text[0] - text)
            for layer in range(self.layers):
                keys, values = self.held[branch, layer]
                self.held[branch, layer] = keys[:, own], values[:, own]
        super().commit()

    def plan(self) -> list[int]:
        layout = self.subject.layout
        spans = [Span.of_frame(Role.HISTORY, f, layout) for f in self.subject.frames(self.piece)]
        for span in spans or [Span.text(self.subject.text[0])]:
            self.timeline.append(span, self.policy.rank(span, None))
        slots = self.policy.plan(self.timeline, self.policy.budget_for(layout.tokens))
        self.timeline.keep(slots)
        return slots

    def kv(self, branch: int = 0) -> list[tuple[Tensor, Tensor]]:
        return [self.held[branch, layer] for layer in range(self.layers)]

    @property
    def logical_length(self) -> int:
        return self.timeline.logical_length

    @property
    def physical_length(self) -> int:
        return self.timeline.physical_length


class Switched(BareSubject):
    """A subject that can be turned off: a model of its own, with the adapter in it."""

    def when_off(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_all(q, k, v)

    def off(self) -> tuple[Tensor, Tensor]:
        x, where = self.embed((1, 0), 0), self.positions(1, 0)
        stock = self.host(x, where, lambda _, q, k, v: attend_all(q, k, v))
        return stock, self.host(x, where, lambda _, q, k, v: self.when_off(q, k, v))


# --- broken by a few lines -----------------------------------------------------------------------


class OffInDouble(Switched):
    """off: more precise is not the same."""

    def when_off(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_all(q.double(), k.double(), v.double()).float()


class FixedBuffer(ListRun):
    """unlimited: the buffer was made for forty tokens and rolls."""

    def update(self, layer: int, k: Tensor, v: Tensor, branch: int) -> tuple[Tensor, Tensor]:
        keys, values = super().update(layer, k, v, branch)
        return keys[:, -40:], values[:, -40:]


class KeysInAnotherOrder(ListRun):
    """bounded: keys of packed frames are gathered by other slots than values."""

    def commit(self) -> None:
        super().commit()
        if any(count < self.subject.layout.tokens for count in self.timeline.counts().values()):
            for place, (keys, values) in self.held.items():
                self.held[place] = keys.roll(1, dims=1), values


class KeepsDrafts(ListRun):
    """draft: a second draft comes behind the first."""

    def update(self, layer: int, k: Tensor, v: Tensor, branch: int) -> tuple[Tensor, Tensor]:
        if self.piece and (branch, layer) in self.draft:
            pairs = zip(self.held[branch, layer], self.draft[branch, layer], strict=True)
            self.held[branch, layer] = tuple(torch.cat(pair, dim=1) for pair in pairs)
        return super().update(layer, k, v, branch)


class TextByPlace(ListRun):
    """order: the first slots are taken for the text, wherever the text lies."""

    def commit(self) -> None:
        super().commit()
        if self.piece == 1:
            self.text = {place: keys[:, :2].clone() for place, (keys, _) in self.held.items()}

    def update(self, layer: int, k: Tensor, v: Tensor, branch: int) -> tuple[Tensor, Tensor]:
        keys, values = super().update(layer, k, v, branch)
        text = self.text[branch, layer] if self.piece else keys[:, :2]
        return torch.cat((text, keys[:, 2:]), dim=1), values


class ZeroedSink(ListRun):
    """sinks: the keys of the first frame are overwritten while it is still attended to."""

    def commit(self) -> None:
        super().commit()
        if self.policy.num_sinks and self.piece > 4:
            for (branch, _), (keys, _) in self.held.items():
                keys[:, self.subject.text[branch]] = 0


class SharedDraft(ListRun):
    """branches: one scratch for both in the first layer."""

    def update(self, layer: int, k: Tensor, v: Tensor, branch: int) -> tuple[Tensor, Tensor]:
        if branch == 1 and layer == 0 and self.piece:
            self.draft[0, 0] = k, v
        return super().update(layer, k, v, branch)


class NewestTwice(ListRun):
    """steady: when the ring is full the newest chunk is reported twice, and the oldest not."""

    def commit(self) -> None:
        super().commit()
        if self.piece > 8:
            size = self.subject.layout.tokens
            for place, pair in self.held.items():
                text = self.subject.text[place[0]]
                self.held[place] = tuple(
                    torch.cat((x[:, :text], x[:, text + size :], x[:, -size:]), dim=1) for x in pair
                )


class ShortTable(ListRun):
    """positions: the table ends after ten frames, and the last row is used on and on."""

    def where(self, branch: int) -> Tensor:
        return super().where(branch).clamp(max=self.subject.text[0] + 9)


class PhysicalForLogical(ListRun):
    """lengths: what is held is told as what was committed."""

    @property
    def logical_length(self) -> int:
        return self.physical_length


class Diary(ListRun):
    """growth: every commit is remembered."""

    def commit(self) -> None:
        super().commit()
        self.__dict__.setdefault("diary", []).append(f"commit {self.piece}")


BROKEN = {
    "off": OffInDouble,
    "unlimited": FixedBuffer,
    "bounded": KeysInAnotherOrder,
    "draft": KeepsDrafts,
    "order": TextByPlace,
    "sinks": ZeroedSink,
    "branches": SharedDraft,
    "steady": NewestTwice,
    "positions": ShortTable,
    "lengths": PhysicalForLogical,
    "growth": Diary,
}


# --- caches that were not written for the kit ----------------------------------------------------


class DynamicRun(BareRun):
    """transformers' DynamicCache, a draft taken back by `crop`."""

    def __init__(self, subject: BareSubject, policy: Policy) -> None:
        super().__init__(subject, policy)
        self.caches = [DynamicCache() for _ in subject.text]
        self.drafted = [0 for _ in subject.text]

    def forward(self, inputs: Any, branch: int = 0) -> Tensor:
        self.take_back(branch, self.drafted[branch])
        out = super().forward(inputs, branch)
        self.drafted[branch] = len(out)
        return out

    def take_back(self, branch: int, tokens: int) -> None:
        self.caches[branch].crop(-tokens)

    def update(self, layer: int, k: Tensor, v: Tensor, branch: int) -> tuple[Tensor, Tensor]:
        keys, values = self.caches[branch].update(k[None], v[None], layer)
        return keys[0], values[0]

    def commit(self) -> None:
        super().commit()
        self.drafted = [0 for _ in self.caches]

    def kv(self, branch: int = 0) -> list[tuple[Tensor, Tensor]]:
        held = int(self.caches[branch].get_seq_length()) - self.drafted[branch]
        layers = [layer for layer in self.caches[branch].layers if layer.is_initialized]
        return [(layer.keys[0, :, :held], layer.values[0, :, :held]) for layer in layers]

    @property
    def logical_length(self) -> int:
        return int(self.caches[0].get_seq_length()) - self.drafted[0]

    @property
    def physical_length(self) -> int:
        return self.logical_length


class StaticRun(DynamicRun):
    """transformers' StaticCache: a buffer of a fixed size, of which the rest is not attended to."""

    def __init__(self, subject: BareSubject, policy: Policy) -> None:
        super().__init__(subject, policy)
        config = LlamaConfig(num_hidden_layers=len(subject.host.blocks))
        self.caches = [StaticCache(config, max_cache_len=400) for _ in subject.text]

    def take_back(self, branch: int, tokens: int) -> None:
        for layer in self.caches[branch].layers:
            layer.cumulative_length -= tokens

    def update(self, layer: int, k: Tensor, v: Tensor, branch: int) -> tuple[Tensor, Tensor]:
        keys, values = super().update(layer, k, v, branch)
        length = int(self.caches[branch].layers[layer].get_seq_length())
        return keys[:, :length], values[:, :length]


# --- right and wrong -----------------------------------------------------------------------------


def states(report: Report) -> dict[str, str]:
    return {found.check: found.state for found in report.findings}


def test_every_check_has_a_cache_that_fails_it():
    assert list(BROKEN) == [asked.name for asked in CHECKS]


@pytest.mark.parametrize("make", [ListRun, FrameCacheRun])
@pytest.mark.parametrize("changes", [{}, {"text": (0,)}, {"text": (4,), "chunk": 3}])
def test_right_caches_pass(make, changes):
    report = check(Switched("right", make, **changes))
    assert report.ok, "\n".join(report.lines())
    not_asked = {"branches"} if changes else set()
    assert {name for name, state in states(report).items() if state != "holds"} == not_asked


@pytest.mark.parametrize("make", [DynamicRun, StaticRun])
def test_caches_of_transformers_pass(make):
    report = check(BareSubject("theirs", make, bounded=False))
    assert report.ok, "\n".join(report.lines())
    held = {name for name, state in states(report).items() if state == "holds"}
    assert held == {"unlimited", "draft", "order", "branches", "lengths"}


@pytest.mark.parametrize(("name", "make"), BROKEN.items())
def test_a_broken_cache_fails_its_own_check_and_no_other(name, make):
    subject = make("broken", ListRun) if name == "off" else Switched("broken", make)
    report = check(subject)
    assert report.failed == [name], "\n".join(report.lines())
    assert not report.ok and "FAIL" in "\n".join(report.lines())


#: As a right cache does it.
ASKS = "keys, values = super().update(layer, k, v, branch)"


@pytest.mark.parametrize("make", BROKEN.values())
def test_it_is_broken_by_at_most_five_lines(make):
    """Statements that a right cache does not have: what only calls it as it is does not count."""
    body = ast.parse(textwrap.dedent(inspect.getsource(make))).body[0]
    lines = [
        line
        for method in ast.walk(body)
        if isinstance(method, ast.FunctionDef)
        for line in ast.unparse(method.body).splitlines()
    ]
    own = [line for line in lines if line not in ("super().commit()", ASKS)]
    assert 0 < len(own) <= 5, own


def test_a_cache_that_crashes_has_failed():
    class Crashes(ListRun):
        def plan(self) -> list[int]:
            raise ValueError("no such setting")

    report = check(BareSubject("crashes", Crashes))
    assert "ValueError: no such setting" in "\n".join(report.lines())
    assert set(states(report).values()) == {"fails", "not asked"}


def test_nan_is_not_near():
    class NotANumber(ListRun):
        def update(self, layer: int, k: Tensor, v: Tensor, branch: int) -> tuple[Tensor, Tensor]:
            keys, values = super().update(layer, k, v, branch)
            return keys * float("nan"), values

    assert "unlimited" in check(BareSubject("nan", NotANumber)).failed


def test_a_report_is_json_with_what_was_seen():
    report = check(BareSubject("short", ListRun), only=["lengths"])
    told = json.loads(json.dumps(report.to_json()))
    assert told["schema"] == "packcache.conformance/1" and told["workload"] == {
        "subjects": ["short"]
    }
    assert [(r["check"], r["state"]) for r in told["results"]] == [("lengths", "holds")]
    assert told["environment"]["torch"]


def test_a_footprint_counts_what_hangs_on_an_object_once():
    held = torch.zeros(1000)
    assert 4000 <= footprint([held]) - footprint([]) < 4100
    assert footprint([held, held[:10]]) - footprint([held]) < 100
    assert footprint({"log": ["x" * 500]}) > 500
    assert footprint([torch.nn.Linear(100, 100)]) - footprint([]) < 100


def test_a_host_that_cannot_tell_is_no_proof():
    """One whose outputs do not depend on what it has seen passes nothing of what is compared."""

    class Blind(BareSubject):
        def whole(self, pieces: Any, bias: Tensor, branch: int = 0) -> Tensor:
            return torch.cat([self.embed(inputs, branch) for inputs in pieces])

    class Echo(ListRun):
        def forward(self, inputs: Any, branch: int = 0) -> Tensor:
            super().forward(inputs, branch)
            return self.subject.embed(inputs, branch)

    report = check(Blind("blind", Echo))
    assert report.failed == ["unlimited", "bounded", "positions"]
    assert "this host cannot tell: without any history" in "\n".join(report.lines())
