"""Hub ids and folders: what is downloaded, what is found offline, what each failure says."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from packcache.errors import InputFileError, InvalidSetting
from packcache.lumos.hub import resolve

SHA = "0123456789" * 4

#: A repository as Lumos-1's: several models, and files that must never be fetched.
REPO = {
    "README.md": b"text",
    "tokenizer.json": b"words",
    "3B/stage/config.json": b"{}",
    "3B/stage/model-00001-of-00002.safetensors": b"first",
    "3B/stage/model-00002-of-00002.safetensors": b"second",
    "3B/stage/model.safetensors.index.json": b"{}",
    "3B/stage/pytorch_model.bin": b"pickle",
    "3B/stage/optimizer.pt": b"pickle",
    "3B/stage/decoder.jit": b"code",
    "3B/stage/old/model.safetensors": b"older",
    "1B/stage/config.json": b"{}",
    "1B/stage/model.safetensors": b"small",
    "best [1]/config.json": b"{}",
    "best [1]/model.safetensors": b"odd name",
}
WANTED = {name for name in REPO if name.startswith("3B/stage/model-")} | {
    "3B/stage/config.json",
    "3B/stage/model.safetensors.index.json",
    "tokenizer.json",
}


#: Repositories that the hub does not give, with its reply.
REFUSALS = {
    "org/missing": (401, "RepoNotFound"),
    "org/gated": (403, "GatedRepo"),
    "org/down": (500, "Internal"),
}


class FakeHub(BaseHTTPRequestHandler):
    """The three requests of a download, and the hub's ways to say no."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        code, headers, data = self._reply(unquote(self.path.split("?")[0]))
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _reply(self, path: str) -> tuple[int, dict[str, str], bytes]:
        for repo, (code, name) in REFUSALS.items():
            if repo in path:
                return code, {"X-Error-Code": name}, b""
        if path.endswith("/revision/main"):
            return 200, {}, json.dumps({"id": "org/name", "sha": SHA, "siblings": []}).encode()
        if "/tree/" in path:
            return 200, {}, json.dumps([_entry(name) for name in REPO]).encode()
        if f"/resolve/{SHA}/" in path:
            name = path.partition(f"/resolve/{SHA}/")[2]
            return 200, {"ETag": _entry(name)["oid"], "X-Repo-Commit": SHA}, REPO[name]
        return 404, {}, b""


def _entry(name: str) -> dict:
    """One line of a tree listing."""
    oid = hashlib.sha1(REPO[name]).hexdigest()
    return {"type": "file", "path": name, "size": len(REPO[name]), "oid": oid}


def point_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """The hub is on this machine, for listings and for files."""
    from huggingface_hub import constants

    here = f"http://127.0.0.1:{port}"
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "ENDPOINT", here)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty hub cache, offline. The library reads its settings on import, so they are set."""
    hub = pytest.importorskip("huggingface_hub")
    hub.close_session()  # its client remembers the proxies of the environment
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    point_at(monkeypatch, 9)  # nobody listens there
    yield tmp_path / "hub"
    hub.close_session()


@pytest.fixture
def online(cache, monkeypatch) -> Iterator[Path]:
    """The same cache, and a hub on this machine."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_at(monkeypatch, server.server_port)
    yield cache
    server.shutdown()
    thread.join()
    server.server_close()


def fill(cache: Path, *names: str, repo: str = "org/name") -> Path:
    """A cached snapshot as an older version of the library, or a copy by hand, leaves it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    for path, data in {f"snapshots/{SHA}/{n}": REPO[n] for n in names}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(SHA)
    return folder / "snapshots" / SHA


def present(snapshot: Path) -> set[str]:
    return {p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()}


def message(*args: object, **settings: object) -> str:
    """The one line that a failure is."""
    with pytest.raises(InputFileError) as caught:
        resolve(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "org" / "name" / "3B").mkdir(parents=True)
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path), "org/name") == tmp_path / "org" / "name"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("org/name", "3B") == Path("org/name/3B")  # a folder goes before a hub id
    assert resolve("~/org") == tmp_path / "org"


def test_the_tokenizer_of_a_folder_may_lie_at_its_top(tmp_path):
    (tmp_path / "3B").mkdir()
    assert resolve(tmp_path, "3B", need="tokenizer") == tmp_path / "3B"
    (tmp_path / "tokenizer.json").touch()
    assert resolve(tmp_path, "3B", need="tokenizer") == tmp_path
    assert resolve(tmp_path, "3B") == tmp_path / "3B"
    (tmp_path / "3B" / "tokenizer.json").touch()
    assert resolve(tmp_path, "3B", need="tokenizer") == tmp_path / "3B"


@pytest.mark.parametrize(
    "name", ["./lumos", "../x/y", "~nobody-here/x", "/no/such/folder", "a/b/c", "lumos", "a\\b", ""]
)
def test_what_looks_like_a_path_is_never_looked_up(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert message(name) == (
        f"folder {name!r} does not exist: expected a model folder, or a hub id such as "
        "organisation/name"
    )


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    assert message(path) == (f"{path} is a file, expected a model folder: name the folder it is in")


def test_a_tokenizer_may_be_named_by_its_file(tmp_path):
    path = tmp_path / "text_tokenizer.json"
    path.touch()
    assert resolve(path, need="tokenizer") == path


def test_a_subfolder_that_is_not_there(tmp_path):
    assert message(tmp_path, "3B") == f"{tmp_path} has no folder 3B: check the subfolder's name"


@pytest.mark.parametrize("subfolder", ["../other", "a/../../b", "/etc"])
def test_a_subfolder_stays_inside(tmp_path, subfolder):
    with pytest.raises(InvalidSetting) as caught:
        resolve(tmp_path, subfolder)
    assert str(caught.value) == (
        f"subfolder is {subfolder!r}, expected a relative path inside the model folder"
    )


# --- the hub ------------------------------------------------------------------------------------


def test_only_the_files_that_are_read_are_downloaded(online):
    folder = resolve("org/name", "3B/stage")
    assert present(folder.parents[1]) == WANTED
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == b"second"
    assert folder.is_relative_to(online)


def test_a_subfolder_is_a_name_and_no_pattern(online):
    assert present(resolve("org/name", "best [1]")) == {"config.json", "model.safetensors"}


def test_a_tokenizer_is_downloaded_without_the_weights(online):
    folder = resolve("org/name", "3B/stage", need="tokenizer")
    assert present(folder) == {"tokenizer.json"}


def test_a_download_is_found_again_offline(online, monkeypatch):
    from huggingface_hub import constants

    folder = resolve("org/name", "3B/stage")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/name", "3B/stage") == folder
    assert resolve("org/name", need="tokenizer") == folder.parents[1]


def test_what_was_not_asked_for_before_is_missing_offline(online, monkeypatch):
    """The library checks a snapshot against the listing it kept, by the same patterns."""
    from huggingface_hub import constants

    resolve("org/name", need="tokenizer")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert message("org/name", "1B/stage") == (
        "org/name lacks 1B/stage/config.json, 1B/stage/model.safetensors in the local hub cache "
        "and cannot be fetched (offline mode is on): run `hf download org/name --include "
        "'1B/stage/*'` on a machine with network and copy its hub cache, or name a folder with "
        "the files"
    )


@pytest.mark.parametrize("subfolder", [None, "3B"])
def test_the_wrong_subfolder_downloads_no_weights(online, subfolder):
    said = message("org/name", subfolder)
    place = "org/name" if subfolder is None else "org/name, folder 3B,"
    assert said == (
        f"{place} lacks config.json, *.safetensors, expected on a hub that can be reached: name "
        "the subfolder that has them (pickled weights are never read)"
    )
    (snapshot,) = online.glob("models--org--name/snapshots/*")
    assert present(snapshot) == {"tokenizer.json"}


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "org/missing",
            "org/missing is neither a folder here nor, for us, on the hub: check the name, or log "
            "in with `hf auth login` if it is private",
        ),
        (
            "org/gated",
            "org/gated is gated on the hub: accept its terms there, then log in with "
            "`hf auth login`",
        ),
        (
            "org/na--me",
            "org/na--me is no hub id (Cannot have -- or .. in repo_id: 'org/na--me'.): expected "
            "organisation/name, or a folder that exists",
        ),
    ],
)
def test_the_hub_says_no(online, name, said):
    assert message(name) == said


def test_a_hub_out_of_order(online):
    said = message("org/down")
    assert said.startswith(
        "org/down is not in the local hub cache and cannot be fetched (HfHubHTTPError: Server error"
    )
    assert said.endswith("or name a folder with the files")


def test_no_network(cache, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert message("org/name").startswith(
        "org/name is not in the local hub cache and cannot be fetched (ConnectError: "
    )
    snapshot = fill(cache, "1B/stage/config.json", "1B/stage/model.safetensors")
    assert resolve("org/name", "1B/stage") == snapshot / "1B/stage"


def test_an_error_nobody_foresaw_is_one_line(cache, monkeypatch):
    import huggingface_hub

    def full(*args: object, **settings: object) -> str:
        raise OSError(28, "No space left on device\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert message("org/name") == (
        "org/name cannot be downloaded (OSError: [Errno 28] No space left on device): run `hf "
        "download org/name` on a machine with network and copy its hub cache, or name a folder "
        "with the files"
    )


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InvalidSetting) as caught:
        resolve("org/name")
    assert str(caught.value) == (
        "'org/name' is no folder here, and hub ids need huggingface_hub: pip install "
        "'packcache[hf]', or name a folder"
    )


# --- offline, a cache without a listing ---------------------------------------------------------


def test_offline_the_cache_is_enough(cache):
    snapshot = fill(cache, *WANTED)
    assert resolve("org/name", "3B/stage") == snapshot / "3B/stage"
    assert resolve("org/name", "3B/stage", need="tokenizer") == snapshot


def test_offline_and_nothing_cached(cache):
    assert message("org/name") == (
        "org/name is not in the local hub cache and cannot be fetched (offline mode is on): run "
        "`hf download org/name` on a machine with network and copy its hub cache, or name a "
        "folder with the files"
    )


@pytest.mark.parametrize(
    "names, need, lacks",
    [
        (["3B/stage/config.json"], "model", "*.safetensors"),
        (["3B/stage/model-00001-of-00002.safetensors"], "model", "config.json"),
        (["1B/stage/config.json"], "model", "config.json, *.safetensors"),
        (["3B/stage/config.json"], "tokenizer", "tokenizer.json"),
    ],
)
def test_offline_and_partly_cached(cache, names, need, lacks):
    """Without a listing the library returns any snapshot as whole, so we look ourselves."""
    fill(cache, *names)
    assert message("org/name", "3B/stage", need=need) == (
        f"org/name, folder 3B/stage, lacks {lacks} in the local hub cache and cannot be fetched "
        "(offline mode is on): run `hf download org/name --include '3B/stage/*'` on a machine "
        "with network and copy its hub cache, or name a folder with the files"
    )


def test_a_link_to_a_lost_file_counts_as_missing(cache):
    snapshot = fill(cache, "1B/stage/config.json")
    (snapshot / "1B/stage/model.safetensors").symlink_to(cache / "blobs" / "gone")
    assert "lacks *.safetensors in the local hub cache" in message("org/name", "1B/stage")


def test_the_environment_says_offline(tmp_path):
    """As a user sets it: read by the library when it is imported."""
    pytest.importorskip("huggingface_hub")
    snapshot = fill(tmp_path / "hub", "1B/stage/config.json", "1B/stage/model.safetensors")
    program = (
        "from packcache.lumos.hub import resolve\n"
        "print(resolve('org/name', '1B/stage'))\n"
        "try: resolve('org/other')\n"
        "except Exception as error: print(error)\n"
    )
    setting = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)}
    ignored = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in ignored}
    run = subprocess.run(
        [sys.executable, "-c", program], env=kept | setting, capture_output=True, text=True
    )
    found, said = run.stdout.splitlines()
    assert found == str(snapshot / "1B/stage")
    assert "offline mode is on" in said and run.returncode == 0
