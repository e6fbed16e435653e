"""What the site needs beside MkDocs' plugins: pages outside of docs, equations, links to the reference."""

import re
from html import unescape
from pathlib import Path

import ziamath
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

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


class Notebook(File):
    """A page whose text is a notebook's."""

    def is_documentation_page(self):
        return True


def on_files(files, config):
    """The repository's own tree, so that links between its pages hold."""
    found = [file for file in files if file.src_dir != config.docs_dir]
    for path in sorted({path for pattern in PAGES for path in ROOT.glob(pattern) if path.is_file()}):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".ipynb":
            found += _notebook(path, name, config)
        elif path.suffix not in (".py", ".pyc"):
            place = {"dest_uri": PLACES[name]} if name in PLACES else {}
            found.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls, **place))
    found.append(File.generated(config, "docs/site/equations.ttf", abs_src_path=str(FONT)))
    return Files(found)


def _notebook(path, name, config):
    """A notebook as a page of Markdown, whose links and equations are then as the others', and its pictures."""
    resources = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    text, resources = MarkdownExporter().from_filename(str(path), resources)
    text = re.sub(r"!\[(png|svg|jpeg)\]", "![what the cell above shows]", text)
    yield Notebook.generated(config, name, content=text)
    for picture, content in resources["outputs"].items():
        yield File.generated(config, f"{Path(name).parent.as_posix()}/{picture}", content=content)


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
