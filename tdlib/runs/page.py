"""Makes one page of an executed notebook: contents, code that folds, light and dark colours, print."""

import re
from html import escape, unescape
from pathlib import Path

from tdlib.core.files import whole_file

WIDGET = "application/vnd.jupyter.widget-view+json"
_CONTENTS = "<!-- contents -->"
# The first cell, which says what the notebook asks, is followed by the contents.
_TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{% block html_head_css %}<style>{{ resources.look }}</style>{% endblock %}
{% block any_cell %}{{ super() }}{% if loop.first %}<!-- contents -->{% endif %}{% endblock %}
{% block input_group %}
{%- if cell.metadata.folded -%}
<details class="code"><summary>code</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{% endblock %}
"""
_LOOK = """
:root { color-scheme: light dark; }
main { max-width: 1100px; margin: 0 auto; }
nav.contents { padding: 0 12px; font: 14px/1.7 var(--jp-content-font-family); }
nav.contents a { color: var(--jp-content-link-color); margin-right: 1.2em; white-space: nowrap; }
/* Cells that show nothing but their fold stand beside each other. */
.jp-Cell.jp-mod-noOutputs:has(> details.code:not([open])) { display: inline-block; padding: 0 5px; }
details.code > summary { cursor: pointer; color: var(--jp-ui-font-color2); font: 12px sans-serif; }
.jp-OutputArea-output { overflow-x: auto; }
@media print {
  /* Only boxes in the usual flow of blocks keep a heading with what follows it. */
  .jp-Notebook, main, .jp-Cell, .jp-InputArea, .jp-OutputArea, .jp-OutputArea-child, .jp-Cell-inputWrapper,
  .jp-Cell-outputWrapper, .jp-OutputArea-output, .jp-RenderedHTMLCommon {
    display: block; overflow: visible; width: auto; padding-right: 0;
  }
  main { max-width: none; }
  .jp-Cell, .jp-Notebook { padding: 0; }
  details.code, a.anchor-link { display: none; }
  h1, h2, h3, h4, .jp-MarkdownCell { break-after: avoid; }
  .jp-MarkdownCell { break-inside: avoid; }
  p { orphans: 3; widows: 3; }
  img, table, figure { break-inside: avoid; }
  img { max-width: 100%; height: auto; }
  .jp-RenderedHTMLCommon, .jp-RenderedHTMLCommon table { font-size: 11px; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  td, th { overflow-wrap: break-word; }
}
"""


def export_html(notebook: Path, page: Path) -> None:
    """Writes the executed notebook as one page that loads nothing from the network.

    Its title is the notebook's first heading; headings of the second level are listed under the first cell.
    Code that JupyterLab would hide (``source_hidden``) opens by a click, and is left out on paper. Controls
    and progress bars are left out: they do nothing on a page, and drawing them would need the network.
    """
    import nbformat
    from nbconvert import HTMLExporter

    content = nbformat.read(notebook, as_version=4)
    content.metadata.pop("widgets", None)
    hides = False
    for cell in content.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        injected = "injected-parameters" in cell.metadata.get("tags", [])
        hides = bool(cell.metadata.get("jupyter", {}).get("source_hidden", injected and hides))
        cell.metadata["folded"] = hides
    heading = re.search(r"^# (.+)$", content.cells[0].source if content.cells else "", re.MULTILINE)
    content.metadata["title"] = heading[1] if heading else notebook.stem
    exporter = HTMLExporter(
        raw_template=_TEMPLATE, mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url=""
    )
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.embed_images = True
    resources = {"metadata": {"name": notebook.stem}, "look": _LOOK + _dark(exporter.template_paths)}
    body, _ = exporter.from_notebook_node(content, resources)
    with whole_file(page) as file:
        file.write(body.replace(_CONTENTS, _contents(body), 1))


def _dark(places: list[str]) -> str:
    """Reads JupyterLab's dark colours, for systems that are set to dark; paper stays white."""
    themes = [Path(place) / "static" / "theme-dark.css" for place in places]
    theme = next((theme for theme in themes if theme.is_file()), None)
    if theme is None:
        return ""
    return f"@media screen and (prefers-color-scheme: dark) {{\n{theme.read_text(encoding='utf-8')}\n}}"


def _contents(body: str) -> str:
    headings = re.findall(r'<h2 id="([^"]+)">(.*?)(?:<a class="anchor-link"|</h2>)', body)
    plain = [(anchor, unescape(re.sub(r"<[^>]+>", "", text)).strip()) for anchor, text in headings]
    links = "\n".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in plain)
    return f'<nav class="contents" aria-label="Contents">{links}</nav>' if len(plain) > 1 else ""
