"""What the site needs beside MkDocs' plugins: pages outside of docs, equations, links to the reference."""

import re
from html import unescape
from pathlib import Path

import ziamath
from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

import interop
import jopt
from interop import amp, optim
from jopt import schedules

ROOT = Path(__file__).parents[2]
PAGES = ("*.md", "docs/**/*", "benchmarks/results/*.md", "benchmarks/results/*.png", "examples/*.ipynb")
PLACES = {"docs/index.md": "index.html", "README.md": "tour.html"}
FONT = next((Path(ziamath.__file__).parent / "fonts").glob("*.ttf"))
BOOSTS = {
    "docs/": 2,
    "docs/optimizers/": 4,
    "docs/troubleshooting": 4,
    "docs/api/": 1,
    "docs/parity": 0.5,
    "benchmarks/": 0.5,
}
PUBLIC = {f"{module.__name__}.{name}" for module in (jopt, schedules, interop, optim, amp) for name in module.__all__}
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LINKS = re.compile(r"<a\b.*?</a>|<h\d\b.*?</h\d>|<pre\b.*?</pre>|<code>((?:jopt|interop)\.[\w.]+)</code>", re.DOTALL)


@event_priority(100)  # before the plugin that looks for notebooks
def on_files(files, config):
    """The repository's own tree, so that links between its pages hold."""
    found = [file for file in files if not file.src_uri or file.abs_src_path is None or file.src_dir != config.docs_dir]
    for path in sorted({path for pattern in PAGES for path in ROOT.glob(pattern) if path.is_file()}):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix not in (".py", ".pyc"):
            place = {"dest_uri": PLACES[name]} if name in PLACES else {}
            found.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls, **place))
    found.append(File.generated(config, "docs/site/equations.ttf", abs_src_path=str(FONT)))
    return Files(found)


def on_page_markdown(markdown, page, config, files):
    """Search finds guides first, and tables of figures last."""
    for start, boost in BOOSTS.items():
        if page.file.src_uri.startswith(start):
            page.meta["search"] = {"boost": boost}
    return markdown


def on_page_content(html, page, config, files):
    return LINKS.sub(_link, EQUATION.sub(_mathml, html))


def _mathml(match):
    display = "block" if match[1] == "div" else "inline"
    return convert(unescape(match[2]), display=display).replace(r"\_", "_")  # in \text it stays as it is


def _link(match):
    """A public name in the text links to the reference."""
    if match[1] not in PUBLIC:
        return match[0]
    return f'<autoref identifier="{match[1]}" optional>{match[0]}</autoref>'
