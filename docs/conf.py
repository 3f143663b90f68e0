"""Settings of the site: `sphinx-build -W docs build/site` makes it and fails on what is broken."""

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

import unroll

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCE = PROJECT["urls"]["Source"]

project, author, release = "unroll", "The unroll authors", unroll.__version__
version = release
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
suppress_warnings = ["myst.header"]  # a heading may skip a level

# Names of this package must resolve; those of others have no inventory here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!unroll\b).*")]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name in ("Batch", "GradientReport", "StepReport")}
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_url_schemes = {"http": None, "https": None, "source": f"{SOURCE}/blob/main/{{{{path}}}}"}

html_theme = "furo"
html_title = f"unroll {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options: dict[str, Any] = {
    "source_repository": SOURCE,
    "source_branch": "main",
    "source_directory": "docs/",
}


def check_public_names(app: Sphinx, _: Exception | None) -> None:
    """Warn, which fails a strict build, of public names without an entry in the API pages."""
    documented = app.env.get_domain("py").data["objects"]
    for name in unroll.__all__:
        if f"unroll.{name}" not in documented:
            logging.getLogger(__name__).warning("unroll.%s is not in the API pages", name)


def setup(app: Sphinx) -> None:
    """Check the API pages at the end of a build."""
    app.connect("build-finished", check_public_names)
