"""The chat template writes MiMo's format exactly, and mlx-lm recognises its thinking and tools."""

from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

CHECKPOINT = Path(__file__).parents[2] / "mlx_mimo" / "demo" / "checkpoint"
SYSTEM = "<|im_start|>system\nYou are MiMo, a helpful AI assistant engineered by Xiaomi.<|im_end|>"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHECKPOINT)


def render(tokenizer, messages, thinking=False, **more):
    more = {"add_generation_prompt": True, **more}
    return tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=thinking, **more)


def test_thinking_off_opens_the_answer_with_an_empty_thought(tokenizer):
    got = render(tokenizer, [{"role": "user", "content": "Hi"}])
    assert got == SYSTEM + "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n<think></think>"


def test_thinking_on_leaves_the_thought_to_the_model(tokenizer):
    got = render(tokenizer, [{"role": "user", "content": "Hi"}], thinking=True)
    assert got == SYSTEM + "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"


def test_thinking_is_off_by_default():
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": "Hi"}]
    plain = AutoTokenizer.from_pretrained(CHECKPOINT)
    got = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert got.endswith("<|im_start|>assistant\n<think></think>")


def test_a_system_message_replaces_the_default(tokenizer):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    got = render(tokenizer, messages, add_generation_prompt=False)
    assert got == "<|im_start|>system\nBe short.<|im_end|><|im_start|>user\nHi<|im_end|>"


def test_parts_of_a_content_are_joined(tokenizer):
    parts = [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 2"}]
    got = render(tokenizer, [{"role": "user", "content": parts}], add_generation_prompt=False)
    assert got == SYSTEM + "<|im_start|>user\n1 + 2<|im_end|>"


def test_tools_calls_results_and_reasoning_are_written_as_mimo_writes_them(tokenizer):
    messages = [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": "", "reasoning": "Ask the tool.", "tool_calls": [CALL]},
        {"role": "tool", "content": "18"},
        {"role": "assistant", "content": "18 degrees"},
        {"role": "user", "content": "Thanks"},
    ]
    assert render(tokenizer, messages, thinking=True, tools=[WEATHER]) == (
        "<|im_start|>system\nYou are MiMo, a helpful AI assistant engineered by Xiaomi.\n\n"
        "You can call these tools:\n"
        "- get_weather(city: string, days: integer): Current weather in a city\n\n"
        "Call a tool like this:\n<tool_call>\n<function=NAME>\n<parameter=P>value</parameter>\n"
        "</function>\n</tool_call><|im_end|><|im_start|>user\nWeather in Rome?<|im_end|><|im_start|>assistant\n"
        "<think>Ask the tool.</think>"
        "<tool_call>\n<function=get_weather>\n<parameter=city>Rome</parameter>\n<parameter=days>2</parameter>\n"
        "</function>\n</tool_call><|im_end|><|im_start|>tool\n<tool_response>18</tool_response><|im_end|>"
        "<|im_start|>assistant\n<think></think>18 degrees<|im_end|><|im_start|>user\nThanks<|im_end|>"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_read_under_either_name(tokenizer, name):
    messages = [{"role": "assistant", "content": "3", name: "1 + 2"}]
    got = render(tokenizer, messages, add_generation_prompt=False)
    assert got == SYSTEM + "<|im_start|>assistant\n<think>1 + 2</think>3<|im_end|>"


def test_each_call_begins_a_line(tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "a"}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call, call]}]
    one = "<tool_call>\n<function=f>\n<parameter=x>a</parameter>\n</function>\n</tool_call>"
    got = render(tokenizer, messages, add_generation_prompt=False)
    assert got == SYSTEM + f"<|im_start|>assistant\n<think></think>{one}\n{one}<|im_end|>"


def test_arguments_as_json_text_are_refused(tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": "a"}'}}
    with pytest.raises(Exception, match="object"):
        render(tokenizer, [{"role": "assistant", "content": "", "tool_calls": [call]}])


def test_mlx_lm_sees_thinking_and_tools_and_parses_a_call(tokenizer):
    assert tokenizer.has_thinking
    assert (tokenizer.think_start, tokenizer.think_end) == ("<think>", "</think>")
    assert tokenizer.has_tool_calling
    assert (tokenizer.tool_call_start, tokenizer.tool_call_end) == ("<tool_call>", "</tool_call>")
    text = "\n<function=get_weather>\n<parameter=city>Rome</parameter>\n<parameter=days>2</parameter>\n</function>\n"
    got = tokenizer.tool_parser(text.strip(), [WEATHER])
    assert got == {"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}
