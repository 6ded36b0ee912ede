"""What the site has beside docs/: the project's own pages, README as its first one, and a page for each public package.

A hook of MkDocs (`mkdocs.yml`). Links between pages are those that also work in a checkout.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
TOP = {"README.md": "index.md"} | {f"{name}.md": f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")}
TOP["CODE_OF_CONDUCT.md"] = "CODE_OF_CONDUCT.md"
PACKAGES = ("nn", "models", "data", "train", "downstream", "experiments", "convert", "integrations")


def api_pages() -> dict[str, str]:
    """Page to module: m3ae_fast, its packages, and a module for each library that it integrates with."""
    libraries = sorted((ROOT / "m3ae_fast/integrations").glob("[a-z]*"))
    names = ["m3ae_fast", *(f"m3ae_fast.{name}" for name in PACKAGES)]
    names += [f"m3ae_fast.integrations.{path.stem}" for path in libraries]
    return {f"api/{name.removeprefix('m3ae_fast.')}.md": name for name in names}


def on_config(config):
    for section in config.nav:
        if "API" in section:
            section["API"] = list(api_pages())
    return config


def on_files(files, config):
    for source, page in TOP.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](").replace("](README.md", "](index.md")
        text = re.sub(r"\]\((?:LICENSE|CITATION\.cff|examples/[^)]*)\)", "](#)", text)
        files.append(File.generated(config, page, content=text))
    for page, module in api_pages().items():
        files.append(File.generated(config, page, content=f"# {module}\n\n::: {module}\n"))
    return files


def on_page_markdown(markdown, page, config, files):
    return re.sub(r"\]\((?:\.\./)+(CONTRIBUTING|CHANGELOG|SECURITY|README)\.md", link_from(page), markdown)


def link_from(page):
    """A replacement for links that lead out of docs/, of a page in one of its folders or in none."""
    up = "../" * page.file.src_uri.count("/")
    return lambda found: f"]({up}{'index' if found[1] == 'README' else found[1]}.md"
