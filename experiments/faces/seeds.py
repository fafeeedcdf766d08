"""One table of several runs of faces or cifar10: means over runs that differ in their seeds, base models beside each other."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from programs.tables import markdown_table

from ..results import differences, environment, finished_results, where_text, write_results
from .presets import PRESETS, Covariance

# What the runs of one table may differ in: what each network has of its own, and what none of these numbers depends on.
_FREE = ("seed", "covariances", "bfloat16", "compiled", "note", "device", "bound_images", "samples", "pairs_at_once")

# Of a row, beside -log p(x | z), with their digits in the table; a diagonal network may have no gain.
_DIGITS = {"nats_gain_per_pixel": 3, "whitened_variance": 3, "whitened_autocorrelation": 3, "whitened_kurtosis": 2}


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a table have in common, of the configuration of one."""
    return {name: value for name, value in config.items() if name not in _FREE} | {
        "given_bases": bool(config.get("given_bases"))
    }


def runs_of(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of finished runs.

    Raises:
        ValueError: a folder without a finished run of faces or cifar10; with other images, sizes or schedules than those of the
            first one; with networks that one before it has, too, or has trained in another precision.
    """
    runs, found, precision = [], {}, {}
    for folder in folders:
        run = finished_results(folder)
        config = run["config"]
        if config.get("experiment") not in PRESETS:
            raise ValueError(f"{folder} holds a run of {config.get('experiment')}, expected one of {' or '.join(PRESETS)}")
        runs.append(run)
        differing = differences("", comparable(runs[0]["config"]), comparable(config))
        texts = [f"{name} is {old!r} there, {new!r} here" for name, old, new in differing]
        if texts:
            raise ValueError(f"the run in {folder} is another than that in {folders[0]}: {'; '.join(texts[:4])}")
        for covariance in config["covariances"]:
            name, seed = Covariance(**covariance).name, config["seed"]
            if (name, seed) in found:
                raise ValueError(f"{folder} and {found[name, seed]} both have {name} of seed {seed}")
            if precision.setdefault(name, config["bfloat16"]) != config["bfloat16"]:
                raise ValueError(f"{folder} has {name} with bfloat16 {config['bfloat16']}, a run before it has another")
            found[name, seed] = folder
    return runs


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each covariance network its values by seed, their means and standard deviations over seeds.

    "difference" is that of -log p(x | z) from the network of the first base model which is its like, over the seeds that both
    have, in which the test images are the same: the mean and its standard error over seeds.
    """
    found: dict[tuple[str, str], dict[int, dict[str, float | None]]] = {}
    for run in runs:
        for covariance in run["config"]["covariances"]:
            row = run["rows"][Covariance(**covariance).name]
            values = {"nats": row["nats"]["mean"], **{name: row.get(name) for name in _DIGITS}}
            values["residual_rms"] = run["residual_rms"][covariance["base"]]["test"]
            kind = Covariance(**covariance).name.removeprefix(f"{covariance['base']}, ")
            found.setdefault((covariance["base"], kind), {})[run["config"]["seed"]] = values
    first = next(iter(found))[0]
    rows = []
    for (base, kind), seeds in found.items():
        row: dict[str, Any] = {"base": base, "network": kind, "seeds": {str(s): seeds[s] for s in sorted(seeds)}}
        for name in next(iter(seeds.values())):
            values = [of_seed[name] for of_seed in seeds.values() if of_seed[name] is not None]
            row[name] = _mean(values) if values else None
        others = found.get((first, kind), {})
        if base != first and (both := sorted(seeds.keys() & others.keys())):
            row["difference"] = _mean([seeds[s]["nats"] - others[s]["nats"] for s in both])
        rows.append(row)
    return rows


def write_table(runs: Sequence[dict[str, Any]], out: Path, console: Console) -> None:
    """Write results.json and results.md of what `runs_of` found into the folder ``out``, and show the table."""
    results = {
        "definition": "nats is -log p(x | z), z the mean of the encoder, in nats per image; stddev is over seeds; "
        "standard_error is stddev by the root of their number",
        "rows": summarise(runs),
        "config": comparable(runs[0]["config"]) | {"experiment": "seeds"},
        "runs": [{key: run[key] for key in ("command", "commit", "seconds")} | {"where": where_text(run)} for run in runs],
        **environment("cpu"),
    }
    write_results(out, results, markdown_report(results), console)


def markdown_report(results: dict[str, Any]) -> str:
    """The table, and what is needed to read it."""
    header = ["", "seeds", "residuals", "-log p(x given z)", "less the first", "gain", "variance", "lag-1", "kurtosis"]
    table = [
        [
            f"{row['base']}, {row['network']}",
            str(len(row["seeds"])),
            _text(row["residual_rms"], 4),
            _text(row["nats"], 0),
            _text(row.get("difference"), 0, "standard_error"),
            *(_text(row[name], digits) for name, digits in _DIGITS.items()),
        ]
        for row in results["rows"]
    ]
    config = results["config"]
    runs = "".join(
        f"* `{run['command']}`, training {run['seconds']['training']:.0f} s on {run['where']}\n" for run in results["runs"]
    )
    return (
        f"# Base models and seeds on {config['data']}, {config['size']} x {config['size']} pixels\n\n"
        + markdown_table(header, table)
        + "\nMean ± standard deviation over seeds, each of which has its own networks, order of training and, where not all "
        f"are taken, choice of {config['test']:,} test images; of the differences, which are seed by seed on the same images, "
        "± standard error. "
        "Residuals: their root mean square. -log p(x given z) in nats per image, lower is better, z the mean of the encoder. "
        "Gains are nats per pixel over the diagonal network, of a VAE over its own diagonal likelihood. Variance, lag-1 and "
        "kurtosis are the variance, the correlation of neighbouring pixels and the excess kurtosis of whitened residuals of "
        f"test images (1, 0 and 0 for a perfect model).\n\n{runs}\nTable: `{results['command']}`.\n"
    )


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    stddev = statistics.stdev(values) if len(values) > 1 else None
    standard_error = None if stddev is None else stddev / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "stddev": stddev, "standard_error": standard_error}


def _text(value: dict[str, float | None] | None, digits: int, spread: str = "stddev") -> str:
    if value is None:
        return ""
    return f"{value['mean']:.{digits}f}" + ("" if value[spread] is None else f" ± {value[spread]:.{digits}f}")
