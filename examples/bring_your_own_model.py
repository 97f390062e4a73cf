"""The cache in somebody else's attention: it needs k and v, and gives back what to attend to."""

import torch
import torch.nn.functional as F

import packcache as pc
from packcache.positions import Rotation

LAYERS, HEADS, SIZE = 2, 4, 64
layout = pc.FrameLayout(rows=6, cols=10, header=0, footer=0, new_line=False)
inv_freq = 1.0 / 10000 ** (torch.arange(0, SIZE, 2) / SIZE)
cache = pc.FrameCache(
    pc.PackCache(budget=1, window=4),
    layers=LAYERS, kv_heads=HEADS, head_dim=SIZE, layout=layout, text=(20,),
    rotation=Rotation.mm_rope(inv_freq), trained_latent_frames=7,
)  # fmt: skip


def forward(tokens: int) -> None:
    """Your network: wherever it has q, k, v of a layer, it asks the cache what to see."""
    for layer in range(LAYERS):
        q, k, v = (torch.randn(HEADS, tokens, SIZE) for _ in range(3))
        keys, values = cache.update(layer, k, v)
        F.scaled_dot_product_attention(q[None], keys[None], values[None])


cache.open(pc.Span.text(20))
forward(20)
cache.commit()
for frame in range(12):
    cache.open(pc.Span.of_frame(pc.Role.HISTORY, frame, layout))
    for _ in range(3):  # denoising: drafts that leave no trace
        forward(layout.tokens)
        cache.rollback()
    forward(layout.tokens)  # the forward that stays
    cache.commit()
    print(frame, cache.timeline.counts(), f"{cache.kv_bytes} bytes")
