"""doctor: one line a check, with stable ids; each fault fails its own check."""

import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from support.converted import converted_directory, fp8_directory, stacked_directory

from mlx_mimo import plan
from mlx_mimo.bridge import __main__ as bridge
from mlx_mimo.checkpoint import directory as directory_module
from mlx_mimo.checkpoint.directory import Directory
from mlx_mimo.checkpoint.header import read_header
from mlx_mimo.config import released
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.doctor import machine_checks as checks
from mlx_mimo.doctor.__main__ import build_parser, doctor
from mlx_mimo.doctor.machine_checks import FAILED, OK, SKIPPED, WARNING, disk_kind, mac_disk_kind
from mlx_mimo.errors import FormatError, UsageError
from mlx_mimo.plan import subject_of
from mlx_mimo.planning.budget import CHUNK, ItemBytes, budget_of, measure
from mlx_mimo.planning.machine import GIB, imagined
from mlx_mimo.planning.plan import make_plan

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "measure" / "doctor_time.py"))
MACHINE = [
    "python",
    "mlx",
    "mlx-lm",
    "transformers",
    "backend",
    "blas",
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
    "model.memory",
    "model.speed",
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


def test_the_ids_of_checks_are_stable(directory, capsys):
    code, checks = run_doctor(capsys, directory)
    assert code == 0
    assert list(checks) == MACHINE + DIRECTORY
    assert list(run_doctor(capsys)[1]) == [*MACHINE, "disk.kind"]
    assert list(run_doctor(capsys, "--sim-memory", "64GB")[1]) == MACHINE  # of another machine's disk nothing is known


def test_a_sound_directory_passes_deep(directory, capsys):
    code, checks = run_doctor(capsys, directory, "--deep")
    assert code == 0
    for name in ("model.config", "model.files", "model.experts", "model.manifest", "model.complete", "model.hashes"):
        assert checks[name]["status"] == OK, checks[name]


def test_a_directory_with_the_bridge_on_passes_deep(directory, capsys):
    bridge.switch(directory, True)
    assert run_doctor(capsys, directory, "--deep")[0] == 0


def fails(capsys, directory, *arguments) -> dict:
    code, checks = run_doctor(capsys, directory, *arguments)
    assert code == 1
    for check in checks.values():
        assert check["status"] != FAILED or check["hint"]
    return {name for name, check in checks.items() if check["status"] == FAILED}


def test_a_file_cut_short_fails_files_experts_and_manifest(directory, capsys):
    file = directory / "model-experts-2.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert fails(capsys, directory) == {"model.files", "model.experts", "model.manifest"}


def test_a_missing_file_fails_files_and_manifest(directory, capsys):
    (directory / "model-trunk-00001.safetensors").unlink()
    assert fails(capsys, directory) == {"model.files", "model.manifest"}


def test_a_changed_byte_is_found_with_deep_only(directory, capsys):
    file = directory / "model-experts-2.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run_doctor(capsys, directory)[0] == 0
    assert fails(capsys, directory, "--deep") == {"model.hashes"}


def test_a_wrong_manifest_fails_its_own_check_alone(directory, capsys):
    (directory / "mlx_mimo.json").write_text("[]")
    assert fails(capsys, directory) == {"model.manifest"}


def test_a_missing_tokenizer_fails(directory, capsys):
    (directory / "tokenizer.json").unlink()
    assert "model.tokenizer" in fails(capsys, directory)


def test_the_config_of_another_model_fails(directory, capsys):
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


def test_wrong_command_lines_are_refused():
    for arguments in (["--deep"], ["/no/such/directory"], ["--sim-memory", "lots"], ["--sim-ssd", "quick"]):
        with pytest.raises(UsageError):
            doctor(build_parser().parse_args(arguments))


def preview(capsys, directory, *arguments) -> dict:
    return run_doctor(capsys, directory, *arguments)[1]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    path = tmp_path_factory.mktemp("doctor") / "release"
    EXAMPLE["write_release"](path)
    return path


@pytest.mark.parametrize(("gib", "disk", "bandwidth"), [(48, 6, 273), (256, 7, 819)])
def test_another_machine_is_previewed_as_plan_sees_it(release, capsys, gib, disk, bandwidth):
    """doctor on the files and plan on the released config give the same slots and speed for the same flags."""
    flags = ["--sim-memory", f"{gib}GiB", "--sim-ssd", f"{disk}GB/s", "--sim-bandwidth", f"{bandwidth}GB/s"]
    checks = preview(capsys, release, *flags)
    machine = imagined("", gib * GIB, disk * 1e9, bandwidth * 1e9)
    planned = make_plan(subject_of(None, "4bit"), ModelArgs.from_dict(released.CONFIG), 32768, machine).forecast
    assert checks["model.memory"]["found"].startswith(f"{planned.slots:,} of 12,032 experts resident")
    assert f"decode {planned.decode_tps.expected:.1f} tokens/s" in checks["model.speed"]["found"]
    assert checks["model.memory"]["status"] == checks["model.speed"]["status"] == OK
    for name in ("backend", "memory", "limits.working_set", "disk.speed"):
        assert checks[name]["found"].endswith("simulated"), checks[name]
    assert checks["backend"]["found"].startswith("metal")
    assert checks["limits.buffer"]["found"] == "not known of another machine"


def test_a_machine_too_small_fails_and_says_what_would_help(release, capsys):
    code, checks = run_doctor(capsys, release, "--sim-memory", "16GiB")
    assert code == 1
    assert checks["model.memory"]["status"] == FAILED
    assert "before the first expert" in checks["model.memory"]["found"]
    assert f"mlx_mimo plan --model {release}" in checks["model.memory"]["hint"]
    assert checks["model.speed"]["status"] == SKIPPED


def test_few_slots_and_a_slow_disk_are_warned_of(release, capsys):
    checks = preview(capsys, release, "--sim-memory", "24GiB", "--sim-ssd", "900MB/s", "--sim-bandwidth", "100GB/s")
    assert checks["model.memory"]["status"] == WARNING
    assert "one token uses 376" in checks["model.memory"]["found"]
    assert checks["disk.speed"]["status"] == checks["model.speed"]["status"] == WARNING


def test_a_flag_replaces_one_value_of_this_machine(directory, capsys):
    checks = preview(capsys, directory, "--sim-available", "8GB", "--sim-ssd", "500MB/s")
    assert "8.0 GB free, simulated" in checks["memory"]["found"]
    assert checks["disk.speed"]["status"] == WARNING
    assert checks["disk.kind"]["status"] == SKIPPED
    assert checks["model.memory"]["status"] == OK
    assert "simulated" not in checks["limits.working_set"]["found"]
    fewer = preview(capsys, directory, "--sim-available", "1MB")
    assert fewer["model.memory"]["status"] == FAILED


def test_the_json_lists_the_simulated_values(directory, capsys):
    doctor(build_parser().parse_args([str(directory), "--json"]))
    assert json.loads(capsys.readouterr().out)["simulated"] == {}
    doctor(build_parser().parse_args([str(directory), "--json", "--sim-memory", "64GB", "--sim-backend", "cpu"]))
    assert json.loads(capsys.readouterr().out)["simulated"] == {"memory": 64 * 10**9, "backend": "cpu"}


def test_a_simulated_cpu_needs_memory_for_float32(release, capsys):
    """The same memory holds fewer experts, since the CPU computes trunk, caches and activations in float32."""
    flags, found = ["--sim-memory", "128GB", "--sim-available", "96GB"], {}
    for backend in ("metal", "cpu"):
        text = preview(capsys, release, *flags, "--sim-backend", backend)["model.memory"]["found"]
        found[backend] = int(text.split()[0].replace(",", ""))
    assert found["cpu"] < found["metal"]


def test_stacked_experts_must_all_fit(tmp_path, capsys):
    stacked_directory(tmp_path)
    checks = preview(capsys, tmp_path, "--sim-memory", "64GB")
    assert checks["model.experts"]["status"] == WARNING
    assert "(100%)" in checks["model.memory"]["found"]
    code, checks = run_doctor(capsys, tmp_path, "--sim-memory", "64GB", "--sim-available", "1MB")
    assert code == 1
    assert "stacked ones must all be resident" in checks["model.memory"]["found"]


@pytest.mark.parametrize("sizes", [ItemBytes(2, 2, 2), ItemBytes(4, 2, 2), ItemBytes(4, 4, 2)])
def test_the_budget_counts_every_expert_as_the_first_of_its_layer(release, sizes):
    args, directory = ModelArgs.from_dict(released.CONFIG), Directory(release)
    entries = [e for file in directory.files for e in directory.header(file).tensors.values()]
    one_by_one = budget_of(((entry, 1) for entry in entries), args, 32768, CHUNK, *sizes)
    assert measure(directory, args, 32768, CHUNK, *sizes) == one_by_one


def test_the_context_is_at_most_the_models_maximum(directory, capsys):
    """The tiny model's maximum is 4096 tokens; the released one is planned with 32k."""
    assert "with 4,096 tokens of context" in preview(capsys, directory, "--sim-memory", "64GB")["model.memory"]["found"]


def test_each_header_is_read_once(directory, capsys, monkeypatch):
    """Reading the released model's headers, of 109,000 tensors, takes most of doctor's time."""
    read = []
    monkeypatch.setattr(directory_module, "read_header", lambda path: read.append(path.name) or read_header(path))
    assert run_doctor(capsys, directory)[0] == 0
    assert sorted(read) == sorted(path.name for path in directory.glob("model*.safetensors"))


def calls(function: Callable[[], object]) -> int:
    """How many functions run meanwhile: as much work on a slow or busy machine as on any other."""
    count = itertools.count()

    def note(frame, event: str, argument) -> None:
        if event in ("call", "c_call"):
            next(count)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return next(count)


def test_it_does_little_for_each_tensor_of_the_released_model(release, capsys):
    """There are 109,000: a search through all of them for each would take minutes."""
    tensors = sum(len(read_header(path).tensors) for path in release.glob("model*.safetensors"))
    args = build_parser().parse_args([str(release)])
    assert calls(lambda: doctor(args)) < 40 * tensors  # 23 when this was written


def test_a_plan_of_everything_does_little(capsys):
    args = plan.build_parser().parse_args(["--all"])
    assert calls(lambda: plan.plan(args)) < 1_000_000  # 480,000 when this was written


# The device, and NumPy's BLAS


def test_the_device_of_the_environment_is_named(capsys, monkeypatch):
    monkeypatch.setenv("MLX_MIMO_DEVICE", "cpu")
    found = run_doctor(capsys)[1]["backend"]
    assert found["found"].startswith("cpu")
    assert found["found"].endswith("as MLX_MIMO_DEVICE says")


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_a_fault_with_a_hint(capsys, monkeypatch):
    monkeypatch.setenv("MLX_MIMO_DEVICE", "gpu")
    code, found = run_doctor(capsys)
    assert (code, found["backend"]["status"], found["backend"]["hint"]) == (1, FAILED, "unset MLX_MIMO_DEVICE")
    assert "MLX_MIMO_DEVICE=gpu: MLX finds no GPU" in found["backend"]["found"]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("MLX_MIMO_DEVICE", "cpu")


def test_a_blas_that_can_be_limited_is_named(capsys, monkeypatch, on_cpu):
    blas = pytest.importorskip("mlx_mimo.cpu.blas")
    monkeypatch.setattr(blas, "limitable", lambda: ["openblas 0.3.31"])
    found = run_doctor(capsys)[1]["blas"]
    assert found["status"] == OK
    assert found["found"].startswith("openblas 0.3.31")


def test_a_blas_that_nothing_limits_is_a_warning(capsys, monkeypatch, on_cpu):
    blas = pytest.importorskip("mlx_mimo.cpu.blas")
    threadpoolctl = pytest.importorskip("threadpoolctl")
    monkeypatch.setattr(threadpoolctl.ThreadpoolController, "_load_libraries", lambda self: None)
    monkeypatch.setattr(checks, "numpy_blas", lambda: "accelerate")
    blas._libraries.cache_clear()
    try:
        code, found = run_doctor(capsys)
    finally:
        blas._libraries.cache_clear()
    assert (code, found["blas"]["status"]) == (0, WARNING)
    assert found["blas"]["found"].startswith("accelerate: a library whose threads cannot be limited")
    assert "VECLIB_MAXIMUM_THREADS" in found["blas"]["hint"]


def test_a_gpu_has_no_use_for_it(capsys):
    assert run_doctor(capsys, "--sim-backend", "metal")[1]["blas"]["status"] == SKIPPED


# Files that cannot be read, and indices that are none


def test_a_broken_link_fails_files_experts_and_manifest(directory, capsys):
    file = directory / "model-experts-2.safetensors"
    file.unlink()
    file.symlink_to(directory / "nowhere")
    assert fails(capsys, directory) == {"model.files", "model.experts", "model.manifest"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_fails_files_and_experts(directory, capsys):
    (directory / "model-experts-2.safetensors").chmod(0)
    assert {"model.files", "model.experts"} <= fails(capsys, directory)


@pytest.mark.parametrize("value", [5, None, ["a"], {}])
def test_an_index_whose_values_are_not_file_names_fails(directory, capsys, value):
    index = directory / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["lm_head.weight"] = value
    index.write_text(json.dumps(fields))
    assert "model.files" in fails(capsys, directory)
    with pytest.raises(FormatError, match=r"index\.json: not an index"):
        Directory(directory).check()


# What is said of memory is what plan says


@pytest.mark.parametrize(("gib", "status"), [(16, WARNING), (24, OK)])
def test_memory_is_judged_as_plan_judges_it(capsys, gib, status):
    checks = run_doctor(capsys, "--sim-memory", f"{gib}GiB")[1]
    planned = make_plan(subject_of(None, "2bit"), ModelArgs.from_dict(released.CONFIG), 32768, imagined("", gib * GIB))
    assert checks["memory"]["status"] == status
    assert (planned.forecast is not None) == (status == OK)


def test_more_free_memory_than_memory_is_refused(capsys):
    with pytest.raises(UsageError, match="--available"):
        run_doctor(capsys, "--sim-memory", "64GB", "--sim-available", "65GB")


def test_the_text_shows_id_and_hint(directory, capsys):
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
def test_the_kind_of_a_macs_disk_is_read_from_diskutil(info, kind):
    assert mac_disk_kind(info) == kind


@pytest.mark.parametrize(
    ("kind", "status"), [("SSD", OK), ("SSD on USB", WARNING), ("hard disk", WARNING), (None, SKIPPED)]
)
def test_slow_kinds_of_disk_are_warned_of(tmp_path, monkeypatch, kind, status):
    for name in ("_linux_disk", "_mac_disk"):
        monkeypatch.setattr(f"mlx_mimo.doctor.machine_checks.{name}", lambda directory: kind)
    check = disk_kind(tmp_path)
    assert check.status == status
    assert "free" in check.found


def test_doctor_loads_no_framework():
    code = (
        "import sys; sys.argv = ['doctor']; from mlx_mimo.doctor.__main__ import main; main(); "
        "sys.exit('imported' if {'transformers', 'torch', 'mlx_lm'} & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout


def test_every_id_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "JSON.md").read_text(encoding="utf-8")
    table = page.partition("## doctor")[2].partition("## plan")[0]
    rows = [row.partition("|")[2].partition("|")[0] for row in table.splitlines() if row.startswith("| `")]
    assert [name for row in rows for name in re.findall(r"`([^`]+)`", row)] == MACHINE + DIRECTORY
