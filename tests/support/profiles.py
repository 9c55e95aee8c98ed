"""How many examples a property is tested with."""

from __future__ import annotations

from hypothesis import settings


def examples(usual: int, deep: int = 10_000) -> settings:
    """Settings of a property: `usual` examples, and `deep` of them in `make test-deep`."""
    profile = settings.get_current_profile_name()
    return settings(max_examples=deep if profile == "deep" else usual)
