"""The page's functions, and the served page as programs see it: uploads that vanish, limits, errors in one line."""

import base64
import concurrent.futures
import html
import io
import json
import os
import re
import signal
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
from chestxray.config import REPOSITORY, SIX_FINDINGS, StudyError
from chestxray.inference import web

PATIENT = "Doe^Jane"


@pytest.fixture
def png(tmp_path):
    """A file to upload."""
    path = tmp_path / "chest.png"
    Image.fromarray(np.linspace(0, 255, 96 * 64).reshape(96, 64).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def page(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    return web.Page(FakeReader(), web.Uploads(folder))


def pictures(text):
    """The pictures that HTML holds: the radiograph and the layer over it."""
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'base64,([^"]+)"', text)]


class TestPage:
    def test_an_upload_is_answered_and_deleted(self, page, png):
        view = page.examine(str(png))
        assert not png.exists()
        assert view.answer.count("<li") == 7 and "Fluid around the lung" in view.answer
        assert view.finding in SIX_FINDINGS and view.shown.pixels.shape == (96, 64)
        film, layer = pictures(view.picture)
        assert film.size == (64, 96) and layer.mode == "RGBA"
        assert abs(layer.width / layer.height - film.width / film.height) < 0.02
        assert "alert" not in view.notes and "<details" not in view.answer

    def test_probabilities_and_operating_points_are_the_readers(self, page, png):
        answer = page.reader.examine(png)
        text = html.unescape(page.answer_html(answer))
        assert [web.percent(answer.calibrated[name]) in text for name in answer.calibrated] == [True] * 7
        assert text.count("Above the operating point") == sum(answer.above.values()) > 0
        assert text.count("Below the operating point") == 6 - sum(answer.above.values()) > 0
        assert "found 81\N{NO-BREAK SPACE}%, wrongly marked\n43\N{NO-BREAK SPACE}%" in text

    def test_flags_are_an_alert_and_fold_the_answer_away(self, page, png):
        page.reader.flags = ["this is <b>no</b> frontal radiograph."]
        notes, answer, *_ = page.examine(str(png))
        assert answer.startswith("<details>") and answer.count("<li") == 7
        assert 'role="alert"' in notes and "This is &lt;b&gt;no&lt;/b&gt; frontal radiograph." in notes

    @pytest.mark.parametrize("name", web.EXAMPLES)
    def test_a_phantom_is_said_to_be_drawn(self, page, name):
        view = page.example(name)
        assert "a drawing made by a program" in view.notes and "Drawn radiograph (phantom)" in view.picture
        assert page.reader.asked[0].shape == (512, 512)
        assert page.example(name).answer == view.answer

    def test_what_cannot_be_read_is_one_line_with_the_files_own_name(self, page, png):
        png.write_bytes(b"<script>alert(1)</script>")
        view = page.examine(str(png))
        assert "chest.png: begins with" in view.notes and str(png.parent) not in view.notes
        assert view.notes.count("\n") == 0 and "<script>" not in view.notes
        assert view.shown is None and not view.answer and not png.exists()

    def test_a_fault_of_ours_tells_nothing_of_the_patient(self, page, png, capsys):
        page.reader.error = RuntimeError(f"cannot read {PATIENT}")
        view = page.examine(str(png))
        assert "chest.png: no answer (RuntimeError)" in view.notes and not png.exists()
        assert PATIENT not in view.notes + "".join(capsys.readouterr())

    def test_nothing_chosen_is_no_answer(self, page):
        assert page.examine(None) == web.View("")
        assert page.picture(web.Shown(np.zeros((8, 8), np.uint8), True), None) == ""

    def test_a_heat_map_of_what_was_forgotten_says_so(self, page):
        assert "choose it again" in page.picture(None, "Mass")

    def test_each_finding_has_its_own_heat_map(self, page, png):
        shown = page.examine(str(png)).shown
        layers = [np.asarray(pictures(page.picture(shown, name))[1]) for name in SIX_FINDINGS]
        hottest = [np.unravel_index(layer[..., 3].argmax(), layer.shape[:2])[0] for layer in layers]
        assert hottest == sorted(hottest) and len(set(hottest)) == 6

    def test_the_picture_says_where_in_words(self, page, png):
        shown = page.examine(str(png)).shown
        assert "strongest at the top left" in page.picture(shown, "Atelectasis")
        assert "strongest at the bottom left" in page.picture(shown, "Pneumothorax")
        assert "strongest" not in web.picture_html(shown, "Mass", np.zeros((96, 64), np.float32))

    def test_what_is_kept_of_a_large_radiograph_is_small(self, page, tmp_path):
        path = tmp_path / "large.png"
        Image.fromarray(np.zeros((3000, 2400), np.uint8)).save(path)
        assert page.examine(str(path)).shown.pixels.shape == (1024, 819)


@pytest.mark.parametrize(("share", "text"), [(0, "<1"), (0.004, "<1"), (0.126, "13"), (0.99, "99"), (0.997, ">99")])
def test_percent(share, text):
    assert web.percent(share) == f"{text}\N{NO-BREAK SPACE}%"


class TestVisit:
    """Wishes that overlap: each may end while another is being worked on."""

    @pytest.fixture
    def visit(self):
        return web.Visit()

    def view(self, grey):
        return web.View(f"{grey}", shown=web.Shown(np.full((4, 4), grey, np.uint8), False))

    def test_an_answer_that_comes_late_replaces_none_of_a_later_wish(self, visit):
        def slow():
            assert visit.radiograph(lambda: self.view(2)).notes == "2"
            return self.view(1)

        assert visit.radiograph(slow) is None
        assert visit.shown.pixels[0, 0] == 2

    def test_a_heat_map_is_not_shown_beside_the_answer_for_another_radiograph(self, visit):
        visit.radiograph(lambda: self.view(1))

        def slow(shown):
            visit.radiograph(lambda: self.view(2))
            return f"{shown.pixels[0, 0]}"

        assert visit.heat_map(slow) is None
        assert visit.heat_map(lambda shown: f"{shown.pixels[0, 0]}") == "2"

    def test_the_last_heat_map_counts(self, visit):
        visit.radiograph(lambda: self.view(1))
        assert visit.heat_map(lambda shown: visit.heat_map(lambda shown: "later") and "earlier") is None

    def test_what_cannot_be_read_leaves_nothing_to_map(self, visit):
        visit.radiograph(lambda: self.view(1))
        visit.radiograph(lambda: web.View("No answer"))
        assert visit.heat_map(lambda shown: str(shown)) == "None"


class TestUploads:
    @pytest.fixture
    def uploads(self, tmp_path):
        return web.Uploads(tmp_path)

    def store(self, uploads, name="a/chest.png"):
        path = uploads.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"pixels")
        return path

    def test_two_visitors_with_one_file(self, uploads):
        for _ in range(2):
            uploads.arrives()
            path = self.store(uploads)
            uploads.arrived([str(path)])
        uploads.answered(str(path))
        assert path.exists()
        uploads.answered(str(path))
        assert list(uploads.folder.iterdir()) == []

    def test_nothing_goes_while_an_upload_arrives_that_may_be_the_same(self, uploads):
        uploads.arrives()
        path = self.store(uploads)
        uploads.arrived([str(path)])
        uploads.arrives()
        uploads.answered(str(path))
        assert path.exists()
        uploads.arrived([str(path)])
        assert path.exists()
        uploads.answered(str(path))
        assert not path.exists()

    def test_what_nobody_asks_about_goes_with_time(self, uploads):
        path = self.store(uploads)
        uploads.sweep(age=60)
        assert path.exists() and uploads.bytes() == 6
        os.utime(path, (time.time() - 61,) * 2)
        uploads.sweep(age=60)
        assert not path.exists() and uploads.bytes() == 0

    def test_a_visitor_who_left_keeps_no_later_ones_upload(self, uploads):
        for age in (0, None):
            uploads.arrives()
            path = self.store(uploads)
            uploads.arrived([str(path)])
            if age is not None:
                os.utime(path, (time.time() - 1,) * 2)
                uploads.sweep(age=age)
        assert path.exists()
        uploads.answered(str(path))
        assert not path.exists()


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


def left(server):
    """Files in the server's folder, once it has had a moment to delete them."""
    for _ in range(50):
        found = [path for path in server.folder.rglob("*") if path.is_file()]
        if not found:
            break
        time.sleep(0.1)
    return found


def said(answer):
    """What the parts of the page show, as one text."""
    return json.dumps(answer)


class TestServer:
    def test_an_upload_is_answered_and_nothing_is_left(self, served, png):
        assert "Fluid around the lung" in upload(served, png)
        assert left(served[0]) == []

    def test_heat_maps_of_the_same_visitor(self, served):
        client = visitor(served)
        client.predict(api_name="/example_mass")
        first, second = (client.predict(finding, api_name="/heat_map") for finding in ("Mass", "Effusion"))
        assert "Heat-map of Large spot" in first and "Heat-map of Fluid" in second
        another = visitor(served).predict("Mass", api_name="/heat_map")
        assert "choose it again" in another and "base64" not in another
        assert left(served[0]) == []

    def test_twenty_visitors_at_once_get_their_own_answers(self, served, tmp_path):
        """Half of them with the same file."""
        paths = [tmp_path / f"{number if number < 10 else 10}.png" for number in range(20)]
        for number, path in enumerate(paths[:11]):
            Image.fromarray(np.full((96, 64), 10 * number + 5, np.uint8)).save(path)
        reader = FakeReader()
        due = [html.escape(web.percent(reader.examine(path).calibrated["Effusion"])) for path in paths]
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda path: upload(served, path), paths))
        found = [re.search(r"Effusion</small></h3><strong>([^<]+)<", answer)[1] for answer in answers]
        assert [json.loads(f'"{text}"') for text in found] == due and len(set(due)) > 5
        assert left(served[0]) == []

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
        assert left(served[0]) == []

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
        assert left(served[0]) == []

    def test_too_many_bytes_are_refused(self, served, monkeypatch, png):
        import httpx

        monkeypatch.setattr(served[0]._blocks, "max_file_size", 1000)
        files = {"files": ("chest.png", bytes(2000))}
        answer = httpx.post(f"{served[0].url}gradio_api/upload", files=files)
        assert answer.status_code == 413 and "maximum allowed size" in answer.text
        assert left(served[0]) == []

    def test_uploads_are_refused_while_too_many_wait(self, served, monkeypatch):
        import httpx

        monkeypatch.setattr(web, "MOST_UPLOADS", -1)
        answer = httpx.post(f"{served[0].url}gradio_api/upload", files={"files": ("chest.png", b"pixels")})
        assert answer.status_code == 503 and "try again in a minute" in answer.text
        assert left(served[0]) == []

    def test_an_upload_that_breaks_off_is_swept(self, served):
        import socket

        server, _ = served
        host, port = re.search(r"//([\d.]+):(\d+)", server.url).groups()
        with socket.create_connection((host, int(port))) as line:
            head = "POST /gradio_api/upload HTTP/1.1\r\nHost: here\r\nContent-Length: 90000\r\n"
            head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            head += 'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
            line.sendall(head.encode() + bytes(40000))
            for _ in range(50):
                if [path for path in server.folder.rglob("*") if path.is_file()]:
                    break
                time.sleep(0.1)
        time.sleep(0.3)
        server.uploads.sweep(age=0)
        assert left(server) == []

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


def test_a_model_card_that_is_missing_is_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setattr(web, "MODEL_CARD", tmp_path / "none.md")
    assert "no model card" in web.model_card()


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(StudyError, match=r"needs gradio, which is missing: pip install 'chestxray\[web\]'"):
        web.Server(FakeReader())


def test_a_port_out_of_range_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("chestxray.pipeline.environment.ensure", lambda extras, arguments: None)
    assert __main__.main(["serve", "--port", "70000"]) == 2
    assert capsys.readouterr().err == "chestxray: --port 70000: give a number from 1 to 65535\n"


@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_the_command_serves_until_it_is_told_to_end_and_leaves_nothing(tmp_path, gradio_client):
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from fake_reader import FakeReader; import chestxray; from chestxray.pipeline.commands import user\n"
        "chestxray.load = FakeReader\n"
        "sys.exit(user.main(['serve']))"
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
