"""The site that `make docs` builds: every page and public name is in it, and a browser reads it without a network.

The slow tests build it and read it in Chromium: `pip install '.[browser]'`, and Debian's chromium and chromium-driver.
"""

import contextlib
import functools
import html.parser
import http.server
import importlib
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

from tests import ROOT, child

CONFIG = (ROOT / "mkdocs.yml").read_text()
NAV = re.findall(r"[\w/.-]+\.(?:md|ipynb)\b", CONFIG.split("\nnav:")[1])
FOLDERS = ("*.md", "docs/**/*.md", "docs/**/*.ipynb", "examples/*.ipynb", "benchmarks/results/*.md")
PAGES = {str(path.relative_to(ROOT)) for pattern in FOLDERS for path in ROOT.glob(pattern)}
REFERENCE = "\n".join(path.read_text() for path in ROOT.glob("docs/api/*.md"))
INDEX = (ROOT / "docs" / "index.md").read_text()
TORCHS = {"interop.optim.Optimizer", "interop.optim.lr_scheduler", "interop.optim.swa_utils"}
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
DESKTOP = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
CHROMIUM = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


def test_every_page_is_in_the_navigation():
    assert set(NAV) == PAGES
    assert len(NAV) == len(set(NAV))


@pytest.mark.parametrize("module", ["jopt", "jopt.schedules", "interop", "interop.optim", "interop.amp"])
def test_every_public_name_is_in_the_reference(module):
    if module.startswith("interop"):
        pytest.importorskip("torch", reason="interop needs it")
    names = {f"{module}.{name}" for name in importlib.import_module(module).__all__} - TORCHS
    written = set(re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE))
    assert names <= written
    assert all(f"`{name.removeprefix('interop.')}`" in REFERENCE for name in TORCHS)


def test_make_builds_it():
    assert re.search(r"^docs: .*\n\t.*-m mkdocs build$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.search(r"^strict: true$", CONFIG, re.MULTILINE)


STARTS = re.findall(r"```python\n(.*?)```", INDEX, re.DOTALL)


@pytest.mark.parametrize("code", STARTS)
def test_the_first_page_starts(code):
    torch = pytest.importorskip("torch", reason="two of the starts are in torch")
    torch.manual_seed(0)
    names = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(code, names)
    found = names["model"].weight[0] if "model" in names else names["params"]["w"]
    assert found.tolist() == pytest.approx([1, -2, 3], abs=0.05)


def test_a_run_starts_where_the_first_device_is_another():
    """As beside a TPU: what `interop` gives lies on one device, and the run goes on on another."""
    pytest.importorskip("torch", reason="the run begins in it")
    (code,) = (code for code in STARTS if "optimizer_to_jax" in code)
    assert "jax.devices()[0]" in code
    code = "import torch; torch.manual_seed(0)\n" + code.replace("jax.devices()[0]", "jax.devices()[1]")
    out = child.run(2, "-c", f"{code}\nprint(*model.weight[0].tolist(), *(x.device.id for x in (a, params['weight'])))")
    *weight, batch, run = map(float, out.splitlines()[-1].split())
    assert weight == pytest.approx([1, -2, 3], abs=0.05)
    assert (batch, run) == (1, 1)


def test_the_first_page_has_the_benchmarks_figures():
    models = {"ResNet-50": "resnet50", "GPT-2 small": "gpt2_small"}
    rows = re.findall(r"^\| (\w+), (.+?) \| (.+) \|$", INDEX, re.MULTILINE)
    assert len(rows) == 3
    page = (ROOT / "benchmarks" / "results" / "dropin.md").read_text()
    for optimizer, model, figures in rows:
        measured = re.search(rf"^\| {optimizer} \| {models[model]} \| (.+)$", page, re.MULTILINE)[1].split("|")
        ours, default, foreach, fused, _, compiled = (x.strip() for x in measured[:6])
        assert [x.strip(" *") for x in figures.split("|")] == [ours, default, foreach, fused, compiled]


# --- in a browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("material", "mkdocstrings_handlers.python", "nbconvert", "ziamath"):
        pytest.importorskip(package, reason="pip install '.[browser]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install '.[browser]'")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("neither chromium nor chromedriver, of Debian's chromium and chromium-driver, is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*CHROMIUM, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.get("about:blank")  # from Chromium's own first page
    messages(browser)
    yield browser
    browser.quit()


class Assets(html.parser.HTMLParser):
    """What a page loads, its links to other pages apart."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.found += [value for name, value in given.items() if name in ("src", "srcset", "data", "poster")]
        if tag == "link" and given.get("rel") != "canonical":
            self.found.append(given.get("href"))


def elsewhere(text):
    return re.match(r"(?:https?:)?//", text or "")


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(NAV)  # 404.html
    loaded = {page: [x for x in Assets(page.read_text()).found if elsewhere(x)] for page in pages}
    assert {page: found for page, found in loaded.items() if found} == {}
    for style in site.rglob("*.css"):
        assert not [x for x in re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", style.read_text()) if elsewhere(x)]


def messages(browser):
    """What the console says since it was last asked, and which addresses were asked for."""
    said = [x["message"] for x in browser.get_log("browser") if x["level"] == "SEVERE"]
    events = [json.loads(x["message"])["message"] for x in browser.get_log("performance")]
    sent = [x["params"]["request"]["url"] for x in events if x["method"] == "Network.requestWillBeSent"]
    return said, sent


def show(browser, address, metrics=DESKTOP, scheme="light"):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(address)


@pytest.mark.slow
def test_every_page_reads_on_a_telephone(site, address, browser):
    found = {}
    for page in sorted(str(path.relative_to(site)) for path in site.rglob("*.html")):
        messages(browser)
        show(browser, address + page, PHONE)
        said, sent = messages(browser)
        wrong = said + [x for x in sent if not x.startswith((address, "data:", "blob:"))]
        width = browser.execute_script("return document.scrollingElement.scrollWidth")
        wrong += [f"{width} pixels wide"] * (width > 390)
        wrong += browser.execute_script("return [...document.images].filter(x => !x.alt.trim()).map(x => x.outerHTML)")
        raw = r"return document.querySelector('article').innerText.match(/\\(frac|sqrt|leftarrow|text|lVert)\b/g) || []"
        wrong += browser.execute_script(raw)  # equations that nothing rendered
        found |= {page: wrong} if wrong else {}
    assert found == {}


def answers(browser, query, page):
    """Whether the search has a page, or a part of it, among its first six answers; they come while it is typed in."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support import expected_conditions
    from selenium.webdriver.support.wait import WebDriverWait

    def found(browser):
        links = browser.execute_script(
            "return [...document.querySelectorAll('a.md-search-result__link')].map(x => x.href)"
        )
        return any(re.sub(r"\?[^#]*", "", link).rpartition("/")[2].startswith(page) for link in links[:6])

    field = (By.CSS_SELECTOR, "input.md-search__input")
    WebDriverWait(browser, 20).until(expected_conditions.element_to_be_clickable(field)).send_keys(query)
    return WebDriverWait(browser, 20).until(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("weight decay", "adamw.html"),
        ("ReduceLROnPlateau", "schedules.html"),
        ("AMSGrad", "adam.html"),
        ("step() in a forked child process", "troubleshooting.html#step-in-a-forked-child-process"),
        ("optimizer_to_jax", "interop.html#interop.optimizer_to_jax"),
    ],
)
def test_search_answers(address, browser, query, page):
    show(browser, address)
    assert answers(browser, query, page)


@pytest.mark.slow
def test_search_answers_in_files(site, browser):
    show(browser, Path(site, "index.html").as_uri())
    assert answers(browser, "forked child process", "troubleshooting.html#")


@pytest.mark.slow
def test_light_and_dark(address, browser):
    from selenium.webdriver.common.by import By

    def scheme():
        return browser.execute_script("return document.body.dataset.mdColorScheme")

    for preferred, expected in (("dark", "slate"), ("light", "default")):
        show(browser, address, scheme=preferred)
        assert scheme() == expected
    seen = []
    for _ in range(3):
        with contextlib.suppress(StopIteration):
            toggles = browser.find_elements(By.CSS_SELECTOR, "form[data-md-component=palette] label")
            next(x for x in toggles if x.is_displayed()).click()
            seen.append(scheme())
    assert seen == ["default", "slate", "default"]  # light, dark, and the system's again
