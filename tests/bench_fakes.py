"""Small results of the benchmark, whose numbers a test can know."""

from indiclip.evals.results import PHOTOGRAPHS, PROCEDURAL, CardResult, Prediction, Result, Score


def score(card: str, value: float, language: str = "en", metric: str = "acc1", **other) -> Score:
    fields = {"suite": "india", "part": PHOTOGRAPHS, "protocol": "zero_shot", "length": 8, "view": "native"} | other
    return Score(card=card, value=value, language=language, metric=metric, **fields)


def card(name: str, **other) -> CardResult:
    fields = {"suite": "india", "title": name.title(), "part": PHOTOGRAPHS, "metric": "acc1", "status": "scored"}
    return CardResult(card=name, **fields | {"num_images": 4, "num_classes": 2, "of_classes": 2} | other)


def answer(key: str, truth: str, predicted: str, rank: int | None = None, **other) -> Prediction:
    rank = int(truth != predicted) if rank is None else rank
    top = [predicted] if truth == predicted else [predicted, truth]
    fields = {"card": "food", "part": PHOTOGRAPHS, "protocol": "zero_shot", "language": "en", "hard_hit": None}
    fields |= {"flagged": False, "cosines": [0.5, 0.25][: len(top)]} | other
    return Prediction(key=key, truth=truth, predicted=predicted, rank=rank, top=top, **fields)


def small_run(model: str = "m", **about) -> Result:
    """Two scored cards, one skipped, one generated.

    English: food (0.6 - 0.2) / 0.8 = 0.5 and script (0.82 - 0.1) / 0.9 = 0.8, mean 0.65. Hindi: food 0.25 alone.
    """
    result = Result(model, [4, 8], ["native"], about={"date": "2026-01-02", **about})
    result.cards = [
        card("food", source="somewhere", licence="CC0"),
        card("script"),
        card("gods", status="skipped", notes=["no folder gods/"], num_images=0),
        card("script", part=PROCEDURAL),
    ]
    result.scores = [
        score("food", 0.6, low=0.5, high=0.7, chance=0.2, num_items=4),
        score("food", 0.4, "hi", chance=0.2, num_items=4),
        score("food", 0.3, chance=0.2, length=4),
        score("script", 0.82, chance=0.1, num_items=4),
        score("script", 0.99, chance=0.1, part=PROCEDURAL),
    ]
    result.predictions = [
        answer("1.jpg", "dosa", "dosa"),
        answer("2.jpg", "dosa", "roti"),
        answer("3.jpg", "roti", "roti"),
        answer("4.jpg", "roti", "roti"),
    ]
    return result
