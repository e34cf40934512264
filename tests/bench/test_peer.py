"""mlx-lm beside us: the same tokens, nothing left running behind an answer, an error where its process ends."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step, generation_stream
from support.converted import converted_directory

from mlx_mimo import load
from mlx_mimo.bench.peer import Peer, load_peer, timed
from mlx_mimo.bench.timing import Case
from mlx_mimo.errors import MimoError
from mlx_mimo.runtime.steps import steps

pytestmark = pytest.mark.long  # mlx-lm in a process of its own.


def test_mlx_lm_generates_the_same_tokens_as_our_model():
    """Greedy, at the window that mlx-lm has: what is timed on both sides is one model."""
    directory = converted_directory("bf16")
    theirs = load_peer(directory)
    window = theirs.args.sliding_window_size
    ours, _ = load(directory, expert_memory="all", sliding_window=window)
    prompt = mx.array(list(range(7, 7 + 3 * window, 2)))
    our_tokens = [step.token for step in steps(ours, prompt, max_tokens=24)]
    their_tokens = [int(token) for token, _ in generate_step(prompt, theirs, max_tokens=24)]
    ours.residency.close()
    assert our_tokens == their_tokens
    assert len(set(our_tokens)) > 3


class Noted(nn.Module):
    """Not a language model: it says when it is called."""

    layers = ()

    def __init__(self, events: list):
        super().__init__()
        self._events = events

    def __call__(self, tokens: mx.array, cache=None) -> mx.array:
        self._events.append("step")
        return mx.zeros((1, tokens.shape[1], 16))


def test_the_peer_answers_when_nothing_of_its_run_is_left(monkeypatch):
    """mlx-lm enqueues a step more than it is asked for; it must not run while we are timed."""
    events, synchronize = [], mx.synchronize
    monkeypatch.setattr(mx, "synchronize", lambda stream: (events.append(stream), synchronize(stream))[1])
    timed(Noted(events), [], [1, 2], [3, 4, 5])
    steps = events.count("step")
    assert steps > 3, "one more than was asked for"
    assert events.index(generation_stream) == steps, "it waits for what runs there, after the last step"


def test_a_peer_that_cannot_load_is_an_error_with_its_exit_code(tmp_path):
    with pytest.raises(MimoError, match="its process ended with 1"), Peer(tmp_path):
        pass


def test_a_peer_that_dies_between_runs_is_an_error_not_a_closed_pipe():
    """As a BrokenPipeError it would end the command quietly, with exit code 0."""
    case, tokens = Case(300, 0, 4), list(range(304))
    with Peer(converted_directory()) as peer:
        assert peer.run(case, tokens).decode_s > 0
        peer.process.kill()
        peer.process.wait()
        with pytest.raises(MimoError, match="its process ended with -9"):
            peer.run(case, tokens)
