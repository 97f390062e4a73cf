"""Self-Forcing-type pipelines: their cache is a list of dicts, and so is this.

    pipeline.kv_cache1 = SelfForcingCache(PackCache(), layers=30, grid=(30, 52))

Self-Forcing, Causal-Forcing, LongLive 1.x, Reward-Forcing, Krea realtime and FastVideo's causal Wan
share one protocol (ecosystem 2.5): a dict a layer with `k` and `v` `[B, slots, H, D]`, written and
read by slices, and two counters, `global_end_index` and `local_end_index`. What a model sees here
is a buffer that never fills, so its own window never moves: it writes a chunk where its tokens lie
in the video, and whatever it reads of what is before the chunk is what the policy holds. A chunk
that is written again overwrites itself; the first write of the next one commits it. Sizes come from
the tensors. A model may write to a copy of the buffer, attend, and write again (LongLive 1.x).

A write that goes back (a prompt was switched, the last frames are encoded anew) forgets what it
replaces; sinks stay as they were. A write to the front while the counters are zero begins a clip.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from packcache.adapters.scored import refuse_scores
from packcache.adapters.shapes import check_same, frame_spans, heads_first, heads_last
from packcache.cache import FrameCache
from packcache.errors import CacheStateError, InvalidSetting
from packcache.policies import Policy
from packcache.positions import PositionMode, Rotation
from packcache.timeline import FrameLayout, Role

__all__ = ["LayerCache", "SelfForcingCache", "longer_table", "wan_rotation"]

#: Slots that a model is told there are: it never has to roll its buffer.
_ENDLESS = 1 << 62

_COUNTERS = ("global_end_index", "local_end_index")


def wan_rotation(freqs: Tensor, *, stride: int = 1) -> Rotation:
    """Which rotary pairs carry time in a Wan model, and how fast, from its own table.

    `freqs` is complex `[positions, D/2]`: time first, then height and width with a third of the
    pairs each, rounded down.
    """
    pairs = freqs.shape[1]
    time = pairs - 2 * (pairs // 3)
    return Rotation(
        pairs=torch.arange(time, device=freqs.device),
        freq=freqs[1, :time].angle(),
        stride=stride,
        interleaved=True,
    )


def longer_table(freqs: Tensor, positions: int) -> Tensor:
    """A model's rotary table `[rows, D/2]` with at least so many rows, complex.

    A clip of more latent frames than the table has rows fails in the model (thu-ml/Causal-Forcing
    issue 2): `model.freqs = longer_table(model.freqs, frames)`. Old rows stay as they are.
    """
    if positions <= len(freqs):
        return freqs
    rows = torch.arange(len(freqs), positions, dtype=torch.float64, device=freqs.device)
    angles = torch.outer(rows, freqs[1].to(torch.complex128).angle())
    return torch.cat((freqs, torch.polar(torch.ones_like(angles), angles).to(freqs.dtype)))


class SelfForcingCache(list["LayerCache"]):
    """The list of dicts that such a pipeline keeps, for one branch of guidance.

    Args:
        policy: which tokens stay. It takes the place of `local_attn_size` and `sink_size`. None
            that goes by scores: the model's attention shows the list no queries.
        layers: transformer blocks of the model.
        grid: rows and columns of tokens in a latent frame.
        image_frames: of these first latent frames, given to the model, no token ever leaves.
        positions, rotation, trained_latent_frames: as for `FrameCache`; the rotation of a Wan
            model is `wan_rotation(model.freqs)`.
        device: of the counters.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        layers: int,
        grid: tuple[int, int],
        image_frames: int = 0,
        positions: PositionMode = "absolute",
        rotation: Rotation | None = None,
        trained_latent_frames: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        rows, cols = grid
        if min(layers, rows, cols) < 1 or image_frames < 0:
            raise InvalidSetting(
                f"layers {layers}, grid {grid}, image_frames {image_frames}: expected a model of "
                "at least one layer and token, and no negative number of frames"
            )
        refuse_scores(policy, "a Self-Forcing-type model")
        super().__init__(LayerCache(self, layer, device) for layer in range(layers))
        self.policy, self.image_frames = policy, image_frames
        self.layout = FrameLayout(rows=rows, cols=cols, header=0, footer=0, new_line=False)
        self._settings: dict[str, Any] = {
            "positions": positions, "rotation": rotation,
            "trained_latent_frames": trained_latent_frames,
        }  # fmt: skip
        self.sizes = 0, 0, 0  # B, H, D, from the first write on
        self._cache: FrameCache | None = None
        self._start = self.end = 0  # of the open chunk, in tokens of the video
        self.protected = 0  # tokens at its front that are sinks and stay as they are

    @property
    def cache(self) -> FrameCache:
        """The cache behind it, of `B * H` heads. Raises CacheStateError before the first write."""
        if self._cache is None:
            raise CacheStateError("nothing was written yet: run the model once")
        return self._cache

    def commit(self) -> None:
        """Commit the chunk that is open, as the first write of the next one would."""
        if self.end > self._start:
            self.cache.commit()
            self._start = self.end

    def reset(self) -> None:
        """Begin a new clip; its tensors may have another shape."""
        self._cache, self.sizes = None, (0, 0, 0)
        self._start = self.end = self.protected = 0
        for layer in self:
            layer.clear()

    # --- what the layers ask ------------------------------------------------------------------

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, n, H, D]` of a chunk that begins at token `start` of the video.

        Returns all there is to attend to, `[B, S, H, D]`, the chunk last.
        """
        self._check(start, k, v)
        if (start, start + k.shape[1]) != (self._start, self.end):
            self._turn(layer, start, k)
        own_k, own_v = (heads_first(x)[:, self.protected :] for x in (k, v))
        keys, values = self.cache.update(layer, own_k, own_v)
        return heads_last(keys, len(k)), heads_last(values, len(k))

    def _check(self, start: int, k: Tensor, v: Tensor) -> None:
        size, shape = self.layout.tokens, (len(k), *k.shape[2:])
        if k.shape != v.shape:
            raise CacheStateError(f"k is {tuple(k.shape)}, v {tuple(v.shape)}, expected the same")
        if k.shape[1] % size or start % size:
            raise InvalidSetting(
                f"{k.shape[1]} tokens at token {start} of the video are no whole latent frames of "
                f"{size} tokens: give the grid of the model's tokens"
            )
        if self._cache is not None:
            check_same(shape, k.dtype, self.sizes, self.cache.dtype)

    def _turn(self, layer: int, start: int, k: Tensor) -> None:
        """Another chunk than the open one begins."""
        if layer:
            raise CacheStateError(
                f"layer {layer} wrote tokens {start} to {start + k.shape[1]}, and layer 0 wrote "
                f"{self._start} to {self.end}: layers are written in order, one cache a model"
            )
        if start > self.end:
            raise CacheStateError(
                f"a chunk begins at token {start} of the video, expected {self.end}: each latent "
                "frame once, in order"
            )
        if self._cache is None:
            self._make(k)
        elif start == self._start:
            self.cache.close()  # the open chunk again, of another length
        else:
            self.commit()
        self._open(start, start + k.shape[1])

    def _make(self, k: Tensor) -> None:
        self.sizes = len(k), k.shape[2], k.shape[3]
        self._cache = FrameCache(
            self.policy, layers=len(self), kv_heads=k.shape[0] * k.shape[2], head_dim=k.shape[3],
            layout=self.layout, text=(0,), dtype=k.dtype, device=k.device, **self._settings,
        )  # fmt: skip

    def _open(self, start: int, end: int) -> None:
        """Latent frames from `start` on, less those whose sinks are to stay."""
        size, fixed = self.layout.tokens, self.image_frames + self.policy.num_sinks
        first, last = start // size, end // size
        begun = self.cache.timeline.num_frames
        stay = max(first, min(fixed, begun)) if first < begun else first
        if stay >= last:
            raise CacheStateError(
                f"latent frames {first} to {last - 1} are sinks or condition images and stay as "
                "they are: encode later ones anew, or reset() first"
            )
        self.cache.rewind(stay)
        roles = [Role.IMAGE] * self.image_frames
        self.cache.open(*frame_spans(range(stay, last), self.layout, roles))
        self._start, self.end, self.protected = start, end, (stay - first) * size


class LayerCache(dict[str, Any]):
    """One layer's dict: `k` and `v` are written and read by slices, counters are tensors."""

    def __init__(self, owner: SelfForcingCache, layer: int, device: torch.device | str) -> None:
        counters = {name: torch.zeros(1, dtype=torch.long, device=device) for name in _COUNTERS}
        super().__init__(k=Slots(self, "k"), v=Slots(self, "v"), **counters)
        self.owner, self.layer = owner, layer
        self._new: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}
        self._chunk = 0  # the slot where the open chunk begins, less sinks that stay
        self._told: dict[str, int] = {}  # to which slot reads went that gave the history

    def __setitem__(self, name: str, value: Any) -> None:
        """Counters may be replaced, as pipelines do between clips; keys and values may not."""
        if name not in _COUNTERS:
            raise CacheStateError(f"{name!r} was replaced, expected writes to slices of it")
        super().__setitem__(name, value)

    def put(self, name: str, start: int, tensor: Tensor) -> None:
        """Take `k` or `v` of a chunk, in any order; with both, the cache is asked."""
        self._seen = {}
        self._new[name] = tensor
        if len(self._new) < 2:
            return
        new, self._new = self._new, {}
        if self.layer == 0 and start == 0 and int(self["global_end_index"]) == 0:
            self.owner.reset()
        keys, values = self.owner.write(self.layer, start, new["k"], new["v"])
        self._seen, self._told = {"k": keys, "v": values}, {}
        self._chunk = start + self.owner.protected

    def look(self, name: str, start: int, stop: int) -> Tensor:
        """What is held and the chunk's tokens at those slots, `[B, S, H, D]`.

        A model that reads its sinks and its window apart gets what is held with the first.
        """
        if name not in self._seen:
            raise CacheStateError(f"{name!r} was read before k and v of the chunk were written")
        seen = self._seen[name]
        size = self.owner.end - self._chunk
        held = seen.shape[1] - size
        first, last = (held + min(max(0, slot - self._chunk), size) for slot in (start, stop))
        if start >= self._told.get(name, start + 1):
            return seen[:, first:last]
        self._told[name] = stop
        if first == held:
            return seen[:, :last]
        return torch.cat((seen[:, :held], seen[:, first:last]), dim=1)

    def clear(self) -> None:
        """Nothing was written: as for a new clip."""
        self._new, self._seen, self._told = {}, {}, {}
        for name in _COUNTERS:
            self[name] = 0 if isinstance(self[name], int) else torch.zeros_like(self[name])


class Slots:
    """What a model takes for the buffer `[B, slots, H, D]` of keys or of values."""

    def __init__(self, layer: LayerCache, name: str) -> None:
        self._layer, self._name = layer, name

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of a tensor; there are always slots enough."""
        batch, heads, size = self._layer.owner.sizes
        return batch, _ENDLESS, heads, size

    def __setitem__(self, index: Any, tensor: Tensor) -> None:
        start, stop = self._slots(index)
        if stop - start != tensor.shape[1]:
            raise CacheStateError(
                f"{tensor.shape[1]} tokens were written to slots {start} to {stop}: expected as "
                "many tokens as slots"
            )
        self._layer.put(self._name, start, tensor)

    def __getitem__(self, index: Any) -> Tensor:
        return self._layer.look(self._name, *self._slots(index))

    def clone(self) -> Slots:
        """A model that writes to a copy first drafts; what it writes later is the same chunk."""
        return self

    def zero_(self) -> Slots:
        """Pipelines clear what they are about to write again: it is forgotten when they do."""
        return self

    def _slots(self, index: Any) -> tuple[int, int]:
        whole = slice(None)
        if not (isinstance(index, tuple) and len(index) == 2 and index[0] == whole):
            self._refuse(index)
        slots = index[1]
        if not isinstance(slots, slice) or slots.step not in (None, 1) or slots.stop is None:
            self._refuse(index)
        return int(slots.start or 0), int(slots.stop)

    def _refuse(self, index: Any) -> NoReturn:
        raise CacheStateError(
            f"{self._name}[{index}] is no slice of slots: expected [:, start:end], as in "
            "Self-Forcing's attention"
        )
