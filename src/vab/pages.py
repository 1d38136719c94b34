"""Pages from jinja2 templates that are files of the package."""

from __future__ import annotations

from typing import Any


def render_page(package: str, template: str, **values: Any) -> str:
    """Fill in a template.

    Args:
        package: The package that has the file, such as ``__package__``.
        template: Name of the file.
        values: By name in the template. Text is escaped in .html; ``{{ value | tojson }}`` is JSON that is safe in a
            <script>.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader(package, ""),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return pages.get_template(template).render(values)
