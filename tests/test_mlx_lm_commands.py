"""mlx-lm's own commands as processes on a converted directory: stock, and with our model through the bridge."""

import importlib.util
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from support.bridged import KINDS, generated, mlx_lm, mlx_lm_server, succeeded
from support.patience import DEADLINE

EITHER = pytest.mark.parametrize("kind", KINDS)
EXTRA = "the extra is missing: pip install 'mlx-mimo[evaluate]'"

pytestmark = pytest.mark.long


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=EXTRA)


GREEDY = ("--prompt", "hello", "-m", 12, "--temp", 0)


def test_generate_needs_trust_remote_code_where_the_bridge_is_on():
    refused = mlx_lm("bridged", "generate", *GREEDY, without=("--trust-remote-code",))
    assert refused.returncode != 0
    assert "trust_remote_code" in refused.stderr


def test_generate_runs_without_the_flag_where_the_bridge_is_off():
    assert len(generated(mlx_lm("stock", "generate", *GREEDY))) > 1


def test_generate_with_streamed_experts_gives_the_text_of_the_resident_model(tmp_path):
    profile = tmp_path / "use.npz"
    streamed = generated(mlx_lm("bridged", "generate", *GREEDY, settings={"MLX_MIMO_PROFILE": str(profile)}))
    assert streamed == generated(mlx_lm("bridged", "generate", *GREEDY, settings={"MLX_MIMO_EXPERT_MEMORY": "all"}))
    assert profile.exists(), "our residency did not run"


def test_a_profile_that_cannot_be_written_is_one_line_at_the_end(tmp_path):
    profile = tmp_path / "no such folder" / "use.npz"
    result = mlx_lm("bridged", "generate", *GREEDY, settings={"MLX_MIMO_PROFILE": str(profile)})
    assert generated(result)
    assert result.stderr.splitlines()[-1].startswith(f"mlx_mimo: error: {profile}: profile cannot be written")
    assert "Traceback" not in result.stderr


@EITHER
def test_chat_answers(kind):
    said = succeeded(mlx_lm(kind, "chat", "--max-tokens", 4, "--temp", 0, stdin="hello\nand now\nq\n"))
    assert said.count("›") == 3
    assert said.rstrip().endswith("bye\x1b[0m")


@EITHER
def test_a_cache_that_cache_prompt_wrote_serves_generate(kind, tmp_path):
    file = ("--prompt-cache-file", tmp_path / "cache.safetensors")
    succeeded(mlx_lm(kind, "cache_prompt", "--prompt", "hello, this is longer than one window of it", *file))
    assert generated(mlx_lm(kind, "generate", "--prompt", "more", "-m", 3, "--temp", 0, *file))


@EITHER
def test_benchmark_runs(kind):
    measured = succeeded(mlx_lm(kind, "benchmark", "-p", 8, "-g", 4, "-n", 1))
    found = re.search(r"Averages: prompt_tps=([\d.]+), generation_tps=([\d.]+)", measured)
    assert float(found[1]) > 0
    assert float(found[2]) > 0


# The server


@EITHER
def test_server_answers(kind, tmp_path):
    profile, log = tmp_path / "use.npz", tmp_path / "log"

    def ask(text: str) -> dict:
        messages = [{"role": "user", "content": text}]
        body = {"messages": messages, "max_tokens": 5, "temperature": 0}
        answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=DEADLINE)
        assert answer.status_code == 200, log.read_text()
        return answer.json()

    with mlx_lm_server(kind, log, settings={"MLX_MIMO_PROFILE": str(profile)}) as url:
        first = ask("hello")
        assert first["usage"]["completion_tokens"] == 5
        with ThreadPoolExecutor(2) as pool:  # mlx-lm puts the two into one batch
            together = list(pool.map(ask, ["hello", "good morning"]))
        assert together[0]["choices"][0]["message"] == first["choices"][0]["message"]
        assert together[1]["usage"]["completion_tokens"] == 5
    assert profile.exists() == (kind == "bridged"), log.read_text()


# Perplexity and evaluation, on local data

SENTENCES = ["the cat sat on the mat", "the dog ran to the tree", "a bird sang in the rain", "we all went home"]


def perplexity(kind: str, folder: Path, settings: dict | None = None) -> float:
    flags = ("--data-path", folder, "--sequence-length", 40, "--num-samples", 2, "--batch-size", 2)
    caches = {"HF_HOME": str(folder.parent / "hf")}
    printed = succeeded(mlx_lm(kind, "perplexity", *flags, settings=caches | (settings or {})))
    return float(re.search(r"Perplexity: ([\d.]+)", printed)[1])


@needs("datasets")
def test_perplexity_of_a_local_folder(tmp_path):
    folder = tmp_path / "sentences"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    streamed = perplexity("bridged", folder)
    assert streamed == perplexity("bridged", folder, {"MLX_MIMO_EXPERT_MEMORY": "all"})
    # mlx-lm's own model computes in bfloat16 here, and its window is a key shorter.
    assert streamed == pytest.approx(perplexity("stock", folder), rel=0.05)


CHOOSE = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}]
"""
WRITE = """\
task: endings
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


@needs("lm_eval")
@needs("datasets")
@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_with_local_tasks(kind, tmp_path):
    (tmp_path / "colours.yaml").write_text(CHOOSE)
    (tmp_path / "endings.yaml").write_text(WRITE)
    # Each question once with either answer: whatever the model prefers, half of them are right.
    asked = [
        {"question": f"the {thing} is", "choices": [" blue", " green"], "answer": answer}
        for thing in ("sky", "sea", "meadow")
        for answer in (0, 1)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    flags = ("--tasks", "colours.yaml", "endings.yaml", "--batch-size", 2, "--output-dir", "results")
    succeeded(mlx_lm(kind, "evaluate", *flags, settings={"HF_HOME": str(tmp_path / "hf")}, cwd=tmp_path))
    (file,) = (tmp_path / "results").iterdir()
    results = json.loads(file.read_text())
    assert results["colours"]["acc,none"] == 0.5
    assert results["colours"]["sample_len"] == results["endings"]["sample_len"] == len(asked)
    assert results["endings"]["exact_match,none"] == 0.0  # four tokens of a random model
