"""--expert-memory auto: load, plan, doctor and the bridge choose the same on the same simulated machine."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import mlx.core as mx
import psutil
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from support.converted import converted_directory

import mlx_mimo.runtime.load as loading
from mlx_mimo.bridge import model as bridge_file
from mlx_mimo.checkpoint.directory import Directory
from mlx_mimo.config.model_args import ModelArgs
from mlx_mimo.doctor.directory_checks import directory_checks
from mlx_mimo.errors import MimoError
from mlx_mimo.plan import subject_of
from mlx_mimo.planning import machine
from mlx_mimo.planning.budget import CHUNK, item_bytes, measure
from mlx_mimo.planning.machine import this_machine
from mlx_mimo.planning.memory import available_memory
from mlx_mimo.planning.plan import make_plan
from mlx_mimo.runtime.steps import steps
from mlx_mimo.units import format_size


@dataclass
class Memory:
    """Stands in for psutil's memory values."""

    total: int
    available: int


@pytest.fixture
def free(monkeypatch):
    """Returns a function that sets the bytes of free memory."""
    memory = Memory(64 * 10**9, 0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    def free(nbytes: int) -> None:
        memory.available = nbytes

    return free


@pytest.fixture
def metal(monkeypatch):
    """Returns a function that simulates a Mac with a working set of so many bytes."""

    def metal(working_set: int) -> None:
        limits = {"max_recommended_working_set_size": working_set}
        monkeypatch.setattr(machine, "backend_and_limits", lambda: ("metal", limits))
        monkeypatch.setattr(loading, "on_cpu", lambda: False)
        monkeypatch.setattr(loading.mx, "device_info", lambda: limits)

    return metal


def config_of(directory) -> tuple[Directory, ModelArgs]:
    found = Directory(directory)
    return found, ModelArgs.from_dict(found.config)


def budget_of(cpu: bool):
    directory, args = config_of(converted_directory())
    return measure(directory.path, args, args.max_position_embeddings, CHUNK, *item_bytes(cpu))


def room_for(budget, slots: int) -> int:
    """Bytes that must be free for `slots` experts and the smallest chunk: half of them are left to the system."""
    return 2 * (budget.with_chunk(256).non_expert_bytes + slots * budget.slot_bytes + budget.slot_bytes // 2)


def planned_slots() -> tuple[int, int]:
    """(slots, chunk) that plan chooses."""
    directory, args = config_of(converted_directory())
    found = make_plan(subject_of(str(directory.path), None), args, args.max_position_embeddings, this_machine())
    return found.forecast.slots, found.budget.chunk


def checked(name: str) -> str:
    checks = directory_checks(converted_directory(), deep=False)
    return next(check.found for check in checks if check.id == name)


def test_load_plan_and_doctor_choose_the_same_on_this_cpu(free):
    budget = budget_of(cpu=True)
    available = room_for(budget, 10)
    free(available)
    assert planned_slots() == (10, 256)
    assert checked("model.memory").startswith("10 of 24 experts resident")
    free(available - budget.trunk)  # which is loaded before `auto` looks
    model, _ = loading.load(converted_directory())
    assert (model.residency.counters.slots, model.loaded.prefill_chunk) == (10, 256)
    model.residency.close()


@pytest.mark.parametrize("tight", ["memory", "working set"])
def test_load_plan_and_doctor_choose_the_same_on_metal(free, metal, tight):
    """Metal's limit is for trunk and experts together, whether it or free memory is the smaller."""
    budget = budget_of(cpu=False)
    least, plenty = room_for(budget, 7), 50 * 10**9
    metal(plenty if tight == "memory" else least)
    available = least if tight == "memory" else plenty
    free(available)
    assert planned_slots() == (7, 256)
    assert checked("model.memory").startswith("7 of 24 experts resident")
    free(available - budget.trunk)
    directory, args = config_of(converted_directory())
    found = loading.expert_limit(directory, args, "auto")
    assert (found.expert_bytes // budget.slot_bytes, found.chunk) == (7, 256)
    assert found.expert_bytes + found.budget.non_expert_bytes <= least


def test_memory_already_held_counts_within_the_working_set(free):
    free(30)
    assert available_memory() == 30
    assert available_memory(held=12) == 42
    assert available_memory(working_set=40, held=12) == 40
    assert available_memory(working_set=50, held=12) == 42


def test_a_size_and_all_are_granted_whatever_is_free(free):
    free(10**6)
    directory, args = config_of(converted_directory())
    budget = budget_of(cpu=True)
    assert loading.expert_limit(directory, args, 50_000).expert_bytes == 50_000
    assert loading.expert_limit(directory, args, "all").expert_bytes == budget.experts


def test_training_counts_the_trunk_within_the_working_set(free, monkeypatch):
    """The trunk in memory reduces what Metal's limit leaves for whole experts."""
    trunk, held = 4000, SimpleNamespace(slots=3, slot_bytes=100)
    parameters = {"trunk": mx.zeros(trunk // 4)}
    directory = Directory(converted_directory())
    needed = sum(file.num_experts * file.layout.nbytes for file in directory.expert_files.values())
    model = SimpleNamespace(
        residency=SimpleNamespace(counters=held), parameters=lambda: parameters, _directory=directory
    )
    assert sum(value.nbytes for _, value in tree_flatten(parameters)) == trunk
    monkeypatch.setattr(bridge_file, "on_cpu", lambda: False)
    free(10**9)
    monkeypatch.setattr(bridge_file, "working_set", lambda: needed + trunk)
    bridge_file._WithResidency._check_memory(model, "training")
    monkeypatch.setattr(bridge_file, "working_set", lambda: needed + trunk - 1)
    with pytest.raises(MimoError, match="training needs all experts"):
        bridge_file._WithResidency._check_memory(model, "training")


def test_the_bridge_leaves_room_for_the_chunks_of_mlx_lm(free):
    """mlx-lm's commands always compute 2048 tokens at a time; our own loop would choose fewer here."""
    directory, args = config_of(converted_directory())
    usual = budget_of(cpu=True)
    free(room_for(usual, 24) - usual.trunk)
    assert loading.expert_limit(directory, args, "auto").chunk == 256
    with pytest.raises(MimoError, match="before the first expert"):
        loading.expert_limit(directory, args, "auto", fixed_chunk=True)
    free(2 * (usual.non_expert_bytes + 10 * usual.slot_bytes))
    assert loading.expert_limit(directory, args, "auto", fixed_chunk=True).chunk == 2048


def test_a_bridged_model_needs_room_for_chunks_of_2048_tokens(free):
    directory, args = config_of(converted_directory())
    sizes = item_bytes(cpu=True, trunk_kernels=False)
    budget = measure(directory.path, args, args.max_position_embeddings, CHUNK, *sizes)
    classes = bridge_file.classes(directory.path, bridge_file.Settings())
    free(2 * budget.non_expert_bytes - budget.trunk)
    with pytest.raises(MimoError, match=f"{format_size(budget.non_expert_bytes)} are needed before the first expert"):
        load_model(directory.path, get_model_classes=lambda config: classes)
    free(2 * (budget.non_expert_bytes + 9 * budget.slot_bytes) - budget.trunk)
    model, _ = load_model(directory.path, get_model_classes=lambda config: classes)
    assert model.residency.counters.slots == 9
    model.residency.close()


# The chunk that the plan chose


def chunks_of(model, prompt: int, **options) -> list[int]:
    """The lengths of the chunks in which a prompt is computed."""
    seen = []

    class Watched:
        args, make_cache = model.args, model.make_cache

        def __call__(self, tokens, cache):
            return model(tokens, cache=cache)

        def prefill(self, tokens, cache):
            seen.append(tokens.shape[1])
            return model.prefill(tokens, cache=cache)

    watched = Watched()
    if hasattr(model, "loaded"):
        watched.loaded = model.loaded
    next(steps(watched, mx.array(list(range(prompt))), max_tokens=1, **options))
    return seen


def test_a_prompt_is_computed_in_the_chunks_of_the_plan(free):
    budget = budget_of(cpu=True)
    free(room_for(budget, 24) - budget.trunk)
    model, _ = loading.load(converted_directory())
    assert model.loaded.prefill_chunk == 256
    assert chunks_of(model, 300) == [256, 43]
    assert chunks_of(model, 300, prefill_step_size=200) == [200, 99]
    free(10**10)
    assert loading.expert_limit(*config_of(converted_directory()), "auto").chunk == 2048
    del model.loaded
    assert chunks_of(model, 300) == [299]  # a model that was not loaded by us


def test_stacked_experts_leave_the_rest_to_the_chunk(free):
    directory, args = config_of(converted_directory())
    budget = budget_of(cpu=True)
    free(budget.kv + budget.experts + budget.with_chunk(512).transients)
    assert loading.expert_limit(directory, args, "all").chunk == 512


def test_a_large_chunk_is_chosen_where_most_experts_stream_and_there_is_room():
    """It costs at most a twentieth of the slots, and halves the reads of a long prompt."""
    from mlx_mimo.planning.forecast import fit_on
    from mlx_mimo.planning.machine import GIB, imagined

    subject = subject_of(None, "4bit")
    args = ModelArgs.from_dict(subject.config)
    mac = imagined("", 128 * GIB, 7e9, 546e9)
    large = make_plan(subject, args, 32768, mac)
    usual = fit_on(subject.budget(args, 4000, mac), mac)
    assert (large.budget.chunk, usual.chunk) == (4096, 2048)  # a context of 4000 tokens has no such chunk
    assert large.forecast.slots > 0.95 * usual.expert_bytes // usual.budget.slot_bytes
    cpu = make_plan(subject, args, 32768, replace(mac, backend="cpu"))
    assert cpu.budget.chunk == 2048


@pytest.mark.parametrize(("flags", "chunk"), [([], 256), (["--prefill-step-size", "100"], 100)])
def test_the_server_computes_prompts_in_the_chunks_of_the_plan(free, flags, chunk):
    from mlx_mimo.server.__main__ import build_parser, complete
    from mlx_mimo.server.engine.engine_model import EngineModel
    from mlx_mimo.server.running import model_source

    free(room_for(budget_of(cpu=True), 24) - budget_of(cpu=True).trunk)
    args = build_parser().parse_args(["--model", str(converted_directory()), *flags])
    complete(args)
    loaded = EngineModel(model_source(args, converted_directory(), {"expert_memory": "auto"}))
    assert loaded.chunk == chunk
    loaded.close()
