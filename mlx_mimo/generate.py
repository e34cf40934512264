"""`python -m mlx_mimo.generate`: one prompt in, text out."""

import argparse
import json
import sys

from .arguments import (
    add_adapter_argument,
    add_model_arguments,
    add_sampling_arguments,
    json_object,
    load_options,
    non_negative_int,
    positive_int,
    readable,
    run,
    take_any_bytes,
)
from .errors import UsageError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_mimo generate", description="Generate text from one prompt.")
    add_model_arguments(parser)
    add_adapter_argument(parser)
    parser.add_argument(
        "-p", "--prompt", type=readable, default="Hello", help="the user's message; - reads it from stdin"
    )
    parser.add_argument("--system-prompt", type=readable, help="the system message")
    parser.add_argument("-m", "--max-tokens", type=non_negative_int, default=1024, help="default: 1024")
    add_sampling_arguments(parser)
    parser.add_argument("--ignore-chat-template", action="store_true", help="use the prompt as it stands")
    parser.add_argument("--prefill-response", type=readable, metavar="TEXT", help="how the answer must begin")
    parser.add_argument(
        "--chat-template-config",
        type=json_object,
        default={},
        metavar="JSON",
        help="keywords for the chat template, such as '{\"enable_thinking\": true}'",
    )
    parser.add_argument("--think", action="store_true", help="let the model think before it answers")
    parser.add_argument("--no-think", action="store_true", help="do not show what it thinks")
    parser.add_argument(
        "--prefill-step-size",
        type=positive_int,
        metavar="N",
        help="prompt tokens a chunk (default: what fits, 2048 as a rule)",
    )
    parser.add_argument("--extra-eos-token", nargs="+", default=(), metavar="TOKEN", help="more tokens that end it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    return parser


def build_prompt(tokenizer, args: argparse.Namespace, text: str) -> str:
    """The prompt's text, with the chat template applied unless --ignore-chat-template is given or there is none."""
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return text
    messages = [{"role": "system", "content": args.system_prompt}] if args.system_prompt is not None else []
    messages.append({"role": "user", "content": text})
    prefilled = args.prefill_response is not None
    if prefilled:
        messages.append({"role": "assistant", "content": args.prefill_response})
    # mlx-lm turns thinking on unless told; the model's own default is off.
    keywords = {"enable_thinking": args.think} | args.chat_template_config
    return tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=not prefilled,
        continue_final_message=prefilled,
        **keywords,
    )


def generate(args: argparse.Namespace) -> int:
    take_any_bytes(sys.stdin)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise UsageError("--prompt: the prompt is empty; give some text, or - to read it from stdin")
    import mlx.core as mx

    from .runtime.load import load
    from .runtime.session import end_residency

    if args.seed is not None:
        mx.random.seed(args.seed)
    model, tokenizer = load(args.model, adapter_path=args.adapter_path, **load_options(args))
    try:
        return answer(model, tokenizer, args, text)
    finally:
        end_residency(model, args.profile)  # last, so that an error of it does not lose the answer


def answer(model, tokenizer, args: argparse.Namespace, text: str) -> int:
    """Generates from one prompt and prints what the flags ask for; returns the exit code."""
    from .console import PrefillProgress, Printer
    from .runtime.loaded import loaded_of
    from .runtime.sampling import sampler_for
    from .runtime.session import wired_limit
    from .runtime.stream import Response, stream_generate

    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    prompt = build_prompt(tokenizer, args, text)
    tokens = tokenizer.encode(prompt, add_special_tokens=args.ignore_chat_template)
    printer = Printer(tokenizer, tokens, hide_thinking=args.no_think)
    ids: list[int] = []
    pieces: list[str] = []
    last: Response | None = None
    reason = "length" if args.max_tokens == 0 else None
    try:
        with wired_limit(model, args.wired), PrefillProgress(sys.stderr) as progress:
            for last in stream_generate(
                model,
                tokenizer,
                tokens,
                max_tokens=args.max_tokens,
                sampler=sampler_for(args, loaded_of(model).sampling),
                prefill_step_size=args.prefill_step_size,
                prompt_progress_callback=progress,
            ):
                progress.close()
                ids.append(last.token)
                pieces.append(last.text)
                if not args.json:
                    printer.write(last.token, last.text)
                reason = last.finish_reason
    except KeyboardInterrupt:
        reason = "interrupted"
    if args.json:
        print(json.dumps(report(model, "".join(pieces), ids, len(tokens), last, reason), ensure_ascii=False))
    else:
        printer.end()
        print_statistics(model, len(tokens), last, reason)
    sys.stdout.flush()
    return 130 if reason == "interrupted" else 0


def report(model, text: str, ids: list[int], prompt_tokens: int, last, reason: str | None) -> dict:
    """The object that `--json` prints."""
    from .runtime.session import experts_report, peak_memory_bytes

    return {
        "text": text,
        "token_ids": ids,
        "prompt_tokens": prompt_tokens,
        "prompt_tps": last.prompt_tps if last else 0.0,
        "generation_tokens": len(ids),
        "generation_tps": last.generation_tps if last else 0.0,
        "ttft_s": last.ttft_s if last else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "finish_reason": reason,
        "experts": experts_report(model),
    }


def print_statistics(model, prompt_tokens: int, last, reason: str | None) -> None:
    if last is None:
        print(f"{prompt_tokens} prompt tokens, nothing generated ({reason})", file=sys.stderr)
        return
    from .runtime.session import experts_report, peak_memory_bytes

    line = (
        f"{prompt_tokens} prompt tokens at {last.prompt_tps:.1f}/s, {last.generation_tokens} generated "
        f"at {last.generation_tps:.1f}/s, first after {last.ttft_s:.2f} s, "
        f"peak memory {peak_memory_bytes() / 1e9:.2f} GB ({reason})"
    )
    experts = experts_report(model)
    if experts:
        line += (
            f"\nexperts: {experts['hit_rate']:.1%} hits in {experts['slots']} slots ({experts['policy']}), "
            f"{experts['bytes_read'] / 1e9:.2f} GB read in {experts['read_seconds']:.2f} s"
        )
    print(line, file=sys.stderr)


def main() -> int:
    args = build_parser().parse_args()
    return run(lambda: generate(args))


if __name__ == "__main__":
    sys.exit(main())
