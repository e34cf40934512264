"""Draws residency.png: `python docs/make_residency.py` serves the demo with under half of its experts in memory, asks
it questions, and has a Chromium look at /residency meanwhile.
"""

import sys
import tempfile
import threading
from pathlib import Path

import requests

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from support.browser import open_browser  # noqa: E402
from support.serving import running_server  # noqa: E402

QUESTIONS = ("Count from one to twenty.", "What is the capital of France?", "What is 7 + 5?", "Write the alphabet.")


def main() -> None:
    done = threading.Event()

    def ask(url: str) -> None:
        while not done.is_set():
            for question in QUESTIONS:
                body = {"messages": [{"role": "user", "content": question}], "max_tokens": 100}
                requests.post(f"{url}/v1/chat/completions", json=body, timeout=300)

    profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # the browser may still write when it has ended
    with running_server(None, "--expert-memory", "3MB") as server, profile, open_browser(Path(profile.name)) as page:
        asking = threading.Thread(target=ask, args=(server.url,))
        asking.start()
        try:
            page.size(960, 460)
            page.open(f"{server.url}/residency")
            page.wait_for("Number(document.getElementById('sum').textContent.replace(/\\D/g, '')) > 400")
            page.wait_for("document.getElementById('now').textContent.includes('%')")
            page.screenshot(HERE / "residency.png")
        finally:
            done.set()
            asking.join()


if __name__ == "__main__":
    main()
