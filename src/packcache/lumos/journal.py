"""The checkpoint of a clip: its state is durable after every latent frame, and a run can go on.

    lock                      held by the process that reads or writes
    manifest.a.json, .b.json  the states after the last two latent frames, by turns
    codes.bin                 int32 `[frames, B, rows, cols]`, appended
    results.jsonl             what each latent frame cost, appended
    kv/NNNNNN.bin             a latent frame's K and V as it was committed, with its order; text.bin

A manifest appears when all that it names is on the disk, in place of the older one. So a kill at
any moment leaves the newest state whole, and damage to that leaves the one before. Keys lie as they
were committed: what a rebase had turned is turned again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor

import packcache
from packcache.cache import FrameCache
from packcache.errors import InputError, InputFileError, OutputError
from packcache.files import PARTIAL, check_folder, lock
from packcache.lumos import saved, sealed
from packcache.lumos.decode import Decoder, FrameResult
from packcache.lumos.saved import Share
from packcache.lumos.sealed import Damage, Seal
from packcache.lumos.weights import fingerprint
from packcache.timeline import FrameLayout, Span, Timeline

if TYPE_CHECKING:
    from filelock import FileLock

__all__ = ["Journal", "frame_bytes", "has_state", "identity", "remove"]

log = logging.getLogger(__name__)

FORMAT = "packcache.checkpoint/1"

#: The manifest after n latent frames is number n % 2.
SLOTS = ("manifest.a.json", "manifest.b.json")

CODES, RESULTS, KV, LOCK = "codes.bin", "results.jsonl", "kv", "lock"

#: What lies in a folder of ours; files of it may also be there under their temporary names.
_FILES = (*SLOTS, CODES, RESULTS)
_OURS = {*_FILES, *(name + PARTIAL for name in _FILES), KV, LOCK}

_CODE = np.dtype(np.int32)

#: What a line of results holds: all of a result but its tokens.
_NUMBERS = [f.name for f in fields(FrameResult) if f.name not in ("ids", "codes")]


class _File(TypedDict):
    """A K/V file and every prompt's share of it."""

    seal: Seal
    shares: list[Share | None]


class _Held(TypedDict):
    """One prompt's cache: the tokens held of each file (`saved.pack`), in sequence order."""

    tokens: dict[str, str]
    counters: dict[str, int]
    delta: int
    capacities: list[int]


class _State(TypedDict):
    """What a manifest says; `frame` latent frames are finished."""

    identity: dict[str, Any]
    frame: int
    generated: int
    prefill_s: float
    codes: Seal
    results: Seal
    caches: list[_Held]
    files: dict[str, _File]


def identity(
    decoder: Decoder,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    given: Tensor | None,
    **header: Any,
) -> dict[str, Any]:
    """What must be the same for a clip to go on, by name, in plain values.

    `header` is what is stated about the clip. How long it will be is no part of it, unless its
    seconds are stated: those of a clip that states its own follow its frames.
    """
    cache, sampling = decoder.caches[0], asdict(decoder.sampling)
    known = {
        "format": FORMAT,
        "packcache": packcache.__version__,
        "torch": str(torch.__version__),
        "device": decoder.device.type,
        "dtype": str(decoder.model.lm_head.weight.dtype).removeprefix("torch."),
        "model": fingerprint(decoder.model),
        "policy": repr(cache.policy),
        "positions": cache.positions,
        "rebase": cache.rebase,
        **{f"sampling.{name}": value for name, value in sampling.items()},
        **{f"reuse.{name}": value for name, value in asdict(decoder.reuse).items()},
        **header,
        "seeds": list(seeds),
        "prompts": list(prompts),
        "prompt": _digest([list(prefix.ids) for prefix in decoder.prefixes]),
        "image or video": None if given is None else _digest(given.tolist()),
    }
    return json.loads(json.dumps(known))


def frame_bytes(layout: FrameLayout, *, kept: int, token_bytes: int, prompts: int = 1) -> int:
    """Bytes that a generated latent frame appends: its K/V file and its codes.

    `kept` are the tokens it holds right after its commit, `token_bytes` those of a token's K and V
    (`FrameCache.token_bytes`). Its line of results, some hundred bytes, is not counted.
    """
    held = saved.INDEX_BYTES * layout.tokens + kept * token_bytes if kept else 0
    return prompts * (held + layout.content * _CODE.itemsize)


class Journal:
    """The checkpoint folder of one run: makes it or takes it up, then keeps it as frames come.

    Args:
        folder: new, empty, or with `resume` one that holds a checkpoint.
        decoder: not used yet; with `resume` it is brought to where the checkpoint stands.
        identity: of this run; a checkpoint of another is refused.

    The folder is locked while it is looked at here, and from the first frame that `record` asks for
    to its end; between the two nobody else may have written to it.

    Raises OutputError for a folder that is taken, locked by another process or cannot be written;
    InputFileError for one without a checkpoint or with a damaged one; InputError for another run's.
    """

    def __init__(
        self,
        folder: str | Path,
        decoder: Decoder,
        identity: dict[str, Any],
        *,
        resume: bool = False,
    ) -> None:
        self.folder, self.decoder, self.identity = Path(folder), decoder, identity
        if resume:
            _check_resumable(self.folder)
        else:
            _prepare(self.folder)
        self._lock = _lock(self.folder)
        try:
            self._state = self._take_up() if resume else self._create()
        finally:
            self.close()

    @property
    def frame(self) -> int:
        """Latent frames that are durable."""
        return self._state["frame"]

    def close(self) -> None:
        """Let others write to the folder; should they, `record` will refuse to go on."""
        self._left = _stamps(self.folder)
        self._lock.release()

    def _reopen(self) -> None:
        self._lock = _lock(self.folder)
        if _stamps(self.folder) != self._left:
            self._lock.release()
            raise OutputError(
                f"checkpoint {self.folder} was changed by another run after this one had looked at "
                "it: resume once more"
            )

    def record(self, coming: Iterator[FrameResult]) -> Iterator[FrameResult]:
        """The frames stored, then those that come, each of them durable before it is handed on.

        Raises OutputError for a folder in use or changed meanwhile, InputFileError for a stored
        frame that cannot be read any more.
        """
        self._reopen()
        try:
            yield from self._stored()
            for result in coming:
                self.append(result)
                yield result
        finally:
            self.close()

    def append(self, result: FrameResult) -> None:
        """Make the state after this frame, just committed, durable. Raises OutputError."""
        before = self._state
        row = {name: getattr(result, name) for name in _NUMBERS}
        with _writing(self.folder, f"{self.frame} latent frames are safe in it: make room, resume"):
            files = self._save_new(before["files"])
            state = _State(
                identity=self.identity,
                frame=self.decoder.frame,
                generated=self.decoder.generated,
                prefill_s=self.decoder.prefill_s,
                codes=self._extend(CODES, before["codes"], saved.raw(result.codes.to(torch.int32))),
                results=self._extend(RESULTS, before["results"], json.dumps(row).encode() + b"\n"),
                caches=[_held(cache) for cache in self.decoder.caches],
                files=files,
            )
            self._write_manifest(state)
            self._state = state
            self._forget_all_but({*before["files"], *files})

    # --- writing ------------------------------------------------------------------------------

    def _create(self) -> _State:
        """The state before the first frame."""
        if has_state(self.folder):
            raise OutputError(
                f"{self.folder} holds a checkpoint already: add --resume to go on with it, or "
                "choose another folder"
            )
        state = _State(
            identity=self.identity,
            frame=0,
            generated=0,
            prefill_s=0.0,
            codes=sealed.EMPTY,
            results=sealed.EMPTY,
            caches=[_held(cache) for cache in self.decoder.caches],
            files={},
        )
        with _writing(self.folder, "choose another folder"):
            (self.folder / KV).mkdir(exist_ok=True)
            for name in (CODES, RESULTS):
                sealed.replace(self.folder / name, [])
            self._write_manifest(state)
        return state

    def _save_new(self, known: dict[str, _File]) -> dict[str, _File]:
        """The file of every entry that some prompt holds, written if it is new."""
        held = [
            {_name(entry.span): entry for entry in cache.timeline.entries}
            for cache in self.decoder.caches
        ]
        files: dict[str, _File] = {}
        for name in dict.fromkeys(itertools.chain.from_iterable(held)):
            if name in known:
                files[name] = known[name]
                continue
            entries = [own.get(name) for own in held]
            shares, pieces = saved.share_out(self.decoder.caches, entries)
            seal = sealed.replace(self._kv(name), map(saved.raw, pieces))  # one on the host a time
            files[name] = _File(seal=seal, shares=shares)
        return files

    def _extend(self, name: str, seal: Seal, data: bytes | memoryview) -> Seal:
        return sealed.extend(self.folder / name, seal, data)

    def _write_manifest(self, state: _State) -> None:
        """Replace the older manifest; from here on this state is the one to resume."""
        told = {"crc32": zlib.crc32(_canonical(state)), "state": state}
        sealed.replace(self.folder / SLOTS[state["frame"] % 2], [json.dumps(told).encode()])

    def _forget_all_but(self, names: set[str]) -> None:
        for file in (self.folder / KV).iterdir():
            if file.name.removesuffix(".bin") not in names:
                file.unlink()

    def _kv(self, name: str) -> Path:
        return self.folder / KV / f"{name}.bin"

    # --- reading ------------------------------------------------------------------------------

    def _take_up(self) -> _State:
        """Bring the decoder to the newest state that is whole."""
        state = self._newest()
        with _reading(self.folder), torch.inference_mode():
            for prompt, cache in enumerate(self.decoder.caches):
                self._restore(cache, prompt, state)
        self.decoder.resume(
            frame=state["frame"], generated=state["generated"], prefill_s=state["prefill_s"]
        )
        return state

    def _newest(self) -> _State:
        """The newest state without damage; warns of any."""
        found, damage = self._manifests()
        for state in sorted(found, key=lambda state: state.get("frame", 0), reverse=True):
            self._check_identity(state["identity"])
            try:
                self._check_files(state)
            except Damage as error:
                damage.append(str(error))
                continue
            if damage:
                log.warning(
                    "checkpoint %s is damaged (%s): going on from the state after %d latent frames",
                    *(self.folder, "; ".join(damage), state["frame"]),
                )
            return state
        raise InputFileError(
            f"checkpoint {self.folder} is damaged ({'; '.join(damage)}), expected one whole state "
            "of two: start in another folder"
        )

    def _manifests(self) -> tuple[list[_State], list[str]]:
        """The states that can be read, and what is wrong with the others."""
        found, damage = [], []
        for slot in SLOTS:
            try:
                found.append(_read_manifest(self.folder / slot))
            except Damage as error:
                damage.append(str(error))
        young = len(found) == 1 and found[0]["frame"] == 0
        if young and not (self.folder / SLOTS[1]).exists():
            damage = []  # there was never another
        return found, damage

    def _check_identity(self, there: dict[str, Any]) -> None:
        here = self.identity
        other = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        if other:
            told = "; ".join(f"{n} is {there.get(n)!r} there, {here.get(n)!r} here" for n in other)
            way_out = "use its settings, or another folder"
            if "seconds" in other and "seconds" in there:  # they may just follow the frames
                stated = there["seconds"]
                way_out = (
                    f"state --seconds {stated} (seconds={stated}) to make it longer, {way_out}"
                )
            raise InputError(
                f"checkpoint {self.folder} is of another run, {_digest(there)}, not "
                f"{_digest(here)}: {told}; {way_out}"
            )

    def _check_files(self, state: _State) -> None:
        for name, file in state["files"].items():
            sealed.check(self._kv(name), file["seal"])
        sealed.check(self.folder / CODES, state["codes"], grows=True)
        sealed.check(self.folder / RESULTS, state["results"], grows=True)

    def _restore(self, cache: FrameCache, prompt: int, state: _State) -> None:
        """One prompt's cache, as it was."""
        held, dtype = state["caches"][prompt], self.decoder.model.lm_head.weight.dtype
        entries, tensors = [], []
        for name, tokens in held["tokens"].items():
            share = state["files"][name]["shares"][prompt]
            assert share is not None  # what is held was saved
            entries.append(saved.read_entry(self._kv(name), share, tokens, cache.layout))
            tensors.append(saved.read_tensors(self._kv(name), share, tokens, dtype))
        cache.restore(
            Timeline(entries, **held["counters"]),
            itertools.chain.from_iterable(tensors),
            delta=held["delta"],
            capacities=held["capacities"],
        )

    def _stored(self) -> Iterator[FrameResult]:
        """The finished frames as they once were handed on, at most as many as the clip has."""
        decoder, count = self.decoder, self.frame
        if decoder.latents is not None:
            count = min(count, decoder.latents)
        layout = decoder.layout
        shape = (len(decoder.caches), layout.rows, layout.cols)
        size = int(np.prod(shape)) * _CODE.itemsize
        with (
            _reading(self.folder),
            (self.folder / CODES).open("rb") as told,
            (self.folder / RESULTS).open("rb") as lines,
        ):
            for _ in range(count):
                array = np.frombuffer(told.read(size), _CODE).astype(np.int64)
                codes = torch.from_numpy(array).reshape(shape)
                row = json.loads(lines.readline())
                row["kept"] = {int(frame): tokens for frame, tokens in row["kept"].items()}
                ids = torch.stack([decoder.vocab.frame(layout, own) for own in codes])
                yield FrameResult(ids=ids, codes=codes, **row)


# --- the folder ---------------------------------------------------------------------------------


def _prepare(folder: Path) -> None:
    """Make the folder of a new checkpoint, or see that nothing in it is anybody else's."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file, expected a folder for the checkpoint")
    if folder.is_dir() and (others := {path.name for path in folder.iterdir()} - _OURS):
        raise OutputError(
            f"{folder} is not empty and no checkpoint, it holds {min(others)}: choose another "
            "folder"
        )
    check_folder(folder if folder.exists() else folder.parent)
    with _writing(folder, "choose another folder"):
        folder.mkdir(exist_ok=True)


def has_state(folder: str | Path) -> bool:
    """Is there a checkpoint to resume? One killed before its first manifest may be begun again."""
    return any((Path(folder) / slot).exists() for slot in SLOTS)


def remove(folder: str | Path) -> None:
    """Delete a checkpoint, and its folder if nothing else lies in it; never a file of others.

    One that a process uses stays. What cannot be deleted stays with a warning: no clip needs it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    try:
        held = lock(folder / LOCK)
        if held is None:
            return
        try:
            _unlink_states(folder)
        finally:
            held.release()
        (folder / LOCK).unlink(missing_ok=True)
        _remove_if_empty(folder)
    except (OSError, OutputError) as error:
        why = getattr(error, "strerror", None) or error
        log.warning("checkpoint %s cannot be removed (%s): delete it yourself", folder, why)


def _unlink_states(folder: Path) -> None:
    """All of a checkpoint but its lock."""
    kv = folder / KV
    ours = [folder / name for name in _OURS - {KV, LOCK}]
    for file in (*ours, *kv.glob("*.bin"), *kv.glob("*.bin" + PARTIAL)):
        file.unlink(missing_ok=True)
    if kv.is_dir():
        _remove_if_empty(kv)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def _lock(folder: Path) -> FileLock:
    """Hold the folder, which nobody else may read or write meanwhile."""
    held = lock(folder / LOCK)
    if held is None:
        raise OutputError(
            f"{folder} is in use by another process: wait for it, or choose another folder"
        )
    return held


def _stamps(folder: Path) -> list[int | None]:
    """What changes with the state in a folder; None for a manifest that cannot be read."""
    stamps: list[int | None] = []
    for slot in SLOTS:
        try:
            stamps.append(zlib.crc32((folder / slot).read_bytes()))
        except OSError:
            stamps.append(None)
    return stamps


def _check_resumable(folder: Path) -> None:
    if not has_state(folder):
        there = "holds no checkpoint" if folder.is_dir() else "is no folder"
        raise InputFileError(
            f"{folder} {there}, expected one to resume: check the name, or start without --resume"
        )


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputFileError(
            f"checkpoint {folder} cannot be read ({error.strerror or error}): try again, or start "
            "in another folder"
        ) from error


@contextlib.contextmanager
def _writing(folder: Path, way_out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise sealed.unwritable(folder, error, way_out) from error


def _read_manifest(path: Path) -> _State:
    try:
        told = json.loads(path.read_bytes())
        state: _State = told["state"]
        whole = zlib.crc32(_canonical(state)) == told["crc32"]
        ours = (
            state["identity"].get("format", FORMAT) == FORMAT
        )  # of another format the identity tells
    except FileNotFoundError:
        raise Damage(f"{path.name} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise Damage(f"{path.name} is unreadable") from None
    if not whole:
        raise Damage(f"{path.name} is unreadable")
    if ours and set(state) != set(_State.__annotations__):
        raise Damage(f"{path.name} is incomplete")
    return state


# --- plain data ---------------------------------------------------------------------------------


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True).encode()


def _digest(data: Any) -> str:
    return hashlib.blake2b(_canonical(data), digest_size=8).hexdigest()


def _name(span: Span) -> str:
    """The file of a span, without suffix."""
    return "text" if span.layout is None else f"{span.frame:06d}"


def _held(cache: FrameCache) -> _Held:
    entries = cache.timeline.entries
    return _Held(
        tokens={_name(e.span): saved.pack(e.held, e.span.tokens) for e in entries},
        counters=cache.timeline.counters(),
        delta=cache.delta,
        capacities=cache.capacities,
    )
