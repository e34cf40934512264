"""The prompt cache on disk: what comes back is what was there, and nothing else is believed."""

import json
import os
import shutil
import stat

import pytest
import requests
from safetensors.numpy import save_file
from support.cached import PAST, computed, continues, tiny_model
from support.patience import DEADLINE
from support.serving import running_server

from mlx_mimo.checkpoint.directory import read_config
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.errors import FormatError, UsageError
from mlx_mimo.models.mimo_v2_flash import Model
from mlx_mimo.server.__main__ import build_parser, complete
from mlx_mimo.server.engine.fingerprint import fingerprint
from mlx_mimo.server.engine.prompt_cache import PromptCache
from mlx_mimo.server.engine.prompt_cache_file import PromptCacheFile

CHAT = "/v1/chat/completions"
LONG = "a question that fills more than one window of sixteen tokens"


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture
def file(tmp_path) -> PromptCacheFile:
    return PromptCacheFile(tmp_path / "kv.cache")


@pytest.fixture
def saved(model, file) -> PromptCacheFile:
    cache = PromptCache()
    for first in (1, 2, 3):
        cache.give(computed(model, [first, *PAST[: 100 * first]], checkpoints=(20, 40)))
    result = file.save(cache, "mine")
    assert (result.entries, result.tokens) == (3, 603)
    assert result.bytes == file.path.stat().st_size
    return file


def test_what_was_saved_continues_as_what_was_computed(model, saved):
    cache = PromptCache()
    assert saved.load(cache, model, "mine") == 3
    assert [entry.tokens[0] for entry in cache.entries] == [1, 2, 3]
    before = saved.path.read_bytes()
    saved.save(cache, "mine")
    assert saved.path.read_bytes() == before, "what was loaded is saved as it was"
    for shared, reused in ((30, 20), (300, 300)):  # on from a checkpoint, and from the end
        tokens = [3, *PAST[: shared - 1], 251, 252]
        entry = cache.take(tokens)
        assert len(entry.tokens) == reused
        assert continues(model, entry, tokens)


def test_the_latest_come_back_where_there_is_room_for_some(model, saved):
    few = PromptCache(max_entries=2)
    assert saved.load(few, model, "mine") == 2
    assert [entry.tokens[0] for entry in few.entries] == [2, 3]
    small = PromptCache(max_bytes=few.entries[-1].nbytes)
    assert saved.load(small, model, "mine") == 1
    assert [entry.tokens[0] for entry in small.entries] == [3]


def test_an_empty_cache_and_a_missing_file_load_as_no_entries(model, file):
    assert file.load(PromptCache(), model, "mine") == 0
    file.save(PromptCache(), "mine")
    assert file.load(PromptCache(), model, "mine") == 0


def test_another_models_cache_is_refused(model, saved):
    with pytest.raises(FormatError, match="another model"):
        saved.load(PromptCache(), model, "other")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"x",
    "a bit of the first tensor": lambda data: flipped(data, 8 + int.from_bytes(data[:8], "little")),
    "a bit of the last tensor": lambda data: flipped(data, len(data) - 1),
    "a checkpoint's place": lambda data: data.replace(rb"[20, 40]", rb"[20, 41]", 1),
    "the sum": lambda data: data.replace(b'"sha256": "', b'"sha256": "0', 1).replace(b"    ", b"   ", 1),
    "text": lambda data: b"not a cache at all, but a letter to a friend",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused(model, saved, caplog, kind):
    data = saved.path.read_bytes()
    damaged = DAMAGE[kind](data)
    assert damaged != data
    saved.path.write_bytes(damaged)
    cache = PromptCache()
    with pytest.raises(FormatError, match=r"kv\.cache"):
        saved.load(cache, model, "mine")
    saved.restore(cache, model, "mine")
    assert len(cache) == 0
    assert "begins empty" in caplog.text


def test_a_foreign_file_is_refused(model, file):
    import numpy as np

    save_file({"a": np.zeros(3, np.float32)}, file.path)
    with pytest.raises(FormatError, match="not a prompt cache"):
        file.load(PromptCache(), model, "mine")


def test_a_write_that_fails_leaves_what_was_there(model, saved, monkeypatch):
    before = saved.path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        saved.save(PromptCache(), "mine")
    assert saved.path.read_bytes() == before
    assert os.listdir(saved.path.parent) == ["kv.cache"]


def test_nobody_else_may_read_it(saved):
    assert stat.S_IMODE(saved.path.stat().st_mode) == 0o600


def test_what_lies_in_its_way_is_not_written_into(model, saved, tmp_path):
    """Neither what a link points to nor a file that others may read."""
    partial = saved.path.with_name(saved.path.name + ".partial")
    other = tmp_path / "other"
    other.write_text("mine")
    partial.symlink_to(other)
    saved.save(PromptCache(), "mine")
    assert other.read_text() == "mine"
    partial.write_text("")
    partial.chmod(0o666)
    saved.save(PromptCache(), "mine")
    assert stat.S_IMODE(saved.path.stat().st_mode) == 0o600
    assert not saved.path.is_symlink()
    assert not partial.exists()


def test_the_fingerprint_is_the_models(model_directory, tmp_path):
    copy = shutil.copytree(model_directory, tmp_path / "copy")
    args = ModelArgs.from_dict(read_config(model_directory))
    first = fingerprint(model_directory, args)
    assert fingerprint(copy, args) == first
    bridged = read_config(copy) | {"model_file": "bridge.py"}
    (copy / "config.json").write_text(json.dumps(bridged))
    assert fingerprint(copy, args) == first, "the bridge changes nothing that is computed"
    wider = ModelArgs.from_dict(read_config(model_directory) | {"window_keys": 99})
    others = [fingerprint(model_directory, wider)]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for content in (b"one", b"two"):
        (adapter / "adapters.safetensors").write_bytes(content)
        others.append(fingerprint(model_directory, args, adapter))
    manifest = json.loads((copy / "mlx_mimo.json").read_text())
    next(iter(manifest["files"].values()))["sha256"] = "0" * 64
    (copy / "mlx_mimo.json").write_text(json.dumps(manifest))
    others.append(fingerprint(copy, args))
    (copy / "mlx_mimo.json").unlink()
    others.append(fingerprint(copy, args))
    assert len({first, *others}) == 1 + len(others)


# In a server


def ask(server, messages: list[dict], **options) -> dict:
    body = {"messages": messages, "max_tokens": 20, "temperature": 0} | options
    return requests.post(server.url + CHAT, json=body, timeout=DEADLINE).json()


@pytest.mark.parametrize("memory", ["120KB", "all"])
def test_it_is_saved_on_request_and_the_next_server_begins_with_it(model_directory, tmp_path, memory):
    path = tmp_path / "kv"
    flags = ("--prompt-cache-file", str(path), "--expert-memory", memory)
    messages = [{"role": "user", "content": LONG}]
    with running_server(model_directory, *flags) as server:
        first = ask(server, messages)
        saved = requests.post(f"{server.url}/prompt-cache/save", timeout=DEADLINE)
        assert saved.status_code == 200
        assert saved.json()["bytes"] == path.stat().st_size
        assert saved.json()["entries"] == len(server.worker.prompt_cache) > 0
        messages += [first["choices"][0]["message"], {"role": "user", "content": "and another"}]
        expected = ask(server, messages)["choices"][0]["message"]["content"]
    with running_server(model_directory, *flags) as server:
        second = ask(server, messages)
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 3
        assert second["choices"][0]["message"]["content"] == expected


def test_saving_wants_the_key_and_the_right_page(model_directory, tmp_path):
    path = tmp_path / "kv"
    with running_server(model_directory, "--prompt-cache-file", str(path), "--api-key", "k") as server:
        save = f"{server.url}/prompt-cache/save"
        key = {"Authorization": "Bearer k"}
        assert requests.post(save, timeout=DEADLINE).status_code == 401
        assert (
            requests.post(save, headers=key | {"Origin": "https://evil.example"}, timeout=DEADLINE).status_code == 403
        )
        assert requests.get(save, headers=key, timeout=DEADLINE).status_code == 405
        assert not path.exists()
        assert requests.post(save, headers=key, timeout=DEADLINE).json()["entries"] == 0
        assert path.exists()


def test_there_is_nothing_to_save_to_without_the_flag(server):
    refused = requests.post(f"{server.url}/prompt-cache/save", timeout=DEADLINE)
    assert refused.status_code == 404
    assert "--prompt-cache-file" in refused.json()["error"]["message"]


def test_a_disk_that_is_full_is_an_answer(model_directory, tmp_path, monkeypatch):
    with running_server(model_directory, "--prompt-cache-file", str(tmp_path / "kv")) as server:

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.replace", full)
        failed = requests.post(f"{server.url}/prompt-cache/save", timeout=DEADLINE)
        assert failed.status_code == 500
        assert "No space left" in failed.json()["error"]["message"]
        assert ask(server, [{"role": "user", "content": "hi"}])["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("name", ["", "nowhere/kv"])
def test_a_place_that_cannot_be_written_to_is_refused_at_once(tmp_path, name):
    with pytest.raises(UsageError, match="--prompt-cache-file"):
        complete(build_parser().parse_args(["--prompt-cache-file", str(tmp_path / name)]))
