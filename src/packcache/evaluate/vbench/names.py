"""Names of clips as VBench reads them, and where everything lies in a folder of exports.

    OUT/sample.json                       what is asked of every policy
    OUT/clips/POLICY/PROMPT-INDEX.mp4     clips and nothing else
    OUT/images/PROMPT.png                 condition images, custom mode only
    OUT/manifests/POLICY.json             how the clips were made
    OUT/results/POLICY/*.json             what VBench writes

VBench takes the prompt of a clip from its name: what stands before the last hyphen and number. In
standard mode it looks for PROMPT-0 to PROMPT-4 with the ending of whatever file it lists first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MOST_CLIPS", "Layout", "clip_name", "name_fault", "slug", "twins"]

#: Clips of one prompt that VBench looks for in standard mode.
MOST_CLIPS = 5

#: Bytes of a file name on the usual file systems.
_MOST_BYTES = 255


def clip_name(prompt: str, index: int) -> str:
    """The file of a prompt's clip; see `name_fault` for prompts that have none."""
    return f"{prompt}-{index}.mp4"


def name_fault(prompt: str) -> str | None:
    """Why a prompt cannot be the name of a clip on every usual system; None if it can."""
    if not prompt.strip():
        return "is empty"
    if prompt != prompt.strip():
        return "begins or ends with a space"
    if "/" in prompt or "\\" in prompt:
        return "has a slash"
    if not prompt.isprintable():
        return "has a character that cannot be printed"
    size = len(clip_name(prompt, MOST_CLIPS - 1).encode(errors="surrogatepass"))
    return f"makes a file name of {size} bytes" if size > _MOST_BYTES else None


def twins(prompts: Iterable[str]) -> list[str]:
    """Prompts that another one before them equals but for capitals, which some systems ignore."""
    seen: set[str] = set()
    found = []
    for prompt in prompts:
        if (key := prompt.casefold()) in seen:
            found.append(prompt)
        seen.add(key)
    return found


def slug(label: str) -> str:
    """The folder of a policy: `packcache:budget=2,window=4` as packcache_budget_2_window_4."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", label)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything lies in a folder of exports."""

    out: Path

    @property
    def sample(self) -> Path:
        return self.out / "sample.json"

    @property
    def images(self) -> Path:
        return self.out / "images"

    @property
    def manifests(self) -> Path:
        return self.out / "manifests"

    @property
    def results(self) -> Path:
        return self.out / "results"

    def clips(self, label: str) -> Path:
        return self.out / "clips" / slug(label)

    def manifest(self, label: str) -> Path:
        return self.manifests / f"{slug(label)}.json"

    def lock(self, label: str) -> Path:
        return self.out / f".{slug(label)}.lock"
