"""`indiclip plan`: what a config needs and costs on a cluster, before it starts."""

from difflib import get_close_matches

from indiclip.commands.findings import json_line
from indiclip.commands.plan_table import show_conversion
from indiclip.names import check_choice, check_range
from indiclip.planning.hardware import STRATEGIES, convert, device, devices, table

_OWN = ("--gpu", "--nodes", "--gpus-per-node", "--price", "--mfu", "--strategy", "--rate", "--convert", "--json")


def run(
    config: list[str] | None,
    gpu: str,
    nodes: int | None,
    gpus_per_node: int | None,
    strategy: str | None,
    mfu: float | None,
    price: float | None,
    rate: float | None,
    days: list[str] | None,
    as_json: bool,
    others: list[str],
) -> int:
    """Print the plan. Returns 1 where the run does not fit into the memory."""
    for word in others:  # of `fit`, which does not know these
        if near := get_close_matches(word.partition("=")[0], _OWN, 1, 0.8):
            raise ValueError(f"{word}: no such option; nearest is {near[0]!r} (indiclip plan --help)")
    if days is not None:
        return _convert(days, as_json)
    if not config:
        raise ValueError("--config: found none; expected an experiment, or --convert DAYS FROM TO")
    check_choice("--gpu", gpu, [*devices(trainable=True), "cpu"])
    check_range({"--price": price, "--rate": rate}, without=0)
    check_range({"--mfu": mfu}, 0, 1, without=0)
    check_range({"--nodes": nodes, "--gpus-per-node": gpus_per_node}, 1)
    if strategy is not None:
        check_choice("--strategy", strategy, STRATEGIES)
    from indiclip.commands.plan_config import plan_on_cpu, plan_on_gpus  # imports Lightning, which takes seconds

    words = [word for file in config for word in ("--config", file)] + others
    if gpu == "cpu":
        return plan_on_cpu(words, rate, as_json)
    return plan_on_gpus(words, gpu, nodes, gpus_per_node, strategy, mfu, price, as_json)


def _convert(words: list[str], as_json: bool) -> int:
    days, source, target = words
    try:
        number = float(days)
    except ValueError:
        raise ValueError(f"--convert: found {days!r}; expected a number of days, as in 48 tpuv4 h100") from None
    converted = convert(number, source, target)
    note = table()["notes"].get(f"{source} {target}".lower(), "")
    if as_json:
        print(json_line({"days": number, "from": source, "to": target, "converted": converted, "note": note}), end="")
    else:
        show_conversion(number, device(source), device(target), converted, note)
    return 0
