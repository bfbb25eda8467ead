"""Where things are on a page in a real browser, and whether they can be read."""

import re


def box_of(page, selector: str) -> tuple[float, float, float, float]:
    found = page.locator(selector).bounding_box()
    return found["x"], found["y"], found["width"], found["height"]


def relative(inner, outer) -> list[float]:
    (x, y, w, h), (left, top, width, height) = inner, outer
    return [(x - left) / width, (y - top) / height, (x + w - left) / width, (y + h - top) / height]


def contrast(page, selector: str) -> float:
    """Of an element's text to what lies behind it, as WCAG counts it."""
    ink, paper = page.locator(selector).evaluate(
        """element => {
            const clear = /rgba\\(.*, 0\\)|transparent/;
            let behind = element;
            while (behind.parentElement && clear.test(getComputedStyle(behind).backgroundColor))
                behind = behind.parentElement;
            return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        }"""
    )
    light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    whole = 1 if colour.startswith("color(srgb") else 255
    values = [float(value) / whole for value in re.findall(r"[\d.]+", colour)[:3]]
    r, g, b = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
