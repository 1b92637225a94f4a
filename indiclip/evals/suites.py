"""The cards that come with IndiCLIP, in suites: a folder of YAML each."""

from importlib import resources

from indiclip.names import check_choice

INDIA = "india"
SUITES = (INDIA, "culture", "world")
OWN = "own"  # the cards that a user wrote


def has_mean(suite: str) -> bool:
    """Whether reports show a mean over the cards of a suite: one over whatever somebody measured says nothing."""
    return suite != OWN


def packaged(suite: str) -> list[str]:
    """The ids of the cards of a suite, in alphabetical order.

    Raises:
        ValueError: No such suite.
    """
    check_choice("suite", suite, SUITES)
    folder = resources.files("indiclip.evals") / suite
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
