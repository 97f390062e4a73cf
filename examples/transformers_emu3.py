"""Emu3 through transformers' own `generate()`, its cache bounded: pip install 'packcache[hf]'."""

import torch
from transformers import Emu3ForCausalLM, Emu3TextConfig

import packcache as pc
from packcache.adapters.transformers import make_cache

torch.manual_seed(0)
config = Emu3TextConfig(
    vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
    eos_token_id=None,
)  # fmt: skip
model = Emu3ForCausalLM(config).eval()  # stands for your checkpoint
prompt = torch.randint(500, (1, 12))

for policy in (pc.FullCache(), pc.SlidingWindow(frames=1), pc.PackCache(budget=1, window=4)):
    cache = make_cache(model, policy, tokens_per_frame=20)
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=200, do_sample=False)
    print(f"{policy!r:32} {out.shape[1]} tokens, {cache.physical_length} held", end=", ")
    print(f"{cache.kv_bytes} bytes")
