"""The server's manners, with real processes: deadlines, browsers, proxies, TLS, logs, and engines that are replaced."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trustme

from servers import SRC, START_SECONDS, Server, events, serving
from test_cli import run

TEXT = "/v1/completions"
ENDLESS = {"prompt": [1, 2], "max_tokens": 3000, "ignore_eos": True, "temperature": 0.0, "n": 32}
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> str:
    return str(tiny("qwen3", max_position_embeddings=4096))


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny model behind a proxy's path, with a key, for the pages of one origin, logging JSON."""
    log = tmp_path_factory.mktemp("manners") / "log"
    flags = ("--root-path", "/api", "--allowed-origin", ORIGIN, "--log-format", "json", "--request-timeout", "30")
    with serving(log, model, "--draft", "ngram", "--api-key", "secret", *flags) as server:
        server.http.headers["authorization"] = "Bearer secret"
        yield server


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_over_its_time_ends_in_the_engine_too(server: Server, stream: bool) -> None:
    before = server.metrics()
    asked = {**ENDLESS, "stream": stream}
    with server.http.stream("POST", TEXT, json=asked, headers={"X-Request-Timeout": "0.3"}) as answer:
        if stream:
            assert answer.status_code == 200
            error = list(events(answer))[-1]["error"]
        else:
            assert answer.status_code == 408
            error = json.loads(answer.read())["error"]
    assert (error["code"], error["type"]) == ("request_timeout", "timeout_error") and "0.3 seconds" in error["message"]
    server.until("outrider:num_requests_running", 0.0)
    after = server.metrics()
    assert after["outrider:request_timeouts_total"] - before["outrider:request_timeouts_total"] == 1
    assert after["outrider:kv_cache_usage_perc"] == 0.0
    wasted = after["outrider:generation_tokens_total"] - before["outrider:generation_tokens_total"]
    assert wasted < 32 * 3000


@pytest.mark.parametrize("given", ["31", "0", "soon"])
def test_a_request_may_not_ask_for_any_time(server: Server, given: str) -> None:
    answer = server.http.post(TEXT, json={"prompt": "x", "max_tokens": 1}, headers={"X-Request-Timeout": given})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "X-Request-Timeout"


def test_browsers_of_one_origin_may_read(server: Server) -> None:
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-request-timeout"
    preflight = httpx.options(f"{server.url}{TEXT}", headers=asked)  # a browser sends no key with it
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-timeout" in preflight.headers["access-control-allow-headers"]
    refused = httpx.post(f"{server.url}{TEXT}", headers={"Origin": ORIGIN}, json={})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in refused.headers
    other = {**asked, "Origin": "https://other.example"}
    assert "access-control-allow-origin" not in httpx.options(f"{server.url}{TEXT}", headers=other).headers


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_a_proxy_may_take_its_path_off_or_leave_it(server: Server, prefix: str) -> None:
    assert httpx.get(f"{server.url}{prefix}/health").status_code == 200
    assert httpx.get(f"{server.url}{prefix}/v1/models").status_code == 401
    assert server.http.get(f"{prefix}/v1/models").status_code == 200
    assert server.http.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/api"}]
    assert server.http.get("/apiv1/models").status_code == 404


def test_the_log_is_json_and_holds_no_text(server: Server) -> None:
    marker = "Zanzibar"
    for body in ({"prompt": marker, "max_tokens": 1, "echo": True}, {"prompt": marker, "temperature": -1}):
        server.http.post(TEXT, json=body, headers={"X-Request-Id": "find-me"})
    found, end = [], time.monotonic() + 10
    while len(found) < 2 and time.monotonic() < end:  # an answer is logged once it is out
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
        found = [line for line in lines if line.get("request_id") == "find-me"]
        time.sleep(0.01)
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert [(line["method"], line["route"], line["status"]) for line in found] == [
        ("POST", TEXT, 200),
        ("POST", TEXT, 400),
    ]
    assert all(line["logger"] == "outrider.access" and line["seconds"] >= 0 for line in found)
    assert marker not in server.log.read_text()


def test_tls(model: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    flags = ("--ssl-certfile", str(tmp_path / "cert.pem"), "--ssl-keyfile", str(tmp_path / "key.pem"))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with serving(tmp_path / "log", model, *flags) as server, httpx.Client(verify=trusting) as client:
        assert server.url.startswith("https://")
        assert client.get(f"{server.url}/health").json() == {"status": "ok"}
        answer = client.post(f"{server.url}{TEXT}", json={"prompt": "x", "max_tokens": 2})
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")  # which does not know the authority
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{server.url.replace('https', 'http')}/health")


def endless(server: Server, stream: bool) -> dict[str, Any]:
    """The error that a long request ends with."""
    with server.http.stream("POST", TEXT, json={**ENDLESS, "stream": stream}) as answer:
        if stream:
            return list(events(answer))[-1]["error"]  # type: ignore[no-any-return]
        assert answer.status_code == 503
        return json.loads(answer.read())["error"]  # type: ignore[no-any-return]


def until_healthy(server: Server, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while server.http.get("/health").status_code != 200:
        assert time.monotonic() < end, server.log.read_text()
        time.sleep(0.05)


def test_an_engine_that_dies_or_hangs_is_replaced(model: str, tmp_path: Path) -> None:
    asked = {"prompt": "x", "max_tokens": 8, "seed": 1}
    flags = ("--restart-engine", "--engine-timeout", "4", "--draft", "ngram")
    with serving(tmp_path / "log", model, *flags) as server, ThreadPoolExecutor(2) as pool:
        text = server.post(TEXT, **asked).json()["choices"][0]["text"]
        for number, fault in enumerate((psutil.Process.kill, psutil.Process.suspend), start=1):
            under_way = [pool.submit(endless, server, stream) for stream in (True, False)]
            server.until("outrider:num_requests_running", 64.0)
            engine = server.engine
            fault(engine)
            for each in under_way:
                assert each.result(30)["code"] == "engine_dead"
            for answer in (server.http.get("/health"), server.post(TEXT, **asked)):
                assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_restarting"
                assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert server.metrics()["outrider:engine_up"] == 0.0
            state = server.http.get("/playground/state").json()
            assert (state["status"], state["running"], state["cache_usage"]) == ("restarting", 0, 0.0)
            until_healthy(server)
            assert not engine.is_running() and server.engine.pid != engine.pid
            assert server.post(TEXT, **asked).json()["choices"][0]["text"] == text
            now = server.metrics()
            assert now["outrider:engine_restarts_total"] == number and now["outrider:engine_up"] == 1.0
            server.until("outrider:kv_cache_usage_perc", 0.0)
        log = server.log.read_text()
        assert "killed by signal 9" in log and "it hangs" in log
        server.engine.kill()
        end = time.monotonic() + 30.0
        while server.http.get("/health").status_code != 503:
            assert time.monotonic() < end, server.log.read_text()
            time.sleep(0.02)
        server.process.terminate()  # while another is being started
        assert server.exit_code() == 0


def test_a_crash_loop_ends(model: str, tmp_path: Path) -> None:
    killed: set[int] = set()
    with serving(tmp_path / "log", model, "--restart-engine") as server:
        parent = psutil.Process(server.process.pid)
        end = time.monotonic() + 90.0
        while server.process.poll() is None and time.monotonic() < end:
            children = []
            with contextlib.suppress(psutil.Error):  # it ended while it was looked at
                children = parent.children()
            for child in children:
                with contextlib.suppress(psutil.Error):
                    if child.pid not in killed and "spawn_main" in " ".join(child.cmdline()):
                        child.kill()
                        killed.add(child.pid)
            time.sleep(0.02)
        assert server.exit_code() == 1
        assert len(killed) == 4 and "after 3 starts in a row: the server ends" in server.log.read_text()


def test_a_terminal_is_shown_that_weights_are_loaded(model: str) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(SRC), "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-m", "outrider", "serve", model, "--port", "0"]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while b"Ctrl-C ends it" not in seen:
            assert select.select([ours], [], [], START_SECONDS)[0], seen
            seen += os.read(ours, 4096)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(ours)
    before, _, after = seen.decode().partition("serving ")
    assert "loading weights" in before and "loading weights" not in after
    assert before.rindex("\x1b[1A\x1b[2K") > before.rindex("loading weights"), "erased before the server listens"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--ssl-certfile", "/no/such/file.pem"],
            "no certificate with its private key can be read from /no/such/file.pem",
        ),
        (["--ssl-keyfile", "key.pem"], "ssl_keyfile needs ssl_certfile"),
        (["--log-format", "xml"], "log_format must be one of text, json"),
        (["--allowed-origin", "https://a.org", "--allowed-origin", "b.org"], "'b.org'"),
        (["--request-timeout", "-1"], "request_timeout must be a number of seconds above 0"),
        (["--otlp-traces-endpoint", "localhost:4318"], "otlp_traces_endpoint must be an http or https URL"),
    ],
)
def test_options_that_cannot_be(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(["serve", *arguments], capsys, monkeypatch)
    assert code == 2 and said in err.replace("\n", " ") and "Traceback" not in err
