"""Opens the built site in a headless Chromium and lists what a reader would stumble over.

``python tools/check_docs.py [--site DIRECTORY] [--screenshots DIRECTORY]`` prints one line for everything that is cut
off, every empty table cell, and every docstring or formula that was not rendered.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent
WIDTHS = (390, 800, 1280)

# Runs in a page and returns pairs of a defect and its place.
LOOK = r"""
(async () => {
  await document.fonts.ready
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))
  const article = document.querySelector("article") ?? document.body
  const found = []
  const report = (what, element) =>
    found.push([what, `${element.tagName.toLowerCase()}: ${element.textContent.trim().slice(0, 60)}`])
  const wide = (element) => element.scrollWidth > element.clientWidth + 1
  if (wide(document.documentElement)) report("cut", document.documentElement)
  for (const element of article.querySelectorAll("*")) {
    if (element.closest(".katex-mathml, svg, button")) continue
    const box = element.getBoundingClientRect()
    const scrolls = getComputedStyle(element).overflowX !== "visible" && element.clientWidth && wide(element)
    const inside = element.parentElement.closest("[data-cut]")
    if (!inside && (scrolls || box.right > innerWidth + 1 || box.left < -1)) {
      element.dataset.cut = ""
      report("cut", element)
    }
  }
  for (const element of document.querySelectorAll("[data-cut]")) delete element.dataset.cut
  for (const cell of article.querySelectorAll("td, th"))
    if (!cell.textContent.trim() && !cell.querySelector("img, svg")) report("empty cell", cell.closest("tr"))
  for (const image of article.querySelectorAll("img"))
    if (image.complete && !image.naturalWidth) found.push(["image", image.src])
  for (const formula of article.querySelectorAll(".arithmatex"))
    if (!formula.querySelector(".katex") || formula.querySelector(".katex-error")) report("unrendered", formula)
  const raw = RegExp([
    ">>> ", ":[a-z]+:`", "\\.\\. [a-z]+::", "``", "\\]\\(", "\\]\\[", "\\\\[(\\[a-z]", "\\*\\*", "^\\|.*\\|$",
    "^(Args|Attributes|Examples?|Returns|Raises|Yields):$"].join("|"), "m")
  const texts = document.createTreeWalker(article, NodeFilter.SHOW_TEXT)
  while (texts.nextNode()) {
    const parent = texts.currentNode.parentElement
    if (raw.test(texts.currentNode.data) && !parent.closest("pre, code, script, .katex, .doc-section-title"))
      report("unrendered", parent)
  }
  return found
})()
"""


class Browser:
    """A headless Chromium, controlled over a pair of pipes (Chrome DevTools Protocol)."""

    def __init__(self, program: str) -> None:
        to_browser, from_browser = os.pipe(), os.pipe()

        def use_pipes() -> None:
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser[0], from_browser[1])]
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        # The browser's own processes may write to it for a moment after it has ended.
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [
                program,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--remote-debugging-pipe",
                f"--user-data-dir={self._profile.name}",
            ],
            preexec_fn=use_pipes,
            pass_fds=(3, 4),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        self._requests = open(to_browser[1], "wb", buffering=0)  # noqa: SIM115
        self._answers = open(from_browser[0], "rb")  # noqa: SIM115
        self._count = 0
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        self.call("Page.enable")

    def __enter__(self) -> Self:
        """Return the browser."""
        return self

    def __exit__(self, *args: object) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait()
        self._requests.close()
        self._answers.close()
        self._profile.cleanup()

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            message += byte
        return json.loads(message)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._count += 1
        request = {"id": self._count, "method": method, "params": params} | self._session
        self._requests.write(json.dumps(request).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def resize(self, width: int) -> None:
        """Set the width of the window in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def open(self, page: Path) -> None:
        """Open a page and wait until it is loaded."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        # Events that arrive while a call waits for its answer are lost, so the page itself is polled.
        ready = "document.readyState === 'complete' && document.URL"
        while self.call("Runtime.evaluate", expression=ready)["result"].get("value") != page.resolve().as_uri():
            time.sleep(0.01)

    def look(self) -> list[tuple[str, str]]:
        """Return the defects of the open page."""
        result = self.call("Runtime.evaluate", expression=LOOK, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return [(what, where) for what, where in result["result"]["value"]]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a picture of the open page."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(image["data"]))


def find_browser() -> str | None:
    """Return the path of Chromium or Chrome."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def pages(site: Path) -> list[Path]:
    """Return the pages of a site, without those of source code."""
    source = site / "source"
    return [page for page in sorted(site.rglob("*.html")) if page.name != "404.html" and source not in page.parents]


def main() -> None:
    """Print the defects and their counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", type=Path, default=ROOT / "site")
    parser.add_argument("--screenshots", type=Path)
    options = parser.parse_args()
    program = find_browser()
    if program is None:
        sys.exit("no Chromium found: install Debian's package chromium")
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    counts: Counter[tuple[int, str]] = Counter()
    with Browser(program) as browser:
        for page in pages(options.site):
            browser.open(page)
            for width in WIDTHS:
                browser.resize(width)
                for what, where in browser.look():
                    counts[width, what] += 1
                    print(f"{page.relative_to(options.site)} at {width} px: {what}: {where}".replace("\n", " "))
                if options.screenshots:
                    name = "-".join(page.relative_to(options.site).with_suffix("").parts)
                    browser.screenshot(options.screenshots / f"{name}-{width}.png")
    for (width, what), count in sorted(counts.items()):
        print(f"{width} px, {what}: {count}")
    sys.exit(bool(counts))


if __name__ == "__main__":
    main()
