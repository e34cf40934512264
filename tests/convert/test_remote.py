"""Streaming from the Hub: a few files at a time, through dropped connections, to the same bytes."""

import json
import os
import subprocess
import sys

import pytest
from support import hub
from support.converted import converted_directory, fp8_directory
from support.patience import DEADLINE

from mlx_mimo.convert import convert_checkpoint, remote
from mlx_mimo.convert.__main__ import main
from mlx_mimo.convert.remote import RemoteSource
from mlx_mimo.errors import MimoError


@pytest.fixture
def served(monkeypatch):
    with hub.serving(mimo=fp8_directory()) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
        yield server


def same_weights(directory):
    for path in converted_directory().glob("*.safetensors"):
        assert (directory / path.name).read_bytes() == path.read_bytes(), path.name
    left = {path.name for path in directory.iterdir()}
    assert left == {path.name for path in converted_directory().iterdir()}


def test_streaming_gives_the_bytes_of_a_local_conversion(served, tmp_path):
    assert main(["--hf-path", "test/mimo", "--mlx-path", str(tmp_path / "mlx"), "--stream", "--quiet"]) == 0
    same_weights(tmp_path / "mlx")
    fields = json.loads((tmp_path / "mlx" / "mlx_mimo.json").read_text())
    assert fields["source"] == {"repo": "test/mimo", "revision": hub.COMMIT}


def test_without_stream_the_whole_repository_is_fetched_first(served, tmp_path):
    """Runs the converter in a process of its own, since the Hub's library reads its settings when imported."""
    settings = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "mlx_mimo.convert", "--hf-path", "test/mimo", "--mlx-path", str(tmp_path / "mlx")]
    subprocess.run([*command, "--quiet"], check=True, env=os.environ | settings, timeout=DEADLINE)
    same_weights(tmp_path / "mlx")
    fields = json.loads((tmp_path / "mlx" / "mlx_mimo.json").read_text())
    assert fields["source"] == {"repo": "test/mimo", "revision": hub.COMMIT}
    assert served.sent["model_1.safetensors"] == (fp8_directory() / "model_1.safetensors").stat().st_size


def test_streaming_keeps_only_a_few_files_at_a_time(served, tmp_path, monkeypatch):
    most = 0
    release = RemoteSource.release

    def counted(self, file):
        nonlocal most
        most = max(most, len(list((tmp_path / "mlx").glob("fetched-*"))))
        release(self, file)

    monkeypatch.setattr(RemoteSource, "release", counted)
    convert_checkpoint(RemoteSource("test/mimo", staging=tmp_path / "mlx"), tmp_path / "mlx", progress=False)
    # The trunk of this tiny model is one file made from six; experts come in twos.
    assert 0 < most <= 6 + 2


def test_a_dropped_connection_is_resumed_where_it_broke(served, tmp_path):
    served.drop_after = {"model_1.safetensors": [150_000, 7], "model_mtp.safetensors": [1000, 0, 90_000]}
    convert_checkpoint(RemoteSource("test/mimo", staging=tmp_path / "mlx"), tmp_path / "mlx", progress=False)
    same_weights(tmp_path / "mlx")
    assert not any(served.drop_after.values())
    resumed = [wanted for file, wanted in served.requests if file == "model_1.safetensors" and wanted.endswith("-")]
    assert resumed == ["bytes=0-", "bytes=150000-", "bytes=150007-"]


def test_a_server_that_always_drops_the_connection_is_an_error(served, tmp_path, capsys):
    served.drop_after = {"model_mtp.safetensors": [0] * 20}
    arguments = ["--hf-path", "test/mimo", "--mlx-path", str(tmp_path / "mlx"), "--stream", "--quiet"]
    assert main(arguments) == 1
    assert "model_mtp.safetensors: could not be fetched in 6 attempts" in capsys.readouterr().err
    assert not (tmp_path / "mlx" / "config.json").exists()
    served.drop_after = {}
    sent = served.sent["model_1_linear_fc1.safetensors"]
    assert main(arguments) == 0
    same_weights(tmp_path / "mlx")
    assert served.sent["model_1_linear_fc1.safetensors"] - sent < 20_000  # its header only: it was done


def test_a_file_of_another_size_than_its_header_says_is_refused(served, tmp_path, capsys):
    served.wrong_size = {"model_2_linear_fc2.safetensors": 5}
    assert main(["--hf-path", "test/mimo", "--mlx-path", str(tmp_path / "mlx"), "--stream", "--quiet"]) == 1
    assert "model_2_linear_fc2.safetensors: " in capsys.readouterr().err
    assert not (tmp_path / "mlx").exists()


def test_a_file_that_changes_on_the_server_is_refused(served):
    source = RemoteSource("test/mimo")
    source.header("model_1.safetensors")
    served.wrong_size = {"model_1.safetensors": -1}
    with pytest.raises(MimoError, match="changed on the server"):
        source.read("model.layers.1.input_layernorm.weight")


def test_a_missing_repository_is_an_error(served, capsys):
    assert main(["--hf-path", "test/absent", "--stream"]) == 1
    assert "test/absent: not at http" in capsys.readouterr().err
    assert main(["--hf-path", str(fp8_directory()), "--stream"]) == 2
    assert not os.path.exists("mlx_model")


def test_the_result_can_be_uploaded(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo, exist_ok):
            calls.append(("create", repo))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, sorted(os.listdir(folder_path))))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    target = tmp_path / "mlx"
    arguments = ["--hf-path", str(fp8_directory()), "--mlx-path", str(target), "--quiet", "--upload-repo", "me/mimo"]
    assert main(arguments) == 0
    assert calls == [("create", "me/mimo"), ("upload", "me/mimo", sorted(os.listdir(target)))]
    assert "config.json" in calls[1][2]
