"""Output for a terminal: text as it is generated, thoughts dim or hidden, and a bar while a long prompt is read."""

import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Printer:
    """Writes generated text to a stream. Thoughts, between <think> and </think>, are dim on a terminal, or hidden."""

    def __init__(self, tokenizer, prompt: Sequence[int], hide_thinking: bool = False, out: TextIO | None = None):
        """`prompt` is searched for a thought that it leaves open; `out` is stdout by default."""
        self.out = out or sys.stdout
        self.hide = hide_thinking
        self.colour = self.out.isatty()
        self.start = getattr(tokenizer, "think_start_id", None) if tokenizer.has_thinking else None
        self.end_of_thought = tokenizer.think_end_id if tokenizer.has_thinking else None
        self.thinking = self._open_thought(list(prompt))
        self.dimmed = False
        if self.thinking:
            self._dim(True)

    def _open_thought(self, prompt: list[int]) -> bool:
        for token in reversed(prompt):
            if token in (self.start, self.end_of_thought):
                return token == self.start
        return False

    def _dim(self, on: bool) -> None:
        if self.colour and on != self.dimmed:
            self.out.write(DIM if on else PLAIN)
            self.dimmed = on

    def write(self, token: int, text: str) -> None:
        if token == self.start:
            self.thinking = True
            self._dim(True)
        if not (self.thinking and self.hide):
            self.out.write(text)
        elif token == self.end_of_thought:
            text = text.partition("</think>")[2]
            self.out.write(text)
        if token == self.end_of_thought:
            self._dim(False)
            self.thinking = False
        self.out.flush()

    def end(self) -> None:
        self._dim(False)
        self.out.write("\n")
        self.out.flush()


class Interrupts:
    """Context manager for the main thread: the first Ctrl-C sets `asked`, so that a loop can end where that is safe;
    the second raises KeyboardInterrupt at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interrupts":
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class PrefillProgress:
    """A progress callback (done, total) that shows a bar on a terminal once a prompt has taken more than a second."""

    def __init__(self, out: TextIO):
        self.out = out
        self.began = time.perf_counter()
        self.bar: tqdm | None = None

    def __enter__(self) -> "PrefillProgress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __call__(self, done: int, total: int) -> None:
        if not self.out.isatty() or (self.bar is None and time.perf_counter() - self.began < 1):
            return
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc="prompt", unit="token", leave=False, file=self.out)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
