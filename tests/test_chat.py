"""chat in a terminal and through a pipe, and a conversation whose caches are reused."""

import gc
import json
import os
import signal
import stat
import subprocess
import sys
import weakref

import mlx.core as mx
import pytest
from support.bridged import link_directory
from support.converted import converted_directory
from support.patience import DEADLINE
from support.terminal import CTRL_A, CTRL_C, CTRL_D, UP, Terminal
from test_generate import mimo

from mlx_mimo import load
from mlx_mimo.chat import HELP, Chat, build_parser
from mlx_mimo.console import Interrupts
from mlx_mimo.errors import MimoError
from mlx_mimo.runtime.conversation import Conversation, Stopped


def greedy(logprobs):
    return mx.argmax(logprobs, axis=-1)


def answer(conversation, text, n=6):
    return list(conversation.answer(text, max_tokens=n, sampler=greedy))


@pytest.fixture(scope="module")
def loaded():
    return load(converted_directory(), expert_memory="all")


def test_the_second_turn_computes_only_its_new_tokens_and_answers_the_same(loaded):
    kept = Conversation(*loaded)
    answer(kept, "first question, long enough to leave the window behind")
    second = answer(kept, "second")
    anew = Conversation(*loaded)
    anew.messages = [*kept.messages[:2]]
    again = answer(anew, "second")
    assert [r.token for r in second] == [r.token for r in again]
    assert second[0].prompt_tokens < again[0].prompt_tokens


@pytest.fixture(params=[True, False], ids=["on demand", "ahead"])
def either_loop(request, loaded, monkeypatch):
    """Both orders: the next forward pass begins after a token was handed out, or before."""
    monkeypatch.setattr(loaded[0].loaded, "synchronous", request.param)
    return loaded


def first_logprobs(responses) -> mx.array:
    return responses[0].logprobs


def same_as_anew(loaded, conversation, text):
    """The answer to `text`, checked against a conversation with the same messages and empty caches."""
    anew = Conversation(*loaded)
    anew.messages = [*conversation.messages]
    found, wanted = answer(conversation, text), answer(anew, text)
    assert [r.token for r in found] == [r.token for r in wanted]
    assert mx.allclose(first_logprobs(found), first_logprobs(wanted), atol=1e-3)
    return found, wanted


def test_every_turn_computes_only_its_new_tokens_in_both_orders(either_loop):
    conversation = Conversation(*either_loop)
    answer(conversation, "first question, long enough to leave the window behind", n=9)
    for text in ("second", "third"):
        found, anew = same_as_anew(either_loop, conversation, text)
        # The template goes on from the very tokens of the answer; the last of them was not computed.
        assert found[0].prompt_tokens <= len(text) + 40 < anew[0].prompt_tokens


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_stopped_answer_keeps_the_caches_of_its_text(tokens, either_loop):
    conversation = Conversation(*either_loop)
    steps = conversation.answer("first, a question of some length, longer than the next", max_tokens=20, sampler=greedy)
    said = "".join(next(steps).text for _ in range(tokens))
    steps.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    found, anew = same_as_anew(either_loop, conversation, "second")
    assert found[0].prompt_tokens < anew[0].prompt_tokens - 50


def test_a_prompt_stopped_between_chunks_is_taken_back_and_its_caches_stay(loaded):
    conversation = Conversation(*loaded)

    def stop(done, total):
        if done >= 24:
            raise Stopped

    text = "a question that takes several chunks"
    options = {"max_tokens": 5, "sampler": greedy, "prefill_step_size": 8, "prompt_progress_callback": stop}
    assert list(conversation.answer(text, **options)) == []
    assert conversation.messages == []
    found, anew = same_as_anew(loaded, conversation, text)
    assert found[0].prompt_tokens == anew[0].prompt_tokens - 24


def test_an_interrupted_forward_pass_does_not_change_the_next_turn(loaded, monkeypatch):
    conversation = Conversation(*loaded)
    answer(conversation, "first")
    layer = loaded[0].layers[2].mlp
    with monkeypatch.context() as patch:
        patch.setattr(type(layer), "__call__", broken_off)
        with pytest.raises(KeyboardInterrupt):
            answer(conversation, "second")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    same_as_anew(loaded, conversation, "second")


def broken_off(*_):
    raise KeyboardInterrupt


def test_logprobs_of_earlier_tokens_are_freed(loaded):
    conversation = Conversation(*loaded)
    steps = conversation.answer("hello", max_tokens=5, sampler=greedy)
    first = weakref.ref(next(steps))
    next(steps)
    gc.collect()
    assert first() is None
    steps.close()


# Ctrl-C


def test_the_first_interrupt_sets_asked_and_the_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_the_prompt_is_read_ends_the_answer_not_the_program(times, loaded, monkeypatch, capsys):
    session = Chat(*loaded, build_parser().parse_args(["-m", "4", "--temp", "0"]))
    read = type(loaded[0]).prefill

    def interrupted(*args, **keywords):
        read(*args, **keywords)
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(type(loaded[0]), "prefill", interrupted)
        session.answer("hello")
    assert session.conversation.messages == []
    assert capsys.readouterr() == ("", " [stopped]\n")
    session.answer("hello")
    assert len(session.conversation.messages) == 2


MOST_TOKENS = 10**6  # hours


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A directory whose model knows no end token, and no end of its positions that a test would see."""
    directory = tmp_path_factory.mktemp("endless") / "model"
    link_directory(converted_directory(), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**7}))
    for name in ("generation_config.json", "tokenizer_config.json"):
        (directory / name).unlink()
    fields = json.loads((converted_directory() / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(fields | {"eos_token": "<|never|>"}))
    return directory


def own_state(folder) -> dict[str, str]:
    """An environment in which chat keeps its history in `folder`."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HOME" if sys.platform == "darwin" else "XDG_STATE_HOME": str(folder)}


def chat_in_terminal(directory, folder, *flags) -> Terminal:
    command = (sys.executable, "-m", "mlx_mimo.chat", "--model", str(directory), "--temp", "0", *flags)
    return Terminal(*command, env=own_state(folder))


@pytest.mark.long
def test_in_a_terminal_ctrl_c_stops_the_answer_and_lines_are_edited_and_remembered(endless, tmp_path):
    with chat_in_terminal(endless, tmp_path, "-m", str(MOST_TOKENS)) as terminal:
        terminal.expect("/help lists the commands(.|\\s)*> ")
        terminal.type(b"hello\r")
        terminal.expect(r"hello\r\n(\x1b\[\?2004l\r)?\s*[^\x1b\s]")  # the answer, and no answer to the terminal
        terminal.type(CTRL_C)
        terminal.expect(r"\[stopped\]")
        terminal.expect("> ")
        terminal.type(b"/stats\r")
        assert int(terminal.expect(r"(\d+) tokens at")[1]) < MOST_TOKENS
        terminal.expect(" GB read\\s+.*> ")
        terminal.type(CTRL_C)
        terminal.expect("> ")
        terminal.type(b"think maybe" + CTRL_A + b"/\r")
        terminal.expect("error: /think: on or off expected, 'maybe' found\\s+.*> ")
        terminal.type(UP + b"\r")
        terminal.expect("error: /think: on or off expected, 'maybe' found\\s+.*> ")
        terminal.type(CTRL_D)
        assert terminal.ended() == 0
    (history,) = tmp_path.rglob("chat_history")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with chat_in_terminal(endless, tmp_path) as terminal:
        terminal.expect("> ")
        terminal.type(UP + b"\r")
        terminal.expect("error: /think: on or off expected, 'maybe' found\\s+.*> ")
        terminal.type(b"/exit\r")
        assert terminal.ended() == 0


@pytest.mark.long
def test_a_history_that_cannot_be_written_is_a_note(endless, tmp_path):
    (tmp_path / "file").write_text("")
    with chat_in_terminal(endless, tmp_path / "file") as terminal:
        terminal.expect("note: the lines you type are not kept: .*chat_history: Not a directory")
        terminal.expect("> ")
        terminal.type(b"/exit\r")
        assert terminal.ended() == 0


# Commands and pipes


def talk(*lines: str, n: int = 4, model=None):
    flags = ("--model", model or converted_directory(), "-m", n, "--temp", 0)
    return mimo(*flags, stdin="\n".join(lines), command="chat")


@pytest.mark.long
def test_a_pipe_runs_commands_and_answers(tmp_path):
    file = tmp_path / "talk.json"
    lines = ["/system Be brief.", "hello", "/stats", f"/save {file}", "/clear", f"/load {file}", "more", "/exit", "no"]
    result = mimo("--model", converted_directory(), "-m", 4, "--temp", 0, stdin="\n".join(lines), command="chat")
    assert result.returncode == 0, result.stderr
    assert "tokens at" in result.stdout
    saved = json.loads(file.read_text())
    assert saved["system"] == "Be brief."
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]


def said(session, capsys, *lines: str) -> str:
    for line in lines:
        if line.startswith("/"):
            session.command(line)
        else:
            session.answer(line)
    return capsys.readouterr().out


def test_load_restores_what_save_wrote(loaded, tmp_path, capsys):
    first, later, other = (Chat(*loaded, build_parser().parse_args(["-m", "4", "--temp", "0"])) for _ in range(3))
    said(first, capsys, "/system Be brief.", "a first question", f"/save {tmp_path / 'talk.json'}")
    wanted = said(first, capsys, "and more")
    assert said(later, capsys, f"/load {tmp_path / 'talk.json'}", "and more") == wanted
    assert later.conversation.messages == first.conversation.messages
    assert said(other, capsys, "and more") != wanted


def test_help_and_settings(loaded, capsys):
    session = Chat(*loaded, build_parser().parse_args([]))
    for line in ("/help", "/think on", "/temperature 0.5", "/top-p 0.9"):
        assert session.command(line)
    assert capsys.readouterr().out == HELP + "\n"
    assert session.conversation.thinking
    assert (session.args.temp, session.args.top_p) == (0.5, 0.9)
    session.command("/think off")
    assert not session.conversation.thinking
    assert not session.command("/exit")


@pytest.mark.parametrize(
    "line", ["/top-p 7", "/top-p -1", "/top-p nan", "/temperature -1", "/temperature inf", "/temperature", "/think"]
)
def test_chat_rejects_settings_out_of_range_and_changes_nothing(line, loaded):
    session = Chat(*loaded, build_parser().parse_args(["--temp", "0.3", "--top-p", "0.4"]))
    with pytest.raises(MimoError, match=line.split()[0]):
        session.command(line)
    assert (session.args.temp, session.args.top_p, session.conversation.thinking) == (0.3, 0.4, False)


@pytest.mark.parametrize(
    "state",
    [
        [],
        {"system": 7, "messages": []},
        {"system": None},
        {"system": None, "messages": [{"role": "user", "content": 1}]},
        {"system": None, "messages": [{"role": "emperor", "content": "kneel"}]},
        {"system": None, "messages": [{"role": "user", "content": "hi", "tool_calls": "x"}]},
        {"system": None, "messages": {"role": "user"}},
        {"system": "half \ud83d", "messages": []},
    ],
)
def test_load_rejects_what_save_would_not_write(state, loaded, tmp_path):
    session = Chat(*loaded, build_parser().parse_args([]))
    session.conversation.messages = before = [{"role": "user", "content": "kept"}]
    (tmp_path / "talk.json").write_text(json.dumps(state))
    with pytest.raises(MimoError, match="not a conversation that /save wrote"):
        session.command(f"/load {tmp_path / 'talk.json'}")
    assert session.conversation.messages is before


@pytest.mark.long
def test_a_template_that_rejects_a_message_is_an_error_and_chat_goes_on(tmp_path):
    directory = tmp_path / "model"
    link_directory(converted_directory(), directory)
    fields = json.loads((directory / "tokenizer_config.json").read_text())
    refusal = "{%- if 'secret' in messages[-1].content -%}{{ raise_exception('not that') }}{%- endif -%}"
    (directory / "tokenizer_config.json").unlink()
    fields["chat_template"] = refusal + fields["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    result = talk("a secret", "hello", f"/save {tmp_path / 'talk.json'}", model=directory)
    assert result.returncode == 1
    assert result.stderr == "error: the chat template refuses this conversation: not that\n"
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "hello"


@pytest.mark.long
def test_an_unfinished_last_line_is_kept_and_bytes_that_are_not_utf8_are_accepted(tmp_path):
    file = tmp_path / "talk.json"
    command = [sys.executable, "-m", "mlx_mimo.chat", "--model", str(converted_directory()), "-m", "2", "--temp", "0"]
    lines = f"one \\\ntwo\nbyte \udcff\n/save {file}\n/stats\\".encode(errors="surrogateescape")
    result = subprocess.run(command, input=lines, capture_output=True, env=own_state(tmp_path), timeout=DEADLINE)
    assert result.returncode == 0, result.stderr
    messages = json.loads(file.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["one \ntwo", "byte \ufffd"]
    assert b"tokens at" in result.stdout


@pytest.mark.long
def test_wrong_commands_are_errors_and_chat_goes_on(tmp_path):
    (tmp_path / "bad.json").write_text("[]")
    lines = ["/fly", "/think maybe", "/temperature hot", f"/load {tmp_path / 'bad.json'}", "/save", "hello"]
    result = mimo("--model", converted_directory(), "-m", 2, "--temp", 0, stdin="\n".join(lines), command="chat")
    assert result.returncode == 1
    assert result.stderr.count("error:") == 5
    assert "Traceback" not in result.stderr
