"""Look at every page of the built site in headless Chromium: wide and narrow, light and dark.

    python docs/look.py SITE SCREENSHOTS

ends with status 1 if a page logs an error, misses an image or its description, asks for anything
outside the site, or scrolls sideways. A picture of each page is left in SCREENSHOTS. It needs
selenium, and the programs chromium (or google-chrome) and chromedriver.
"""

import base64
import json
import os
import shutil
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = ("light", "dark")
HEIGHT = 900
MOST_BYTES = 300_000  # of a page but for its figures
# Everything that a page asks for comes from the disk, or stands in the page.
INSIDE = ("file:", "data:", "blob:", "about:")
STATE = """
const root = document.documentElement;
const images = [...document.images];
images.forEach(image => image.loading = "eager");
return {
    wide: root.scrollWidth - root.clientWidth,
    broken: images.filter(i => i.complete && !i.naturalWidth).map(i => i.src),
    silent: images.filter(i => !i.alt.trim()).map(i => i.src),
    dark: getComputedStyle(document.body).backgroundColor,
};
"""


def browser(chromium, driver):
    """Return a browser that reports what it is asked for and what it logs."""
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium has none for root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def logged(window):
    """Return the errors of the console, and the addresses outside the site, since the last call."""
    errors = [e["message"] for e in window.get_log("browser") if e["level"] == "SEVERE"]
    asked = []
    for entry in window.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
    return errors, [url for url in asked if not url.startswith(INSIDE)]


def look(window, page, name, screenshots):
    """Yield what is wrong with one page."""
    if page.stat().st_size > MOST_BYTES:
        yield f"has {page.stat().st_size:,} bytes, more than {MOST_BYTES:,}"
    for device, width in WIDTHS.items():
        backgrounds = set()
        for scheme in SCHEMES:
            where = f"{device}, {scheme}"
            window.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": HEIGHT, "deviceScaleFactor": 1,
                 "mobile": device == "phone"},
            )  # fmt: skip
            window.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
            )
            window.get(page.as_uri())
            state = window.execute_script(STATE)
            errors, outside = logged(window)
            yield from (f"{where}: {error}" for error in errors)
            yield from (f"{where}: asks for {url}" for url in outside)
            yield from (f"{where}: misses {url}" for url in state["broken"])
            yield from (f"{where}: no description of {url}" for url in state["silent"])
            if state["wide"] > 0:
                yield f"{where}: scrolls sideways by {state['wide']} pixels"
            backgrounds.add(state["dark"])
            shot = window.execute_cdp_cmd("Page.captureScreenshot", {})
            file = screenshots / f"{name}-{device}-{scheme}.png"
            file.write_bytes(base64.b64decode(shot["data"]))
        if len(backgrounds) < len(SCHEMES):
            yield f"{device}: light and dark are the same"


def main(site, screenshots):
    """Look at all pages; return 1 if something is wrong."""
    programs = {name: shutil.which(name) for name in ("chromium", "google-chrome", "chromedriver")}
    chromium, driver = programs["chromium"] or programs["google-chrome"], programs["chromedriver"]
    if not (chromium and driver):
        print("needs chromium or google-chrome, and chromedriver")
        return 2
    pages = sorted(Path(site).resolve().rglob("*.html"))
    shutil.rmtree(screenshots, ignore_errors=True)
    Path(screenshots).mkdir(parents=True)
    window, wrong = browser(chromium, driver), 0
    try:
        for page in pages:
            name = page.relative_to(Path(site).resolve()).with_suffix("").as_posix()
            for problem in look(window, page, name.replace("/", "-"), Path(screenshots)):
                print(f"{name}: {problem}")
                wrong += 1
    finally:
        window.quit()
    print(f"{len(pages)} pages, {wrong} problems; screenshots in {screenshots}")
    return 1 if wrong or not pages else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
