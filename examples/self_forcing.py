"""A Self-Forcing-type pipeline with a bounded cache: only the making of the list is replaced."""

import torch

import packcache as pc
from packcache.adapters.self_forcing import SelfForcingCache
from packcache.testing.causal_wan import CausalWan, dict_cache

GRID, FRAMES = (6, 10), 3  # tokens of a latent frame, latent frames a chunk
model = CausalWan(layers=4, heads=4, head_dim=24, grid=GRID)  # stands for your model
chunk_tokens = FRAMES * GRID[0] * GRID[1]


def generate(cache: list, chunks: int) -> torch.Tensor:
    """The pipeline's own loop: noisy forwards, then a clean one that stays."""
    torch.manual_seed(0)
    for chunk in range(chunks):
        x = torch.randn(1, chunk_tokens, model.width)
        for timestep in (1.0, 0.75, 0.5, 0.25, 0.0):
            out = model(x, timestep=timestep, kv_cache=cache, current_start=chunk * chunk_tokens)
            x = x + 0.2 * (out - x)
    return x


stock = dict_cache(model, slots=20 * chunk_tokens)
unlimited = SelfForcingCache(pc.FullCache(), layers=4, grid=GRID)
packed = SelfForcingCache(pc.PackCache(budget=3, window=9), layers=4, grid=GRID)
same = torch.equal(generate(stock, 8), generate(unlimited, 8))
generate(packed, 20)
for cache in (unlimited, packed):
    cache.commit()
print("everything kept, equal to the pipeline's own list:", same)
print(unlimited.cache.logical_length, "tokens held of", unlimited.cache.logical_length)
print(packed.cache.physical_length, "tokens held of", packed.cache.logical_length)
