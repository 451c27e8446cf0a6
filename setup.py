"""What an index of packages shows, where paths of the repository lead nowhere; the rest: pyproject.toml."""

import os
import re
from pathlib import Path

from setuptools import setup

LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?:)(?P<path>[^)]+)\)")
IMAGE = re.compile(r'<img src="(?!https?:)(?P<path>[^"]+)"')


def for_index(text: str, site: str) -> str:
    """Return the text with links to the pages of a published site; without one, such links are words alone.

    Args:
        text: Markdown whose links are paths of the repository.
        site: Where the site is published, as ``SITE_URL`` says; empty if nowhere.
    """
    if not site:
        text = re.sub(r"<p>\n(<img .*\n)+</p>\n", "", text)
        return LINK.sub(lambda link: "" if link["image"] else link["text"], text)

    def address(path: str) -> str | None:
        page = "docs/changelog.md" if path == "CHANGELOG.md" else path
        if not page.startswith("docs/"):
            return None  # not on the site
        return f"{site.rstrip('/')}/{page.removeprefix('docs/').replace('.md', '.html')}"

    def absolute(link: re.Match[str]) -> str:
        found = address(link["path"])
        return f"{link['image']}[{link['text']}]({found})" if found else link["text"]

    return IMAGE.sub(lambda image: f'<img src="{address(image["path"])}"', LINK.sub(absolute, text))


def urls(site: str) -> dict[str, str]:
    """Return the links of the project.

    Args:
        site: Where the site is published; empty if nowhere.
    """
    found = {"Paper": "https://arxiv.org/abs/1906.00586", "Original code": "https://github.com/allenai/dnw"}
    if site:
        found |= {"Documentation": site, "Changelog": f"{site.rstrip('/')}/changelog.html"}
    return found


if __name__ == "__main__":
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    site = os.environ.get("SITE_URL", "")
    setup(
        long_description=for_index(readme, site),
        long_description_content_type="text/markdown",
        project_urls=urls(site),
    )
