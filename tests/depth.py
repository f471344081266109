"""How much a run of the tests tries.

Without --deep a test draws few cases, the same ones in every run, so that luck decides nothing. With --deep it draws
many, new ones in every run, and tests marked `deep` run, too.
"""

from hypothesis import HealthCheck, settings

_deep = False


def choose(deep: bool) -> None:
    """Decide, before the first test is collected: tests read it as they are imported."""
    global _deep
    _deep = deep
    # No draw is too slow: a busy machine must not fail a test.
    patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("quick", patient, max_examples=40, derandomize=True, database=None)
    settings.register_profile("deep", patient, max_examples=200, print_blob=True)
    settings.load_profile("deep" if deep else "quick")


def is_deep() -> bool:
    """Whether this run has all the time it wants."""
    return _deep


def draws(quick: int, deep: int) -> settings:
    """How many cases a test draws, where each costs more than a moment."""
    return settings(max_examples=deep if _deep else quick)
