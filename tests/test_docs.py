"""Prose cannot drift: commands exist, snippets run, the tree is real, numbers name their source."""

import itertools
import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from packcache.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TAGS = ("golden", "random weights", "embedded model", "footage", "GPU run", "not run", "paper")

#: A measured number: a figure with a unit, a ratio or a share.
NUMBER = re.compile(
    r"\d(?:[\d.,]*\d)?\s?(?:x|times|s|ms|seconds|minutes|hours|kB|MB|GB|KiB|MiB|GiB|dB|points)\b"
    r"|\d\s?%|\de-\d"
)


def blocks(text: str) -> list[str]:
    """Paragraphs, list items and whole tables, without code blocks."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    parts = re.split(r"\n\s*\n|\n(?=\s*[-*] |\d+\. )", text)
    return [part.strip() for part in parts if part.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_measured_number_has_a_tag(page):
    untagged = [
        block
        for block in blocks(page.read_text())
        if NUMBER.search(re.sub(r"`[^`]*`|\([^)]*\)\[|\]\([^)]*\)", "", block))
        and not any(f"*{tag}*" in block for tag in TAGS)
    ]
    assert not untagged, f"{page.name}: say where these numbers come from: {untagged}"


def test_an_untagged_number_is_found():
    """The check above can fail."""
    for text in ("twice as fast: 2.1x", "KV is 3 MB", "lost 4 %", "error 1e-4", "in 12 seconds"):
        assert NUMBER.search(text), text
    for text in ("48 frames", "7 latent frames", "arXiv 2601.04359", "seed 0", "section 3.5"):
        assert not NUMBER.search(text), text


def test_readme_is_short_and_its_python_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    first = re.search(r"```python\n(.*?)```", text, re.S)
    assert first and len([line for line in first[1].splitlines() if line]) == 5
    monkeypatch.chdir(tmp_path)
    exec(first[1], {})
    assert (tmp_path / "clip.mp4").stat().st_size > 1000


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"^packcache (\w+)", text, re.M))
    assert named and named <= commands
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_readme_tree_is_real():
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("src/packcache/\n") :].split("```")[0]
    inside = ROOT / "src/packcache"
    listed: set[str] = set()
    for line in tree.splitlines()[1:]:
        names = re.findall(r"[\w/]+(?:\.py|/)(?=\s|$)", line)
        base = inside if line.startswith("  ") else ROOT
        for name in names if line.startswith("  ") else names[:1]:
            assert (base / name).exists(), name
            listed.add(name)
    rooms = {p.name for p in inside.glob("*.py") if not p.name.startswith("__")}
    folders = {f"{p.name}/" for p in inside.iterdir() if (p / "__init__.py").exists()}
    assert rooms | folders <= listed


def test_the_truth_table_is_the_measured_one():
    result = json.loads((ROOT / "benchmarks/results/truth.json").read_text())
    page = (ROOT / "docs/digits.md").read_text()
    for row in result["results"]:
        line = next(line for line in page.splitlines() if line.startswith(f"| {row['title']} "))
        measured = row["measured"]
        for name in ("mean", "low", "high"):
            assert f"{measured[name]:.1f}" in line, (row["title"], name)
        assert row["unit"] in line and str(row["aim"]) in line


def test_the_leaderboard_is_the_stored_one():
    result = json.loads((ROOT / "benchmarks/results/leaderboard.json").read_text())
    rows = {row["policy"]: row for row in result["results"]}
    page = (ROOT / "docs/evaluation.md").read_text()
    names = (
        "observed",
        "novelty",
        "fademem",
        "paper",
        "uniform",
        "window",
        "deepforcing",
        "random",
    )
    best: dict[int, set[str]] = {1: set(), 2: set()}
    for name in names:
        cells = []
        for frames in (1, 2):
            by_frames = name in ("window", "deepforcing")
            label = f"{name} {frames}" if by_frames else f"{name}, budget {frames}"
            if label not in rows:
                cells.append("-")
                continue
            row = rows[label]
            assert row["held"]["mean"] == frames * result["workload"]["tokens_per_frame"]
            mean, low, high = (100 * row["history"][n] for n in ("mean", "low", "high"))
            cells.append(f"{mean:.1f} % ({low:.1f} to {high:.1f})")
            best[frames].add(f"{100 * row['best']['mean']:.1f} %")
            assert f"from latent frame {row['since']} on |" in page
        assert f"| {name} | {cells[0]} | {cells[1]} |" in page
    (one,), (two,) = best[1], best[2]
    assert f"| the best possible, chosen anew for every latent frame | {one} | {two} |" in page


def test_presets_are_spelled_as_the_guide_says():
    from packcache.policies import PackCache, parse_policy

    page = (ROOT / "docs/evaluation.md").read_text()
    for name in ("paper", "paper_literal", "paper_visible"):
        own = re.findall(r"`(packcache[^` ]*)` is[^`]*`" + name + "`", page)
        assert [parse_policy(text) for text in own] == [getattr(PackCache, name)()], name


def test_the_adapters_gains_are_the_measured_ones():
    result = json.loads((ROOT / "benchmarks/results/adapters.json").read_text())
    lines = (ROOT / "docs/adapters.md").read_text().splitlines()
    parts = (("wan", "Wan 1.3B", "chunk"), ("self_forcing", "Self-Forcing's", "chunk"))
    for part, name, unit in (*parts, ("emu3", "Emu3 8B", "token")):
        own = [line for line in lines if line.startswith(f"| {name}") and "own dicts" not in line]
        for line, row in zip(own, result[part]["rows"], strict=True):
            took = row[f"{unit}_s"]
            assert f"{row['kv_gib']:.2f} GiB" in line and f"| {row['history_tokens']} |" in line
            assert (f"{took:.0f} s a chunk" if unit == "chunk" else f"{took:.2f} s a token") in line
            low, high = row["faster"]["low"], row["faster"]["high"]
            assert f"{row['faster']['ratio']:.2f}x ({low:.2f} to {high:.2f})" in line


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run_and_are_short(example, tmp_path, monkeypatch):
    assert len(example.read_text().splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")


def test_version_is_the_same_everywhere():
    import packcache

    stated = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert stated and stated[1] == packcache.__version__


def test_tracked_text_names_no_machine():
    """No path or host of the machine it was written on."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    pattern = re.compile(r"/(?:home|root|Users|work|tmp)/\w")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".md", ".py", ".toml", ".txt", ".json", ".html", "") and path.is_file():
            assert not pattern.search(path.read_text(errors="ignore")), name


def planned_memory() -> list[str]:
    """Rows of the memory table of docs/lumos1.md, from the planner."""
    from packcache.lumos.config import SIZES
    from packcache.lumos.plan import plan
    from packcache.policies import FullCache, PackCache, SlidingWindow

    rows = []
    for name, width, height, frames in itertools.product(
        ("1b", "3b"), (448, 672), (256, 384), (24, 48, 384)
    ):
        if (width, height) not in ((448, 256), (672, 384)):
            continue
        plans = [
            plan(
                SIZES[name], size=(width, height), frames=frames, policy=policy, memory=16 << 30,
                candidates={"full": FullCache()},
            )
            for policy in (FullCache(), SlidingWindow(), PackCache())
        ]  # fmt: skip
        cells = [f"{p.total_bytes / 2**30:.1f} ({p.kv_bytes / 2**30:.2f})" for p in plans]
        longest = str(plans[0].longest[0].frames)
        title = [name.upper(), f"{width}x{height}", str(frames)]
        rows.append(f"| {' | '.join([*title, *cells, longest])} |")
    return rows


def papers_figures() -> list[str]:
    """Rows of the comparison with the paper in docs/lumos1.md."""
    from packcache.lumos.plan import paper_figures

    return [f"| {r.claim} | {r.paper} | {r.ours} | {r.verdict} |" for r in paper_figures()]


@pytest.mark.parametrize("rows", [planned_memory, papers_figures], ids=lambda f: f.__name__)
def test_the_plans_tables_are_the_planners(rows):
    page = (ROOT / "docs/lumos1.md").read_text()
    assert [row for row in rows() if row not in page] == []


def test_the_rehearsals_numbers_are_the_measured_ones():
    page = (ROOT / "docs/lumos1.md").read_text()
    (full,) = json.loads((ROOT / "benchmarks/results/full_size.json").read_text())["results"]
    (endless,) = json.loads((ROOT / "benchmarks/results/endless.json").read_text())["results"]
    for said in (
        f"in {full['load_s']:.0f} s",
        f"{full['peak_over_weights']:.3f} times the weights",
        f"{full['step_s']:.0f} s",
        f"{endless['slope_percent_per_1000_frames']:.3f} %",
        f"{endless['late_over_early_time']:.3f} times",
    ):
        assert said in page, said
    assert full["peak_over_weights"] <= 1.15
    assert endless["slope_percent_per_1000_frames"] <= 0.1
    assert endless["late_over_early_time"] <= 1.05
