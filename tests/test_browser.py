"""The explorer in a real browser: in JupyterLab by keyboard and mouse, as an untrusted notebook, as a page.

Looks at text, numbers and colours that the page shows and compares them with the data; never at pixels.
The runs hold hostile strings throughout: whatever is opened here must neither run nor load them. Needs an
installed Chromium (or Chrome) and Playwright; without them every test here is skipped and says so.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from tdlib.core.facts import percent
from tdlib.core.paths import ROOT
from tdlib.core.records import END, read_records, write_records
from tdlib.runs.notebook import run_notebook
from tdlib.runs.page import export_html
from tdlib.training.run import compare
from tdlib.views import index

playwright = pytest.importorskip("playwright.sync_api", reason="no browser tests: playwright is missing")
CHROMIUM = os.environ.get("TDLIB_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM, reason="no browser tests: no chromium in PATH (or name one in TDLIB_CHROMIUM)"
    ),
]

PATIENCE = 240_000  # milliseconds; a busy machine is no failure
EVIL = '<img src=x onerror="window.broken = 1"> <script>window.broken = 2</script>'
TOKEN = secrets.token_hex(16)
OTHER_CACHE = """from pathlib import Path

from tdlib.training import prepare as experiments

experiments.CACHE_ROOT = Path({cache!r})
"""
# The last cell of 05_tokens without the pages of views before it.
LIVE = """from tdlib.views.index import find_runs
from tdlib.views.widgets import Explorer, OwnExample

panel = Explorer(find_runs([{runs!r}]))
display(panel)
display(OwnExample(panel, panel.request.record().image))
"""


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """A Chromium with a profile of its own."""
    options = (
        "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync"
    )
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM, headless=True,
            args=options.split(), viewport={"width": 1400, "height": 1000}, timeout=PATIENCE,
        )  # fmt: skip
        context.set_default_timeout(PATIENCE)
        yield context
        context.close()


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> Path:
    """Two arms that recorded six questions at several steps; every text and name in them is hostile."""
    changes = {"eval_splits": ["val"], "shift": "", "probe_examples": 6, "probe_every": 1}
    config = base.model_copy(update=changes)
    folders = compare(config, ["clip_td", "naive"], [0], tmp_path_factory.mktemp("runs"))
    for folder in folders:
        records = read_records(folder / index.SELECTIONS)
        hostile = [
            replace(r, text=f"{r.text} {EVIL}", object_names=tuple(f"{n}{EVIL}" for n in r.object_names))
            for r in records
        ]
        write_records(hostile, folder / index.SELECTIONS)
    return folders[0].parent


@pytest.fixture(scope="module")
def executed(runs, own_cache, tmp_path_factory) -> Path:
    """The notebook as papermill leaves it, with its page beside it; its cache is not data/'s."""
    home = tmp_path_factory.mktemp("executed")
    notebook = nbformat.read(ROOT / "notebooks" / "05_tokens.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in {"runs": [str(runs)], "examples": 1}.items():
        cell.source, count = re.subn(
            rf"^({name}: \w+ = ).*?(  #)", lambda m, v=value: f"{m[1]}{v!r}{m[2]}", cell.source, flags=re.M
        )
        assert count == 1, name
    notebook.cells.insert(0, nbformat.v4.new_code_cell(OTHER_CACHE.format(cache=str(own_cache))))
    nbformat.write(notebook, home / "05_tokens.ipynb")
    return run_notebook(home / "05_tokens.ipynb", home / "report", {}).with_suffix(".ipynb")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab with nothing of the user's: its address, and the folder that it shows.

    It is dark, and shows whole notebooks at once.
    """
    home = tmp_path_factory.mktemp("lab")
    work, settings = home / "work", home / "settings" / "@jupyterlab"
    work.mkdir()
    for name, content in {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/themes": {"theme": "JupyterLab Dark"},
        "apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false"},
    }.items():
        file = settings / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }  # fmt: skip
    environment = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.port_retries=0", "--ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}",
               f"--ServerApp.root_dir={work}", "--LabApp.news_url="]  # fmt: skip
    with (home / "log.txt").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + PATIENCE / 1000
        while True:
            assert server.poll() is None, (home / "log.txt").read_text()
            try:
                urllib.request.urlopen(f"{address}/api/status?token={TOKEN}", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < until, "JupyterLab does not answer"
                time.sleep(0.3)
        yield address, work
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, 9)


class Watch:
    """A page's console errors, exceptions and requests beyond ``allowed``."""

    def __init__(self, page, allowed: tuple[str, ...]):
        self.errors: list[str] = []
        self.foreign: list[str] = []
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

        def route(route) -> None:
            if route.request.url.startswith(allowed):
                route.continue_()
            else:
                self.foreign.append(route.request.url)
                route.abort()

        page.route("**/*", route)


# Every visible word of every view and how far its colour is from its ground (WCAG 2).
CONTRAST = """
(selector) => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (let n = node; n; n = n.parentElement) {
      const c = channels(getComputedStyle(n).backgroundColor);
      if (c.length < 4 || c[3] > 0.99) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const view of document.querySelectorAll(selector)) {
    for (const node of view.querySelectorAll("*")) {
      const own = [...node.childNodes].filter((n) => n.nodeType === 3 && n.data.trim());
      if (!own.length || !node.getClientRects().length) continue;
      const [a, b] = [light(channels(getComputedStyle(node).color)), light(ground(node))];
      found.push([own[0].data.trim(), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
    }
  }
  return found;
}
"""
VIEW = 'div[style*="#ffffff"]'  # the frame of every view, as written in it


def assert_readable(page, selector: str) -> None:
    found = page.evaluate(CONTRAST, selector)
    assert len(found) > 50
    faint = [(text, round(ratio, 1)) for text, ratio in found if ratio < 4.5]
    assert not faint, faint


def assert_shows(text: str, records, run: str) -> None:
    """The words of a statement with their weights, and the hostile string as text."""
    text = re.sub(r" \[\d+\](?= )", "", " ".join(text.split()))  # objects stand between word and weight
    assert EVIL.split(" ")[0] in text and "window.broken = 2</script>" in text
    for record in records:
        assert record.example_id in text
        for i in record.selected.nonzero()[0]:
            if record.is_text[i]:
                assert f"{record.tokens[i]} {percent(float(record.weight[i]))}" in text


def one_record(runs: Path, name: str, example_id: str, step: int = END):
    """The right statement of a question, as the file has it."""
    records = read_records(runs / name / index.SELECTIONS, [step])
    (record,) = [r for r in records if r.example_id == example_id and r.choice == r.label]
    return record


def spaced(page, selector: str) -> str:
    """The text of what is selected, with a space between any two elements."""
    script = """(selector) => [...document.querySelectorAll(selector)].map((root) => {
      const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), parts = [];
      while (walker.nextNode()) parts.push(walker.currentNode.data);
      return parts.join(" ");
    }).join(" ")"""
    return page.evaluate(script, selector)


def unbroken(page) -> bool:
    return page.evaluate("window.broken === undefined")


def test_the_exported_page_needs_no_network_and_shows_everything(context, executed, runs):
    page = context.new_page()
    watch = Watch(page, ("file://", "data:"))
    page.goto(executed.with_suffix(".html").as_uri(), wait_until="load")
    assert watch.foreign == [] and watch.errors == []
    assert unbroken(page)
    text = spaced(page, "body")
    first = index.find_runs([runs])[0]
    assert first.name == "clip_td-seed0"
    assert_shows(text, [one_record(runs, first.name, first.index["example_id"][0])], first.name)
    for said in ("naive-seed0 − clip_td-seed0", "over training", "Instance weights of 6 examples",
                 "tokens of student and teacher", "attention rollout of layers 0 to 1",
                 "teacher, image tower: attention", "gradient relevance", "trained student"):  # fmt: skip
        assert said in text, said
    widths = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
    assert len(widths) >= 14 and min(widths) > 100
    hovers = page.evaluate("[...document.querySelectorAll('[title]')].map((node) => node.title)")
    record = one_record(runs, first.name, first.index["example_id"][0])
    for i in (record.is_text | record.is_visual).nonzero()[0]:  # without any script
        assert any(f"score {percent(float(record.score[i]))} %, weight" in title for title in hovers)
    assert page.evaluate("document.scripts.length") == 0 or watch.foreign == []
    assert_readable(page, VIEW)
    page.close()


def test_the_page_of_a_notebook_with_controls_is_offline_too(context, executed, tmp_path):
    """Stored widget states would make nbconvert load their renderer from the network."""
    notebook = nbformat.read(executed, as_version=4)
    state = {"a": {"model_module": "anywidget", "model_module_version": "~0.11.*",
                   "model_name": "AnyModel", "state": {}}}  # fmt: skip
    kind = "application/vnd.jupyter.widget"
    notebook.metadata["widgets"] = {
        f"{kind}-state+json": {"version_major": 2, "version_minor": 0, "state": state}
    }
    data = {f"{kind}-view+json": {"version_major": 2, "version_minor": 0, "model_id": "a"}, "text/plain": "E"}
    notebook.cells[-1].outputs = [nbformat.v4.new_output("display_data", data)]
    nbformat.write(notebook, tmp_path / "x.ipynb")
    export_html(tmp_path / "x.ipynb", tmp_path / "x.html")
    page = context.new_page()
    watch = Watch(page, ("file://", "data:"))
    page.goto((tmp_path / "x.html").as_uri(), wait_until="load")
    page.wait_for_timeout(500)
    assert watch.foreign == [] and watch.errors == []
    page.close()


def open_in_lab(context, lab: tuple[str, Path], notebook: nbformat.NotebookNode, name: str):
    address, work = lab
    nbformat.write(notebook, work / name)
    page = context.new_page()
    watch = Watch(page, (address, address.replace("http", "ws"), "data:", "blob:"))
    page.goto(f"{address}/lab/tree/{name}?token={TOKEN}&reset")
    page.wait_for_selector(".jp-NotebookPanel-notebook .jp-Cell")
    return page, watch


def test_an_untrusted_notebook_shows_the_same_in_the_dark(context, lab, executed, runs):
    notebook = nbformat.read(executed, as_version=4)  # with an output that only a trusted notebook runs
    script = {"text/html": "<script>window.trusted = true</script><b>probe</b>"}
    notebook.cells[0].outputs = [nbformat.v4.new_output("display_data", script)]
    page, watch = open_in_lab(context, lab, notebook, "executed.ipynb")
    page.wait_for_selector(f".jp-OutputArea-output {VIEW}")
    page.wait_for_function("document.querySelectorAll('.jp-OutputArea-output img').length >= 14")
    assert page.evaluate("document.body.dataset.jpThemeLight") == "false"
    assert "probe" in spaced(page, ".jp-OutputArea-output") and page.evaluate("window.trusted === undefined")
    assert unbroken(page) and watch.foreign == []
    name = "clip_td-seed0"
    ids = index.find_runs([runs])[0].index["example_id"]
    text = spaced(page, ".jp-OutputArea-output")
    assert_shows(text, [one_record(runs, name, ids[0])], name)
    assert_readable(page, f".jp-OutputArea-output {VIEW}")
    page.close()


def check_hover_and_links(page, record) -> None:
    """A token says its numbers under the mouse, and what agrees with it lights up once that is known."""
    line = page.locator(".tdlib-line").first
    word = int((record.is_text & record.distilled).nonzero()[0][0])
    cell = int((record.is_region & record.distilled).nonzero()[0][0])
    for token in (word, cell):
        node = page.locator(f'.tdlib-stage [data-token="{token}"]').first
        node.hover(force=True)
        numbers = f"relevance {record.relevance[token]:.3f}, prior {record.prior[token]:.3f}, score"
        playwright.expect(line).to_contain_text(numbers, timeout=PATIENCE)
    page.mouse.move(5, 5)
    page.locator(f'.tdlib-stage [data-token="{word}"]').first.hover(force=True)
    playwright.expect(line).to_contain_text("agrees with it, cosines", timeout=PATIENCE)  # with the teacher
    lit = page.evaluate(
        """() => [...document.querySelectorAll(".tdlib-stage div[data-token]")]
            .filter((box) => box.style.backgroundColor.startsWith("rgba(0, 114, 178")).length"""
    )
    assert 0 < lit < int(record.is_region.sum())
    keep_picture(page, "hover")
    page.mouse.move(5, 5)
    playwright.expect(line).to_contain_text("text tokens selected", timeout=PATIENCE)


def check_sliders_sort_and_reset(page, run, shows) -> None:
    """The slider of mass selects anew, the list is sorted by c, and reset undoes both."""
    stage = page.locator(".tdlib-stage")
    marked = (
        """() => document.querySelectorAll('.tdlib-stage [style*="font-weight: bold"][data-token]').length"""
    )
    before = page.evaluate(marked)
    handle = page.locator(".widget-hslider", has_text="mass").locator(".noUi-handle")
    handle.focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    playwright.expect(stage).to_contain_text("instead", timeout=PATIENCE)
    page.wait_for_function(f"({marked})() > {before}")
    keep_picture(page, "slider")
    page.get_by_label("order", exact=True).select_option("highest c")
    best = run.index.sort_values("c", ascending=False, kind="stable")["example_id"].iloc[0]
    playwright.expect(page.locator(".tdlib-row").first).to_contain_text(f" {best} ", timeout=PATIENCE)
    page.get_by_role("button", name="reset").click()
    playwright.expect(stage).not_to_contain_text("instead", timeout=PATIENCE)
    shows(run.index["example_id"].iloc[0])


def check_export(page, example_id: str) -> None:
    """The browser gets the files; they are of what stands there."""
    for kind, start in (("csv", b"split,example_id"), ("pdf", b"%PDF")):
        with page.expect_download(timeout=PATIENCE) as waiting:
            page.get_by_role("button", name=kind, exact=True).click()
        download = waiting.value
        assert download.suggested_filename.endswith(f".{kind}") and example_id in download.suggested_filename
        assert Path(download.path()).read_bytes().startswith(start)


def keep_picture(page, name: str) -> None:
    """A picture of the window, for a person to look at, where TDLIB_SCREENSHOTS names a folder."""
    if folder := os.environ.get("TDLIB_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def print_latency(page, ids) -> None:
    """How long a step takes from the key to the drawn page; printed, as it depends on the machine."""
    page.locator(".tdlib-list").focus()
    page.keyboard.press("Home")
    times = []
    for place in range(1, len(ids)):
        page.evaluate("() => { performance.clearMarks(); }")
        page.keyboard.press("ArrowRight")
        playwright.expect(page.locator(".tdlib-stage")).to_contain_text(f"{ids[place]}, ", timeout=PATIENCE)
        marks = page.evaluate("() => performance.getEntriesByType('mark').map((m) => [m.name, m.startTime])")
        start = next(at for name, at in marks if name == "tdlib-step")
        times.append(next(at for name, at in marks if name == "tdlib-drawn" and at > start) - start)
    print(f"a step of the explorer: median {sorted(times)[len(times) // 2]:.0f} ms of {len(times)}")


def test_the_explorer_follows_keyboard_and_mouse(context, lab, runs, own_cache):
    cells = (OTHER_CACHE.format(cache=str(own_cache)), LIVE.format(runs=str(runs)))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    page, watch = open_in_lab(context, lab, notebook, "live.ipynb")
    page.wait_for_selector("text=/ipykernel. . Idle/")  # before, cells would be run without a kernel
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    failed = page.locator(".jp-RenderedText[data-mime-type*=stderr]", has_text="Traceback")
    page.locator(".tdlib-row[aria-selected=true]").or_(failed).first.wait_for()
    assert failed.count() == 0, failed.first.inner_text()
    run = index.find_runs([runs])[0]
    ids, cells = list(run.index["example_id"]), page.locator(".jp-Cell").count()
    chosen = page.locator(".tdlib-row[aria-selected=true]")

    def shows(example_id: str, name: str = "clip_td-seed0") -> None:
        """The list stands at an example and the view has its words and weights."""
        record = one_record(runs, name, example_id)
        playwright.expect(chosen).to_contain_text(f" {example_id} ", timeout=PATIENCE)
        playwright.expect(chosen).to_contain_text(f"c {record.instance_weight:.2f}", timeout=PATIENCE)
        frame = page.locator(".tdlib-stage")
        playwright.expect(frame).to_contain_text(f"{example_id}, choice {record.choice} ", timeout=PATIENCE)
        playwright.expect(frame).to_contain_text(f"{record.instance_weight:.3f}", timeout=PATIENCE)
        assert_shows(spaced(page, ".tdlib-stage"), [record], name)

    shows(ids[0])
    page.locator(".tdlib-list").focus()
    for key, place in (("ArrowRight", 1), ("j", 2), ("k", 1), ("ArrowLeft", 0), ("End", 5), ("Home", 0)):
        page.keyboard.press(key)
        shows(ids[place])
    page.locator(".tdlib-row").nth(3).click()
    shows(ids[3])
    page.locator(".tdlib-list button").nth(1).click()
    shows(ids[4])
    check_hover_and_links(page, one_record(runs, "clip_td-seed0", ids[4]))
    check_sliders_sort_and_reset(page, run, shows)
    page.locator(".tdlib-row").nth(4).click()
    shows(ids[4])
    check_export(page, ids[4])
    print_latency(page, ids)
    page.locator(".tdlib-row").nth(4).click()
    shows(ids[4])
    page.locator(".tdlib-list").focus()
    assert page.locator(".jp-Cell").count() == cells and page.locator(".tdlib-list:focus-within").count() == 1

    # typing belongs to the text box: neither the list nor JupyterLab's shortcuts take the letters
    search = page.get_by_placeholder("words of id, text, answer")
    search.click()
    page.keyboard.type(f"jk {ids[2]}")
    assert search.input_value() == f"jk {ids[2]}" and page.locator(".jp-Cell").count() == cells
    playwright.expect(chosen).to_contain_text(f" {ids[4]} ")
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".tdlib-list")).to_contain_text("none", timeout=PATIENCE)
    search.fill(ids[2])
    page.keyboard.press("Enter")
    shows(ids[2])
    search.fill("")
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".tdlib-list")).to_contain_text(f"of {len(ids)}", timeout=PATIENCE)

    wrong = list(run.index["example_id"][~run.index["correct"].astype(bool)])
    page.get_by_label("student", exact=True).select_option("wrong")
    playwright.expect(page.locator(".tdlib-row")).to_have_count(len(wrong), timeout=PATIENCE)
    shows(wrong[0])

    views = page.get_by_label("view", exact=True)
    views.select_option("two runs")
    playwright.expect(page.locator(".tdlib-stage")).to_contain_text("of the weight moved", timeout=PATIENCE)
    views.select_option("student: attention")
    playwright.expect(page.locator(".tdlib-stage")).to_contain_text(
        "attention of layers 0 to 1", timeout=PATIENCE
    )
    keep_picture(page, "attention")
    views.select_option("statement and picture")
    page.get_by_label("run", exact=True).select_option("naive-seed0")
    page.get_by_label("student", exact=True).select_option("any")
    playwright.expect(page.locator(".tdlib-stage")).to_contain_text("naive-seed0", timeout=PATIENCE)
    for width in (900, 1400):
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(300)
        boxes = ".tdlib-explorer, .tdlib-right, .tdlib-left"
        wide = "(box) => box.scrollWidth > box.clientWidth + 1"
        cut = page.evaluate(f"() => [...document.querySelectorAll('{boxes}')].filter({wide}).length")
        assert cut == 0, width
        keep_picture(page, f"{width}-pixels")

    # one's own picture and text
    page.get_by_label("text", exact=True).fill("A person holds a red umbrella.")
    page.get_by_role("button", name="Show what is selected").click()
    own = page.locator(".tdlib-own")
    playwright.expect(own).to_contain_text("naive-seed0, trained student", timeout=PATIENCE)
    letters = re.sub("[^a-z]", "", spaced(page, ".tdlib-own").lower())  # weights stand between word pieces
    assert "apersonholdsaredumbrella" in letters
    keep_picture(page, "own")
    assert unbroken(page) and watch.foreign == []
    page.close()
