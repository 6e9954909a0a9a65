"""The documentation site: these pages, sections of README.md, the docstrings, and the comments of conf/ (make docs)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mnist_lit import __version__

ROOT = Path(__file__).resolve().parents[1]
VERBS = ["train", "evaluate", "predict", "export", "convert", "serve", "tune", "runs"]
GROUPS = [
    "data",
    "augment",
    "model",
    "loss",
    "optimizer",
    "scheduler",
    "metrics",
    "callbacks",
    "logger",
    "experiment",
    "debug",
]
# Files outside of docs/ that pages link to, and the pages that show them.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
PAGES |= dict.fromkeys(["conf", "conf/train.yaml", "conf/tune.yaml"], "configuration.md")
PAGES |= {f"conf/{group}": f"configuration.md#{group}" for group in GROUPS}
PAGES |= {f"mnist_lit/{name}.py": f"source.md#{name}" for name in ("network", "data", "model", "train")}
PAGES["examples/one_file.py"] = "source.md#on-one-page"

project, release, language = "mnist_lit", __version__, "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # tests/test_tutorial.py runs the notebook
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
highlight_language = "text"
smartquotes_action = "D"  # dashes, but no quotation marks, which would change what is copied
html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_title = f"{project} {release}"
html_copy_source = html_show_copyright = False


def written_out(text: str) -> str:
    """A page with what its comments ask for: ``<!-- README: Speed -->``, ``<!-- file: SECURITY.md -->``."""
    text = re.sub(r"<!-- README: (.*?) -->", lambda found: section(found[1]), text)
    text = re.sub(r"<!-- file: (.*?) -->", lambda found: from_root((ROOT / found[1]).read_text("utf-8")), text)
    text = text.replace("<!-- configuration -->", "\n\n".join(configuration()))
    return re.sub(r"\]\(\.\./([^)#]+?)/?(#[^)]*)?\)", shown, text)


def shown(link: re.Match[str]) -> str:
    """The link to a file outside of docs/ as one to the page that shows it, if one does."""
    page = PAGES.get(link[1])
    if not page:
        return link[0]
    return f"]({page if '#' in page else page + (link[2] or '')})"


def section(title: str) -> str:
    """A section of README.md, with a label for the links of the others; ``beginning``: all before the first."""
    beginning, *sections = re.split(r"^## ", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    if title == "beginning":
        return from_root(beginning)
    (body,) = [each for each in sections if each.splitlines()[0] == title]
    return from_root(f"(readme-{re.sub(r'[^a-z]+', '-', title.lower())})=\n## {body}")


def from_root(text: str) -> str:
    """``text`` of a file in the root of the project, its links as from docs/, where its sections may be in other pages."""
    return re.sub(r"\]\((?!#|\w+:)", "](../", text.replace("](#", "](#readme-"))


def configuration() -> Iterator[str]:
    """The files of conf/: what each is for, and its keys with default and comment."""
    for verb in VERBS:
        yield f"## {verb}\n\n{described(ROOT / 'conf' / f'{verb}.yaml', '')}"
    for group in GROUPS:
        yield f"## {group}"
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            yield f"### {group}={path.stem}\n\n{described(path, f'{group}.')}"


def described(path: Path, prefix: str) -> str:
    text = path.read_text("utf-8")
    if text.startswith("# @package _global_"):  # an experiment: changes of others' keys
        return f"```yaml\n{text}```"
    head = [line for line in text.split("\n\n")[0].splitlines() if line.startswith("#")]
    about = "\n".join(
        f" {line[1:]}" if line.startswith("#   ") else re.sub(r"(--\w+)", r"`\1`", line[2:]) for line in head
    )
    if all(line.startswith("#") for line in text.splitlines()):  # none.yaml
        return about
    rows = [f"| `{key}` | {f'`{default}`' if default else ''} | {note} |" for key, default, note in keys(text, prefix)]
    return "\n".join([about, "", "| key | default | what it does |", "| --- | --- | --- |", *rows])


def keys(text: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Key, default and comment of each line of a YAML file but Hydra's own, as cells of a table."""
    lines = text.splitlines()

    def rows(node: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
        for key, value in node.value:
            if key.value == "hydra" or key.value.startswith("override "):
                continue
            if key.value == "defaults":
                for entry in value.value:
                    yield from rows(entry, prefix) if isinstance(entry, yaml.MappingNode) else ()
                continue
            is_section = isinstance(value, yaml.MappingNode) and value.start_mark.line > key.start_mark.line
            default = "" if is_section else text[value.start_mark.index : value.end_mark.index]
            end = key.end_mark if is_section else value.end_mark
            comment = lines[end.line][end.column :].partition("# ")[2]
            comment = re.sub(r"([\\`*_<>|\[\]])", r"\\\1", comment)
            yield prefix + key.value.removeprefix("optional "), default.replace("|", "\\|"), comment
            if is_section:
                yield from rows(value, f"{prefix}{key.value}.")

    return rows(yaml.compose(text), prefix)


def setup(app: Any) -> None:
    def read(app: Any, page: str, source: list[str]) -> None:
        source[0] = written_out(source[0])

    app.connect("source-read", read)
