"""DESIGN 3 and 10: the house stays as it was planned, read from the sources."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tools import ROOT

PACKAGE = ROOT / "src" / "packcache"
SOURCES = sorted(PACKAGE.rglob("*.py"))

#: What each room may import of the package, besides itself.
ALLOWED = {
    "errors": set(),
    "timeline": {"errors"},
    "budget": {"errors", "timeline"},
    "selectors": {"errors", "timeline", "budget"},
    "checks": {"errors"},
    "files": {"errors"},
    "policies": {"errors", "timeline", "budget", "selectors", "checks", "files", "rivals"},
    "scores": {"errors", "timeline", "budget", "selectors"},
    "positions": {"errors", "timeline"},
    "store": {"errors", "timeline"},
    "reuse": {"errors"},
    "attention": set(),
    "cache": {
        "errors",
        "timeline",
        "budget",
        "selectors",
        "policies",
        "positions",
        "store",
        "scores",
    },
}

#: Floors that nothing below may look up to.
TOP = {
    "bench", "evaluate", "inspect",
    "cli", "cli_asked", "cli_bench", "cli_check", "cli_evaluate", "cli_generate", "cli_inspect",
    "cli_lumos", "cli_options", "cli_trace", "cli_vbench",
}  # fmt: skip

MAX_FUNCTION, MAX_MODULE = 60, 600

#: What diffusers sets on whatever attention processor it finds.
OF_PROCESSORS = {"_attention_backend", "_parallel_config"}


def room(path: Path) -> str:
    """The module or folder right under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    """Dotted names of everything a module imports, typing-only imports included."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = path.parent.relative_to(PACKAGE.parent).parts
            base = parent[: len(parent) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def rooms_imported(path: Path) -> set[str]:
    known = {room(source) for source in SOURCES}
    parts = (name.split(".") for name in imported(path))
    return {p[1] for p in parts if p[0] == "packcache" and len(p) > 1 and p[1] in known}


def by_name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


every_module = pytest.mark.parametrize("path", SOURCES, ids=by_name)


@pytest.mark.parametrize("name", ALLOWED)
def test_dependencies_run_one_way(name):
    assert rooms_imported(PACKAGE / f"{name}.py") <= ALLOWED[name] | {name}


@every_module
def test_engines_never_name_the_store_or_the_budget(path):
    if room(path) in {"lumos", "adapters"}:
        assert not rooms_imported(path) & {"store", "budget"}


@every_module
def test_nothing_looks_up_to_the_top_floor(path):
    """cli may call inspect; a room of the top floor may use itself."""
    if room(path) not in TOP | {"__init__", "__main__"}:
        assert not rooms_imported(path) & TOP


@every_module
def test_only_adapters_import_other_peoples_models(path):
    outside = {name.split(".")[0] for name in imported(path)}
    if room(path) != "adapters":
        assert not outside & {"transformers", "diffusers"}


@every_module
def test_the_embedded_model_knows_nothing_of_the_cache(path):
    """digits: its world, its weights, nothing of the engine but the network's shapes."""
    if room(path) == "digits":
        assert not rooms_imported(path) & {"cache", "store", "budget", "selectors", "policies"}


@pytest.mark.parametrize("name", ["errors", "timeline", "budget", "selectors", "policies", "reuse"])
def test_integer_rooms_import_no_torch(name):
    assert not any(n.split(".")[0] == "torch" for n in imported(PACKAGE / f"{name}.py"))


@every_module
def test_no_isinstance_on_a_policy_outside_policies(path):
    if room(path) == "policies":
        return
    kinds = {
        node.name for node in tree(PACKAGE / "policies.py").body if isinstance(node, ast.ClassDef)
    }
    assert {"Policy", "PackCache", "FullCache"} <= kinds
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"isinstance", "type"}:
            named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            named |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            assert not named & kinds, f"line {node.lineno}"


@every_module
def test_only_the_command_line_and_the_golden_runner_print(path):
    if path.name.startswith("cli") or by_name(path) in {"console.py", "testing/golden.py"}:
        return
    calls = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call)]
    assert not [n.lineno for n in calls if getattr(n.func, "id", "") == "print"]


@every_module
def test_private_names_stay_at_home(path):
    """Nobody reaches into another object; torch's own private names are torch's business."""
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Attribute) or not re.match("_[^_]", node.attr):
            continue
        owner = ast.unparse(node.value)
        outside = owner.startswith(("torch.", "storage")) or node.attr in OF_PROCESSORS
        assert owner in ("self", "cls", "super()") or outside, f"line {node.lineno}: {owner}"


@every_module
def test_functions_fit_on_a_screen_and_modules_have_one_job(path):
    assert len(path.read_text().splitlines()) <= MAX_MODULE
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, node.name


@every_module
def test_every_module_says_what_it_is_for(path):
    if path.read_text() and path.name != "__main__.py":
        assert ast.get_docstring(tree(path))


def test_policies_are_frozen_dataclasses():
    """A new policy is one frozen dataclass: settings by name, immutable."""
    for node in tree(PACKAGE / "policies.py").body:
        if isinstance(node, ast.ClassDef):
            (decorator,) = node.decorator_list
            options = {k.arg: k.value.value for k in decorator.keywords}
            assert options["frozen"] and options["kw_only"], node.name


def tracked_files() -> list[Path]:
    """What git knows, or every file of the working tree where there is no git."""
    if not shutil.which("git"):
        pytest.skip("no git")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_text_file_names_a_machine():
    """No absolute path of anyone's home, work or temporary folder."""
    places = [f"/{name}/" for name in ("home", "root", "Users", "work", "tmp", "mnt", "scratch")]
    offending = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            words = line.replace("://", " ").split()
            if any(word.strip("\"'`(=[").startswith(place) for word in words for place in places):
                offending.append(f"{path.relative_to(ROOT)}:{number}")
    assert offending == []


# --- mutations: the checks see what they are for ------------------------------------------------


@pytest.mark.parametrize(
    "source, names",
    [
        ("import torch.nn as nn", {"torch.nn"}),
        ("from packcache import store", {"packcache", "packcache.store"}),
        (
            "from packcache.budget import allocate",
            {"packcache.budget", "packcache.budget.allocate"},
        ),
        ("from . import store", {"packcache.lumos", "packcache.lumos.store"}),
        ("from .. import store", {"packcache", "packcache.store"}),
        (
            "def f():\n    from ..store import KVStore",
            {"packcache.store", "packcache.store.KVStore"},
        ),
    ],
)
def test_every_way_to_import_is_seen(source, names, monkeypatch):
    path = PACKAGE / "lumos" / "made_up.py"
    monkeypatch.setattr(Path, "read_text", lambda self: source)
    tree.cache_clear()
    assert imported(path) == names
    tree.cache_clear()
