"""The server's page, in Chromium."""

import re
import threading
from pathlib import Path

import browser
import numpy as np
import pytest
import tritonclient.http as triton

PAGE = Path(__file__).parents[2] / "cc" / "server" / "page"
FEATURES = 6

needs_browser = pytest.mark.skipif(browser.PROGRAM is None, reason="Chromium is not installed")


def test_nothing_comes_from_elsewhere():
    for file in PAGE.iterdir():
        for link in re.findall(r"https?://[^\"')\s]+", file.read_text()):
            assert link == "http://www.w3.org/2000/svg", file.name  # a name, which no one fetches


def step(client, x, **options):
    tensor = triton.InferInput("x", list(x.shape), "FP32")
    return client.infer("small", [tensor.set_data_from_numpy(x)], **options)


@pytest.fixture
def stepping(server):
    """Steps of the stream "watched", as long as the test runs."""
    ended = threading.Event()

    def run():
        client = triton.InferenceServerClient(f"127.0.0.1:{server.http_port}")
        x = np.zeros((1, FEATURES), np.float32)
        while not ended.wait(0.02):
            step(client, x, sequence_id="watched")
        client.close()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    ended.set()
    thread.join()


@needs_browser
@pytest.mark.sampled(2, rest="slow")
@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_what_happens(server, stepping, scheme, width):
    with browser.Browser(width=width, scheme=scheme) as page:
        page.open(f"http://127.0.0.1:{server.http_port}/")
        page.wait("document.querySelector('#state')?.textContent === 'Ready'")
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        assert "x FP32 [6] → y FP32 [3]" in page.text("#facts")
        assert int(page.text("#tile-open").replace(",", "")) >= 1
        # A sample, and so a point in each chart.
        page.wait("document.querySelectorAll('svg.chart circle').length >= 4")
        assert page.text("#tile-p50") != "–"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # No token, no operator.
        assert page.evaluate("document.querySelector('#streams').hidden")

        page.evaluate("document.querySelector('#stream').value = 'watched'")
        page.evaluate("document.querySelector('#watch-button').click()")
        page.wait("document.querySelector('#watch-state').textContent.startsWith('Step')")
        page.wait("document.querySelectorAll('#outputs canvas').length === 2")
        assert "y: 3 numbers" in page.text("#outputs")
        page.evaluate("document.querySelector('#watch-button').click()")
        assert page.text("#watch-button") == "Watch"
        assert page.complaints == []


@needs_browser
def test_the_theme_can_be_chosen(server):
    with browser.Browser(scheme="light") as page:
        page.open(f"http://127.0.0.1:{server.http_port}/")
        page.wait("document.querySelector('#state')?.textContent === 'Ready'")
        colors = set()
        for theme in ("light", "dark"):
            page.evaluate("document.querySelector('#theme').click()")
            assert page.evaluate("document.documentElement.dataset.theme") == theme
            colors.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(colors) == 2
        page.open(f"http://127.0.0.1:{server.http_port}/")
        page.wait("document.querySelector('#theme')?.textContent === 'Theme: dark'")


@needs_browser
def test_refusals_and_names_are_shown_as_text(server):
    """A stream's name cannot become a part of the page."""
    client = triton.InferenceServerClient(f"127.0.0.1:{server.http_port}")
    x = np.zeros((1, FEATURES), np.float32)
    with pytest.raises(Exception, match="which stream"):
        step(client, x)
    with browser.Browser() as page:
        page.open(f"http://127.0.0.1:{server.http_port}/")
        page.wait("document.querySelector('#refused')?.innerText.includes('Malformed')")


@needs_browser
def test_the_operator_needs_the_token(start_server, model_file, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    server = start_server(model_file, "--token-file", tmp_path / "token")
    client = triton.InferenceServerClient(f"127.0.0.1:{server.http_port}")
    client.register_plugin(Token("secret"))
    name = "<img src=x onerror=document.body.remove()>"
    x = np.zeros((1, FEATURES), np.float32)
    step(client, x, sequence_id=name)
    with browser.Browser() as page:
        page.open(f"http://127.0.0.1:{server.http_port}/")
        page.wait("document.querySelector('#token-form')?.hidden === false")
        assert page.evaluate("document.querySelector('#content').hidden")

        def enter(token):
            page.evaluate(f"document.querySelector('#token').value = '{token}'")
            page.evaluate("document.querySelector('#token-form button').click()")

        enter("wrong")
        page.wait("document.querySelector('#token-error').textContent")
        enter("secret")
        page.wait("document.querySelector('#content').hidden === false")
        page.wait("document.querySelectorAll('#stream-rows tr').length === 1")
        assert page.text("#stream-rows td") == name
        assert page.evaluate("document.querySelectorAll('#stream-rows img').length") == 0
        # Its button closes it, after a question.
        page.evaluate("window.confirm = () => true")
        page.evaluate("document.querySelector('#stream-rows tr td:last-child').lastChild.click()")
        page.wait("document.querySelectorAll('#stream-rows tr').length === 0")
        assert all("401" in str(complaint) for complaint in page.complaints)


class Token:
    """A plugin of tritonclient that adds the token to each request."""

    def __init__(self, token):
        self.token = token

    def __call__(self, request):
        request.headers["authorization"] = f"Bearer {self.token}"
