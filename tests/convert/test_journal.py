"""Interrupted conversions: killed or out of disk, they go on and give the same bytes."""

import errno
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from support.converted import converted_directory, fp8_directory
from support.damage import copy, edit
from support.patience import DEADLINE

from mlx_mimo.convert import convert_checkpoint, journal, writer
from mlx_mimo.errors import MimoError


class Stop(Exception):
    """Raised to interrupt a conversion."""


def same(found: Path, wanted: Path) -> bool:
    return sorted(p.name for p in found.iterdir()) == sorted(p.name for p in wanted.iterdir()) and all(
        (found / path.name).read_bytes() == path.read_bytes() for path in wanted.iterdir()
    )


def stop_after(monkeypatch, files: int, error: BaseException) -> None:
    """Makes the next conversion fail after `files` files of weights, within the following one."""
    begun = 0
    write = writer.FileWriter.write

    def counted(self, data):
        nonlocal begun
        begun += self.nbytes == 0
        if begun > files and self.nbytes:
            raise error
        write(self, data)

    monkeypatch.setattr(writer.FileWriter, "write", counted)


def interrupted(monkeypatch, source: Path, target: Path, files: int = 3) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, files, Stop())
        with pytest.raises(Stop):
            convert_checkpoint(source, target, progress=False)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_random_points_the_result_is_the_same(tmp_path, seed):
    script = Path(__file__).with_name("killed.py")
    arguments = [sys.executable, script, fp8_directory(), tmp_path, "6", str(seed)]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=DEADLINE)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 4
    for number in range(6):
        assert same(tmp_path / str(number), converted_directory())


def test_finished_files_are_not_made_again(tmp_path, monkeypatch):
    target = tmp_path / "mlx"
    interrupted(monkeypatch, fp8_directory(), target)
    done = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert len(done) == 3
    assert not list(target.glob("*.part"))
    convert_checkpoint(fp8_directory(), target, progress=False)
    assert {name: (target / name).stat().st_mtime_ns for name in done} == done
    assert same(target, converted_directory())


def test_a_file_whose_journal_line_was_cut_short_is_written_again(tmp_path, monkeypatch):
    target = tmp_path / "mlx"
    interrupted(monkeypatch, fp8_directory(), target)
    path = target / journal.NAME
    path.write_bytes(path.read_bytes()[:-40])
    convert_checkpoint(fp8_directory(), target, progress=False)
    assert same(target, converted_directory())


def test_a_full_disk_is_reported_and_the_same_command_goes_on(tmp_path, monkeypatch):
    target = tmp_path / "mlx"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(
            MimoError, match=r"model-experts-2.safetensors: No space left on device.*run the same command"
        ):
            convert_checkpoint(fp8_directory(), target, progress=False)
    assert not list(target.glob("*.part"))
    assert not (target / "config.json").exists()
    convert_checkpoint(fp8_directory(), target, progress=False)
    assert same(target, converted_directory())


def test_a_disk_that_fills_while_the_journal_is_written_is_reported(tmp_path, monkeypatch):
    def full(self, report):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", full)
        with pytest.raises(MimoError, match="No space left"):
            convert_checkpoint(fp8_directory(), tmp_path / "mlx", progress=False)
    convert_checkpoint(fp8_directory(), tmp_path / "mlx", progress=False)
    assert same(tmp_path / "mlx", converted_directory())


def test_too_little_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(MimoError, match=r"0.0 GB to write, 0.0 GB free"):
        convert_checkpoint(fp8_directory(), tmp_path / "mlx", progress=False)
    assert not list((tmp_path / "mlx").glob("*.safetensors*"))


def test_a_source_file_that_changed_between_two_calls_is_refused(tmp_path, monkeypatch):
    source, target = copy(fp8_directory(), tmp_path / "fp8"), tmp_path / "mlx"
    interrupted(monkeypatch, source, target)
    edit(source, "model.layers.1.mlp.experts.0.up_proj.weight", lambda codes: codes ^ 1)
    with pytest.raises(MimoError, match=r"model_1_linear_fc1.safetensors: changed since model-experts-1.safetensors"):
        convert_checkpoint(source, target, progress=False)


def test_a_source_file_that_nothing_was_made_from_may_be_replaced(tmp_path, monkeypatch):
    source, target = copy(fp8_directory(), tmp_path / "fp8"), tmp_path / "mlx"
    interrupted(monkeypatch, source, target)
    path = source / "model_3_linear_fc2.safetensors"
    path.write_bytes(path.read_bytes())
    convert_checkpoint(source, target, progress=False)
    assert same(target, converted_directory())


def test_a_source_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source = copy(fp8_directory(), tmp_path / "fp8")
    path = source / "model_2_linear_fc2.safetensors"
    write = writer.FileWriter.write

    def meddle(self, data):
        if self.path.name == "model-experts-2.safetensors":
            os.utime(path, ns=(1, 1))
        write(self, data)

    monkeypatch.setattr(writer.FileWriter, "write", meddle)
    with pytest.raises(MimoError, match=r"model_2_linear_fc2.safetensors: changed while"):
        convert_checkpoint(source, tmp_path / "mlx", progress=False)


def test_another_recipe_on_an_unfinished_directory_is_refused(tmp_path, monkeypatch):
    interrupted(monkeypatch, fp8_directory(), tmp_path / "mlx")
    with pytest.raises(MimoError, match="unfinished conversion with another recipe"):
        convert_checkpoint(fp8_directory(), tmp_path / "mlx", recipe="8bit", progress=False)


def test_the_second_of_two_converters_is_refused(tmp_path):
    target = tmp_path / "mlx"
    target.mkdir()
    with journal.DirectoryLock(target), pytest.raises(MimoError, match="another conversion is writing here"):
        convert_checkpoint(fp8_directory(), target, progress=False)
    assert not list(target.iterdir())
    convert_checkpoint(fp8_directory(), target, progress=False)
