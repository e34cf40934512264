"""Sends mixed traffic to a running server, reports wrong answers: `python examples/measure/server_soak.py --pid N`.

The traffic comes from several threads: OpenAI's and Anthropic's endpoints, streamed and not, several choices, forced
tool calls, saves of the prompt cache, metrics, clients that disconnect or send slowly, and bad requests. The script
exits with 1 if an answer was not the expected one, a request took longer than --deadline, the server was not healthy at
the end, or (in runs of MEMORY_MINUTES and more) its memory kept growing after the first third.
"""

import argparse
import itertools
import json
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil
import requests

CHAT = "/v1/chat/completions"
MEMORY_MINUTES = 5  # before, buffers and caches still fill
GROWTH = 1.05  # of the last third over the one before


@dataclass(frozen=True)
class Server:
    url: str
    deadline: float  # seconds within which a request must be answered


def body(chance: random.Random, **options) -> dict:
    words = " ".join(chance.choice(("red", "green", "blue", "one", "two")) for _ in range(chance.randint(1, 60)))
    return {"messages": [{"role": "user", "content": words}], "max_tokens": chance.randint(1, 40)} | options


def post(at: Server, path: str, asked: dict, stream: bool = False) -> requests.Response:
    return requests.post(at.url + path, json=asked, stream=stream, timeout=at.deadline)


def lines(at: Server, answer: requests.Response) -> list[bytes]:
    """Returns a stream's lines up to its end or the deadline: a server may keep a stream alive and never end it."""
    end = time.monotonic() + at.deadline
    return list(itertools.takewhile(lambda _: time.monotonic() < end, answer.iter_lines()))


# Each function below sends one request and returns its outcome; ACTIONS has the expected one.


def whole(at: Server, chance: random.Random) -> str:
    return str(post(at, CHAT, body(chance)).status_code)


def streamed(at: Server, chance: random.Random) -> str:
    answer = post(at, CHAT, body(chance, stream=True), stream=True)
    if answer.status_code != 200:
        return str(answer.status_code)
    return "whole stream" if b"data: [DONE]" in lines(at, answer) else "the stream broke off"


def several(at: Server, chance: random.Random) -> str:
    answer = post(at, CHAT, body(chance, n=2))
    return str(answer.status_code) if answer.status_code != 200 else f"{len(answer.json()['choices'])} choices"


def forced(at: Server, chance: random.Random) -> str:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tools = [{"type": "function", "function": {"name": "lamp", "parameters": schema}}]
    asked = body(chance, max_tokens=200, tools=tools, tool_choice="required", parallel_tool_calls=False)
    answer = post(at, CHAT, asked)
    if answer.status_code != 200:
        return str(answer.status_code)
    return "a call" if answer.json()["choices"][0]["message"].get("tool_calls") else "no call"


def text(at: Server, chance: random.Random) -> str:
    asked = {"prompt": "one two " * chance.randint(1, 20), "max_tokens": chance.randint(1, 40)}
    answer = post(at, "/v1/completions", asked)
    return str(answer.status_code) if answer.status_code != 200 else f"{len(answer.json()['choices'])} choices"


def message(at: Server, chance: random.Random) -> str:
    answer = post(at, "/v1/messages", body(chance))
    return str(answer.status_code) if answer.status_code != 200 else answer.json()["type"]


def streamed_message(at: Server, chance: random.Random) -> str:
    answer = post(at, "/v1/messages", body(chance, stream=True), stream=True)
    if answer.status_code != 200:
        return str(answer.status_code)
    return "whole stream" if b"event: message_stop" in lines(at, answer) else "the stream broke off"


def metrics(at: Server, chance: random.Random) -> str:
    answer = requests.get(f"{at.url}/metrics", timeout=at.deadline)
    return "figures" if "mlx_mimo_generated_tokens_total" in answer.text else str(answer.status_code)


def events(at: Server, chance: random.Random) -> str:
    """Reads two states of the page's endless stream and disconnects."""
    with requests.get(f"{at.url}/residency/events", stream=True, timeout=at.deadline) as answer:
        states = [line for line in itertools.islice(answer.iter_lines(), 4) if line.startswith(b"data: ")]
        return str(answer.status_code) if answer.status_code != 200 else f"{len(states)} states"


def saves(at: Server, chance: random.Random) -> str:
    return str(requests.post(f"{at.url}/prompt-cache/save", timeout=at.deadline).status_code)


def bad(at: Server, chance: random.Random) -> str:
    data = chance.choice((b"{", b"[]", b"\xff", json.dumps(body(chance, temperature=-1)).encode()))
    return str(requests.post(at.url + CHAT, data=data, timeout=at.deadline).status_code)


def connected(at: Server, length: int) -> socket.socket:
    """Returns a connection on which the head of a chat request was sent."""
    parts = urlsplit(at.url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=at.deadline)
    connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {length}\r\n\r\n".encode())
    return connection


def status(connection: socket.socket) -> str:
    with connection.makefile("rb") as answer:
        return answer.readline().split()[1].decode()


def leaves(at: Server, chance: random.Random) -> str:
    data = json.dumps(body(chance, stream=chance.random() < 0.5, max_tokens=400)).encode()
    with connected(at, len(data)) as connection:
        connection.sendall(data)
        time.sleep(chance.uniform(0, 1))
    return "left"


def slow(at: Server, chance: random.Random) -> str:
    data = json.dumps(body(chance)).encode()
    with connected(at, len(data)) as connection:
        for start in range(0, len(data), 1 + len(data) // 5):
            time.sleep(chance.uniform(0, 0.5))
            connection.sendall(data[start : start + 1 + len(data) // 5])
        return status(connection)


def oversized(at: Server, chance: random.Random) -> str:
    with connected(at, 10**12) as connection:
        return status(connection)


ACTIONS = {
    whole: "200",
    streamed: "whole stream",
    several: "2 choices",
    forced: "a call",
    text: "1 choices",
    message: "message",
    streamed_message: "whole stream",
    metrics: "figures",
    events: "2 states",
    saves: "200",
    bad: "400",
    leaves: "left",
    slow: "200",
    oversized: "413",
}


class Traffic:
    """Several clients' actions until `end`, each action at least once, and their outcomes."""

    def __init__(self, at: Server, actions: list, end: float):
        self.at, self.actions, self.end = at, actions, end
        self.never_done = list(actions)
        self.outcomes, self.failures, self.longest = Counter(), Counter(), Counter()
        self.lock = threading.Lock()

    def client(self, seed: int) -> None:
        chance = random.Random(seed)
        while (action := self.next(chance)) is not None:
            self.once(action, chance)

    def next(self, chance: random.Random):
        with self.lock:
            if self.never_done:
                return self.never_done.pop()
        return chance.choice(self.actions) if time.monotonic() < self.end else None

    def once(self, action, chance: random.Random) -> None:
        began = time.monotonic()
        try:
            outcome = action(self.at, chance)
        except Exception as error:  # the report names it, and the other clients go on
            outcome = f"{type(error).__name__}: {error}"[:200]
        seconds = time.monotonic() - began
        if seconds > self.at.deadline:
            outcome += " too late"
        with self.lock:
            self.longest[action.__name__] = max(self.longest[action.__name__], round(seconds, 2))
            self.outcomes[f"{action.__name__} → {outcome}"] += 1
            if outcome != ACTIONS[action]:
                self.failures[f"{action.__name__} → {outcome}"] += 1


def watched(server: psutil.Process, threads: list[threading.Thread], until: float) -> list[tuple[float, int]]:
    """Returns (minutes, bytes) samples of the server's memory while the threads run, until `until` at the latest."""
    began, samples = time.monotonic(), []
    pause = min(1.0, (until - began) / 100)
    while any(thread.is_alive() for thread in threads) and time.monotonic() < until:
        try:
            samples.append(((time.monotonic() - began) / 60, server.memory_info().rss))
        except psutil.Error:  # the process ended; the check of its health reports that
            break
        time.sleep(pause)
    return samples


def memory(samples: list[tuple[float, int]]) -> dict:
    """Returns minimum and maximum of each third of the samples, and the slope after the first."""
    third = len(samples) // 3
    if third < 2:
        return {}
    thirds = [[size for _, size in part] for part in (samples[:third], samples[third:-third], samples[-third:])]
    minutes, sizes = zip(*samples[third:], strict=True)
    slope = statistics.linear_regression(minutes, sizes).slope
    return {
        "rss_least_and_most_mb": [[round(min(part) / 1e6, 1), round(max(part) / 1e6, 1)] for part in thirds],
        "rss_mb_a_minute_after_the_first_third": round(slope / 1e6, 2),
        "grew": max(thirds[2]) > GROWTH * max(thirds[1]),
    }


def has_cache_file(at: Server) -> bool:
    """Returns False for a server without --prompt-cache-file, which answers 404 to a save."""
    try:
        return saves(at, random.Random(0)) != "404"
    except requests.RequestException:
        return True  # the traffic will show what is wrong


def is_healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=60).status_code == 200
    except requests.RequestException:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--pid", type=int, required=True, help="of the server, to watch its memory")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--deadline", type=float, default=300, help="seconds within which a request must be answered")
    args = parser.parse_args()
    at = Server(args.url, args.deadline)
    actions = [action for action in ACTIONS if action is not saves or has_cache_file(at)]
    end = time.monotonic() + 60 * args.minutes
    traffic = Traffic(at, actions, end)
    threads = [threading.Thread(target=traffic.client, args=(seed,), daemon=True) for seed in range(args.clients)]
    for thread in threads:
        thread.start()
    samples = watched(psutil.Process(args.pid), threads, end + 2 * args.deadline)
    for thread in threads:
        thread.join(max(0.0, end + 2 * args.deadline - time.monotonic()))
    report = {
        "outcomes": dict(sorted(traffic.outcomes.items())),
        "failures": dict(traffic.failures),
        "hung": sum(thread.is_alive() for thread in threads),
        "longest_seconds": dict(traffic.longest),
        "healthy": is_healthy(args.url),
    } | memory(samples)
    print(json.dumps(report, indent=1, ensure_ascii=False))
    grew = report.get("grew", True) and args.minutes >= MEMORY_MINUTES
    return 1 if report["failures"] or report["hung"] or grew or not report["healthy"] else 0


if __name__ == "__main__":
    sys.exit(main())
