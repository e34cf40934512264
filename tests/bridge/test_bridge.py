"""The bridge's switch and settings, and the model that mlx-lm's loader builds through it."""

import hashlib
import json
import re
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from support.bridged import bridged_directory
from support.checkpoints import tiny_config
from support.converted import converted_directory

import mlx_mimo.bridge
from mlx_mimo.bridge import __main__ as bridge
from mlx_mimo.bridge import model as bridge_file
from mlx_mimo.bridge.model import VARIABLES, Settings, classes
from mlx_mimo.errors import FormatError, MimoError, UsageError
from mlx_mimo.models.cache import make_cache

DOCUMENTED = Path(__file__).parents[2] / "docs" / "SERVER.md"

# The switch


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def test_off_restores_every_byte(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_bytes((converted_directory() / "config.json").read_bytes())
    before = digests(directory)
    bridge.switch(directory, True)
    assert json.loads((directory / "config.json").read_text())["model_file"] == bridge.FILE
    once = digests(directory)
    bridge.switch(directory, True)
    assert digests(directory) == once
    bridge.switch(directory, False)
    assert digests(directory) == before


def status(directory: Path, state: str = "status") -> int:
    return bridge.bridge(bridge.build_parser().parse_args([str(directory), state]))


@pytest.fixture
def switched_on(tmp_path) -> Path:
    (tmp_path / "config.json").write_bytes((converted_directory() / "config.json").read_bytes())
    bridge.switch(tmp_path, True)
    return tmp_path


def test_status_says_whether_the_bridge_is_on(switched_on, capsys):
    assert status(switched_on) == 0
    assert capsys.readouterr().out == f"{switched_on}: bridge on\n"
    assert status(switched_on, "off") == 0
    assert capsys.readouterr().out == f"{switched_on}: bridge off\n"


EARLIER = "from mlx_mimo.runtime.bridge_file import classes\n"


@pytest.mark.parametrize(
    ("content", "found"), [(EARLIER, "was written by another version of mlx-mimo"), (None, "is missing")]
)
def test_status_tells_a_file_of_another_version_and_on_writes_it_anew(switched_on, capsys, content, found):
    file, config = switched_on / bridge.FILE, (switched_on / "config.json").read_bytes()
    file.unlink() if content is None else file.write_text(content)
    assert status(switched_on) == 1
    message = f"bridge on, but {bridge.FILE} {found}; run mlx_mimo bridge {switched_on} on again"
    assert capsys.readouterr().out == f"{switched_on}: {message}\n"
    assert status(switched_on, "on") == 0
    assert file.read_text() == bridge.CONTENT
    assert (switched_on / "config.json").read_bytes() == config


def test_the_written_file_imports_what_the_package_offers():
    assert "from mlx_mimo.bridge import classes\n" in bridge.CONTENT
    assert mlx_mimo.bridge.classes is classes


def test_off_removes_the_key_from_a_config_that_mlx_lm_rewrote(tmp_path):
    before = json.loads((converted_directory() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(before | {"model_file": bridge.FILE}, indent=4, sort_keys=True))
    bridge.switch(tmp_path, False)
    assert json.loads((tmp_path / "config.json").read_text()) == before


def test_on_rejects_a_directory_whose_model_file_is_not_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"model_file": "other.py"}')
    with pytest.raises(FormatError, match=r"other\.py"):
        bridge.switch(tmp_path, True)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_file": "other.py"}


def test_on_rejects_an_fp8_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(UsageError, match="convert it first"):
        bridge.switch(tmp_path, True)


# Settings


def test_settings_come_from_the_environment_and_errors_name_the_variable():
    assert Settings.from_environment({}) == Settings()
    found = Settings.from_environment({"MLX_MIMO_EXPERT_MEMORY": "24GB", "MLX_MIMO_LOOKAHEAD": "1"})
    assert (found.expert_memory, found.lookahead) == (24 * 10**9, True)
    wrong = {
        "EXPERT_MEMORY": "much",
        "EXPERT_POLICY": "fifo",
        "THREADS": "0",
        "LOOKAHEAD": "yes",
        "READER_THREADS": "65",
    }
    for name, text in wrong.items():
        with pytest.raises(UsageError, match=f"MLX_MIMO_{name}"):
            Settings.from_environment({f"MLX_MIMO_{name}": text})


def test_the_documented_variables_are_those_of_the_code():
    table = DOCUMENTED.read_text(encoding="utf-8").split("| variable | meaning |", 1)[1].split("\n\n", 1)[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.MULTILINE))
    fields = {bridge_file.PREFIX + field.upper(): text for field, (_, text) in VARIABLES.items()}
    assert rows.keys() == fields.keys() | {"MLX_MIMO_CPU_KERNELS", "MLX_MIMO_DEVICE"}
    for name, text in fields.items():
        assert rows[name].replace("`", "") == text
    assert f"default {Settings().reader_threads}" in rows["MLX_MIMO_READER_THREADS"]


@pytest.mark.parametrize(
    ("field", "value"), [("expert_memory", 1000), ("profile", Path("use.npz")), ("trace", Path("routes"))]
)
def test_a_stacked_directory_rejects_settings_that_need_residency(field, value, tmp_path):
    with pytest.raises(MimoError, match=f"MLX_MIMO_{field.upper()}"):
        classes(tmp_path, Settings(**{field: value}))


# The model


@pytest.fixture
def bridged(monkeypatch):
    """Loads the bridged directory as mlx-lm does, with the given environment."""
    models = []

    def load(**settings):
        for name, value in settings.items():
            monkeypatch.setenv(f"MLX_MIMO_{name}", value)
        models.append(load_model(bridged_directory(), trust_remote_code=True)[0])
        return models[-1]

    yield load
    mx.enable_compile()  # on a CPU the bridge turns it off for the whole process
    for model in models:
        model._end_residency()


def test_mlx_lm_loads_our_model_with_streamed_experts(bridged):
    model = bridged(EXPERT_MEMORY="120KB")
    assert not model.residency.all_resident
    assert not [name for name, _ in tree_flatten(model.parameters()) if "switch_mlp" in name]


def test_mlx_lms_caches_give_the_logits_of_ours(bridged):
    model = bridged(EXPERT_MEMORY="120KB")
    tokens = mx.random.randint(0, 256, (1, 50))  # three windows
    ours, theirs = make_cache(model.args), model.make_cache()
    for start, end in ((0, 30), (30, 49), (49, 50)):
        piece = tokens[:, start:end]
        assert mx.allclose(model(piece, cache=ours), model(piece, cache=theirs), atol=1e-4)


@pytest.mark.parametrize("memory", ["120KB", "all"])
def test_training_ends_residency_and_computes_the_same(bridged, memory):
    model = bridged(EXPERT_MEMORY=memory)
    tokens = mx.array([[5, 6, 7, 8]])
    before = model(tokens)
    model.train()
    assert model.residency is None
    assert [name for name, _ in tree_flatten(model.parameters()) if "switch_mlp" in name]
    assert mx.allclose(before, model(tokens), atol=1e-3)
    assert not [name for name, _ in tree_flatten(model.trainable_parameters()) if "switch_mlp" in name]
    whole = model.layers[1].mlp.switch_mlp
    model.eval()
    model.train()
    assert model.layers[1].mlp.switch_mlp is whole, "an evaluation between two steps read the experts again"


def test_training_rejects_experts_that_do_not_fit_into_memory(bridged, monkeypatch):
    model = bridged(EXPERT_MEMORY="120KB")
    tokens = mx.array([[5, 6, 7, 8]])
    before = model(tokens)
    monkeypatch.setattr(bridge_file, "available_memory", lambda working_set, held: 1000)
    with pytest.raises(MimoError, match="needs all experts in memory"):
        model.train()
    assert mx.array_equal(before, model(tokens)), "the refusal left the model as it was"


def test_a_profile_is_saved_when_training_begins(bridged, tmp_path):
    model = bridged(EXPERT_MEMORY="120KB", PROFILE=str(tmp_path / "use.npz"))
    mx.eval(model(mx.array([[5, 6, 7, 8]])))
    model.train()
    assert bridged(EXPERT_MEMORY="120KB").residency.counters.preloaded > 0
