"""Sphinx's settings for this site; `make docs` builds it into build/docs, with warnings as errors."""

from oribi import __version__

project = "oribi"
author = "the oribi contributors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]

default_role = "code"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"oribi {release}"
html_show_sphinx = False
html_copy_source = False
# fonts of the reader's system: pages load nothing from elsewhere
html_theme_options = {
    "light_css_variables": {
        "font-stack": "system-ui, sans-serif",
        "font-stack--monospace": "ui-monospace, monospace",
    },
}
