"""The report in a real browser: headless Chromium through its driver. See ``make browser``."""

import base64
import json
import os
import shutil
import threading
from functools import partial

import pytest

from steelyard.lab import _report_server, report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
EVIL = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">"
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20" onload="alert(1)">
<style>path { stroke: #0072B2 }</style><path id="a#b" d="M0 0
L40 20"/></svg>"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)"),
    pytest.mark.skipif(
        DRIVER is None, reason="needs chromedriver (apt-get install chromium-driver)"
    ),
]


@pytest.fixture(scope="module")
def session():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    if os.geteuid() == 0:  # the sandbox does not start for root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(120)
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def browser(session):
    """The browser, wide and light, with nothing stored."""
    look(session)
    for kind in ("browser", "performance"):
        session.get_log(kind)  # empties it
    yield session
    session.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    session.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def look(browser, scheme="light", media="", width=1280):
    """Set the colours the system asks for, the medium and the width."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    settings = {"media": media, "features": features}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", settings)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def claim(statement, verdict="HOLDS", effect=1.5):
    return {
        "statement": statement,
        "source": "Fig. 1",
        "metric": "b",
        "baseline": "a",
        "direction": "higher",
        "margin": 0.0,
        "verdict": verdict,
        "effect": effect,
        "low": effect - 0.5,
        "high": effect + 0.5,
        "seeds": 3,
        "note": "",
    }


def result(recipe, *claims, wall=42.0):
    return {
        "recipe": recipe,
        "title": f"A study of {recipe}",
        "form": "quick",
        "config": {"epochs": [4, 20], "name": "x" * 200},
        "seeds": list(range(10)),
        "started": "2026-01-01T00:00:00+00:00",
        "wall_seconds": wall,
        "metrics": {str(seed): {"part/of/a/long/metric/name": 1.0} for seed in range(10)},
        "claims": list(claims),
    }


RESULTS = (
    result(
        "bpo", claim("bpo leaves the band less", effect=12.0), claim("bpo is faster", "FAILS", -2.0)
    ),
    result("canon", claim("canon finds the direction", effect=3.0), wall=4000.0),
    result(EVIL, claim(EVIL, "UNDECIDED", 0.5)),
)


@pytest.fixture
def page(browser, tmp_path):
    """The browser with a report opened from a file."""
    figure = tmp_path / "figure.svg"
    figure.write_text(SVG)
    report.render_report(
        RESULTS, tmp_path / "report.html", figures={"bpo": [figure], "canon": [figure]}
    )
    browser.get((tmp_path / "report.html").as_uri())
    return browser


def named(browser, name):
    return browser.find_element(By.ID, name)


def shown(browser):
    """Systems and claims of the rows that are shown, in their order."""
    script = """return [...document.querySelectorAll('#board tbody tr')]
        .filter((row) => row.checkVisibility())
        .map((row) => [row.dataset.system, row.cells[2].textContent])"""
    return [tuple(row) for row in browser.execute_script(script)]


def style(browser, selector, name):
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    return browser.execute_script(script, selector, name)


def requests(browser):
    """Addresses of everything that the browser asked for since the log was emptied."""
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]


def open_all(browser):
    """Open all details and wait until every figure is decoded; a broken one is an error."""
    named(browser, "fold").click()
    script = """const done = arguments[0];
        const images = [...document.querySelectorAll('figure img')];
        for (const image of images) image.loading = 'eager';
        const decoded = images.map((image) => image.decode());
        Promise.all(decoded).then(() => done(''), (error) => done(`${error}`))"""
    assert browser.execute_async_script(script) == ""


def test_it_loads_without_an_error_and_asks_nobody(page):
    open_all(page)
    page.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    assert page.get_log("browser") == []
    asked = requests(page)
    assert any(address.startswith("file:") for address in asked)
    assert all(address.startswith(("file:", "data:")) for address in asked)


def test_a_request_would_be_seen_and_is_forbidden(page):
    """The two tests above can fail: an image of another place is refused and said."""
    page.execute_script("document.body.append(Object.assign(new Image(), {src: 'http://x.test/'}))")
    said = WebDriverWait(page, 10).until(lambda b: b.get_log("browser"))
    assert "Content Security Policy" in said[0]["message"]


def test_hostile_names_are_texts(page):
    assert page.title == "Steelyard report"
    assert EVIL in page.page_source.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert len(page.find_elements(By.TAG_NAME, "script")) == 1
    assert EVIL in named(page, "board").text


def test_figures_are_drawn(page):
    open_all(page)
    sizes = page.execute_script(
        "return [...document.querySelectorAll('figure img')].map((i) => i.naturalWidth)"
    )
    assert len(sizes) == 2
    assert min(sizes) > 0


def test_search_and_filters_narrow_rows_cards_and_sections(page):
    everything = shown(page)
    assert len(everything) == 3 + 1 + 33
    named(page, "search").send_keys("LEAVES bpo")
    assert [text for _, text in shown(page)] == ["bpo leaves the band less"]
    assert named(page, "count").text == "1 of 37 rows, 1 of 36 systems"
    assert named(page, "count").get_attribute("aria-live") == "polite"
    sections = page.find_elements(By.CSS_SELECTOR, ".system:not([hidden])")
    assert [section.get_attribute("id") for section in sections] == ["system-bpo"]
    assert len(page.find_elements(By.CSS_SELECTOR, ".cards li:not([hidden])")) == 1
    named(page, "clear").click()
    assert shown(page) == everything
    Select(named(page, "verdict")).select_by_visible_text("FAILS")
    assert [text for _, text in shown(page)] == ["bpo is faster"]
    Select(named(page, "field")).select_by_visible_text("tabular")
    assert shown(page) == []
    assert named(page, "nothing").is_displayed()
    Select(named(page, "verdict")).select_by_visible_text("no result")
    assert {system for system, _ in shown(page)} == {"system-scorecard", "system-fair-dcov"}


def test_the_paper_of_a_system_can_be_searched(page):
    named(page, "search").send_keys("2310.02970")
    assert [system for system, _ in shown(page)] == ["system-ponita"]


def test_columns_sort_by_their_numbers_from_the_keyboard(page):
    before = shown(page)
    heading = page.find_element(By.CSS_SELECTOR, "#board th[data-key='effect']")
    button = heading.find_element(By.TAG_NAME, "button")
    page.execute_script("arguments[0].focus()", button)
    button.send_keys(Keys.ENTER)
    assert heading.get_attribute("aria-sort") == "ascending"
    firsts = ["bpo is faster", EVIL, "canon finds the direction", "bpo leaves the band less"]
    assert [text for _, text in shown(page)][:4] == firsts
    button.send_keys(Keys.SPACE)
    assert heading.get_attribute("aria-sort") == "descending"
    assert [text for _, text in shown(page)][:4] == firsts[::-1]  # what has none stays last
    button.send_keys(Keys.ENTER)
    assert heading.get_attribute("aria-sort") is None
    assert shown(page) == before


def test_everything_can_be_reached_by_the_keyboard_and_the_focus_shows(page):
    reached = []
    for _ in range(9):
        page.switch_to.active_element.send_keys(Keys.TAB)
        active = page.switch_to.active_element
        reached.append(active.get_attribute("id") or active.text)
        assert active.value_of_css_property("outline-style") == "solid"
    order = ["search", "verdict", "field", "theme", "clear"]
    assert [name for name in reached if name in order] == order
    assert reached[0] == "Skip to the scoreboard"
    summary = page.find_element(By.CSS_SELECTOR, "header summary")
    summary.send_keys(Keys.ENTER)
    assert page.find_element(By.CSS_SELECTOR, "header details p").is_displayed()


def test_dark_follows_the_system_or_the_reader(page):
    light, dark = "rgb(250, 250, 248)", "rgb(20, 22, 23)"
    assert style(page, "body", "backgroundColor") == light
    look(page, "dark")
    assert style(page, "body", "backgroundColor") == dark
    open_all(page)
    assert "invert" in style(page, "figure img", "filter")
    Select(named(page, "theme")).select_by_visible_text("light")
    assert style(page, "body", "backgroundColor") == light
    assert style(page, "figure img", "filter") == "none"
    look(page, "light")
    Select(named(page, "theme")).select_by_visible_text("dark")
    assert style(page, "body", "backgroundColor") == dark
    assert "invert" in style(page, "figure img", "filter")
    page.refresh()
    assert style(page, "body", "backgroundColor") == dark
    Select(named(page, "theme")).select_by_visible_text("as the system")
    assert style(page, "body", "backgroundColor") == light


@pytest.mark.parametrize("width", [320, 390, 768, 1000, 1280])
def test_nothing_is_wider_than_the_screen(page, width):
    look(page, width=width)
    open_all(page)
    widths = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scroll, client = page.execute_script(widths)
    assert scroll <= client <= width


def test_a_phone_can_sort_without_the_heading(page):
    look(page, width=390)
    assert not page.find_element(By.CSS_SELECTOR, "#board thead").is_displayed()
    Select(named(page, "order")).select_by_visible_text("Effect")
    assert shown(page)[0][1] == "bpo is faster"
    assert page.find_element(By.CSS_SELECTOR, "#board tbody tr").text.startswith("bpo\npolicy")


def test_print_is_black_on_white_without_controls(page):
    look(page, "dark", media="print")
    assert style(page, "body", "backgroundColor") == "rgb(255, 255, 255)"
    assert style(page, "body", "color") == "rgb(0, 0, 0)"
    assert not named(page, "controls").is_displayed()
    printed = base64.b64decode(page.print_page())
    assert printed.startswith(b"%PDF")


def test_it_is_readable_without_scripts(browser, tmp_path):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    report.render_report(RESULTS, tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    assert not named(browser, "controls").is_displayed()
    assert not named(browser, "fold").is_displayed()
    assert "bpo leaves the band less" in named(browser, "board").text
    assert "steelyard run canon" in browser.find_element(By.CSS_SELECTOR, "#system-canon pre").text


def write_run(folder, content):
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "claims.svg").write_text(SVG)
    (folder / "result.json").write_text(json.dumps(content))


def test_a_served_page_follows_runs_and_keeps_what_the_reader_set(browser, tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "one", RESULTS[0])
    site = _report_server.Site(lambda: [runs], tmp_path / "scratch")
    server = _report_server.make_server(site, 0)
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    try:
        browser.get(f"http://127.0.0.1:{server.server_address[1]}/")
        named(browser, "search").send_keys("finds direction")
        details = browser.find_element(By.CSS_SELECTOR, "main details[data-fold$=figures]")
        browser.execute_script("arguments[0].open = true", details)
        assert shown(browser) == []
        two = runs / "two" / "seeds" / "0" / "train"
        two.mkdir(parents=True)
        setup = {"recipe": EVIL, "form": "quick", "seeds": [0], "started": "2026-01-01"}
        (runs / "two" / "config.json").write_text(json.dumps(setup))
        (two / "metrics.jsonl").write_text('{"step": 7, "loss": 2}\n{"step": 8, "loss": 1}\n')
        wait = WebDriverWait(browser, 60)
        wait.until(lambda b: "0 of 1 seed finished" in " ".join(named(b, "live").text.split()))
        assert browser.find_element(By.CSS_SELECTOR, "#live .curve").is_displayed()
        write_run(runs / "three", RESULTS[1])
        wait.until(lambda b: [text for _, text in shown(b)] == ["canon finds the direction"])
        assert named(browser, "search").get_attribute("value") == "finds direction"
        opened = browser.find_elements(By.CSS_SELECTOR, "main details[data-fold$=figures][open]")
        assert len(opened) == 1
        assert browser.get_log("browser") == []
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    wait.until(lambda b: "does not answer" in named(b, "lost").text)
    assert browser.title == "Steelyard report"
