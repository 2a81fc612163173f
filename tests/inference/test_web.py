"""The served page as programs see it: uploads that vanish, limits, errors in one line."""

import concurrent.futures
import html
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import dicom_files
import numpy as np
import pytest
from fake_reader import FakeReader
from PIL import Image

from chestxray import __main__
from chestxray.config import REPOSITORY, StudyError
from chestxray.inference import web
from chestxray.inference.page import percent


@pytest.fixture
def png(tmp_path):
    """A file to upload."""
    path = tmp_path / "chest.png"
    Image.fromarray(np.linspace(0, 255, 96 * 64).reshape(96, 64).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def gradio_client():
    """What programs ask the page with."""
    pytest.importorskip("gradio", reason="gradio is not installed; it comes with the extra web")
    import gradio_client

    return gradio_client


@pytest.fixture(scope="module")
def connections():
    """Where this process connects to that is not this machine, and from which code, as the interpreter reports it."""
    seen = []

    def note(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo"):
            host = arguments[1][0] if event == "socket.connect" else arguments[0]
            if host not in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "", None):
                seen.append((host, "".join(traceback.format_stack(limit=30))))

    sys.addaudithook(note)
    return seen


@pytest.fixture(scope="module")
def served(connections, gradio_client):
    """The page with a reader that needs no model, and that reader."""
    reader = FakeReader()
    with web.Server(reader) as server:
        yield server, reader
    assert not server.folder.exists()


@pytest.fixture(autouse=True)
def untouched(request):
    """Every test finds the reader as it was."""
    if "served" in request.fixturenames:
        reader = request.getfixturevalue("served")[1]
        reader.flags, reader.error = [], None


def visitor(served):
    import gradio_client

    return gradio_client.Client(served[0].url, verbose=False, analytics_enabled=False)


def upload(served, path):
    """One visitor's answer for one file, as text."""
    import gradio_client

    return said(visitor(served).predict(gradio_client.handle_file(path), api_name="/examine"))


def stored(server):
    """Files in the server's folder."""
    return {path for path in server.folder.rglob("*") if path.is_file()}


def said(answer):
    """What the parts of the page show, as one text."""
    return json.dumps(answer)


class TestServer:
    def test_an_upload_is_answered(self, served, png):
        assert "Fluid around the lung" in upload(served, png)

    def test_shares_re_weight_and_stay_for_the_next_radiograph(self, served):
        client, asked = visitor(served), len(served[1].asked)
        assert "Class: Mass" in said(client.predict(api_name="/example_mass"))
        assert "Class: No finding" in client.predict("nih", api_name="/shares")
        assert len(served[1].asked) == asked + 1
        assert "Class: No finding" in said(client.predict(api_name="/example_effusion"))
        assert "Class: Mass" in said(visitor(served).predict(api_name="/example_mass"))

    def test_heat_maps_of_the_same_visitor(self, served):
        client = visitor(served)
        client.predict(api_name="/example_mass")
        first, second = (client.predict(finding, api_name="/heat_map") for finding in ("Mass", "Effusion"))
        assert "Heat-map of Large spot" in first and "Heat-map of Fluid" in second
        another = visitor(served).predict("Mass", api_name="/heat_map")
        assert "choose it again" in another and "base64" not in another

    def test_twenty_visitors_at_once_get_their_own_answers(self, served, tmp_path):
        """Half of them with the same file."""
        paths = [tmp_path / f"{number if number < 10 else 10}.png" for number in range(20)]
        for number, path in enumerate(paths[:11]):
            Image.fromarray(np.full((96, 64), 10 * number + 5, np.uint8)).save(path)
        reader = FakeReader()
        due = [html.escape(percent(reader.examine(path).present["Effusion"])) for path in paths]
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda path: upload(served, path), paths))
        found = [re.search(r"Effusion</small></h3><strong>([^<]+)<", answer)[1] for answer in answers]
        assert [json.loads(f'"{text}"') for text in found] == due and len(set(due)) > 5

    @pytest.mark.parametrize("kind", ["png", "tiff", "dicom"])
    def test_a_decompression_bomb_is_one_line(self, served, tmp_path, kind):
        path = tmp_path / f"bomb.{kind}"
        if kind == "dicom":
            path.write_bytes(dicom_files.deflated_bomb(600_000_000))
        else:
            Image.new("1", (40000, 40000)).save(path, kind, **({"compression": "group4"} if kind == "tiff" else {}))
        assert path.stat().st_size < 2_000_000
        answer = upload(served, path)
        assert "No answer" in answer and path.name in answer and "Traceback" not in answer

    @pytest.mark.parametrize(
        ("content", "line"),
        [
            (b"no image at all", "chest.png: "),
            (b"", "chest.png: 0 bytes"),
        ],
    )
    def test_a_bad_file_is_one_line(self, served, png, content, line, capfd):
        png.write_bytes(content)
        answer = upload(served, png)
        assert line in answer and "Traceback" not in answer and str(served[0].folder) not in answer
        assert "Traceback" not in "".join(capfd.readouterr())

    def test_too_many_bytes_are_refused(self, served, monkeypatch, png):
        import httpx

        monkeypatch.setattr(served[0]._blocks, "max_file_size", 1000)
        before = stored(served[0])
        files = {"files": ("chest.png", bytes(2000))}
        answer = httpx.post(f"{served[0].url}gradio_api/upload", files=files)
        assert answer.status_code == 413 and "maximum allowed size" in answer.text
        assert stored(served[0]) == before

    def test_uploads_are_refused_while_too_many_wait(self, served, monkeypatch):
        import httpx

        monkeypatch.setattr(web, "MOST_UPLOADS", -1)
        before = stored(served[0])
        answer = httpx.post(f"{served[0].url}gradio_api/upload", files={"files": ("chest.png", b"pixels")})
        assert answer.status_code == 503 and "try again in a minute" in answer.text
        assert stored(served[0]) == before

    def test_browsers_are_told_to_load_nothing_from_elsewhere(self, served):
        import httpx

        headers = httpx.get(served[0].url).headers
        assert headers["content-security-policy"] == web.POLICY and "http" not in web.POLICY

    def test_the_server_calls_nobody(self, served, connections):
        ours = [
            seen for seen in connections if "in visitor" not in seen[1]
        ]  # gradio's client asks the Hub, as a visitor
        assert ours == [], ours[0][1]

    def test_the_folder_is_this_users_alone(self, served):
        assert served[0].folder.stat().st_mode & 0o077 == 0

    def test_a_taken_port_is_one_line(self, served):
        port = int(re.search(r":(\d+)", served[0].url[6:])[1])
        with pytest.raises(StudyError, match=rf"port {port}: cannot be listened on .*give another"):
            web.Server(FakeReader(), port=port)

    def test_the_page_is_here_only_and_has_the_model_card(self, served):
        import httpx

        server, _ = served
        assert server.url.startswith("http://127.0.0.1:") and not server.shared
        config = httpx.get(f"{server.url}config").json()
        texts = [str(part["props"].get("value")) for part in config["components"]]
        assert any("Model card" in text for text in texts) == web.MODEL_CARD.exists()
        assert any("not a medical device" in text for text in texts)
        assert config.get("analytics_enabled", False) is False


class TestUploads:
    """Uploads on a server that deletes them after a few seconds."""

    @pytest.fixture
    def brief(self, gradio_client, monkeypatch):
        monkeypatch.setattr(web, "STAY", 4)
        monkeypatch.setattr(web, "SWEEP", 1)
        with web.Server(FakeReader()) as server:
            yield server
        assert not server.folder.exists()

    def waits(self, condition):
        for _ in range(150):
            if condition():
                return True
            time.sleep(0.1)
        return False

    def test_an_upload_is_deleted(self, brief, png):
        before = stored(brief)
        assert "Fluid around the lung" in upload((brief,), png)
        assert any(path.name == "chest.png" for path in stored(brief) - before)
        assert self.waits(lambda: not stored(brief))

    def test_an_upload_that_nobody_asks_about_is_deleted(self, brief):
        import httpx

        answer = httpx.post(f"{brief.url}gradio_api/upload", files={"files": ("chest.png", b"pixels")})
        assert [Path(path).read_bytes() for path in answer.json()] == [b"pixels"]
        assert self.waits(lambda: not stored(brief))

    def test_an_upload_that_breaks_off_is_deleted(self, brief):
        host, port = re.search(r"//([\d.]+):(\d+)", brief.url).groups()
        with socket.create_connection((host, int(port))) as line:
            head = "POST /gradio_api/upload HTTP/1.1\r\nHost: here\r\nContent-Length: 90000\r\n"
            head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            head += 'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
            line.sendall(head.encode() + bytes(40000))
            assert self.waits(lambda: stored(brief))
        assert self.waits(lambda: not stored(brief))


def test_a_model_card_that_is_missing_is_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setattr(web, "MODEL_CARD", tmp_path / "none.md")
    assert "no model card" in web.model_card()


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(StudyError, match=r"needs gradio, which is missing: pip install 'chestxray\[web\]'"):
        web.Server(FakeReader())


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "a..b", ""])
def test_a_host_that_is_none_of_this_machine_is_one_line(host):
    with pytest.raises(StudyError, match=r"cannot be listened on .*; give another --host or --port") as error:
        web.Server(FakeReader(), host)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "no address"])
def test_a_proxy_stands_not_before_the_page(proxy, monkeypatch):
    pytest.importorskip("gradio", reason="only the page needs it")
    for name in ("http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("no_proxy", "")
    with web.Server(FakeReader()) as server:
        assert server.url.startswith("http://127.0.0.1:")
    assert os.environ["no_proxy"] == ""


def test_a_port_out_of_range_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("chestxray.pipeline.environment.ensure", lambda extras, arguments: None)
    assert __main__.main(["serve", "--port", "70000"]) == 2
    assert capsys.readouterr().err == "chestxray: --port 70000: give a number from 1 to 65535\n"


@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_the_command_serves_until_it_is_told_to_end_and_leaves_nothing(tmp_path, gradio_client):
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from fake_reader import FakeReader; from chestxray.inference import reader\n"
        "from chestxray.pipeline import commands\n"
        "reader.load = FakeReader\n"
        "sys.exit(commands.main(['serve']))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    )
    watch = threading.Timer(600, process.kill)
    watch.start()
    try:
        url = process.stdout.readline().split()[0]
        client = gradio_client.Client(url, verbose=False, analytics_enabled=False)
        assert "a drawing made by a program" in said(client.predict(api_name="/example_effusion"))
        assert list(tmp_path.glob("chestxray-*"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert not list(Path(tmp_path).glob("chestxray-*"))
    finally:
        watch.cancel()
        process.kill()
        process.stdout.close()
