"""`python -m mlx_mimo.chat`: an interactive conversation in a terminal, or line by line through a pipe."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import (
    add_adapter_argument,
    add_model_arguments,
    add_sampling_arguments,
    load_options,
    non_negative_float,
    positive_int,
    readable,
    run,
    share,
    take_any_bytes,
)
from .errors import MimoError

if TYPE_CHECKING:
    from .runtime.stream import Response

HELP = """\
/help              this list
/exit              leave (also Ctrl-D)
/system [TEXT]     set the system message, or drop it; starts anew
/clear             start anew, the system message stays
/think on|off      think before the answer
/temperature X     sampling temperature, 0 is greedy
/top-p X           share of probability that is sampled from
/stats             speed and expert residency of the last answer
/save FILE         write the conversation as JSON
/load FILE         read it back
Ctrl-C stops an answer after the next token, a second one at once.
A line that ends with \\ goes on in the next."""


MESSAGE_KEYS = ("role", "content", "reasoning_content")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_mimo chat", description="Chat with the model.")
    add_model_arguments(parser)
    add_adapter_argument(parser)
    parser.add_argument("--system-prompt", type=readable, help="the system message")
    parser.add_argument("-m", "--max-tokens", type=positive_int, default=4096, help="of one answer (default: 4096)")
    add_sampling_arguments(parser)
    parser.add_argument("--think", action="store_true", help="let the model think before it answers")
    parser.add_argument("--no-think", action="store_true", help="do not show what it thinks")
    return parser


class Chat:
    """One session: a conversation, and the settings for sampling its answers."""

    def __init__(self, model, tokenizer, args: argparse.Namespace):
        from .runtime.conversation import Conversation

        self.args = args
        self.model, self.tokenizer = model, tokenizer
        self.conversation = Conversation(model, tokenizer, args.system_prompt, args.think)
        self.last: Response | None = None

    def answer(self, text: str) -> None:
        """Runs one turn and prints the answer as it is generated; Ctrl-C ends it and keeps the text so far."""
        from .console import Interrupts, PrefillProgress, Printer
        from .runtime.conversation import Stopped
        from .runtime.loaded import loaded_of
        from .runtime.sampling import sampler_for

        sampler = sampler_for(self.args, loaded_of(self.model).sampling)
        options = {"max_tokens": self.args.max_tokens, "sampler": sampler}
        printer, stopped = None, False
        try:
            with Interrupts() as interrupts, PrefillProgress(sys.stderr) as bar:

                def progress(done: int, total: int) -> None:
                    if interrupts.asked:
                        raise Stopped
                    bar(done, total)

                with closing(self.conversation.answer(text, prompt_progress_callback=progress, **options)) as steps:
                    for step in steps:
                        bar.close()
                        printer = printer or Printer(self.tokenizer, [], hide_thinking=self.args.no_think)
                        printer.write(step.token, step.text)
                        self.last = step
                        if interrupts.asked:
                            break
                stopped = interrupts.asked
        except KeyboardInterrupt:
            stopped = True
        finally:
            if stopped:
                print(" [stopped]", end="" if printer else "\n", file=sys.stderr, flush=True)
            if printer is not None:
                printer.end()

    def command(self, line: str) -> bool:
        """Executes a line that begins with a slash; returns False where the program is to end. Raises MimoError for a
        wrong command."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/exit" | "/quit":
                return False
            case "/help":
                print(HELP)
            case "/system":
                self.conversation.system = rest or None
                self.conversation.clear()
            case "/clear":
                self.conversation.clear()
            case "/think":
                if rest not in ("on", "off"):
                    raise MimoError(f"/think: on or off expected, {rest!r} found")
                self.conversation.thinking = rest == "on"
            case "/temperature":
                self.args.temp = self._number(name, rest, non_negative_float)
            case "/top-p":
                self.args.top_p = self._number(name, rest, share)
            case "/stats":
                self._statistics()
            case "/save":
                self._save(self._file(name, rest))
            case "/load":
                self._load(self._file(name, rest))
            case _:
                raise MimoError(f"{name}: no such command; /help lists them")
        return True

    def _number(self, name: str, text: str, parse: Callable[[str], float]) -> float:
        try:
            return parse(text)
        except argparse.ArgumentTypeError as error:
            raise MimoError(f"{name}: {error}") from None

    def _file(self, name: str, text: str) -> Path:
        if not text:
            raise MimoError(f"{name}: the name of a file expected")
        return Path(text).expanduser()

    def _statistics(self) -> None:
        from .runtime.session import experts_report

        if self.last is None:
            print("nothing generated yet")
            return
        print(f"{self.last.generation_tokens} tokens at {self.last.generation_tps:.1f}/s, ", end="")
        print(f"{self.last.prompt_tokens} new prompt tokens, first token after {self.last.ttft_s:.2f} s")
        experts = experts_report(self.model)
        if experts:
            print(f"experts: {experts['hit_rate']:.1%} hits, {experts['slots']} slots, {experts['policy']}, ", end="")
            print(f"{experts['bytes_read'] / 1e9:.2f} GB read")

    def _save(self, path: Path) -> None:
        conversation = self.conversation
        state = {"system": conversation.system, "messages": conversation.messages}
        try:
            path.write_text(json.dumps(state, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise MimoError(f"{path}: cannot be written: {error.strerror}") from None

    def _load(self, path: Path) -> None:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            json.dumps(state, ensure_ascii=False).encode()  # raises where JSON escapes half of a surrogate pair
            system, messages = state["system"], state["messages"]
            if not (system is None or isinstance(system, str)) or not all(map(is_message, messages)):
                raise TypeError("system and messages")
        except OSError as error:
            raise MimoError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise MimoError(f"{path}: not a conversation that /save wrote") from None
        self.conversation.clear()
        self.conversation.system, self.conversation.messages = system, messages


def is_message(value) -> bool:
    """Whether a value is a message as /save writes it."""
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys() <= {*MESSAGE_KEYS}:
        return False
    return value["role"] in ("user", "assistant") and all(isinstance(text, str) for text in value.values())


def read_line(interactive: bool) -> str:
    """One message; raises EOFError at the end. Backslashes at line ends join lines."""
    lines: list[str] = []
    while True:
        try:
            line = input(("> " if not lines else ". ") if interactive else "")
        except EOFError:
            if not lines:
                raise
            return "\n".join(lines)
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)


def use_history() -> None:
    """Turns on line editing and a history that is kept between runs, where Python has readline."""
    try:
        import readline
    except ImportError:
        return  # some builds of Python have none; input() works without it
    import atexit

    import platformdirs

    file = Path(platformdirs.user_state_dir("mlx-mimo", appauthor=False)) / "chat_history"
    readline.set_history_length(1000)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.stat().st_size:
            readline.read_history_file(file)
    except OSError as error:
        print(f"note: the lines you type are not kept: {file}: {error.strerror}", file=sys.stderr)
        return
    atexit.register(save_history, readline.write_history_file, file)


def save_history(write: Callable[[Path], None], file: Path) -> None:
    """Writes the history into a file that only its owner can read."""
    before = os.umask(0o077)
    try:
        write(file)
        file.chmod(0o600)
    except OSError as error:
        print(f"note: the lines you typed are not kept: {file}: {error.strerror}", file=sys.stderr)
    finally:
        os.umask(before)


def converse(session: Chat, interactive: bool) -> bool:
    """Answers messages and executes commands until the input ends; returns whether none of them failed."""
    well = True
    while True:
        try:
            line = read_line(interactive)
        except EOFError:
            return well
        except KeyboardInterrupt:
            print()
            continue
        try:
            if line.startswith("/"):
                if not session.command(line):
                    return well
            elif line.strip():
                session.answer(line)
        except MimoError as error:
            well = False
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(file=sys.stderr)


def chat(args: argparse.Namespace) -> int:
    import mlx.core as mx

    from .runtime.load import load
    from .runtime.session import end_residency, wired_limit

    if args.seed is not None:
        mx.random.seed(args.seed)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    take_any_bytes(sys.stdin)
    model, tokenizer = load(args.model, adapter_path=args.adapter_path, **load_options(args))
    try:
        session = Chat(model, tokenizer, args)
        if interactive:
            use_history()
            print("/help lists the commands, /exit leaves.")
        with wired_limit(model, args.wired):
            well = converse(session, interactive)
    finally:
        end_residency(model, args.profile)
    return 0 if well or interactive else 1


def main() -> int:
    args = build_parser().parse_args()
    return run(lambda: chat(args))


if __name__ == "__main__":
    sys.exit(main())
