"""The offer to convert a checkpoint as Hugging Face has it."""

import os
import shutil
import sys

import pytest
from support.converted import fp8_directory
from support.terminal import Terminal

from mlx_mimo.errors import MimoError
from mlx_mimo.runtime import source


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(fp8_directory(), tmp_path / "released")


@pytest.mark.long
def test_answering_yes_converts_beside_the_checkpoint_and_continues(checkpoint):
    command = [sys.executable, "-m", "mlx_mimo.chat", "--model", str(checkpoint), "-m", "2", "--temp", "0"]
    target = checkpoint.with_name("released-4bit")
    with Terminal(*command, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as terminal:
        terminal.expect(f"released is an FP8 checkpoint of [0-9.]+ [kM]B.*\\s+.*about [0-9.]+ [kM]B, in {target}")
        terminal.expect(r"Convert it now\? \[y/N\] ")
        assert not target.exists()
        terminal.type(b"y\r")
        terminal.expect("/help lists the commands")
        terminal.type(b"/exit\r")
        assert terminal.ended() == 0
    assert (target / "config.json").exists()
    assert source.find(checkpoint).path == target


@pytest.mark.parametrize("reply", ["n", "", "yesterday", None])
def test_any_other_answer_converts_nothing_and_names_the_command(reply, checkpoint, monkeypatch):
    def answer():
        if reply is None:
            raise EOFError
        return reply

    monkeypatch.setattr("builtins.input", answer)
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    with pytest.raises(MimoError, match=rf"not converted.*mlx_mimo convert --hf-path {checkpoint} --mlx-path"):
        source.find(checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["released"]


def test_without_a_terminal_no_question_is_asked(checkpoint, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda: pytest.fail("asked"))
    with pytest.raises(MimoError, match=r"must be converted first: mlx_mimo convert --hf-path"):
        source.find(checkpoint)
