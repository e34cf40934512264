"""Mixed traffic against a running server for a while; says whether it stood it.

`python examples/server_soak.py --pid N`: streams, whole answers, several choices, calls that must come, saves of the
prompt cache, clients that leave, and bad requests, from several threads. Exits 1 where a request failed, the server was
not healthy at the end, or its memory went on growing after the first third.
"""

import argparse
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from urllib.parse import urlsplit

import psutil
import requests

PATH = "/v1/chat/completions"


def body(chance: random.Random, **options) -> dict:
    words = " ".join(chance.choice(("red", "green", "blue", "one", "two")) for _ in range(chance.randint(1, 60)))
    return {"messages": [{"role": "user", "content": words}], "max_tokens": chance.randint(1, 40)} | options


def whole(url: str, chance: random.Random) -> str:
    return str(requests.post(url + PATH, json=body(chance), timeout=300).status_code)


def streamed(url: str, chance: random.Random) -> str:
    answer = requests.post(url + PATH, json=body(chance, stream=True), stream=True, timeout=300)
    lines = list(answer.iter_lines())
    if answer.status_code != 200:
        return str(answer.status_code)
    return "whole stream" if b"data: [DONE]" in lines else "failed: the stream broke off"


def several(url: str, chance: random.Random) -> str:
    answer = requests.post(url + PATH, json=body(chance, n=2), timeout=300)
    return str(answer.status_code) if answer.status_code != 200 else f"{len(answer.json()['choices'])} choices"


def forced(url: str, chance: random.Random) -> str:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tools = [{"type": "function", "function": {"name": "lamp", "parameters": schema}}]
    asked = body(chance, max_tokens=200, tools=tools, tool_choice="required", parallel_tool_calls=False)
    answer = requests.post(url + PATH, json=asked, timeout=300)
    if answer.status_code != 200:
        return str(answer.status_code)
    return "a call" if answer.json()["choices"][0]["message"].get("tool_calls") else "failed: no call"


def saves(url: str, chance: random.Random) -> str:
    return str(requests.post(f"{url}/prompt-cache/save", timeout=300).status_code)


def leaves(url: str, chance: random.Random) -> str:
    parts = urlsplit(url)
    data = json.dumps(body(chance, stream=chance.random() < 0.5, max_tokens=400)).encode()
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        time.sleep(chance.uniform(0, 1))
    return "left"


def bad(url: str, chance: random.Random) -> str:
    data = chance.choice((b"{", b"[]", b"\xff", json.dumps(body(chance, temperature=-1)).encode()))
    return str(requests.post(url + PATH, data=data, timeout=60).status_code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--pid", type=int, required=True, help="of the server, to watch its memory")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=4)
    args = parser.parse_args()
    server, outcomes, sizes = psutil.Process(args.pid), Counter(), []
    end = time.monotonic() + 60 * args.minutes

    def client(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            action = chance.choice((whole, streamed, streamed, several, forced, saves, leaves, bad))
            try:
                outcome = action(args.url, chance)
            except requests.RequestException as error:
                outcome = f"failed: {type(error).__name__}"
            outcomes[f"{action.__name__} → {outcome}"] += 1

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(args.clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        sizes.append(server.memory_info().rss)
        time.sleep(1)
    healthy = requests.get(f"{args.url}/health", timeout=60).status_code == 200
    third = len(sizes) // 3
    early, late = max(sizes[third : 2 * third]), max(sizes[2 * third :])
    failed = [name for name in outcomes if "failed" in name or "500" in name]
    report = {"outcomes": dict(outcomes), "healthy": healthy, "rss_middle_third": early, "rss_last_third": late}
    print(json.dumps(report, indent=1))
    return 0 if healthy and not failed and late < 1.05 * early else 1


if __name__ == "__main__":
    sys.exit(main())
