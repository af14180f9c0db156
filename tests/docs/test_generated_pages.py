"""The generated pages are what `python docs/generate.py` writes, and every setting has its advice."""

import runpy
import sys
from pathlib import Path

import pytest

from oribi.config import SETTINGS
from oribi.config_advice import WHEN_TO_CHANGE

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = ["cli.md", "config.md", "models.md", pytest.param("guides/memory-by-card.md", marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def written():
    """Page -> the function that makes it."""
    before = sys.path.copy()
    yield runpy.run_path(str(DOCS / "generate.py"))["PAGES"]
    sys.path[:] = before


def test_every_setting_has_advice():
    assert list(WHEN_TO_CHANGE) == list(SETTINGS), (
        "config_advice.py has one sentence per setting, in its order"
    )


def test_every_generated_page_is_compared(written):
    assert {getattr(page, "values", (page,))[0] for page in PAGES} == set(written)


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_up_to_date(written, page):
    assert (DOCS / page).read_text(encoding="utf-8") == written[page](), (
        "python docs/generate.py writes it anew"
    )
