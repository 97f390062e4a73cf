"""The five lines of the README: one clip with a packed cache."""

import packcache as pc

gen = pc.load("digits")
clip = gen.generate("a red 3 moving right", frames=48, policy=pc.PackCache(), seed=0)
clip.save("clip.mp4")
print(f"{clip.stats.total_s:.1f} s, cache {clip.stats.kv_bytes[-1] / 1e6:.1f} MB")
