"""The playground: what a stream tells of each token, and the page that shows it, in a real Chromium."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from filelock import FileLock
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

from outrider import LLM, SamplingParams
from outrider.draft.base import BUNDLED_MODEL
from outrider.draft.registry import default_method
from outrider.server.paths import PLAYGROUND
from outrider.server.playground.routes import DIRECTORY
from servers import Server, events, serving

KEY = "a-key-of-this-test"
PROMPT = "def read_json(path):\n"
ENDLESS = {"temperature": "0", "max_tokens": "2000"}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
INSTALL_SECONDS = 600.0
"""For each of apt-get's commands."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled model with its own drafts, behind a key."""
    with serving(tmp_path_factory.mktemp("playground") / "log", OUTRIDER_API_KEY=KEY) as server:
        server.http.headers["authorization"] = f"Bearer {KEY}"
        yield server


# --- what a stream tells of each token


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(speculative_config={"method": default_method(BUNDLED_MODEL)}) as llm:
        yield llm


def streamed(server: Server, path: str, **asked: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that tells of its tokens, its usage last."""
    asked["speculative"] = {"return_tokens": True, **asked.get("speculative", {})}
    with server.http.stream(
        "POST", path, json={**asked, "stream": True, "stream_options": {"include_usage": True}}
    ) as got:
        assert got.status_code == 200, got.read()
        return list(events(got))


@pytest.mark.parametrize(
    ("sampling", "speculative"),
    [
        ({"temperature": 0.0, "max_tokens": 40}, {}),
        ({"temperature": 0.8, "seed": 3, "max_tokens": 40, "stop": ["\n\n"]}, {}),
        ({"temperature": 0.0, "max_tokens": 40}, {"num_speculative_tokens": 2}),
        ({"temperature": 0.0, "max_tokens": 40}, {"enabled": False}),
    ],
    ids=["greedy", "sampled", "two drafts", "no drafts"],
)
def test_each_token_is_told_of_as_offline(
    server: Server, llm: LLM, sampling: dict[str, Any], speculative: dict[str, Any]
) -> None:
    expected = [
        (piece.token_id, piece.text, piece.draft_position) for piece in llm.stream(PROMPT, SamplingParams(**sampling))
    ]
    *chunks, last = streamed(server, "/v1/completions", prompt=PROMPT, speculative=speculative, **sampling)
    told = [choice["speculative"] for chunk in chunks for choice in chunk["choices"]]
    tokens = [token for one in told for token in one["tokens"]]
    assert [(token["id"], token["text"]) for token in tokens] == [piece[:2] for piece in expected]
    if not speculative:
        places = [position for _, _, position in expected]
        assert [token["draft_position"] for token in tokens] == places
        assert max(places) > 2, "this prompt shows nothing"
    texts = ["".join(token["text"] for token in one["tokens"]) for one in told]
    assert texts == [chunk["choices"][0]["text"] for chunk in chunks]
    seconds = [one["seconds"] for one in told]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert told[-1]["acceptance"] == last["usage"]["speculative"]


@pytest.mark.parametrize("limit", [0, 2, 7])
def test_positions_agree_with_usage(server: Server, limit: int) -> None:
    speculative = {"num_speculative_tokens": limit} if limit else {"enabled": False}
    *chunks, last = streamed(
        server, "/v1/completions", prompt=PROMPT, temperature=0, max_tokens=60, speculative=speculative
    )
    tokens = [token for chunk in chunks for token in chunk["choices"][0]["speculative"]["tokens"]]
    assert len(tokens) == last["usage"]["completion_tokens"] == 60
    places = [token["draft_position"] for token in tokens]
    assert places[0] == 0, "the first token is the prompt's own step's"
    for before, after in pairwise(places):
        assert after in (0, before + 1), "positions rise by one in a round, which the target's own token ends"
    counted = last["usage"]["speculative"]["per_position"]
    shown = [places.count(place) for place in range(1, 8)]
    cut = [more - fewer for more, fewer in zip([*counted, *[0] * 7], shown, strict=False)]
    assert all(one in (0, 1) for one in cut), "only the last round may have been cut off by max_tokens"
    assert all(one == 0 for one in cut[: places[-1]]) and max(places) <= limit
    assert sum(shown) > 0 or limit == 0


def test_chat_tells_of_each_token_of_each_choice(server: Server) -> None:
    messages = [{"role": "user", "content": "Add two numbers."}]
    *chunks, last = streamed(server, "/v1/chat/completions", messages=messages, n=2, seed=4, max_tokens=30)
    said, ids = ["", ""], [0, 0]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        for token in choice.get("speculative", {"tokens": []})["tokens"]:
            said[choice["index"]] += token["text"]
            ids[choice["index"]] += 1
    answer = server.post("/v1/chat/completions", messages=messages, n=2, seed=4, max_tokens=30).json()
    assert said == [choice["message"]["content"] for choice in answer["choices"]] and said[0] != said[1]
    assert sum(ids) == last["usage"]["completion_tokens"]


def test_tokens_are_told_only_where_they_are_asked_for_and_streamed(server: Server) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 2, "speculative": {"return_tokens": True}}
    refused = server.post("/v1/completions", **asked)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "speculative.return_tokens"
    assert "set stream" in refused.json()["error"]["message"]
    with server.http.stream("POST", "/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, "stream": True}) as got:
        assert all("speculative" not in choice for chunk in events(got) for choice in chunk["choices"])


# --- the page's files and what it polls


def test_every_file_is_shown_and_no_other() -> None:
    assert sorted(PLAYGROUND.values()) == sorted(path.name for path in DIRECTORY.iterdir())


@pytest.mark.parametrize(("path", "name"), PLAYGROUND.items(), ids=list(PLAYGROUND.values()))
def test_a_file_needs_no_key_and_is_kept_until_it_changes(server: Server, path: str, name: str) -> None:
    got = httpx.get(server.url + path)
    assert got.status_code == 200 and got.content == (DIRECTORY / name).read_bytes()
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert got.headers["content-type"].startswith(kinds[name.rpartition(".")[2]])
    assert got.headers["x-content-type-options"] == "nosniff"
    policy = got.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    again = httpx.get(server.url + path, headers={"if-none-match": f'"another", W/{got.headers["etag"]}'})
    assert again.status_code == 304 and not again.content and again.headers["cache-control"] == "no-cache"
    assert httpx.head(server.url + path).headers["content-length"] == str(len(got.content))


@pytest.mark.parametrize(
    "path", ["/playground", "/playground/", "/playground/..%2froutes.py", "/playground/nothing.js"]
)
def test_nothing_else_is_under_its_path(server: Server, path: str) -> None:
    assert httpx.get(server.url + path).status_code == 401
    assert server.http.get(path).status_code == 404


def test_the_state_is_what_models_and_metrics_say_and_needs_a_key(server: Server) -> None:
    assert httpx.get(f"{server.url}/playground/state").status_code == 401
    server.post("/v1/completions", prompt=PROMPT, max_tokens=20, temperature=0)
    server.until("outrider:num_requests_running", 0.0)
    state, metrics = server.http.get("/playground/state").json(), server.metrics()
    assert state["model"] == server.http.get("/v1/models").json()["data"][0]
    assert state["status"] == "ok" and (state["running"], state["waiting"]) == (0, 0)
    assert state["acceptance"]["drafts"] == metrics["outrider:spec_decode_num_drafts_total"] > 0
    (greedy,) = [one for one in state["watched"] if one["temperature"] == 0]
    assert greedy["expected"][0] == metrics['outrider:watchdog_expected_rate{position="1",temperature="0"}']


# --- the page


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


def chromium(lock: Path) -> str:
    """Chromium's path; Debian's package is installed if it is missing and that is possible, by one worker at a time."""
    if find_chromium() is None and shutil.which("apt-get") and os.geteuid() == 0:
        wait = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::http::Timeout=20", "-qq"]
        with FileLock(lock):
            if find_chromium() is None:
                for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
                    with contextlib.suppress(subprocess.TimeoutExpired):  # as where it fails: there is none then
                        subprocess.run([*wait, *command], check=False, timeout=INSTALL_SECONDS)
    found = find_chromium()
    if found is None:
        pytest.skip("there is no chromium on this machine, and it could not be installed: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # by all workers of a run
    path = chromium(shared / "chromium.lock")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(server: Server, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page, with the key unless told otherwise; it must log no error but the statuses that are named."""
    pages: list[tuple[Page, list[str], tuple[int, ...]]] = []

    def open_(*statuses: int, key: str | None = KEY, **context: Any) -> Page:
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(20_000)
        wrong: list[str] = []

        def logged(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                wrong.append(message.text)

        page.on("console", logged)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => console.error('CSP', event.violatedDirective));"
        )
        if key is not None:
            page.add_init_script(f"sessionStorage.setItem('outrider.key', '{key}')")
        pages.append((page, wrong, statuses))
        page.goto(server.url)
        if key == KEY:
            expect(page.locator("#status")).to_have_text("ready")
        return page

    yield open_
    for page, wrong, statuses in pages:
        page.context.close()
        expected = [f"status of {status}" for status in statuses]
        assert [text for text in wrong if not any(one in text for one in expected)] == []
        for one in expected:
            assert any(one in text for text in wrong), f"{one} was not met"


def fill(page: Page, **fields: str) -> None:
    for name, value in fields.items():
        page.fill(f"#{name}", value)


def finished(page: Page) -> Locator:
    """The summary of a run that has ended by itself."""
    expect(page.locator("#replaying")).to_be_visible(timeout=60_000)
    return page.locator("#summary")


def shown(page: Page, view: str = "tokens") -> list[dict[str, Any]]:
    """Every token on show: its text, id, position, colour of its underline and the digit under it."""
    found: list[dict[str, Any]] = page.eval_on_selector_all(
        f"#{view} .token",
        """spans => spans.map(span => ({
            text: span.textContent, id: Number(span.dataset.id), position: Number(span.dataset.position),
            background: getComputedStyle(span).backgroundColor, digit: getComputedStyle(span, '::after').content}))""",
    )
    return found


def test_accepted_drafts_come_in_the_colour_of_their_position(server: Server, opened: Callable[..., Page]) -> None:
    page = opened()
    fill(page, prompt=PROMPT, max_tokens="60")
    page.click("#run")
    summary = finished(page).inner_text()
    tokens = shown(page)
    *chunks, last = streamed(server, "/v1/completions", prompt=PROMPT, temperature=0, max_tokens=60)
    told = [token for chunk in chunks for token in chunk["choices"][0]["speculative"]["tokens"]]
    keys = ("id", "text", "draft_position")
    assert [(token["id"], token["text"], token["position"]) for token in tokens] == [
        tuple(token[name] for name in keys) for token in told
    ]
    assert page.locator("#tokens .token").first.evaluate("token => getComputedStyle(token).animationName") == "arrive"
    drafts = [token for token in tokens if token["position"]]
    assert f"60 tokens, {len(drafts)} of them accepted drafts" in summary
    assert all(token["digit"] == f'"{token["position"]}"' for token in drafts)
    clear = {token["background"] for token in tokens if not token["position"]}
    colours = {
        position: {one["background"] for one in drafts if one["position"] == position} for position in range(1, 8)
    }
    met = [colour for found in colours.values() for colour in found]
    assert clear == {"rgba(0, 0, 0, 0)"} and len(met) == len(set(met)) == len(
        [1 for found in colours.values() if found]
    )
    rates = [f"{int(100 * rate + 0.5)} %" for rate in last["usage"]["speculative"]["rates"]]
    assert page.locator("#rates tr td:nth-child(2)").all_inner_texts() == rates
    assert page.locator("#chart .bar").count() == page.locator("#chart .record").count() == len(rates) == 7


def test_a_token_is_told_of_where_it_is_pointed_at(opened: Callable[..., Page]) -> None:
    page = opened()
    fill(page, prompt=PROMPT, max_tokens="30")
    page.click("#run")
    finished(page)
    index, token = next((place, one) for place, one in enumerate(shown(page)) if one["position"] == 2)
    page.locator("#tokens .token").nth(index).hover()
    expect(page.locator("#inspector")).to_contain_text(f"token {index + 1} of 30")
    expect(page.locator("#inspector")).to_contain_text(f"id {token['id']}")
    expect(page.locator("#inspector")).to_contain_text("accepted draft, position 2")


def test_stop_aborts_the_request(server: Server, opened: Callable[..., Page]) -> None:
    page = opened()
    page.check("input[value=prompt]", force=True)
    fill(page, prompt="# a list of numbers\n[", **ENDLESS)
    with page.expect_request("**/v1/completions"):
        page.click("#run")
    page.locator("#tokens .token").first.wait_for()
    page.click("#stop")
    expect(page.locator("#summary")).to_have_text("stopped")
    expect(page.locator("#stop")).to_be_hidden()
    assert 0 < len(shown(page)) < 2000
    server.until("outrider:num_requests_running", 0.0)
    page.fill("#max_tokens", "8")
    page.click("#run")
    assert finished(page).inner_text().startswith("8 tokens")


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_the_race_shows_identical_texts(opened: Callable[..., Page], temperature: str) -> None:
    page = opened(reduced_motion="reduce")
    fill(page, prompt=PROMPT, max_tokens="50", temperature=temperature)
    page.click("#race")
    summary = finished(page).inner_text()
    without, drafted = shown(page, "without"), shown(page, "with")
    assert [token["id"] for token in without] == [token["id"] for token in drafted]
    assert f"the texts are identical, all {len(without)} tokens" in summary and "× the speed" in summary
    assert not any(token["position"] for token in without) and any(token["position"] for token in drafted)
    for side in ("without", "with"):
        expect(page.locator(f"#{side}-speed")).to_contain_text("tokens/s")
    expect(page.locator("#fairness")).to_contain_text("the drafter does not run")
    assert (page.input_value("#seed") != "") == (temperature != "0")
    assert page.locator("#with .token").first.evaluate("token => getComputedStyle(token).animationName") == "none"


def test_a_replay_ends_with_the_whole_text(opened: Callable[..., Page]) -> None:
    page = opened()
    fill(page, prompt=PROMPT, max_tokens="30")
    page.click("#run")
    finished(page)
    before = shown(page)
    page.select_option("#pace", "2")
    counted = "document.querySelectorAll('#tokens .token').length"
    assert page.evaluate(f"document.getElementById('replay').click(), {counted}") == 0
    expect(page.locator("#tokens .token")).to_have_count(30)
    assert [token["id"] for token in shown(page)] == [token["id"] for token in before]


def test_errors_are_shown_in_words(opened: Callable[..., Page]) -> None:
    page = opened(400)
    fill(page, prompt=PROMPT, top_p="1.5")
    page.click("#run")
    expect(page.get_by_role("alert")).to_contain_text("top_p must be less than or equal to 1")
    expect(page.locator("#top_p")).to_have_attribute("aria-invalid", "true")
    fill(page, top_p="", seed="12345678901234567890")
    page.click("#run")
    expect(page.get_by_role("alert")).to_contain_text("seed has more digits than a browser keeps")
    fill(page, seed="1", max_tokens="4")
    page.click("#run")
    finished(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    assert page.locator("[aria-invalid]").count() == 0


def test_a_chat_goes_on_and_is_forgotten(opened: Callable[..., Page]) -> None:
    page = opened()
    page.check("input[value=chat]", force=True)
    fill(page, message="Add two numbers.", max_tokens="12")
    page.click("#run")
    finished(page)
    answer = "".join(token["text"] for token in shown(page))
    expect(page.locator("#message")).to_have_value("")
    page.fill("#message", "Again.")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.click("#run")
    assert sent.value.post_data_json["messages"] == [
        {"role": "user", "content": "Add two numbers."},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Again."},
    ]
    finished(page)
    page.click("#forget")
    expect(page.locator("#conversation")).to_be_hidden()
    assert shown(page) == []


@pytest.mark.parametrize("wrong_first", [False, True])
def test_the_key_is_asked_for_and_kept(opened: Callable[..., Page], wrong_first: bool) -> None:
    page = opened(401, key=None)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This server asks for an API key")
    if wrong_first:
        page.fill("#key-value", "wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("does not know this key")
    page.fill("#key-value", KEY)
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#status")).to_have_text("ready")
    page.reload()
    expect(page.locator("#status")).to_have_text("ready")
    assert page.evaluate("localStorage.length") == 0 and KEY not in page.content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_one_way(opened: Callable[..., Page], scheme: str) -> None:
    page = opened(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True, reduced_motion="reduce")
    fill(page, prompt=PROMPT, max_tokens="40")
    for button in ("#run", "#race"):
        page.click(button)
        finished(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    wide = "e => [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 360.5).length"
    assert page.evaluate(wide) == 0


def test_light_and_dark_are_both_readable(opened: Callable[..., Page]) -> None:
    contrast = """selector => {
        const luminance = (element, property) => {
            const canvas = new OffscreenCanvas(1, 1).getContext('2d');
            canvas.fillStyle = getComputedStyle(element)[property];
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => {
                const share = part / 255;
                return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const element = document.querySelector(selector);
        let behind = element;
        while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
        const [a, b] = [luminance(element, 'color'), luminance(behind, 'backgroundColor')];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), b];
    }"""
    behind = {}
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        for selector in ("h1", ".note", "#run", "#inspector", ".load dt", "#verdict-runner", "label[for=prompt]"):
            ratio, behind[scheme] = page.evaluate(contrast, selector)
            assert ratio >= 4.5, f"{selector} in {scheme}: {ratio:.2f}"
    assert behind["light"] > 0.8 > 0.1 > behind["dark"]


def test_the_keyboard_alone_is_enough(opened: Callable[..., Page]) -> None:
    page = opened()
    sampling = ["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"]
    for wanted in ("mode", "prompt", *sampling, "speculate", "drafts", "run", "race", "tokens"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id || document.activeElement.name") == wanted
        assert page.evaluate("document.activeElement.matches(':focus-visible')"), wanted
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("import os")
    page.keyboard.press("Control+Enter")
    finished(page)
    page.focus("#tokens")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#inspector")).to_contain_text("token 2 of")
    second = page.locator("#tokens").get_attribute("aria-activedescendant")
    assert page.locator(f"#{second}").get_attribute("aria-label") and second == "tokens-2"
    page.keyboard.press("End")
    expect(page.locator("#inspector")).to_contain_text("token 128 of 128")
    fill(page, **ENDLESS)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#stop")).to_be_visible()
    page.locator("#tokens .token").first.wait_for()
    page.keyboard.press("Escape")
    expect(page.locator("#summary")).to_have_text("stopped")
    page.keyboard.press("Control+Shift+Enter")
    expect(page.locator("#lanes")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#summary")).to_have_text("stopped")


def test_what_serves_is_told_and_kept_up_to_date(server: Server, opened: Callable[..., Page]) -> None:
    page = opened()
    model = server.http.get("/v1/models").json()["data"][0]
    expect(page.locator("#verdict-runner")).to_contain_text(model["runner"])
    expect(page.locator("#verdict-drafter")).to_contain_text(f"{model['method']}, {model['num_speculative_tokens']}")
    expect(page.locator("#verdict-verifier")).to_contain_text(model["verifier"])
    assert page.locator("#passed-over li").count() == max(1, len(model["passed_over"]))
    expect(page.locator("#running")).to_have_text("0")
    with server.http.stream(
        "POST", "/v1/completions", json={"prompt": "[", "stream": True, "max_tokens": 1900, "ignore_eos": True, "n": 4}
    ) as under_way:
        assert under_way.status_code == 200
        expect(page.locator("#running")).to_have_text("4")
    expect(page.locator("#running")).to_have_text("0")


def test_a_hidden_tab_does_not_poll(opened: Callable[..., Page]) -> None:
    page = opened()
    hide = """hidden => {
        Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));
    }"""
    page.evaluate(hide, True)
    page.wait_for_timeout(300)  # what was under way
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(1500)
    assert asked == []
    with page.expect_request("**/playground/state"):
        page.evaluate(hide, False)


def test_where_nothing_is_drafted_the_page_says_so(server: Server, opened: Callable[..., Page]) -> None:
    page = opened()
    state = server.http.get("/playground/state").json()
    state["model"] |= {"method": "none", "num_speculative_tokens": 0}
    page.route("**/playground/state", lambda route: route.fulfill(json={**state, "watched": []}))
    expect(page.locator("#verdict-drafter")).to_contain_text("none: every token")
    expect(page.locator("#acceptance")).to_be_hidden()
    expect(page.locator("#speculate")).to_be_disabled()
    page.click("#race")
    expect(page.get_by_role("alert")).to_contain_text("this server drafts nothing")
