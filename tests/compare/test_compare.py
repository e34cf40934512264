"""compare: zero for a model and itself, what a plain computation gives for two, the same with streamed experts."""

import json
import os
import shutil
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from support.converted import converted_directory

from mlx_mimo import load
from mlx_mimo.compare import __main__ as compare_module
from mlx_mimo.compare.__main__ import build_parser, compare
from mlx_mimo.compare.quality import Comparer, windows
from mlx_mimo.errors import FormatError, MimoError, UsageError

TEXT = "The quick brown fox jumps over the lazy dog. " * 2


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run_compare(capsys, *arguments) -> dict:
    assert compare(build_parser().parse_args([*map(str, arguments), "--json"])) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_compared_with_itself_has_no_divergence(text, capsys):
    a = converted_directory()
    fields = run_compare(capsys, a, a, "--text", text, "--window", 32)
    assert fields["schema_version"] == 1
    assert fields["kl_mean"] == fields["kl_max"] == 0
    assert fields["top1_agreement"] == 1
    assert fields["perplexity_a"] == fields["perplexity_b"]


def test_streamed_experts_give_the_figures_of_resident_ones(text, capsys):
    a, b = converted_directory("bf16"), converted_directory()
    whole = run_compare(capsys, a, b, "--text", text, "--window", 32, "--expert-memory", "all")
    streamed = run_compare(capsys, a, b, "--text", text, "--window", 32, "--expert-memory", "150kB")
    assert streamed["experts_b"]["misses"] > 0
    for name in ("tokens", "top1_agreement"):
        assert whole[name] == streamed[name]
    for name in ("kl_mean", "kl_99", "perplexity_a", "perplexity_b"):
        assert whole[name] == pytest.approx(streamed[name], rel=1e-4)


def test_the_figures_equal_a_plain_computation_of_them(text, capsys):
    """The reference is computed in float64 without blocks."""
    a, b = converted_directory("bf16"), converted_directory("2bit")
    fields = run_compare(capsys, a, b, "--text", text, "--window", 40)
    kl, agree, lost = [], [], ([], [])
    models = [load(path, expert_memory="all") for path in (a, b)]
    ids = models[0][1].encode(TEXT, add_special_tokens=False)
    for start in range(0, len(ids), 40):
        piece = ids[start : start + 40]
        logits = [np.array(model(mx.array([piece]))[0], dtype=np.float64)[:-1] for model, _ in models]
        p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in logits)
        kl += (p * np.log(p / q)).sum(axis=1).tolist()
        agree += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
        for which, x in enumerate((p, q)):
            lost[which].extend(-np.log(x[np.arange(len(piece) - 1), piece[1:]]))
    assert fields["tokens"] == len(kl)
    assert fields["kl_mean"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert fields["kl_mean"] > 1e-4
    assert fields["kl_99"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert fields["top1_agreement"] == np.mean(agree)
    assert fields["perplexity_a"] == pytest.approx(np.exp(np.mean(lost[0])), rel=1e-4)
    assert fields["perplexity_b"] == pytest.approx(np.exp(np.mean(lost[1])), rel=1e-4)


def test_more_bits_give_a_smaller_divergence(text, capsys):
    far, near = (
        run_compare(capsys, converted_directory("bf16"), converted_directory(recipe), "--text", text)["kl_mean"]
        for recipe in ("2bit", "8bit")
    )
    assert near < far / 10


def test_max_tokens_limits_the_text(text, capsys):
    a = converted_directory()
    fields = run_compare(capsys, a, a, "--text", text, "--window", 8, "--max-tokens", 20)
    assert (fields["tokens"], fields["windows"]) == (20 - 3, 3)


def test_a_token_of_probability_0_adds_nothing_to_the_divergence():
    comparer = Comparer()
    a = np.log(np.array([[1.0, 0.5], [0.5, 0.5]], dtype=np.float32))
    a[0, 1] = -np.inf
    comparer.add(a, np.log(np.array([[0.5, 0.5], [0.5, 0.5]], dtype=np.float32)), [0, 1])
    result = comparer.result()
    assert result.kl_mean == pytest.approx(np.log(2) / 2, rel=1e-6)
    assert result.perplexity_b == pytest.approx(2)


def test_a_last_window_of_one_token_is_left_out():
    assert windows(range(9), 4, 100) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.usefixtures("unrun")
def test_compare_rejects_directories_with_different_tokenizers(tmp_path, text):
    other = shutil.copytree(converted_directory(), tmp_path / "other")
    fields = json.loads((other / "tokenizer.json").read_text())
    vocab = fields["model"]["vocab"]
    vocab["a"], vocab["b"], vocab["o"], vocab["e"] = vocab["b"], vocab["a"], vocab["e"], vocab["o"]
    (other / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(MimoError, match="different tokenizers"):
        run_pair(other, text)


@pytest.fixture
def unrun(monkeypatch):
    """Fails the test where a model is loaded."""
    monkeypatch.setattr("mlx_mimo.runtime.load.load", lambda *_, **__: pytest.fail("loaded"))


def run_pair(b, text, *arguments):
    compare(build_parser().parse_args([str(converted_directory()), str(b), "--text", str(text), *arguments]))


@pytest.mark.usefixtures("unrun")
def test_both_directories_are_checked_before_either_is_loaded(tmp_path, text):
    with pytest.raises(UsageError, match="nowhere: no such directory"):
        run_pair(tmp_path / "nowhere", text)
    cut = shutil.copytree(converted_directory(), tmp_path / "cut")
    with open(cut / "model-experts-2.safetensors", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(FormatError, match="model-experts-2"):
        run_pair(cut, text)


@pytest.mark.usefixtures("unrun")
def test_compare_rejects_directories_with_different_vocabularies(tmp_path, text):
    other = shutil.copytree(converted_directory(), tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"vocab_size": 384}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(MimoError, match="other: vocabulary of 384, 320 in"):
        run_pair(other, text)


@pytest.mark.usefixtures("unrun")
def test_compare_rejects_a_temporary_folder_without_room(text, monkeypatch):
    """20 tokens in windows of 8 are 17 predictions of 320 float32."""
    need = 17 * 320 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1))
    with pytest.raises(MimoError, match=r"21\.8 kB are needed for A's predictions, 21\.8 kB are free.*TMPDIR"):
        run_pair(converted_directory(), text, "--window", "8", "--max-tokens", "20")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need))
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        run_pair(converted_directory(), text, "--window", "8", "--max-tokens", "20")


def test_the_temporary_file_has_the_announced_size(text, monkeypatch):
    sizes = []
    whole = compare_module._PredictionComparer.__init__

    def look(self, file, *rest):
        sizes.append(os.fstat(file.fileno()).st_size)
        whole(self, file, *rest)

    monkeypatch.setattr(compare_module._PredictionComparer, "__init__", look)
    run_pair(converted_directory(), text, "--window", "8", "--max-tokens", "20")
    assert sizes == [17 * 320 * 4]


def test_compare_rejects_a_text_that_does_not_exist():
    a = str(converted_directory())
    with pytest.raises(UsageError, match="cannot be read"):
        compare(build_parser().parse_args([a, a, "--text", "/no/such/file"]))
