"""HTML as an untrusted notebook in JupyterLab leaves it: which tags, attributes and styles views may use."""

import re
from html.parser import HTMLParser

TAGS = {"div", "span", "b", "small", "br", "img", "table", "thead", "tbody", "tr", "td", "th", "p"}
ATTRIBUTES = {
    "style",
    "title",
    "src",
    "alt",
    "width",
    "class",
    "dir",
    "data-v",
    "data-token",
    "data-key",
}  # those of data are dropped without harm
NUMBER = r"(0|\d+(\.\d+)?(px|%)?)"
HEX = r"#[0-9a-f]{6}"
ALPHA = r"rgba\(\d+, \d+, \d+, [01](\.\d+)?\)"
STYLES = {
    "background-color": f"{HEX}|{ALPHA}",
    "background-clip": "padding-box",
    "color": HEX,
    "border": rf"\d+px (solid|dashed|dotted) {HEX}",
    "border-top": rf"\d+px (solid|dotted|dashed) {HEX}",
    "border-left": rf"\d+px (solid|dashed) {HEX}",
    "border-bottom": rf"\d+px (solid|dotted) {HEX}",
    "box-sizing": "border-box",
    "flex": r"\d \d \d+px",
    "flex-wrap": "wrap",
    "gap": r"\d+px",
    "height": NUMBER,
    "left": f"-?{NUMBER}",
    "max-width": NUMBER,
    "outline": rf"1px solid {HEX}",
    "page-break-inside": "avoid",
    "position": "relative|absolute",
    "top": f"-?{NUMBER}",
    "border-collapse": "collapse",
    "display": "inline-block|block|flex",
    "font-family": "sans-serif",
    "font-size": NUMBER,
    "font-weight": "bold|normal",
    "line-height": NUMBER,
    "margin": rf"{NUMBER}( {NUMBER})*",
    "margin-bottom": NUMBER,
    "padding": rf"{NUMBER}( {NUMBER})*",
    "text-align": "left|center",
    "vertical-align": "top",
    "white-space": "nowrap",
    "width": NUMBER,
}


class Page(HTMLParser):
    """Elements as (tag, attributes, own text), and what is not on the lists above."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.problems: list[str] = []
        self.feed(html)
        self.close()
        if self.open:
            self.problems.append(f"left open: {[tag for tag, _, _ in self.open]}")

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in TAGS:
            self.problems.append(f"tag {tag}")
        for name, value in attrs:
            if name not in ATTRIBUTES:
                self.problems.append(f"attribute {name}")
            elif name == "src" and not re.match(r"data:image/(png|jpeg);base64,", value):
                self.problems.append(f"src {value[:40]}")
            elif name == "style":
                self.problems += [f"style {rule}" for rule in value.split("; ") if not self._is_allowed(rule)]
        if tag not in ("br", "img"):
            self.open.append(element)

    @staticmethod
    def _is_allowed(rule: str) -> bool:
        name, _, value = rule.partition(": ")
        return name in STYLES and re.fullmatch(STYLES[name], value) is not None

    def handle_endtag(self, tag):
        if not self.open or self.open.pop()[0] != tag:
            self.problems.append(f"stray end of {tag}")

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def handle_comment(self, data):
        self.problems.append("comment")

    def handle_decl(self, decl):
        self.problems.append("declaration")

    def tokens(self) -> list[tuple[str, dict[str, str], str]]:
        """Drawn tokens: text, style rules, and the number below."""
        styled = [
            ("".join(text), dict(rule.split(": ") for rule in attributes["style"].split("; ")))
            for tag, attributes, text in self.elements
            if tag == "span" and "style" in attributes
        ]
        below = [text.strip() for text, style in styled if style.get("font-size") == "11px"]
        drawn = [(text, style) for text, style in styled if "font-weight" in style]
        return [(text, style, number) for (text, style), number in zip(drawn, below, strict=True)]


def problems(html: str) -> list[str]:
    """What JupyterLab would drop of a page, or could be an injection."""
    return Page(html).problems
