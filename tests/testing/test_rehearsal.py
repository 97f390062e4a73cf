"""The loop on fake CUDA tensors: it waits for nothing, and takes what the planner said."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
)

from packcache.lumos.config import SIZES
from packcache.lumos.plan import plan
from packcache.lumos.schedule import Sampling
from packcache.policies import FullCache, PackCache
from packcache.reuse import parse_reuse
from packcache.testing.live import LiveBytes
from packcache.testing.rehearsal import Rehearsal, RehearsalDecoder, rehearse

SIZE = (672, 384)

#: 3B with a tenth of its layers: all widths are true, and a rehearsal takes seconds.
THIN = dataclasses.replace(SIZES["3b"], num_hidden_layers=2)

# --- counting live bytes ------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [True, False])
def test_live_bytes_follow_every_storage(inference):
    old = torch.zeros(1000)
    with torch.inference_mode(inference), LiveBytes() as live:
        a = torch.empty(250)
        assert live.now == 1000
        view = a[10:].view(2, -1)
        assert live.now == 1000  # a view has no storage of its own
        del a
        assert live.now == 1000  # and keeps the one it looks into
        b = view.clone()
        assert live.now == 1000 + 960
        del view
        assert live.now == 960
        b.add_(1)  # in place
        assert live.now == 960
        b = b + b + b  # a sum in between lives until the second one is done
        assert (live.now, live.peak) == (960, 3 * 960)
        c = torch.tensor([1, 2, 3])
        assert live.now == 960 + 24
        borrowed = old[3:]  # was there before
        assert live.now == 960 + 24
        several = torch.zeros(4, 5).sort()
        assert live.now == 960 + 24 + 80 + 160
        del b, c, borrowed, several
        assert live.now == 0
    assert live.peak == live.peak_of("cpu") == 3 * 960 and live.peak_of("cuda") == 0


def test_live_bytes_outside_the_block_are_forgotten_quietly():
    with LiveBytes() as live:
        a = torch.zeros(10)
    b = torch.zeros(1000)
    assert live.now == 40
    del a
    assert live.now == 0 and len(b) == 1000


def test_live_bytes_of_fake_tensors_count_by_device():
    with FakeTensorMode(), LiveBytes() as live:
        a = torch.empty(1000, device="cuda", dtype=torch.bfloat16)
        b = torch.empty(10, device="cpu")
        assert (live.now_of("cuda"), live.now_of("cpu"), live.now) == (2000, 40, 2040)
        c = a.float()
        del a
        assert live.now_of("cuda") == 4000 and live.peak_of("cuda") == 6000
        del b, c
    assert live.now == 0


# --- the loop -----------------------------------------------------------------------------------


def check(
    rehearsal: Rehearsal, frames: int, *, dtype: torch.dtype = torch.bfloat16, **settings: object
) -> None:
    """It never waited, and took what the plan said."""
    made = plan(frames=frames, size=SIZE, dtype=dtype, **settings)
    assert rehearsal.frames == made.workload["latent_frames"]
    assert rehearsal.syncs_in_steps == 0 and rehearsal.ops_in_steps > 100
    assert rehearsal.devices == {"cuda"}
    stored = str(dtype)
    assert rehearsal.dtypes == {"K/V": stored, "hidden": stored, "logits": stored}
    assert rehearsal.weights_bytes == made.weights_bytes
    assert rehearsal.kv_bytes[-1] == made.kv_bytes
    assert rehearsal.capacity_bytes[-1] == made.capacity_bytes
    assert rehearsal.peak_bytes == pytest.approx(made.peak.bytes, rel=1e-3)
    transient = rehearsal.peak_bytes - made.peak.cache_bytes
    assert transient == pytest.approx(made.transient_bytes, rel=1e-2)


@pytest.mark.parametrize(
    "size, frames, policy, image, dtype, reuse",
    [
        ("3b", 24, PackCache(), True, torch.bfloat16, "exact"),
        ("1b", 9, FullCache(), False, torch.bfloat16, "exact"),
        ("3b", 9, PackCache(), True, torch.float32, "exact"),
        ("3b", 9, PackCache(), True, torch.bfloat16, "history_every=2,rest_every=3"),
        ("1b", 9, FullCache(), False, torch.float32, "history_every=3"),
        ("1b", 9, PackCache(), True, torch.bfloat16, "rest_every=4"),
    ],
    ids=["3b packed", "1b full", "3b float32", "3b reuse", "1b history", "1b rest"],
)
def test_the_loop_never_waits_and_takes_what_was_planned(size, frames, policy, image, dtype, reuse):
    config = dataclasses.replace(SIZES[size], num_hidden_layers=2)
    settings = {
        "config": config,
        "policy": policy,
        "sampling": Sampling(steps=2 if reuse == "exact" else 5),
        "reuse": parse_reuse(reuse),
        "image": image,
        "dtype": dtype,
    }
    check(rehearse(frames=frames, size=SIZE, **settings), frames, **settings)


def test_where_attention_takes_most_in_float32():
    """The kernel's results do not lie as the queries do: a copy that fits into the plan."""
    config = dataclasses.replace(THIN, num_hidden_layers=1, intermediate_size=64)
    settings = {
        "config": config,
        "policy": PackCache(),
        "sampling": Sampling(steps=1),
        "dtype": torch.float32,
    }
    made = plan(frames=5, size=SIZE, **settings)
    assert made.peak.moment.name == "step, output projection"
    check(rehearse(frames=5, size=SIZE, **settings), 5, **settings)


def test_all_layers_of_3b_for_two_frames():
    settings = {"config": SIZES["3b"], "policy": PackCache(), "sampling": Sampling(steps=1)}
    check(rehearse(frames=5, size=SIZE, **settings), 5, **settings)


@pytest.mark.nightly
def test_the_whole_loop_at_full_size():
    """48 frames, 50 steps: eleven minutes of one core."""
    settings = {"config": SIZES["3b"], "policy": PackCache(), "sampling": Sampling(steps=50)}
    check(rehearse(frames=48, size=SIZE, **settings), 48, **settings)


# --- mutations: a loop that waits, or takes more, is caught -------------------------------------


class Asks(RehearsalDecoder):
    """Asks the device how many tokens are undecided."""

    def _num_mask(self, known: Tensor, step: int) -> Tensor:
        return torch.full((1, 1), int((~known).sum().item()), device=self.device)


class Branches(RehearsalDecoder):
    """Branches on what is on the device."""

    def _num_mask(self, known: Tensor, step: int) -> Tensor:
        assert not known.all()
        return super()._num_mask(known, step)


class Copies(RehearsalDecoder):
    """Looks at a mask on the host."""

    def _num_mask(self, known: Tensor, step: int) -> Tensor:
        return super()._num_mask(known.cpu(), step).to(self.device)


class Sends(RehearsalDecoder):
    """Sends an index from the host in every step."""

    def _num_mask(self, known: Tensor, step: int) -> Tensor:
        return super()._num_mask(known[:, torch.arange(known.shape[1])], step)


class Hoards(RehearsalDecoder):
    """Keeps the hidden states of every step."""

    def _forward(self, ids: Tensor, *arguments: Any) -> Tensor:
        self.hoard = [*getattr(self, "hoard", []), super()._forward(ids, *arguments)]
        return self.hoard[-1]


def mutant(
    decoder: type[RehearsalDecoder] = RehearsalDecoder, dtype: torch.dtype = torch.bfloat16
) -> Rehearsal:
    return rehearse(
        dataclasses.replace(THIN, num_hidden_layers=1),
        size=SIZE,
        frames=5,
        sampling=Sampling(steps=2),
        policy=PackCache(),
        decoder=decoder,
        dtype=dtype,
    )


@pytest.mark.parametrize("decoder", [Asks, Branches])
def test_a_loop_that_asks_the_device_does_not_end(decoder):
    with pytest.raises(DataDependentOutputException):
        mutant(decoder)


@pytest.mark.parametrize("decoder", [Copies, Sends])
def test_a_loop_that_visits_the_host_is_counted(decoder):
    assert mutant(decoder).syncs_in_steps > 0


def test_a_loop_that_takes_more_than_planned_is_seen():
    config = dataclasses.replace(THIN, num_hidden_layers=1)
    settings = {"config": config, "policy": PackCache(), "sampling": Sampling(steps=2)}
    check(mutant(), 5, **settings)
    with pytest.raises(AssertionError):
        check(mutant(Hoards), 5, **settings)


def test_a_loop_that_relies_on_where_flash_attention_writes_is_caught(monkeypatch):
    def grouped(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        stacked = q.reshape(1, len(keys), -1, q.shape[-1])
        return F.scaled_dot_product_attention(stacked, keys[None], values[None]).view(q.shape)

    monkeypatch.setattr("packcache.lumos.attend.attend", grouped)
    mutant()
    with pytest.raises(ValueError, match="Cannot view a tensor"):
        mutant(dtype=torch.float32)
