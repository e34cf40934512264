"""Talks to a running server with OpenAI's client, streaming: `python examples/server_chat.py "a question"`."""

import os
import sys

import openai

client = openai.OpenAI(
    base_url=os.environ.get("MLX_MIMO_URL", "http://127.0.0.1:8080/v1"),
    api_key=os.environ.get("MLX_MIMO_API_KEY", "none"),
)
model = client.models.list().data[0].id
question = " ".join(sys.argv[1:]) or "Hello, who are you?"
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    max_tokens=512,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n[{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]", file=sys.stderr)
