"""Does public attention of this protocol compute the same with our list of dicts as with its own?

    git clone https://github.com/guandeh17/Self-Forcing
    git clone --branch v1.0 https://github.com/NVlabs/LongLive
    pip install einops diffusers
    python benchmarks/self_forcing_upstream.py --upstream Self-Forcing
    python benchmarks/self_forcing_upstream.py --upstream LongLive

Nothing of upstream is in this file: its attention class is imported from the checkout, a few layers
with small random weights, float32, and run chunk by chunk as its pipeline does: a noisy forward and
a clean one; LongLive also encodes its window anew in the middle, as on a switch of prompts. Once
with the dicts that its pipeline makes, its own rolling window and sink, once with
`SelfForcingCache` and the policy that says the same. Writes
benchmarks/results/self_forcing_upstream.json or longlive_upstream.json.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packcache.adapters.self_forcing import SelfForcingCache, longer_table
from packcache.environment import environment
from packcache.files import write_json
from packcache.policies import FullCache, Policy, SinkWindow

HEADS, HEAD_DIM, LAYERS = 4, 24, 3
GRID, CHUNK, CHUNKS = (6, 8), 3, 9
SIZE = GRID[0] * GRID[1]

#: A switch of prompts comes after so many chunks.
SWITCH = 6

#: Sink and window in latent frames, the open chunk not counted; None keeps everything.
CASES: list[tuple[int, int] | None] = [None, (0, 6), (3, 3), (3, 6)]


def load(folder: Path) -> tuple[Any, Any]:
    """Upstream's modules `causal_model` and `model`, without running its packages' own imports."""
    if not (folder / "wan/modules/causal_model.py").exists():
        raise SystemExit(f"{folder} has no wan/modules/causal_model.py: give a checkout's folder")
    for name in ("wan", "wan.modules", "utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    memory = types.ModuleType("utils.memory")  # asks for a GPU at import
    memory.__getattr__ = lambda name: None  # type: ignore[method-assign]
    sys.modules["utils.memory"] = memory
    torch.compile = lambda function, **_: function  # it compiles a kernel at import
    causal = importlib.import_module("wan.modules.causal_model")
    causal.attention = functools.partial(causal.attention, dtype=torch.float32)
    return causal, importlib.import_module("wan.modules.model")


class Upstream:
    """Some layers of upstream's attention, one after the other."""

    def __init__(self, causal: Any, model: Any, case: tuple[int, int] | None) -> None:
        self.causal = causal
        sink, local = (0, -1) if case is None else (case[0], sum(case) + CHUNK)
        torch.manual_seed(1)
        width = HEADS * HEAD_DIM
        make = causal.CausalWanSelfAttention
        self.layers = [make(width, HEADS, local, sink) for _ in range(LAYERS)]
        for layer in self.layers:  # its constant is of another frame size
            layer.max_attention_size = CHUNKS * CHUNK * SIZE if case is None else local * SIZE
        spatial = 2 * (HEAD_DIM // 6)
        parts = HEAD_DIM - 2 * spatial, spatial, spatial
        self.freqs = torch.cat([model.rope_params(1024, part) for part in parts], dim=1)
        self.slots = layer.max_attention_size

    def own_cache(self) -> list[dict[str, Tensor]]:
        size = 1, self.slots, HEADS, HEAD_DIM
        return [
            {
                "k": torch.zeros(size), "v": torch.zeros(size),
                "global_end_index": torch.tensor([0]), "local_end_index": torch.tensor([0]),
            }
            for _ in self.layers
        ]  # fmt: skip

    @property
    def is_deferred(self) -> bool:
        """Does it write when all layers are through, as LongLive 1.x?"""
        return hasattr(self.causal.CausalWanModel, "_apply_cache_updates")

    def play(self, cache: list[Any]) -> Tensor:
        """Outputs of the clean forwards of all chunks, and of what is encoded anew."""
        draw = torch.Generator().manual_seed(0)
        shape = (1, CHUNK * SIZE, HEADS * HEAD_DIM)
        chunks: list[Tensor] = []
        outputs = []
        for number in range(CHUNKS):
            if self.is_deferred and number == SWITCH:
                again = min(len(chunks) * CHUNK, self.slots // SIZE)
                window = torch.cat(chunks, dim=1)[:, -again * SIZE :]
                outputs.append(self.forward(cache, window + 0.5, number * CHUNK - again))
            chunks.append(torch.randn(shape, generator=draw))
            self.forward(cache, chunks[-1] + torch.randn(shape, generator=draw), number * CHUNK)
            outputs.append(self.forward(cache, chunks[-1], number * CHUNK))
        return torch.cat(outputs, dim=1)

    def forward(self, cache: list[Any], x: Tensor, frame: int) -> Tensor:
        """The layers on tokens that begin at a latent frame."""
        tokens, updates = x.shape[1], []
        grid = torch.tensor([[tokens // SIZE, *GRID]])
        for number, (layer, own) in enumerate(zip(self.layers, cache, strict=True)):
            out = layer(
                x, torch.tensor([tokens]), grid, self.freqs, None, kv_cache=own,
                current_start=frame * SIZE,
            )  # fmt: skip
            if self.is_deferred:
                out, update = out
                updates.append((number, update))
            x = x + out
        if self.is_deferred:
            self.causal.CausalWanModel._apply_cache_updates(None, cache, updates)
        return x


@torch.no_grad()
def compare(causal: Any, model: Any, case: tuple[int, int] | None) -> dict[str, Any]:
    """The same chunks through upstream's dicts and through ours."""
    upstream = Upstream(causal, model, case)
    policy: Policy = FullCache() if case is None else SinkWindow(sinks=case[0], frames=case[1])
    theirs = upstream.play(upstream.own_cache())
    ours = upstream.play(SelfForcingCache(policy, layers=LAYERS, grid=GRID))
    return {
        "policy": repr(policy),
        "equal": torch.equal(theirs, ours),
        "largest_difference": float((theirs - ours).abs().max()),
        "deviation": float(theirs.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, required=True, help="folder of a checkout")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    causal, model = load(arguments.upstream)
    rows = [compare(causal, model, case) for case in CASES]
    deferred = Upstream(causal, model, None).is_deferred
    name = "longlive" if deferred else "self_forcing"
    whole, short = (model.rope_params(rows, HEAD_DIM) for rows in (1100, 1024))
    longer = float((longer_table(short, 1100) - whole).abs().max())
    for row in rows:
        print(f"{row['policy']:32} largest difference {row['largest_difference']:.1e}")
    print(f"{'rotary table continued':32} largest difference {longer:.1e}")
    result = {
        "schema": "packcache.self_forcing/1",
        "environment": environment(),
        "workload": {
            "layers": LAYERS, "heads": HEADS, "head_dim": HEAD_DIM, "grid": list(GRID),
            "frames_per_chunk": CHUNK, "chunks": CHUNKS, "weights": "random",
            "encoded_anew_after": SWITCH if deferred else None,
        },
        "results": rows,
        "table_difference": longer,
    }  # fmt: skip
    write_json(result, arguments.out or Path(f"benchmarks/results/{name}_upstream.json"))


if __name__ == "__main__":
    main()
