"""The report's HTML page: its template, and matplotlib's plots made fit to stand in it."""

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import jinja2
import matplotlib as mpl
from markupsafe import Markup

# What matplotlib draws in these colours follows the page's colour scheme.
SCHEME_COLORS = {"#ffffff": "var(--paper)", "#000000": "currentColor", "#555555": "var(--gray)"}
LINK = "{http://www.w3.org/1999/xlink}href"


def render(**content: Any) -> str:
    """The page; all of its content is escaped except the plots of ``inline_svg``."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja").render(content)


def inline_svg(
    draw: Callable[[dict[str, Any], Path], None], result: dict[str, Any], name: str, description: str
) -> Markup:
    """A plot as an element of the page: text as text, colours of the page's scheme, two decimals, ids of its own.

    Args:
        draw: writes the plot of ``result`` to a file.
        result: what is plotted.
        name: what its ids begin with, so that no two plots of a page share one.
        description: for those who cannot see it.
    """
    with TemporaryDirectory() as folder, mpl.rc_context({"svg.fonttype": "none"}):
        draw(result, Path(folder) / "plot.svg")
        svg = ElementTree.parse(Path(folder) / "plot.svg").getroot()
    for parent in list(svg.iter()):
        # matplotlib's style sheet would hold for the whole page, which has its own.
        for child in [child for child in parent if _tag(child) in ("metadata", "style")]:
            parent.remove(child)
    used = {link.lstrip("#") for element in svg.iter() if (link := element.get(LINK))}
    used |= {clip for element in svg.iter() for clip in re.findall(r"url\(#(.*?)\)", element.get("clip-path", ""))}
    for element in svg.iter():
        element.tag = _tag(element)
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        else:
            element.set("id", f"{name}-{element.get('id')}")
        if LINK in element.attrib:
            element.set("href", f"#{name}-{element.attrib.pop(LINK).lstrip('#')}")
        for key, value in element.attrib.items():
            if key == "clip-path":
                value = value.replace("url(#", f"url(#{name}-")
            elif key == "style":
                value = re.sub(r"font-family:[^;]*;\s*", "", value)
                value = re.sub("#[0-9a-f]{6}", lambda color: SCHEME_COLORS.get(color[0], color[0]), value)
            elif key not in ("id", "href"):
                value = " ".join(re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}", value).split())
            element.set(key, value)
        element.text, element.tail = (element.text or "").strip() or None, None
    width = float(svg.attrib["viewBox"].split()[2])
    limits = f"min-width: {width:.0f}px; max-width: {1.6 * width:.0f}px"  # where letters are neither tiny nor huge
    svg.attrib = {"viewBox": svg.attrib["viewBox"], "role": "img", "aria-label": description, "style": limits}
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]
