"""How the pages' templates are filled: what escapes, and how numbers are written."""

from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape


def environment() -> Environment:
    # Captions, questions and answers are hostile text: everything that is not Markup is escaped.
    environment = Environment(
        loader=PackageLoader("vlmpipe.report"), autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True, lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f}%"
    environment.filters["number"] = _number
    environment.filters["brief"] = lambda value: "–" if value is None else f"{value:.2g}"
    environment.filters["signed"] = lambda value: "–" if value is None else f"{value:+.3g}"
    return environment


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
