"""How many examples a property is tried on: few, or all with `--hypothesis-profile=ci`."""

from hypothesis import settings


def up_to(count):
    """Try a property on `count` examples with the profile "ci", with "default" on a quarter."""
    share = settings.default.max_examples / 100
    return settings(max_examples=max(5, round(share * count)), deadline=None)
