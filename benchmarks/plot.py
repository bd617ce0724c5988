"""Draws what ``benchmarks.peers --json`` has written.

    python -m benchmarks.plot docs/benchmarks.png loopback-cnn.json 100mbit-cnn.json 100mbit-time.json

A panel for each file: a method's step over that of ``local``, median with the least and the greatest round, and the
limit; or, from ``--time-to-accuracy``, the validation accuracy over seconds, a line a seed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

COLOURS = {
    "local": "0.5",
    "ddp": "tab:red",
    "post_local_sgd": "tab:orange",
    "torchft_local_sgd": "tab:olive",
    "torchft_diloco_5": "tab:brown",
    "torchft_diloco_9": "tab:pink",
    "easgd_float32": "tab:blue",
    "easgd_bfloat16": "tab:cyan",
    "easgd_int8": "tab:green",
}


def draw_steps(axes: Axes, run: dict[str, Any]) -> None:
    """Bars of the first number of replicas."""
    result = run["results"][0]
    rows = {method: row["over_local"] for method, row in result["methods"].items() if method != "local"}
    medians = [row["median"] for row in rows.values()]
    errors = [
        [row["median"] - row["min"] for row in rows.values()],
        [row["max"] - row["median"] for row in rows.values()],
    ]
    axes.barh(list(rows), medians, xerr=errors, color=[COLOURS[method] for method in rows], error_kw={"lw": 1})
    for y, median in enumerate(medians):
        axes.text(1.02 * max(median + errors[1][y], 1), y, f"{median:.2f}", va="center", fontsize=8)
    for y, method in enumerate(rows):
        limit = medians[y] / result["methods"][method]["over_limit"]["median"]
        axes.plot([limit, limit], [y - 0.4, y + 0.4], color="black", lw=1)
    axes.set_xscale("log")
    axes.set_xlim(0.7, 1.6 * max(median + error for median, error in zip(medians, errors[1], strict=True)))
    axes.set_xlabel("step over that of no communication; black: limit")
    axes.invert_yaxis()


def draw_times(axes: Axes, run: dict[str, Any]) -> None:
    seen = set()
    for each in run["results"]:
        _, seconds, accuracy = zip(*each["curve"], strict=True)
        label = None if each["method"] in seen else each["method"]
        seen.add(each["method"])
        axes.plot(seconds, accuracy, color=COLOURS[each["method"]], lw=1, label=label)
    axes.axhline(run["arguments"]["target"], color="black", lw=0.5)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("validation accuracy")
    axes.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="to be written")
    parser.add_argument("json", type=Path, nargs="+", help="what benchmarks.peers has written")
    given = parser.parse_args()
    columns = min(len(given.json), 3)
    rows = -(-len(given.json) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5 * columns, 3 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(given.json) :]:
        axes.axis("off")
    for axes, path in zip(grid.flat, given.json, strict=False):
        run = json.loads(path.read_text())
        arguments = run["arguments"]
        (draw_times if arguments["time_to_accuracy"] else draw_steps)(axes, run)
        axes.set_title(f"{arguments['work']}, {arguments['link']}, period {arguments['period']}", fontsize=10)
    figure.savefig(given.image, dpi=110)


if __name__ == "__main__":
    main()
