"""The page as a browser shows it; skipped where there is none."""

import base64
import json

import pytest
import requests
from support.browser import Page, find_browser, open_browser
from support.patience import DEADLINE
from support.serving import running_server

pytestmark = [pytest.mark.long, pytest.mark.skipif(find_browser() is None, reason="no Chromium here")]

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser, server) -> Page:
    """Open, and live: its second snapshot has come."""
    browser.size(1000, 900)
    browser.scheme("light")
    browser.log.clear()
    requests.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=DEADLINE)
    browser.open(f"{server.url}/residency")
    browser.wait_for("document.readyState == 'complete' && document.getElementById('tokens').textContent != '–'")
    yield browser
    assert browser.log == [], "errors in the page"
    browser.open("about:blank")


def shown(page: Page, name: str) -> str:
    return page.run(f"document.getElementById('{name}').textContent")


def snapshot(server) -> dict:
    with requests.get(f"{server.url}/residency/events", stream=True, timeout=DEADLINE) as events:
        return json.loads(next(line for line in events.iter_lines() if line.startswith(b"data: "))[6:])


def test_the_figures_are_the_servers_and_live(page, server):
    state = snapshot(server)
    assert shown(page, "state") == f"live, policy {state['policy']}"
    assert shown(page, "all") == f"{100 * state['hits'] / (state['hits'] + state['misses']):.1f} %"
    assert shown(page, "slots") == f"{state['slots']} of 24"
    assert shown(page, "queue") == "0"
    assert shown(page, "memory").endswith("kB")
    before = int(shown(page, "sum").replace(",", ""))
    assert before == state["tokens"]
    requests.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=DEADLINE)
    page.wait_for(f"document.getElementById('sum').textContent.replace(/\\D/g, '') == {before + 6}")
    for _ in range(100):
        requests.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=DEADLINE)
        if shown(page, "now").endswith("%"):
            break
    assert shown(page, "now").endswith("%")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_map_is_blue_where_an_expert_is_resident(page, server, scheme):
    page.scheme(scheme)
    drawn = page.run("before.time")
    page.wait_for(f"before && before.time > {drawn}")  # the next snapshot is drawn in the scheme's colours
    state = snapshot(server)
    pixels = page.run("[map.width, map.height, ...ink.getImageData(0, 0, map.width, map.height).data]")
    width, height, *values = pixels
    assert (width, height) == (8, 3)
    assert (sum(values) / len(values) - 255 / 4 > 80) == (scheme == "light"), "the fourth channel is 255 throughout"
    for y, row in enumerate(state["layers"]):
        for x, resident in enumerate(base64.b64decode(row["resident"])):
            red, _, blue, alpha = values[4 * (8 * y + x) : 4 * (8 * y + x) + 4]
            assert alpha == 255
            if abs(red - blue) > 2:  # an expert on disk that nobody used has next to no colour
                assert (blue > red) == bool(resident)
            else:
                assert not resident


def test_pointing_at_an_expert_names_it(page, server):
    box = page.run("(() => { const b = map.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()")
    left, top, width, height = box
    where = {"x": left + width * 3.5 / 8, "y": top + height * 1.5 / 3}
    page.command("Input.dispatchMouseEvent", type="mouseMoved", **where)
    resident = base64.b64decode(snapshot(server)["layers"][1]["resident"])[3]
    expected = f"layer 2, expert 3: {'in memory' if resident else 'on disk'}, used "
    page.wait_for(f"document.getElementById('cell').textContent.startsWith({json.dumps(expected)})")


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in colour[4:-1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(page, scheme):
    page.scheme(scheme)
    back = luminance(page.run("getComputedStyle(document.body).backgroundColor"))
    assert (back > 0.5) == (scheme == "light")
    for part in ("h1", "dt", "dd", "p"):
        text = luminance(page.run(f"getComputedStyle(document.querySelector('{part}')).color"))
        contrast = (max(text, back) + 0.05) / (min(text, back) + 0.05)
        assert contrast >= 4.5, f"{part}: WCAG's least contrast is 4.5, {contrast:.1f} found"


@pytest.mark.parametrize("width", [320, 390, 1400])
def test_it_fits_a_phone_and_a_desk(page, width, tmp_path):
    page.size(width, 800, mobile=width < 500)
    page.wait_for(f"innerWidth == {width}")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("Math.min(...[...document.querySelectorAll('dt, dd, p')].map(e => e.clientWidth)) > 100")
    assert page.run("[...document.querySelectorAll('dd')].every(e => e.scrollWidth <= e.clientWidth)")
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_when_the_server_has_gone_and_when_everything_is_resident(browser, model_directory):
    with running_server(model_directory, "--expert-memory", "all") as server:
        browser.open(f"{server.url}/residency")
        browser.wait_for("document.getElementById('state')?.textContent == 'every expert is resident'")
        assert shown(browser, "slots") == "all"
        assert browser.run("map.hidden && document.getElementById('legend').hidden")
    browser.wait_for("document.getElementById('state').textContent.startsWith('the server does not answer')")
    browser.open("about:blank")
