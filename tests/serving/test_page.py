"""The page at `/`: what is sent for it, and how it works in a browser."""

import contextlib
import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_openai import FakeOpenAI, listening
from starlette.responses import JSONResponse
from starlette.routing import Route

from jpaged.block_manager import BlockManager
from jpaged.pool_view import view_pool
from jpaged.request import Request
from jpaged.sampling_params import SamplingParams
from jpaged.serving.app import create_app
from jpaged.serving.page import mount_page
from jpaged.serving.settings import ServerSettings

STATIC = Path(__file__).parents[2] / "serving" / "static"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
KEY = "secret"

needs_browser = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium and the package playwright",
)


class FakeServer(FakeOpenAI):
    """The page before a small server with a pool of 40 blocks; may want a key."""

    def __init__(self, root_path: str = "") -> None:
        super().__init__()
        self.manager = BlockManager(41, 16)
        self.wants_key = False
        self.num_pool_calls = 0
        self.app.router.routes.append(Route("/pool", self._pool))
        mount_page(self.app, ServerSettings(root_path=root_path))

    def hold(self, request_id: str, num_tokens: int, *, shared: bool = False) -> None:
        """Gives a sequence its blocks; two sequences if they are to be shared."""
        first, other = (
            Request(request_id, list(range(num_tokens)), SamplingParams()).sequences[0]
            for _ in range(2)
        )
        assert self.manager.allocate_slots(first, num_tokens) is not None
        first.num_computed_tokens = num_tokens
        if shared:
            self.manager.fork(first, other)

    async def _pool(self, request: Any) -> JSONResponse:
        self.num_pool_calls += 1
        if self.wants_key and request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": {"message": "a valid API key is required"}}, 401)
        return JSONResponse(view_pool(self.manager).as_dict())


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    with listening(fake.app) as fake.base_url:
        yield fake


# What is sent.


def test_every_file_is_sent_with_a_strict_policy(server):
    files = {path.name: path for path in STATIC.iterdir()}
    assert {"index.html", "app.js", "style.css", "icon.svg"} <= files.keys()
    for name, path in files.items():
        response = httpx2.get(
            server.base_url + ("/" if name == "index.html" else f"/static/{name}")
        )
        assert response.status_code == 200
        if name != "index.html":
            assert response.content == path.read_bytes()
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-cache"
    assert httpx2.get(server.base_url + "/static/missing.js").status_code == 404
    assert httpx2.get(server.base_url + "/static/..%2fpage.py").status_code == 404


def test_unchanged_file_is_not_sent_again(server):
    url = server.base_url + "/static/app.js"
    tag = httpx2.get(url).headers["etag"]
    again = httpx2.get(url, headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert httpx2.get(url, headers={"If-None-Match": '"other"'}).status_code == 200
    head = httpx2.head(url)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    ("root_path", "base"), [("", "/"), ("/llm", "/llm/"), ('/a"b/', "/a&quot;b/")]
)
def test_page_knows_the_path_of_a_proxy(root_path, base):
    fake = FakeServer(root_path)
    with listening(fake.app) as url:
        assert f'<base href="{base}">' in httpx2.get(url).text


@pytest.mark.parametrize("path", sorted(STATIC.iterdir()), ids=lambda path: path.name)
def test_file_takes_nothing_from_outside(path):
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+/", text)
    assert "innerHTML" not in text
    if path.suffix == ".html":
        assert not re.findall(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", text)


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", *quiet]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, server):
    """Opens the page in a window of this size; what it logs or fails to load fails the test."""
    with contextlib.ExitStack() as stack:
        faults: list[str] = []

        def open_at(width: int = 1280, height: int = 800, **options: Any) -> Any:
            context = browser.new_context(viewport={"width": width, "height": height}, **options)
            stack.callback(context.close)
            page = context.new_page()
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda message: faults.append(message.text))
            page.goto(server.base_url)
            return page

        open_at.faults = faults  # pyright: ignore[reportFunctionMemberAccess]
        yield open_at
        assert not faults


def expect(what: Any) -> Any:
    from playwright.sync_api import expect as expect_

    return expect_(what, "")


def say(page: Any, text: str) -> None:
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


@needs_browser
@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window(width, scheme, open_page, server):
    server.hold("chatcmpl-" + "0123456789" * 5, 100)
    page = open_page(width, 800, color_scheme=scheme)
    say(page, "x" * 300)
    expect(page.locator(".turn.assistant .hint")).to_contain_text("512 tokens")
    size = page.locator("html").evaluate("e => [e.scrollWidth, e.scrollHeight]")
    assert size == [width, 800]
    for name in ("#blocks", "#text", "#send", "#settings"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= 800


@needs_browser
def test_chat_streams_and_sends_the_whole_conversation(open_page, server):
    page = open_page()
    expect(page.locator("#model")).to_have_value("fake-model")
    page.locator("#settings summary").click()
    page.locator("#system").fill("Be brief.")
    page.locator("#max-tokens").fill("3")
    page.locator("#text").fill("one")
    page.locator("#send").click()
    expect(page.locator(".turn.assistant .said")).to_have_text("w0 w1 w2")
    expect(page.locator(".turn.assistant .hint")).to_contain_text("first token after")
    expect(page.locator(".turn.assistant .hint")).to_contain_text("3 tokens")
    say(page, "<b>two</b>")
    expect(page.locator(".turn.user .said").nth(1)).to_have_text("<b>two</b>")
    expect(page.locator(".turn.assistant .hint").nth(1)).to_contain_text("3 tokens")
    body = server.bodies[1]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "w0 w1 w2 "},
        {"role": "user", "content": "<b>two</b>"},
    ]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("fake-model", 3, 0.7)
    page.locator("#clear").click()
    expect(page.locator(".turn")).to_have_count(0)
    say(page, "three")
    expect(page.locator(".turn.assistant .hint")).to_contain_text("3 tokens")
    assert len(server.bodies[2]["messages"]) == 2


@needs_browser
@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_answer_and_keeps_what_came(how, open_page, server):
    page = open_page()
    say(page, "HANG")
    expect(page.locator(".turn.assistant .said")).to_have_text("w0")
    expect(page.locator("#send")).to_be_hidden()
    if how == "button":
        page.locator("#stop").click()
    else:
        page.locator("#text").press("Escape")
    expect(page.locator(".turn.assistant .hint")).to_contain_text("stopped")
    assert server.was_left.wait(30)
    expect(page.locator("#send")).to_be_visible()
    say(page, "more")
    expect(page.locator(".turn.assistant .hint").nth(1)).to_contain_text("tokens")
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": "w0 "}


@needs_browser
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("REFUSE", "top_p must be in (0, 1]"),
        ("BREAK", "the engine has ended"),
        ("CUT", "No answer: the answer was cut off"),
    ],
)
def test_errors_are_shown(prompt, message, open_page):
    page = open_page()
    say(page, prompt)
    expect(page.locator(".turn.assistant [role=alert]")).to_have_text(message)
    expect(page.locator("#text")).to_have_value(prompt if prompt == "REFUSE" else "")
    expect(page.locator("#send")).to_be_visible()
    if prompt == "REFUSE":  # browsers tell of each answer that is an error
        assert len(open_page.faults) == 1
        assert "400" in open_page.faults.pop()


@needs_browser
def test_pool_is_shown_and_kept_up_to_date(open_page, server):
    server.hold("cmpl-a", 40)
    server.hold("cmpl-b", 20, shared=True)
    page = open_page()
    counts = page.locator("#counts")
    expect(counts).to_contain_text("35 free")
    expect(counts).to_contain_text("3 used")
    expect(counts).to_contain_text("2 shared (saves 2)")
    expect(page.locator("#sequences tbody tr")).to_have_count(3)
    expect(page.locator("#sequences tbody tr").first).to_have_text("cmpl-a403")
    server.hold("cmpl-c", 16 * 30)
    expect(counts).to_contain_text("5 free")


@needs_browser
def test_block_under_the_pointer_or_the_cursor_is_described(open_page, server):
    server.hold("cmpl-a", 24)
    page = open_page()
    expect(page.locator("#counts")).to_contain_text("2 used")
    canvas, tip = page.locator("#blocks"), page.locator("#tip")
    canvas.hover(position={"x": 20, "y": 5})
    expect(tip).to_have_text("Block 2: 8 of 16 tokens of cmpl-a")
    canvas.hover(position={"x": 400, "y": 250})
    expect(tip).to_be_hidden()
    canvas.focus()
    canvas.press("ArrowRight")
    expect(page.locator("#block-told")).to_have_text("Block 1: 16 of 16 tokens of cmpl-a")
    for _ in range(2):
        canvas.press("ArrowRight")
    expect(page.locator("#block-told")).to_have_text("Block 3: free")
    expect(tip).to_be_visible()
    page.locator("#text").focus()
    expect(tip).to_be_hidden()


@needs_browser
def test_block_of_an_answer_has_its_colour(open_page, server):
    page = open_page()
    say(page, "hi")
    swatch = page.locator(".turn.assistant .who i")
    expect(swatch).to_be_visible()
    server.hold(f"{FakeOpenAI.answer_id}-0", 30)
    expect(page.locator("#sequences tbody tr")).to_have_count(1)
    colour = "e => getComputedStyle(e).backgroundColor"
    wanted = swatch.evaluate(colour)
    assert page.locator("#sequences tbody i").evaluate(colour) == wanted
    pixel = page.locator("#blocks").evaluate(
        "e => [...e.getContext('2d').getImageData(4, 4, 1, 1).data].slice(0, 3).join(', ')"
    )
    assert wanted == f"rgb({pixel})"


@needs_browser
def test_hidden_page_asks_nothing(open_page, server):
    page = open_page()
    page.clock.install()
    page.reload()
    counts = page.locator("#counts")
    expect(counts).to_contain_text("40 free")
    server.hold("a", 16)
    page.clock.run_for(600)
    expect(counts).to_contain_text("39 free")
    calls = server.num_pool_calls
    set_visibility = (
        "value => { Object.defineProperty(document, 'visibilityState',"
        " { value, configurable: true });"
        " document.dispatchEvent(new Event('visibilitychange')); }"
    )
    page.evaluate(set_visibility, "hidden")
    page.clock.run_for(5000)
    server.hold("b", 16)
    page.evaluate(set_visibility, "visible")
    expect(counts).to_contain_text("38 free")
    assert server.num_pool_calls == calls + 1


@needs_browser
def test_key_is_asked_for_and_kept_in_the_tab(open_page, server):
    server.wants_key = True
    page = open_page()
    expect(page.locator("#pool-note")).to_have_text(
        "No view of the pool: the server wants an API key"
    )
    page.locator("#settings summary").click()
    page.locator("#key").fill(KEY)
    page.locator("#key").press("Enter")
    expect(page.locator("#counts")).to_contain_text("40 free")
    expect(page.locator("#pool-note")).to_be_hidden()
    page.reload()
    expect(page.locator("#counts")).to_contain_text("40 free")
    say(page, "hi")
    expect(page.locator(".turn.assistant .hint")).to_contain_text("tokens")
    assert server.headers[-1]["authorization"] == f"Bearer {KEY}"
    assert page.evaluate("() => [localStorage.length, document.cookie]") == [0, ""]
    assert all("401" in fault for fault in open_page.faults)
    open_page.faults.clear()


@needs_browser
def test_key_that_the_browser_asked_for_is_enough(browser, engine):
    settings = ServerSettings(api_keys=(KEY,))
    with listening(create_app(engine, settings)) as url:
        assert httpx2.get(url).headers["www-authenticate"].startswith("Basic ")
        context = browser.new_context(http_credentials={"username": "me", "password": KEY})
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#model")).to_have_value("tiny")
        say(page, "hi")
        expect(page.locator(".turn.assistant .said")).to_have_text("Hello wörld!")
        context.close()


@needs_browser
def test_everything_is_reached_by_keyboard(open_page):
    page = open_page()
    expect(page.locator("#model")).to_be_enabled()
    reached = []
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("() => document.activeElement.id || 'summary'"))
    assert {"model", "summary", "blocks", "log", "text", "send", "clear"} <= set(reached)
