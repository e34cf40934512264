"""The generate command as a process: flags, output and exit codes."""

import json
import os
import subprocess
import sys

import pytest
from support.converted import converted_directory, fp8_directory
from support.patience import DEADLINE

FIELDS = {
    "text",
    "token_ids",
    "prompt_tokens",
    "prompt_tps",
    "generation_tokens",
    "generation_tps",
    "ttft_s",
    "peak_memory_bytes",
    "finish_reason",
    "experts",
}
EXPERT_FIELDS = {
    "policy",
    "slots",
    "slot_bytes",
    "hits",
    "misses",
    "evictions",
    "hit_rate",
    "bytes_read",
    "read_seconds",
}


def mimo(*arguments, stdin: str | None = None, command="generate"):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", f"mlx_mimo.{command}", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment,
        timeout=DEADLINE,
    )


def test_json_has_the_documented_fields():
    result = mimo("--model", converted_directory(), "--prompt", "hello", "--max-tokens", 6, "--json", "--temp", 0)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) == FIELDS
    assert set(report["experts"]) >= EXPERT_FIELDS
    assert report["generation_tokens"] == len(report["token_ids"]) <= 6
    assert report["finish_reason"] in ("length", "stop")


@pytest.mark.long
def test_a_budget_and_a_prompt_from_stdin_give_the_same_text():
    whole = mimo("--model", converted_directory(), "-p", "the same", "-m", 8, "--temp", 0, "--json")
    streamed = mimo(
        *("--model", converted_directory(), "-p", "-", "-m", 8, "--temp", 0, "--json", "--expert-memory", "100kB"),
        stdin="the same",
    )
    assert streamed.returncode == 0, streamed.stderr
    one, two = json.loads(whole.stdout), json.loads(streamed.stdout)
    assert one["token_ids"] == two["token_ids"]
    assert two["experts"]["slots"] < one["experts"]["slots"]
    assert two["experts"]["misses"] > 0


@pytest.mark.long
@pytest.mark.parametrize(("prompt", "stdin"), [(b"a \xff b", b""), (b"-", b"a \xff b")])
def test_bytes_that_are_not_utf8_are_accepted(prompt, stdin):
    command = [sys.executable, "-m", "mlx_mimo.generate", "--model", str(converted_directory()), "--json"]
    command += ["-m", "2", "--temp", "0", "--prompt", os.fsdecode(prompt)]
    result = subprocess.run(command, input=stdin, capture_output=True, timeout=DEADLINE)
    assert result.returncode == 0, result.stderr
    plain = mimo("--model", converted_directory(), "--json", "-m", 2, "--temp", 0, "--prompt", "a \ufffd b")
    assert json.loads(result.stdout)["prompt_tokens"] == json.loads(plain.stdout)["prompt_tokens"]


def test_text_goes_to_stdout_and_statistics_to_stderr():
    result = mimo("--model", converted_directory(), "--prompt", "hello", "--max-tokens", 4, "--seed", 1, "--temp", 1)
    assert result.returncode == 0, result.stderr
    assert "prompt tokens at" in result.stderr
    assert "prompt tokens" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--max-tokens", "-1"], 2, "--max-tokens"),
        (["--expert-memory", "lots"], 2, "24GB"),
        (["--sliding-window", "0"], 2, "--sliding-window"),
        (["--temp", "nan"], 2, "--temp"),
        (["--top-p", "7"], 2, "--top-p: a number from 0 to 1"),
        (["--reader-threads", "0"], 2, "--reader-threads"),
        (["--reader-threads", "65"], 2, "reader threads: 1 to 64 expected"),
        (["--chat-template-config", "{"], 2, "JSON"),
        (["--prompt", ""], 2, "empty"),
        (["--model", "./nowhere"], 2, "no such directory"),
    ],
)
def test_wrong_usage_is_one_line_on_stderr(arguments, code, words):
    result = mimo("--model", converted_directory(), *arguments)
    assert result.returncode == code
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.long
def test_max_tokens_0_generates_nothing():
    result = mimo("--model", converted_directory(), "--prompt", "hello", "--max-tokens", 0, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["text"], report["token_ids"], report["finish_reason"]) == ("", [], "length")


@pytest.mark.long
@pytest.mark.parametrize("flags", [("--json",), ()])
def test_the_answer_is_printed_before_a_profile_fails_to_be_written(flags, tmp_path):
    profile = tmp_path / "no such folder" / "use.json"
    arguments = ("--prompt", "hello", "-m", 3, "--temp", 0, "--expert-memory", "100kB", "--profile", profile)
    result = mimo("--model", converted_directory(), *arguments, *flags)
    assert result.returncode == 1
    assert f"{profile}: profile cannot be written" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    if flags:
        assert len(json.loads(result.stdout)["token_ids"]) == 3
    else:
        assert result.stdout.strip()
        assert "prompt tokens at" in result.stderr


@pytest.mark.long
def test_generate_rejects_a_prompt_longer_than_the_context():
    result = mimo("--model", converted_directory(), "--prompt", "-", stdin="x" * 300_000)
    assert result.returncode == 2
    assert "max_position_embeddings" in result.stderr


def test_an_fp8_directory_without_a_terminal_prints_the_command():
    result = mimo("--model", fp8_directory(), "--prompt", "hello")
    assert result.returncode == 1
    assert "mlx_mimo convert --hf-path" in result.stderr


def test_the_console_entry_lists_commands_and_rejects_others():
    listing = subprocess.run([sys.executable, "-m", "mlx_mimo"], capture_output=True, text=True)
    assert listing.returncode == 0
    assert "generate" in listing.stdout
    unknown = subprocess.run([sys.executable, "-m", "mlx_mimo", "fly"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "'fly'" in unknown.stderr
