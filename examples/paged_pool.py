"""A serving engine keeps K/V in its own pages; the policy only says which tokens stay. No torch.

Pages are plain lists. After each frame the kept tokens move to the front of the pool, and pages
that hold none go back to the free list: pages in use stay constant however long the clip.
"""

from packcache.policies import PackCache
from packcache.timeline import FrameLayout, Role, Span, Timeline

PAGE = 16  # tokens
layout, policy = FrameLayout(rows=8, cols=8), PackCache(budget=1, window=4)


def pages(tokens: list) -> list[list]:
    return [tokens[i : i + PAGE] for i in range(0, len(tokens), PAGE)]


def main(frames: int = 12) -> list[int]:
    """Pages in use after each latent frame."""
    timeline, pool, in_use = Timeline(), [], []
    timeline.append(Span.text(13))
    pool = pages([("text", i) for i in range(13)])
    for frame in range(frames):
        span = Span.of_frame(Role.HISTORY, frame, layout)
        newest = timeline.history[0].span if timeline.history else None
        timeline.append(span, policy.rank(span, newest))
        tokens = [token for page in pool for token in page]
        tokens += [(f"frame {frame}", i) for i in range(span.tokens)]
        slots = policy.plan(timeline)  # the whole interface: integers in, integers out
        pool = pages([tokens[slot] for slot in slots])
        timeline.keep(slots)
        in_use.append(len(pool))
        full = -(-timeline.logical_length // PAGE)
        print(f"frame {frame}: {len(pool)} pages in use, {full} with a full cache")
    return in_use


if __name__ == "__main__":
    main()
