"""The cards that come with IndiCLIP, in suites: a folder of YAML each."""

from importlib import resources

from indiclip.names import check_choice

SUITES = ("india", "culture", "world")


def packaged(suite: str) -> list[str]:
    """The ids of the cards of a suite, in alphabetical order.

    Raises:
        ValueError: No such suite.
    """
    check_choice("suite", suite, SUITES)
    folder = resources.files("indiclip.evals") / suite
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
