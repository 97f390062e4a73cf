"""WHAT a cached token is: its role, its latent frame, its (t, y, x), visible or re-masked.

Everything here is integers (numpy, no torch): who owns which slot is decided without tensors, so
it can be tested in microseconds and asked by serving engines that keep their K/V elsewhere.

    timeline = Timeline()
    timeline.append(Span.text(13))
    timeline.append(Span.frame(Role.HISTORY, frame=0, layout=FrameLayout(rows=8, cols=8)))
    timeline.physical_length        # 89

A *slot* is a place among the tokens held, counted from 0 in sequence order. A *logical* index
counts every token ever committed. Slots are counted in the conditional branch.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from packcache.errors import CacheStateError, InvalidSetting

Ints = NDArray[np.int32]

__all__ = ["FrameLayout", "HeldFrame", "Kind", "Role", "Span", "Timeline"]


class Role(str, enum.Enum):
    """What a committed token is for. Anchors (text, image) never decay."""

    TEXT = "text"
    IMAGE = "condition image"
    HISTORY = "history"

    @property
    def is_anchor(self) -> bool:
        return self is not Role.HISTORY


class Kind(enum.IntEnum):
    """What a token is inside its latent frame."""

    BORDER = 0
    CONTENT = 1
    NEW_LINE = 2


@dataclass(frozen=True, kw_only=True)
class FrameLayout:
    """How a latent frame lies in the sequence: header, rows of `cols` content tokens, footer.

    Lumos-1 opens a frame with three border tokens, ends each row with a new line and closes with
    one border token (lumos1-spec 3.2): `P = rows * (cols + 1) + 4`. Models without such tokens
    set `header=0, footer=0, new_line=False`.
    """

    rows: int
    cols: int
    header: int = 3
    footer: int = 1
    new_line: bool = True

    @property
    def row_length(self) -> int:
        return self.cols + self.new_line

    @property
    def body(self) -> int:
        """Tokens between header and footer."""
        return self.rows * self.row_length

    @property
    def tokens(self) -> int:
        """P, all tokens of the latent frame."""
        return self.header + self.body + self.footer

    @property
    def content(self) -> int:
        return self.rows * self.cols

    def kinds(self) -> NDArray[np.int8]:
        """`Kind` of each of the P tokens."""
        kinds = np.full(self.tokens, Kind.BORDER, dtype=np.int8)
        row = np.full(self.row_length, Kind.CONTENT, dtype=np.int8)
        row[self.cols :] = Kind.NEW_LINE
        kinds[self.header : self.header + self.body] = np.tile(row, self.rows)
        return kinds

    def content_offsets(self) -> Ints:
        """Offsets of the content tokens, row-major, `[rows * cols]`."""
        return np.flatnonzero(self.kinds() == Kind.CONTENT).astype(np.int32)

    def cells(self) -> tuple[Ints, Ints]:
        """Row y and column x of each of the P tokens; border tokens have -1, new lines x = cols."""
        y = np.full(self.tokens, -1, dtype=np.int32)
        x = np.full(self.tokens, -1, dtype=np.int32)
        inside = np.arange(self.body, dtype=np.int32)
        y[self.header : self.header + self.body] = inside // self.row_length
        x[self.header : self.header + self.body] = inside % self.row_length
        return y, x


@dataclass(frozen=True, kw_only=True, eq=False)
class Span:
    """A stretch of tokens committed together: the text, the condition image, or one latent frame.

    `visible [tokens]` is False where the token was re-masked at commit; None means all visible.
    `ids [tokens]` are the true token ids, which the novelty order reads (None: the model has none).
    """

    role: Role
    tokens: int
    frame: int = -1
    layout: FrameLayout | None = None
    visible: NDArray[np.bool_] | None = None
    ids: Ints | None = None

    @classmethod
    def text(cls, tokens: int) -> Span:
        return cls(role=Role.TEXT, tokens=tokens)

    @classmethod
    def of_frame(
        cls,
        role: Role,
        frame: int,
        layout: FrameLayout,
        *,
        visible: NDArray[np.bool_] | None = None,
        ids: Ints | None = None,
    ) -> Span:
        """The span of latent frame `frame` (counted from 0 over given and generated frames)."""
        for name, array in (("visible", visible), ("ids", ids)):
            if array is not None and array.shape != (layout.tokens,):
                raise InvalidSetting(
                    f"{name} has shape {array.shape}, expected ({layout.tokens},): one entry for "
                    "each token of the latent frame, border tokens included"
                )
        return cls(
            role=role, tokens=layout.tokens, frame=frame, layout=layout, visible=visible, ids=ids
        )

    def visible_mask(self) -> NDArray[np.bool_]:
        return np.ones(self.tokens, dtype=bool) if self.visible is None else self.visible


@dataclass(eq=False)
class HeldFrame:
    """A committed span and what is left of it.

    `held` lists the offsets inside the span that still hold a token, ascending. `rank[offset]` is
    the token's place in the order fixed at commit: the highest rank is given up first. None for
    anchors, which give up nothing.
    """

    span: Span
    start: int
    held: Ints
    rank: Ints | None = None

    @property
    def count(self) -> int:
        return len(self.held)

    def best(self, keep: int) -> Ints:
        """The `keep` held offsets that come first in the order, ascending: nested as it shrinks."""
        if keep >= self.count:
            return self.held
        if self.rank is None:
            raise CacheStateError(f"{self.span.role.value} has no order: anchors keep all tokens")
        first = np.argsort(self.rank[self.held], kind="stable")[:keep]
        return np.sort(self.held[first])


@dataclass(eq=False)
class Timeline:
    """The committed spans in sequence order; those that hold no token any more are forgotten."""

    entries: list[HeldFrame] = field(default_factory=list)
    logical_length: int = 0
    num_frames: int = 0
    first_history: int = 0
    evicted_tokens: int = 0

    @property
    def physical_length(self) -> int:
        """Tokens held, all roles."""
        return sum(entry.count for entry in self.entries)

    @property
    def history(self) -> list[HeldFrame]:
        """History frames that hold a token, newest first: d = 1, 2, ..."""
        return [e for e in reversed(self.entries) if e.span.role is Role.HISTORY]

    @property
    def anchors(self) -> list[HeldFrame]:
        return [e for e in self.entries if e.span.role.is_anchor]

    def distance(self, entry: HeldFrame) -> int:
        """d of a history frame in latent frames: 1 is the newest committed one."""
        return self.num_frames - entry.span.frame

    def append(self, span: Span, rank: Ints | None = None) -> HeldFrame:
        """Add a span that was just committed; frames must come in order."""
        if span.layout is not None and span.frame != self.num_frames:
            raise CacheStateError(
                f"latent frame {span.frame} was committed, expected frame {self.num_frames}: "
                "frames are committed in order, each once"
            )
        held = np.arange(span.tokens, dtype=np.int32)
        entry = HeldFrame(span, self.logical_length, held, rank)
        self.entries.append(entry)
        self.logical_length += span.tokens
        self.num_frames += span.layout is not None
        if span.role is Role.IMAGE:
            self.first_history = self.num_frames
        return entry

    def slots(self) -> Iterator[tuple[HeldFrame, range]]:
        """Each entry with the slots it occupies now."""
        start = 0
        for entry in self.entries:
            yield entry, range(start, start + entry.count)
            start += entry.count

    def keep(self, slots: Iterable[int]) -> None:
        """Hold only these slots from now on (ascending); entries left empty are forgotten."""
        wanted = np.asarray(slots, dtype=np.int64)
        if len(wanted) and (
            wanted[0] < 0 or wanted[-1] >= self.physical_length or (np.diff(wanted) <= 0).any()
        ):
            raise CacheStateError(
                f"slots to keep must ascend inside 0..{self.physical_length - 1}, each once"
            )
        self.evicted_tokens += self.physical_length - len(wanted)
        kept: list[HeldFrame] = []
        for entry, where in list(self.slots()):
            low, high = np.searchsorted(wanted, (where.start, where.stop))
            if low < high:
                entry.held = entry.held[wanted[low:high] - where.start]
                kept.append(entry)
        self.entries = kept

    def rewind(self, frame: int, slots: Iterable[int], logical_length: int) -> None:
        """Go back to before latent frame `frame`, of which these slots are left to hold."""
        self.keep(slots)
        self.num_frames, self.logical_length = frame, logical_length
        self.first_history = min(self.first_history, frame)
        self.evicted_tokens = logical_length - self.physical_length

    def counts(self) -> dict[int, int]:
        """Tokens held per history frame: {latent frame: tokens}, oldest first."""
        return {e.span.frame: e.count for e in self.entries if e.span.role is Role.HISTORY}

    def counters(self) -> dict[str, int]:
        """What the entries do not tell: `Timeline(entries, **counters)` is the same timeline."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "entries"}

    def coordinates(self, entry: HeldFrame) -> tuple[Ints, Ints, Ints]:
        """(t, y, x) of the held tokens, in latent frames and tokens; -1 for border tokens."""
        if entry.span.layout is None:
            raise CacheStateError("text has a 1-D index, not (t, y, x)")
        y, x = entry.span.layout.cells()
        t = np.full(entry.count, entry.span.frame, dtype=np.int32)
        return t, y[entry.held], x[entry.held]

    @property
    def metadata_bytes(self) -> int:
        """Bytes of the index arrays: slots, orders, visibility, ids."""
        arrays = [
            array
            for e in self.entries
            for array in (e.held, e.rank, e.span.visible, e.span.ids)
            if array is not None
        ]
        return sum(array.nbytes for array in arrays)
