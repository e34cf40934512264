"""One prompt in, text out, token by token: `python examples/generate.py "a question" [DIR_OR_REPO]`."""

import sys

from mlx_mimo import load, stream_generate

question = sys.argv[1] if len(sys.argv) > 1 else "What is 37 + 48?"
model, tokenizer = load(sys.argv[2] if len(sys.argv) > 2 else None, expert_memory="auto")

messages = [{"role": "user", "content": question}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)

for response in stream_generate(model, tokenizer, prompt, max_tokens=128):
    print(response.text, end="", flush=True)
print()

print(f"{response.generation_tps:.1f} tokens/s", file=sys.stderr)
if model.residency:  # None where experts are stacked, as in mlx-lm's own conversions: all of them are in memory then
    print(f"{model.residency.counters.hit_rate:.0%} of experts were in memory", file=sys.stderr)
    model.residency.close()
