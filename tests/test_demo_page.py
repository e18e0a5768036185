"""The page of `rdsnet demo` in headless Chromium. RDSNET_ARTIFACTS names a folder that keeps its screenshot."""

from __future__ import annotations

import json
import os
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import make
from rdsnet.cli.predict import demo

pytest.importorskip("gradio", reason="Gradio is not installed (the extra [demo])")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

LOOK = 20_000  # milliseconds that the page gets to answer, on a busy machine
SAMPLE = "#samples button >> nth=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m.safetensors, photo.png and note.txt."""
    folder = tmp_path_factory.mktemp("page")
    make.save_weights(folder / "m.safetensors", sure=True, detect={"max_detections": 20})
    noise = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((320, 200)).save(folder / "photo.png")
    (folder / "note.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Of a page that is served beside the tests."""
    from rdsnet.serve.page import Handlers, build_page, launch
    from rdsnet.serve.session import Models

    weights = str(folder / "m.safetensors")
    (folder / "served").mkdir()
    handlers = Handlers(Models("cpu"), [folder / "photo.png"], folder / "served")
    page = build_page(handlers, weights=weights, any_weights=True)
    yield launch(page, "127.0.0.1", make.free_port(), browser=False)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page as a newcomer finds it; `page.requested` lists what it has asked for."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page.set_default_timeout(LOOK)
    page.requested = []
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(address)
    page.wait_for_selector(SAMPLE)
    yield page
    page.close()


def source(page: Any) -> str:
    return str(page.get_attribute("#picture img", "src"))


def upload(page: Any, file: Path) -> None:
    page.set_input_files("#upload input[type=file]", file)


def slide(page: Any, slider: str, value: float) -> None:
    """Type a slider's number, which is what its handle does too."""
    page.fill(f"#{slider} input[type=number]", str(value))
    page.press(f"#{slider} input[type=number]", "Enter")


def wait_for_another(page: Any, before: str) -> None:
    page.wait_for_function("before => document.querySelector('#picture img')?.src !== before", arg=before)


def wait_for_text(page: Any, where: str, text: str, there: bool = True) -> None:
    script = "([where, text, there]) => document.querySelector(where).innerText.includes(text) === there"
    page.wait_for_function(script, arg=[where, text, there])


def save(page: Any, button: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.click(button)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_an_upload_is_answered_and_every_control_draws_it_again(page: Any, folder: Path) -> None:
    upload(page, folder / "photo.png")
    page.wait_for_selector("#picture img")
    wait_for_text(page, "#summary", "20 of 20 objects")
    before = source(page)
    slide(page, "refinement", 0)
    wait_for_another(page, before)
    for switch in ("masks", "uncertainty", "names"):
        before = source(page)
        if switch == "uncertainty":  # shown of refined boxes
            slide(page, "refinement", 1)
            wait_for_another(page, before)
            before = source(page)
        page.click(f"#{switch} input")
        wait_for_another(page, before)


def test_the_threshold_leaves_rows_out_of_the_table(page: Any) -> None:
    page.click(SAMPLE)
    for threshold, count in ((1, 0), (0.5, 20)):
        slide(page, "threshold", threshold)
        wait_for_text(page, "#summary", f"{count} of 20 objects")
        wait_for_text(page, "#objects", "dog", there=count > 0)


def test_downloads_are_what_the_page_shows(page: Any, tmp_path: Path) -> None:
    page.click(SAMPLE)
    page.wait_for_selector("#picture img")
    content = json.loads(save(page, "#json", tmp_path).read_text())
    assert content["images"][0]["file_name"] == "photo.png" and len(content["annotations"]) == 20
    with Image.open(save(page, "#overlay", tmp_path)) as overlay:
        assert overlay.filename.endswith("photo_objects.png") and overlay.size == (960, 600)
    slide(page, "threshold", 1)
    wait_for_text(page, "#summary", "0 of 20 objects")
    assert json.loads(save(page, "#json", tmp_path).read_text())["annotations"] == []


def test_bad_files_and_weights_are_messages_and_the_next_image_is_taken(page: Any, folder: Path) -> None:
    upload(page, folder / "note.txt")
    page.wait_for_selector("text=note.txt: cannot be read as an image")
    upload(page, folder / "photo.png")
    page.wait_for_selector("#picture img")
    before = source(page)
    page.fill("#weights input", str(folder / "note.txt"))
    page.press("#weights input", "Enter")
    page.wait_for_selector("text=note.txt is not a safetensors file")
    assert source(page) == before
    assert "Traceback" not in page.inner_text("body")


def test_the_page_asks_for_nothing_but_itself(page: Any, address: str) -> None:
    page.click(SAMPLE)
    page.wait_for_selector("#picture img")
    assert page.requested and [url for url in page.requested if not url.startswith((address, "data:", "blob:"))] == []


def ask(address: str, path: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=LOOK / 1000) as answer:
        return str(answer.read().decode())


def test_the_page_opens_no_file_that_it_was_not_given(address: str, folder: Path) -> None:
    with pytest.raises(urllib.error.HTTPError, match="403"):
        ask(address, f"gradio_api/file={folder / 'm.safetensors'}")
    config = json.loads(ask(address, "config"))
    uploaded = next(event["id"] for event in config["dependencies"] if event["targets"][0][1] == "upload")
    for path in (folder / "photo.png", folder / "m.safetensors"):  # in place of an upload's
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        join = {"data": [file, str(folder / "m.safetensors"), None], "fn_index": uploaded, "session_hash": path.stem}
        ask(address, "gradio_api/queue/join", join)
        assert '"success":false' in ask(address, f"gradio_api/queue/data?session_hash={path.stem}")


def test_the_command_serves_until_ctrl_c_and_talks_to_this_machine_only(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = make.free_port()
    artifacts = Path(os.environ.get("RDSNET_ARTIFACTS", tmp_path))
    artifacts.mkdir(parents=True, exist_ok=True)
    hosts: list[Any] = []
    connect = socket.socket.connect

    def recorded(self: socket.socket, address: Any) -> None:
        hosts.append(address[0])
        connect(self, address)

    def use() -> None:
        assert f"page: http://127.0.0.1:{port}/" in capsys.readouterr().out
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(LOOK)
        page.goto(f"http://127.0.0.1:{port}")
        page.click("#samples button >> nth=3")
        page.wait_for_selector("#picture img")
        wait_for_text(page, "#objects", "nucleus")
        page.screenshot(path=artifacts / "demo.png")
        raise KeyboardInterrupt  # with the page still open

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setattr(socket.socket, "connect", recorded)
    monkeypatch.setattr("rdsnet.cli.predict.wait", use)
    with pytest.raises(KeyboardInterrupt):
        demo(port=port, no_browser=True, device="cpu")
    assert set(hosts) == {"127.0.0.1"}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
