"""What tests of evaluations share."""

from __future__ import annotations

import pytest

from packcache.evaluate import truth


@pytest.fixture(scope="module")
def quick_reader():
    """A reader of fewer lessons: it takes a second instead of ten, and reads nearly as well."""
    quick = truth.Reader(copies=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truth, "reader", lambda: quick)
        patch.setattr(truth, "_default", lambda: quick)
        yield
