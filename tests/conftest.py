"""Every run of the tests tries the same examples, so that a failure is a change and not a draw."""

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
