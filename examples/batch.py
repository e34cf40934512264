"""Several prompts at once through mlx-lm's batch generation: `python examples/batch.py [DIR_OR_REPO]`.

Each step unites the experts of all sequences; that pays where most experts are resident.
"""

import sys

from mlx_lm import batch_generate

from mlx_mimo import load

model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else None)
questions = ["What is 2 plus 3?", "What is the capital of France?", "Sort 41, 7, 23."]
prompts = [
    tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, enable_thinking=False
    )
    for question in questions
]
for question, text in zip(questions, batch_generate(model, tokenizer, prompts, max_tokens=32).texts):
    print(f"{question}\n    {text.strip()}")
if model.residency:
    model.residency.close()
