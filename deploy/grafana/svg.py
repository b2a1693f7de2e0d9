"""Elements of an SVG picture as text. Attributes are keywords, with _ for -."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def element(name: str, content: str, /, **attributes: object) -> str:
    """One element; `content` stands in it as it is. Fractions get one digit."""
    given = "".join(
        f' {key.replace("_", "-")}="{_attribute(value)}"' for key, value in attributes.items()
    )
    return f"<{name}{given}>{content}</{name}>" if content else f"<{name}{given}/>"


def text(x: float, y: float, content: str, **attributes: object) -> str:
    """A line of text that begins at `x` on the base line `y`, unless `text_anchor` is given."""
    return element("text", escape(content), x=x, y=y, **attributes)


def rect(x: float, y: float, width: float, height: float, **attributes: object) -> str:
    return element("rect", "", x=x, y=y, width=width, height=height, **attributes)


def path(d: str, **attributes: object) -> str:
    return element("path", "", d=d, **attributes)


def document(
    width: int, height: int, body: Iterable[str], font_size: int = 11, background: str = "white"
) -> str:
    """The whole picture, in pixels."""
    lines = [rect(0, 0, width, height, fill=background), *body]
    root = element(
        "svg",
        "\n" + "\n".join(lines) + "\n",
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {width} {height}",
        font_family="sans-serif",
        font_size=font_size,
    )
    return root + "\n"


def _attribute(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return escape(str(value))
