"""The stream of steps: without a tokenizer (`steps`), with text (`text_steps`), as Responses (`stream_generate`)."""

import dataclasses

import mlx.core as mx
import pytest
from mlx_lm.generate import GenerationResponse
from support.cached import PAST, tiny_model
from support.converted import converted_directory

from mlx_mimo import load, stream_generate
from mlx_mimo.errors import UsageError
from mlx_mimo.planning.budget import CHUNK
from mlx_mimo.runtime.loaded import Loaded
from mlx_mimo.runtime.steps import Step, steps
from mlx_mimo.runtime.stream import Response, check_prompt, text_steps

PROMPT = PAST[:40]  # past the tiny model's window of 16


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def loaded():
    return load(converted_directory(), expert_memory="all")


class Watched:
    """A model that notes the shape of each forward pass. `chunks` are the prompt's, `forwards` the number of others."""

    def __init__(self, model, synchronous: bool = True):
        self.model, self.args = model, model.args
        self.loaded = Loaded(synchronous=synchronous)
        self.chunks: list[int] = []
        self.forwards = 0

    def make_cache(self) -> list:
        return self.model.make_cache()

    def prefill(self, tokens: mx.array, cache: list) -> None:
        self.chunks.append(tokens.shape[1])
        self.model.prefill(tokens, cache=cache)

    def __call__(self, tokens: mx.array, cache: list) -> mx.array:
        self.forwards += 1
        return self.model(tokens, cache=cache)


def tokens_of(model, prompt=PROMPT, n=8, **options) -> list[int]:
    return [step.token for step in steps(model, mx.array(prompt), max_tokens=n, **options)]


def lengths(cache: list) -> set[int]:
    return {layer.offset for layer in cache}


# Tokens


def test_steps_are_the_greedy_tokens_with_their_logprobs(model):
    found = list(steps(model, mx.array(PROMPT), max_tokens=4))
    tokens = list(PROMPT)
    for step in found:
        logits = model(mx.array([tokens]), cache=model.make_cache())[0, -1]
        wanted = logits - mx.logsumexp(logits)
        assert step.token == wanted.argmax().item()
        assert mx.allclose(step.logprobs, wanted, atol=1e-4)
        assert step.logprobs.shape == (model.args.vocab_size,)
        assert not step.from_draft
        tokens.append(step.token)


@pytest.mark.parametrize("synchronous", [True, False])
def test_both_orders_of_token_and_forward_give_the_same_steps(model, synchronous):
    watched = Watched(model, synchronous)
    assert tokens_of(watched, n=12) == tokens_of(model, n=12)
    assert watched.forwards == 12, "a forward pass was computed for no token"


def test_an_empty_prompt_is_an_error(loaded):
    with pytest.raises(UsageError, match="the prompt is empty"):
        next(steps(loaded[0], mx.array([], dtype=mx.int32)))
    for prompt in ([], mx.array([], dtype=mx.int32)):
        with pytest.raises(UsageError, match="the prompt is empty"):
            next(stream_generate(*loaded, prompt))


def test_a_prompt_that_fills_the_context_is_an_error(loaded):
    model, tokenizer = loaded
    limit = model.args.max_position_embeddings
    with pytest.raises(UsageError, match=f"fewer than max_position_embeddings = {limit:,} expected"):
        next(stream_generate(model, tokenizer, [65] * limit))


def test_a_prompt_one_token_short_of_the_context_is_taken(model):
    prompt = mx.array([65] * (model.args.max_position_embeddings - 1))
    assert check_prompt(prompt, model) is prompt


def test_no_tokens_asked_for_computes_nothing(model, loaded):
    watched = Watched(model)
    assert tokens_of(watched, n=0) == []
    assert (watched.chunks, watched.forwards) == ([], 0)
    assert list(stream_generate(*loaded, PROMPT, max_tokens=0)) == []


def test_one_token_takes_one_forward_after_the_prompt(model):
    for synchronous in (True, False):
        watched = Watched(model, synchronous)
        assert len(tokens_of(watched, n=1)) == 1
        assert (watched.chunks, watched.forwards) == ([len(PROMPT) - 1], 1)


def test_minus_one_generates_until_it_is_closed(model, loaded):
    endless = steps(model, mx.array(PROMPT), max_tokens=-1)
    assert len([next(endless) for _ in range(260)]) == 260  # more than the default
    endless.close()
    answer = stream_generate(*loaded, PROMPT, max_tokens=-1)
    assert next(answer).finish_reason is None
    answer.close()


# The prompt


@pytest.mark.parametrize(
    ("length", "chunk", "wanted"),
    [
        (1, 4, []),
        (2, 4, [1]),
        (4, 4, [3]),
        (5, 4, [4]),
        (6, 4, [4, 1]),
        (9, 4, [4, 4]),
        (10, 4, [4, 4, 1]),
        (4, 1, [1, 1, 1]),
    ],
)
def test_a_prompt_is_computed_in_chunks_and_its_last_token_alone(model, length, chunk, wanted):
    watched = Watched(model)
    calls = []
    found = tokens_of(
        watched, PAST[:length], 3, prefill_step_size=chunk, prompt_progress_callback=lambda *call: calls.append(call)
    )
    assert watched.chunks == wanted
    assert calls == [(sum(wanted[:i]), length) for i in range(len(wanted) + 1)]
    assert found == tokens_of(model, PAST[:length], 3)


def test_a_model_that_load_did_not_make_is_computed_in_chunks_of_the_usual_size(model):
    chunks = []

    class Foreign:
        def __call__(self, tokens, cache):
            chunks.append(tokens.shape[1])
            return mx.zeros((1, tokens.shape[1], 4))

    assert tokens_of(Foreign(), [1] * (2 * CHUNK + 2), 1, cache=[]) == [0]
    assert chunks == [CHUNK, CHUNK, 1, 1]


def test_a_callback_that_raises_ends_the_prompt_with_consistent_caches(model):
    class Enough(Exception):
        pass

    def stop(done, total):
        if done == 16:
            raise Enough

    cache = model.make_cache()
    with pytest.raises(Enough):
        next(steps(model, mx.array(PROMPT), cache, prefill_step_size=8, prompt_progress_callback=stop))
    assert lengths(cache) == {16}
    rest = [step.token for step in steps(model, mx.array(PROMPT[16:]), cache, max_tokens=5)]
    assert rest == tokens_of(model, n=5)


# When a forward pass begins, and what the caches hold


def test_a_synchronous_model_begins_no_forward_before_the_next_token_is_asked_for(model):
    watched = Watched(model)
    answer = steps(watched, mx.array(PROMPT), max_tokens=3)
    for token in (1, 2, 3):
        next(answer)
        assert watched.forwards == token
    assert list(answer) == []
    assert watched.forwards == 3


def test_other_models_have_the_next_forward_enqueued_before_a_token_is_handed_out(model):
    watched = Watched(model, synchronous=False)
    answer = steps(watched, mx.array(PROMPT), max_tokens=3)
    begun = []
    for _ in answer:
        begun.append(watched.forwards)
    assert begun == [2, 3, 3]


def test_logits_processors_are_never_run_ahead(model):
    watched = Watched(model, synchronous=False)
    next(steps(watched, mx.array(PROMPT), max_tokens=3, logits_processors=[lambda tokens, logits: logits]))
    assert watched.forwards == 1


@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize("taken", [1, 2, 7])
def test_closing_leaves_the_caches_a_prefix_of_what_was_handed_out(model, taken, synchronous):
    watched = Watched(model, synchronous)
    cache = model.make_cache()
    answer = steps(watched, mx.array(PROMPT), cache, max_tokens=20)
    tokens = [*PROMPT, *(next(answer).token for _ in range(taken))]
    answer.close()
    (held,) = lengths(cache)
    assert held == len(tokens) - synchronous, "all that was handed out, but a last token that was not computed"
    goes_on = tokens if held < len(tokens) else [*tokens, 7]
    rest = [step.token for step in steps(model, mx.array(goes_on[held:]), cache, max_tokens=5)]
    assert rest == tokens_of(model, goes_on, 5)


@pytest.mark.parametrize("synchronous", [True, False])
def test_all_tokens_but_the_last_are_in_the_caches_at_the_end(model, synchronous):
    cache = model.make_cache()
    list(steps(Watched(model, synchronous), mx.array(PROMPT), cache, max_tokens=6))
    assert lengths(cache) == {len(PROMPT) + 5}


def test_closing_the_responses_closes_the_steps_under_them(loaded):
    _, tokenizer = loaded
    ended = []

    def counted():
        try:
            for token in range(100):
                yield Step(token=token, logprobs=mx.zeros(4))
        finally:
            ended.append(True)

    answer = text_steps(counted(), tokenizer, -1)
    next(answer)
    assert not ended
    answer.close()
    assert ended


# Samplers and processors


def test_a_sampler_chooses_from_normalised_logprobs(model):
    seen = []

    def second_best(logprobs):
        seen.append(mx.exp(logprobs).sum().item())
        return mx.argsort(-logprobs, axis=-1)[:, 1]

    found = list(steps(model, mx.array(PROMPT), max_tokens=3, sampler=second_best))
    assert seen == pytest.approx([1.0] * 3, abs=1e-4)
    for step in found:
        assert (step.logprobs > step.logprobs[step.token]).sum().item() == 1


def test_logits_processors_see_the_prompt_and_each_token_before_their_own(model):
    seen = []

    def remember(tokens, logits):
        assert logits.shape == (1, model.args.vocab_size)
        seen.append(tokens.tolist())
        return logits

    found = tokens_of(model, n=4, logits_processors=[remember])
    assert seen == [[*PROMPT, *found[:i]] for i in range(4)]


def test_logits_processors_run_in_order_and_decide(model):
    def only(token):
        return lambda tokens, logits: mx.where(mx.arange(logits.shape[1]) == token, 1e9, logits)

    assert tokens_of(model, n=2, logits_processors=[only(5), lambda tokens, logits: -logits, only(9)]) == [9, 9]


# Text


def scripted(tokens: list[int]):
    for token in tokens:
        yield Step(token=token, logprobs=mx.zeros(4), from_draft=token % 2 == 1)


def test_text_comes_with_the_token_that_completes_it(loaded):
    _, tokenizer = loaded
    text = "a – b"  # the dash takes three bytes
    tokens = tokenizer.encode(text, add_special_tokens=False)
    found = list(text_steps(scripted(tokens), tokenizer, -1))
    assert [step.token for step in found] == tokens
    assert [step.count for step in found] == list(range(1, len(tokens) + 1))
    assert [step.from_draft for step in found] == [token % 2 == 1 for token in tokens]
    assert all(text.startswith("".join(step.text for step in found[:i])) for i in range(len(found)))


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_the_last_step_brings_the_text_that_was_held_back(loaded, reason):
    _, tokenizer = loaded
    half = tokenizer.encode("a –", add_special_tokens=False)[:-1]  # a character that is never completed
    following = [next(iter(tokenizer.eos_token_ids)), 65] if reason == "stop" else [65]
    *others, last = text_steps(scripted([*half, *following]), tokenizer, -1 if reason == "stop" else len(half))
    assert (last.finish_reason, last.count) == (reason, len(half) + (reason == "stop"))
    assert "\ufffd" not in "".join(step.text for step in others)
    assert last.text.endswith("\ufffd")


def test_an_end_token_wins_over_the_limit(loaded):
    _, tokenizer = loaded
    (step,) = text_steps(scripted([next(iter(tokenizer.eos_token_ids))]), tokenizer, 1)
    assert (step.text, step.finish_reason) == ("", "stop")


def test_every_end_token_of_the_tokenizer_ends_the_text(loaded):
    _, tokenizer = loaded
    assert len(tokenizer.eos_token_ids) > 1
    for end in tokenizer.eos_token_ids:
        found = list(text_steps(scripted([65, end, 65]), tokenizer, -1))
        assert [step.finish_reason for step in found] == [None, "stop"]


def test_an_end_token_that_is_added_ends_the_text(loaded):
    model, _ = loaded
    _, tokenizer = load(converted_directory(), expert_memory="all")
    plain = [response.token for response in stream_generate(model, tokenizer, PROMPT, max_tokens=6)]
    tokenizer.add_eos_token(str(plain[2]))
    found = list(stream_generate(model, tokenizer, PROMPT, max_tokens=6))
    length = plain.index(plain[2]) + 1
    assert [response.token for response in found] == plain[:length]
    assert found[-1].finish_reason == "stop"
    assert "".join(response.text for response in found) == tokenizer.decode(plain[: length - 1])


def test_text_that_goes_on_from_other_text_keeps_its_first_space(loaded):
    _, tokenizer = loaded
    tokens = tokenizer.encode(" word", add_special_tokens=False)
    found = "".join(step.text for step in text_steps(scripted(tokens), tokenizer, len(tokens), said="one"))
    assert found == " word"


# Responses


def test_a_response_has_every_field_of_mlx_lms():
    theirs = {field.name for field in dataclasses.fields(GenerationResponse)}
    assert theirs <= {field.name for field in dataclasses.fields(Response)}


def test_responses_count_tokens_and_say_why_they_end(loaded):
    found = list(stream_generate(*loaded, PROMPT, max_tokens=3))
    assert [response.generation_tokens for response in found] == [1, 2, 3]
    assert [response.finish_reason for response in found] == [None, None, "length"]
    assert {response.prompt_tokens for response in found} == {len(PROMPT)}
    assert len({response.ttft_s for response in found}) == 1
    assert found[0].generation_tps == 0.0 < found[2].generation_tps
    assert all(response.prompt_tps > 0 and response.peak_memory >= 0 for response in found)


def test_text_ids_and_an_array_are_the_same_prompt(loaded):
    model, tokenizer = loaded
    ids = tokenizer.encode("A prompt.")
    found = [
        [(response.token, response.text) for response in stream_generate(model, tokenizer, prompt, max_tokens=4)]
        for prompt in ("A prompt.", ids, mx.array(ids))
    ]
    assert found[0] == found[1] == found[2]


def test_text_that_begins_with_the_bos_token_gets_no_second_one(loaded):
    from types import SimpleNamespace

    from mlx_mimo.runtime.stream import encode_prompt

    asked = []

    def encode(text, add_special_tokens):
        asked.append((text, add_special_tokens))
        return [1]

    for bos, text in (("<s>", "<s>hello"), ("<s>", "hello"), (None, "hello")):
        encode_prompt(SimpleNamespace(bos_token=bos, encode=encode), text)
    assert asked == [("<s>hello", False), ("hello", True), ("hello", True)]


def test_a_transformers_tokenizer_does_as_well(loaded):
    model, tokenizer = loaded
    plain = tokenizer._tokenizer
    found = [response.token for response in stream_generate(model, plain, PROMPT, max_tokens=3)]
    assert found == [response.token for response in stream_generate(model, tokenizer, PROMPT, max_tokens=3)]
