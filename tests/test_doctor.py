"""doctor: one line a check, stable ids, and each fault found under its own."""

import json
import shutil
import subprocess
import sys

import pytest
from converted import converted_directory, fp8_directory

from mlx_mimo.doctor import build_parser, doctor
from mlx_mimo.errors import UsageError
from mlx_mimo.runtime.checks import FAILED, OK, SKIPPED, WARNING, disk_kind, mac_disk_kind

MACHINE = [
    "python",
    "mlx",
    "mlx-lm",
    "transformers",
    "backend",
    "memory",
    "limits.working_set",
    "limits.buffer",
    "limits.files",
]
DIRECTORY = [
    "disk.kind",
    "disk.speed",
    "model.config",
    "model.files",
    "model.experts",
    "model.manifest",
    "model.tokenizer",
    "model.complete",
    "model.hashes",
]


@pytest.fixture
def directory(tmp_path):
    return shutil.copytree(converted_directory(), tmp_path / "model")


def run_doctor(capsys, *arguments) -> tuple[int, dict]:
    code = doctor(build_parser().parse_args([*map(str, arguments), "--json"]))
    fields = json.loads(capsys.readouterr().out)
    assert fields["schema_version"] == 1
    assert fields["ok"] == (code == 0)
    return code, {check["id"]: check for check in fields["checks"]}


def test_the_ids_are_stable(directory, capsys):
    code, checks = run_doctor(capsys, directory)
    assert code == 0
    assert list(checks) == MACHINE + DIRECTORY
    assert list(run_doctor(capsys)[1]) == MACHINE


def test_a_sound_directory_passes_deep(directory, capsys):
    code, checks = run_doctor(capsys, directory, "--deep")
    assert code == 0
    for name in ("model.config", "model.files", "model.experts", "model.manifest", "model.complete", "model.hashes"):
        assert checks[name]["status"] == OK, checks[name]


def fails(capsys, directory, *arguments) -> dict:
    code, checks = run_doctor(capsys, directory, *arguments)
    assert code == 1
    for check in checks.values():
        assert check["status"] != FAILED or check["hint"]
    return {name for name, check in checks.items() if check["status"] == FAILED}


def test_a_file_cut_short(directory, capsys):
    file = directory / "model-experts-2.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert fails(capsys, directory) == {"model.files", "model.experts", "model.manifest"}


def test_a_missing_file(directory, capsys):
    (directory / "model-trunk-00001.safetensors").unlink()
    assert fails(capsys, directory) == {"model.files", "model.manifest"}


def test_a_changed_byte_is_found_by_deep_alone(directory, capsys):
    file = directory / "model-experts-2.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run_doctor(capsys, directory)[0] == 0
    assert fails(capsys, directory, "--deep") == {"model.hashes"}


def test_a_manifest_that_is_none(directory, capsys):
    (directory / "mlx_mimo.json").write_text("[]")
    assert fails(capsys, directory) == {"model.manifest"}


def test_no_tokenizer(directory, capsys):
    (directory / "tokenizer.json").unlink()
    assert "model.tokenizer" in fails(capsys, directory)


def test_a_config_of_another_model(directory, capsys):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert fails(capsys, directory) == {"model.config"}


def test_warnings_do_not_fail(directory, capsys):
    (directory / "mlx_mimo.json").unlink()
    (directory / "model-trunk-00001.safetensors.part").write_bytes(b"")
    code, checks = run_doctor(capsys, directory)
    assert code == 0
    assert checks["model.manifest"]["status"] == WARNING
    assert checks["model.complete"]["status"] == WARNING


def test_an_fp8_checkpoint_is_told_how_to_convert(capsys):
    _, checks = run_doctor(capsys, fp8_directory())
    assert checks["model.config"]["status"] == WARNING
    assert "mlx_mimo convert --hf-path" in checks["model.config"]["hint"]


def test_wrong_command_lines():
    for arguments in (["--deep"], ["/no/such/directory"]):
        with pytest.raises(UsageError):
            doctor(build_parser().parse_args(arguments))


def test_the_lines_name_id_and_hint(directory, capsys):
    (directory / "tokenizer.json").unlink()
    doctor(build_parser().parse_args([str(directory)]))
    text = capsys.readouterr().out
    assert "FAIL  model.tokenizer" in text
    assert "→ copy the tokenizer's files" in text


@pytest.mark.parametrize(
    ("info", "kind"),
    [
        ({"SolidState": True, "BusProtocol": "Apple Fabric"}, "SSD"),
        ({"SolidState": True, "BusProtocol": "USB"}, "SSD on USB"),
        ({"SolidState": False, "BusProtocol": "SATA"}, "hard disk"),
        ({"BusProtocol": "SMB"}, None),
    ],
)
def test_what_a_mac_says_of_its_disk(info, kind):
    assert mac_disk_kind(info) == kind


@pytest.mark.parametrize(
    ("kind", "status"), [("SSD", OK), ("SSD on USB", WARNING), ("hard disk", WARNING), (None, SKIPPED)]
)
def test_slow_kinds_of_disk_are_warned_of(tmp_path, monkeypatch, kind, status):
    for name in ("_linux_disk", "_mac_disk"):
        monkeypatch.setattr(f"mlx_mimo.runtime.checks.{name}", lambda directory: kind)
    check = disk_kind(tmp_path)
    assert check.status == status
    assert "free" in check.found


def test_doctor_loads_no_framework():
    code = (
        "import sys; sys.argv = ['doctor']; from mlx_mimo.doctor import main; main(); "
        "sys.exit('imported' if {'transformers', 'torch', 'mlx_lm'} & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
