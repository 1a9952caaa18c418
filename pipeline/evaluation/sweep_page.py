"""The page of a sweep: a table of its trials, the best first, and their values as parallel coordinates."""

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.evaluation import plots
from pipeline.process.files import write_atomically


def write_page(path: Path, name: str, whole: dict[str, Any], on_test: str) -> Path:
    """Write the page of the JSON of a sweep; `on_test`: the command that measures the best on test prompts."""
    sign = -1 if whole["metric"]["goal"] == "maximize" else 1
    measured = [row for row in whole["rows"] if not math.isnan(row.get("value", math.nan))]
    rows = sorted(measured, key=lambda row: sign * row["value"])
    rows += [row for row in whole["rows"] if row not in measured]
    keys = list(whole["rows"][0]["trial"])
    tried = {key: [row["trial"][key] for row in measured] for key in keys}
    columns = {key: values for key, values in tried.items() if any(v != values[0] for v in values)}
    columns[whole["metric"]["name"]] = [row["value"] for row in measured]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    text = environment.get_template("sweep.html.jinja").render(
        name=name,
        whole=whole,
        keys=keys,
        rows=[
            row | {"shown": [json.dumps(row["trial"][key], ensure_ascii=False) for key in keys]}
            for row in rows
        ],
        plot=plots.parallel(columns) if measured else "",
        on_test=on_test,
    )
    write_atomically(path, text)
    return path
