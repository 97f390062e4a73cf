"""A Wan transformer of diffusers, chunk by chunk, its cache bounded: 'packcache[diffusers]'."""

import torch
from diffusers import WanTransformer3DModel

import packcache as pc
from packcache.adapters.diffusers import install

torch.manual_seed(0)
torch.set_grad_enabled(False)
transformer = WanTransformer3DModel(  # stands for your causally trained checkpoint
    num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=16, ffn_dim=32, num_layers=2,
).eval()  # fmt: skip
text = torch.randn(1, 5, 16)
cache = install(transformer, pc.PackCache(budget=3, window=9))

for chunk in range(8):
    latents = torch.randn(1, 4, 3, 8, 12)  # three latent frames of 4 x 6 tokens
    for t in (1000, 750, 500, 250):
        with cache.frame():  # a draft: leaves no trace
            flow = transformer(latents, torch.tensor([t]), text).sample
        latents = latents - 0.25 * flow
    with cache.frame(commit=True):  # the forward that stays
        transformer(latents, torch.tensor([0]), text)
    held = cache.caches["cond"]
    print(f"chunk {chunk}: {held.physical_length} tokens held of {held.logical_length}")
cache.uninstall()
