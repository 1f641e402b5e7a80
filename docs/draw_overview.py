"""Draws docs/figures/overview.svg, the README's picture: ``python docs/draw_overview.py``."""

from __future__ import annotations

from pathlib import Path

OUTPUT = Path(__file__).parent / "figures" / "overview.svg"
WIDTH, HEIGHT = 860, 250
BOXES = (
    # left, title, lines, fill
    (20, "your model", ("vanilla layers", "vanilla state dict"), "#eef2f7"),
    (240, "plan", ("one row per weight:", "LWE, MWE or left alone,", "and why"), "#fff4d6"),
    (460, "training", ("raw weights move,", "the model computes with", "W' = E(raw)"), "#e3f1e4"),
    (680, "what you deploy", ("vanilla layers", "vanilla state dict", "holding W'"), "#eef2f7"),
)
ARROWS = ((180, 240, ""), (400, 460, "attach"), (620, 680, "save"))
SECOND_FORM = ((400, 460, "convert"), (620, 680, "strip"))
BOX_WIDTH, BOX_TOP, BOX_HEIGHT = 160, 45, 125


def text(x: float, y: float, content: str, size: int = 13, weight: str = "normal") -> str:
    """A line of text, centred at ``x``."""
    content = content.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="middle">{content}</text>'
    )


def arrow(left: float, right: float, y: float) -> str:
    """An arrow at the height ``y``."""
    return f'<path d="M{left + 4:g} {y:g}H{right - 5:g}" marker-end="url(#head)"/>'


def overview() -> str:
    """The picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" fill="#1b2733">',
        "<title>A plan says what each weight gets; training excites; what is deployed is "
        "vanilla</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#1b2733" stroke="none"/>'
        "</marker></defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>',
    ]
    for left, title, lines, fill in BOXES:
        middle = left + BOX_WIDTH / 2
        parts.append(
            f'<rect x="{left}" y="{BOX_TOP}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8" '
            f'fill="{fill}" stroke="#8a97a6"/>'
        )
        parts.append(text(middle, BOX_TOP + 28, title, 15, "bold"))
        parts += [text(middle, BOX_TOP + 56 + 20 * row, line) for row, line in enumerate(lines)]
    parts.append('<g stroke="#1b2733" stroke-width="1.6" fill="none">')
    parts += [arrow(left, right, 85) for left, right, _ in ARROWS]
    parts += [arrow(left, right, 145) for left, right, _ in SECOND_FORM]
    parts.append("</g>")
    for y, labels in ((78, ARROWS), (138, SECOND_FORM)):
        parts += [text((left + right) / 2, y, label, 12, "bold") for left, right, label in labels]
    parts.append(
        text(
            WIDTH / 2,
            205,
            "attach: the model stays vanilla; excitation happens in optimizer.step()",
        )
    )
    parts.append(
        text(
            WIDTH / 2,
            227,
            "convert ... strip: the layers compute W' themselves, and are folded at the end",
        )
    )
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(overview(), encoding="utf-8")
