"""Does the public Self-Forcing attention compute the same with our list of dicts as with its own?

    git clone https://github.com/guandeh17/Self-Forcing
    pip install einops
    python benchmarks/self_forcing_upstream.py --upstream Self-Forcing

Nothing of upstream is in this file: its attention class is imported from the checkout, a few layers
with small random weights, float32, and run chunk by chunk as its pipeline does: a noisy forward and
a clean one. Once with the dicts that its pipeline makes, its own rolling window and sink, once with
`SelfForcingCache` and the policy that says the same. Writes
benchmarks/results/self_forcing_upstream.json.
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

#: Sink and window in latent frames, the open chunk not counted; None keeps everything.
CASES: list[tuple[int, int] | None] = [None, (0, 6), (3, 3), (3, 6)]


def load(folder: Path) -> tuple[Any, Any]:
    """Upstream's modules `causal_model` and `model`, without running its packages' own imports."""
    if not (folder / "wan/modules/causal_model.py").exists():
        raise SystemExit(f"{folder} has no wan/modules/causal_model.py: give a checkout's folder")
    for name, inside in (("wan", "wan"), ("wan.modules", "wan/modules")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / inside)]
        sys.modules[name] = package
    torch.compile = lambda function, **_: function  # it compiles a kernel at import
    causal = importlib.import_module("wan.modules.causal_model")
    causal.attention = functools.partial(causal.attention, dtype=torch.float32)
    return causal, importlib.import_module("wan.modules.model")


class Upstream:
    """Some layers of upstream's attention, one after the other."""

    def __init__(self, causal: Any, model: Any, case: tuple[int, int] | None) -> None:
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

    def play(self, cache: list[Any]) -> Tensor:
        """Outputs of the clean forwards of all chunks."""
        draw = torch.Generator().manual_seed(0)
        shape, grid = (1, CHUNK * SIZE, HEADS * HEAD_DIM), torch.tensor([[CHUNK, *GRID]])
        outputs = []
        for number in range(CHUNKS):
            clean = torch.randn(shape, generator=draw)
            for x in (clean + torch.randn(shape, generator=draw), clean):
                for layer, own in zip(self.layers, cache, strict=True):
                    x = x + layer(
                        x, torch.tensor([shape[1]]), grid, self.freqs, None, kv_cache=own,
                        current_start=number * shape[1],
                    )  # fmt: skip
            outputs.append(x)
        return torch.cat(outputs, dim=1)


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
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/self_forcing_upstream.json")
    )
    arguments = parser.parse_args()
    causal, model = load(arguments.upstream)
    rows = [compare(causal, model, case) for case in CASES]
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
        },
        "results": rows,
        "table_difference": longer,
    }  # fmt: skip
    write_json(result, arguments.out)


if __name__ == "__main__":
    main()
