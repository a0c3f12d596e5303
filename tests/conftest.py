"""Fixtures that every folder may use."""

from hypothesis import settings

pytest_plugins = ["tests.harness.plugin"]

# No test is an assertion on time: on a loaded machine an example of a millisecond may take a second.
settings.register_profile("arks", deadline=None)
settings.load_profile("arks")
