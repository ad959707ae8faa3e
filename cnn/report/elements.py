"""HTML as a tree of elements: every text and attribute is escaped where the tree is written."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import PIL.Image

_LARGEST_PNG = 400_000  # bytes; a larger picture is compressed with loss
# What XML and HTML forbid in a text: control characters, lone surrogates, noncharacters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

Child = Element | str


def element(tag: str, *children: Child, **attributes: str) -> Element:
    """An HTML element.

    Args:
      tag: its name.
      *children: elements and texts, in order.
      **attributes: `class_` is the attribute `class`, and `aria_label` is `aria-label`.

    >>> write(element("p", "a < b", element("em", "!"), class_="note"))
    '<p class="note">a &lt; b<em>!</em></p>'
    """
    names = {name.rstrip("_").replace("_", "-"): printable(v) for name, v in attributes.items()}
    made = Element(tag, names)
    previous = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            previous = child
        elif previous is None:
            made.text = (made.text or "") + printable(child)
        else:
            previous.tail = (previous.tail or "") + printable(child)
    return made


def write(root: Element) -> str:
    """The HTML of an element."""
    return ElementTree.tostring(root, encoding="unicode", method="html")


def printable(text: str) -> str:
    r"""A text in which characters that HTML forbids are replaced by their escapes.

    >>> print(printable("a\x00"))
    a\x00
    """
    return _FORBIDDEN.sub(lambda match: ascii(match[0])[1:-1], text)


def document(title: str, style: str, *children: Child) -> str:
    """A whole page.

    Args:
      title: in the window's title.
      style: the style sheet.
      *children: of the body's `main`.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        # Nothing is fetched and nothing is run, whatever a run's files hold.
        element(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        ),
        element("title", title),
        element("style", style),
    )
    root = element("html", head, element("body", element("main", *children)), lang="en")
    return f"<!DOCTYPE html>\n{write(root)}\n"


def section(title: str, *children: Child) -> Element:
    """A section with its heading."""
    return element("section", element("h2", title), *children)


def table(
    header: Sequence[Child],
    rows: Iterable[Sequence[Child]],
    *,
    caption: Child = "",
    numbers: Sequence[int] = (),
) -> Element:
    """A table whose first cell of a row is the row's header.

    Args:
      header: of the columns; empty for a table of names and values.
      rows: the cells.
      caption: above the table.
      numbers: the columns of numbers, which are aligned at the right.
    """
    made = element("table")
    if caption:
        made.append(element("caption", element("span", caption)))
    if header:
        cells = [
            element("th", cell, scope="col", **_kind(column, numbers))
            for column, cell in enumerate(header)
        ]
        made.append(element("thead", element("tr", *cells)))
    body = element("tbody")
    for first, *rest in rows:
        cells = [element("td", cell, **_kind(c, numbers)) for c, cell in enumerate(rest, 1)]
        body.append(element("tr", element("th", first, scope="row", **_kind(0, numbers)), *cells))
    made.append(body)
    # A wide table scrolls by itself, and by the keyboard, where the window is narrow.
    return element(
        "div", made, class_="scroll", tabindex="0", role="region", aria_label=_label(made)
    )


def _kind(column: int, numbers: Sequence[int]) -> dict[str, str]:
    return {"class_": "number"} if column in numbers else {}


def _label(made: Element) -> str:
    caption = made.find("caption")
    return "".join(caption.itertext()) if caption is not None else "table"


def figure(caption: Child, *children: Child) -> Element:
    """Pictures with a caption."""
    return element("figure", *children, element("figcaption", caption))


def picture(light: str, dark: str, alt: str) -> Element:
    """An SVG drawing that follows the colour scheme."""
    return element(
        "picture",
        element(
            "source", media="(prefers-color-scheme: dark)", srcset=_uri(dark.encode(), "svg+xml")
        ),
        element("img", src=_uri(light.encode(), "svg+xml"), alt=alt),
    )


def png(data: bytes, alt: str) -> Element:
    """A picture of pixels on white; a large one is compressed."""
    kind = "png"
    if len(data) > _LARGEST_PNG:
        stream = io.BytesIO()
        with PIL.Image.open(io.BytesIO(data)) as image:
            image.convert("RGB").save(stream, "WEBP", quality=85)
        data, kind = stream.getvalue(), "webp"
    return element("img", src=_uri(data, kind), alt=alt, class_="paper")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
