"""The page's server: its token, its address, where it connects, and what a visitor gets."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.cookiejar import CookieJar

import pytest

from oribi.errors import ConfigError
from oribi.watch.runs import Roots, Watched
from oribi.watch.talk import Talk
from tests.watch.runs_small import answered, log_lines, write_run

pytest.importorskip("gradio", reason='the page is drawn by gradio: pip install "oribi[watch]"')

TOKEN = "secret-of-this-test"


@contextmanager
def served(folder):
    """The server of a folder's runs in a thread; gives its address."""
    import uvicorn

    from oribi.watch.server import listen, watch_app

    with listen(None) as listening:
        port = listening.getsockname()[1]
        app = watch_app(Watched(Roots.of([str(folder)])), Talk(), TOKEN, port)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "first", log_lines(30), state="finished", answers=[answered(0, "a"), answered(9, "b")])
    return folder


@pytest.fixture(scope="module")
def connected():
    """Addresses that the process connects to or looks up while the module's server runs."""
    found = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            socket.socket, "connect", lambda self, address: found.append(address) or connect(self, address)
        )
        patch.setattr(
            socket, "getaddrinfo", lambda host, *a, **k: found.append((host,)) or look_up(host, *a, **k)
        )
        yield found


@pytest.fixture(scope="module")
def address(folder, connected):
    with served(folder) as found:
        yield found


@pytest.fixture
def visitor():
    """Opens addresses with the cookies that it was given."""
    return urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar())).open


def status(open_address, request) -> int:
    try:
        return open_address(request).status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_the_token_opens_the_page(address, visitor):
    for path in ("/", "/config", "/gradio_api/info", "/?token=wrong", "/gradio_api/queue/join", "/theme.css"):
        assert status(visitor, address + path) == 403, path
    page = visitor(f"{address}/?token={TOKEN}")
    assert page.url == f"{address}/"  # the token does not stay in the browser's history
    assert "oribi watch" in page.read().decode()
    assert status(visitor, f"{address}/theme.css") == 200  # the cookie is enough


def test_a_foreign_name_is_refused_even_with_the_token(address, visitor):
    foreign = urllib.request.Request(f"{address}/?token={TOKEN}", headers={"Host": "evil.example:7860"})
    assert status(visitor, foreign) == 403
    forwarded = urllib.request.Request(f"{address}/?token={TOKEN}", headers={"Host": "localhost:9999"})
    assert status(visitor, forwarded) == 200  # through ssh -L, to any port there


def test_pages_may_load_and_reach_nothing_else(address, visitor):
    page = visitor(f"{address}/?token={TOKEN}")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "connect-src 'self'" in policy
    assert "http" not in policy
    style = visitor(f"{address}/theme.css").read().decode()
    assert "@import" not in style
    assert "//" not in style.replace("http://www.w3.org/", "").replace("/*", "").replace("*/", "")


def call(visitor, address, function: int, data: list) -> list:
    """What a function of the page returns to a visitor."""
    body = json.dumps({"data": data, "fn_index": function, "session_hash": "a"}).encode()
    headers = {"Content-Type": "application/json"}
    visitor(urllib.request.Request(f"{address}/gradio_api/queue/join", body, headers))
    for line in visitor(f"{address}/gradio_api/queue/data?session_hash=a"):
        message = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
        if message.get("msg") == "process_completed":
            assert message["success"], message
            return message["output"]["data"]
    raise AssertionError("no answer")


def test_a_visitor_sees_the_runs_and_their_folder_stays_as_it_was(address, visitor, folder, connected):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    visitor(f"{address}/?token={TOKEN}")
    config = json.loads(visitor(f"{address}/config").read())
    loads = [
        one
        for one in config["dependencies"]
        if one["targets"] != [None, "load"] and any(kind == "load" for _, kind in one["targets"])
    ]
    shown = json.dumps([call(visitor, address, one["id"], [None] * len(one["inputs"])) for one in loads])
    assert "finished at step 30" in shown
    assert "tuned, step 9" in shown
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    elsewhere = {one[0] for one in connected if isinstance(one, tuple)} - {
        "127.0.0.1",
        "localhost",
        "::1",
        None,
    }
    assert not elsewhere


def test_a_port_in_use_is_an_error_and_the_next_is_taken_by_default():
    from oribi.watch.server import listen

    with listen(None) as taken, listen(None) as next_one:
        assert taken.getsockname()[0] == next_one.getsockname()[0] == "127.0.0.1"
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: .*; leave it out"):
            listen(port)
